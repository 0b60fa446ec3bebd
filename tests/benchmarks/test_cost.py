"""The cost model against operations counted in real steps, and its arithmetic."""

import pytest
import torch
from doubles import random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks.train.cost import (
    LLAMA_3_8B,
    LLAMA_3_70B,
    Cluster,
    DrafterPlan,
    TargetShape,
    bill,
    cache_bytes,
    file_a_sample_bytes,
)
from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run

LENGTH, DOCUMENTS = (
    66,
    2,
)  # two shorter documents would share their attention, which computes more than the paper counts


def _attention(query: torch.Size, key: torch.Size, *args: object, **kwargs: object) -> int:
    """Operations of a causal attention forward, half of the square; queries [B, H, L, Dh]."""
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3] // 2


def _attention_backward(_grad: torch.Size, query: torch.Size, key: torch.Size, *args: object, **kwargs: object) -> int:
    return _attention(query, key) * 5 // 2


def _product_added(_into: torch.Size, left: torch.Size, right: torch.Size, *args: object, **kwargs: object) -> int:
    return 2 * left[0] * left[1] * right[1]


# What torch does not count: attention as a CPU computes it, and products that are added in place.
COUNTED = {
    torch.ops.aten.addmm_: _product_added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=COUNTED)


@pytest.fixture(scope="module")
def target() -> Target:
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return Target.from_model(random_model(config), name="counted")


def batch_of(target: Target, layers: tuple[str, ...]) -> PackedBatch:
    total = LENGTH * DOCUMENTS
    generator = torch.Generator().manual_seed(0)
    return PackedBatch(
        input_ids=torch.randint(0, 384, (total,), generator=generator),
        loss_mask=torch.ones(total, dtype=torch.bool),
        document_ids=torch.arange(DOCUMENTS).repeat_interleave(LENGTH),
        positions=torch.arange(LENGTH).repeat(DOCUMENTS),
        hidden={name: torch.randn(total, 64, generator=generator) for name in layers},
    )


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        (ReDrafterFamily(), DrafterPlan("redrafter", 4)),
        (ReDrafterFamily(exit_dim=128, num_draft_layers=1), DrafterPlan("redrafter", 3, None, 128, 1)),
        (EagleFamily(), DrafterPlan("eagle", 1)),
        (EagleFamily(detach_steps=True), DrafterPlan("eagle", 3)),
        (Eagle3Family(), DrafterPlan("eagle3", 1)),
        (Eagle3Family(draft_vocab_size=96), DrafterPlan("eagle3", 4, 96)),
    ],
    ids=["redrafter", "wide redrafter", "eagle", "hass", "eagle3", "eagle3 with a draft vocabulary"],
)
def test_a_step_on_paper_is_what_a_real_step_computes(target: Target, family: DrafterFamily, plan: DrafterPlan) -> None:
    ids = None if plan.draft_vocab_size is None else torch.arange(0, 4 * plan.draft_vocab_size, 4)
    drafter = family.build(target.ends, ids, plan.num_steps, "").train()
    objective = Objective(plan.num_steps, "path")
    batch = batch_of(target, tuple({PRE_NORM, *drafter.features}))
    lesson = prepare(objective, batch, inverse_draft_ids(drafter.draft_ids(), 384))
    with counter() as counted:
        run(objective, lesson, drafter, target.ends, torch.ones(plan.num_steps), metrics=False).total.backward()
    shape = TargetShape.from_config(target.config)
    predicted = len(batch.input_ids) * plan.step_flops(shape, LENGTH)
    assert predicted == pytest.approx(counted.get_total_flops(), rel=0.04)
    weights = sum(weight.numel() for weight in drafter.parameters() if weight.requires_grad and weight.ndim > 1)
    assert plan.parameters(shape) == weights


def test_a_forward_on_paper_is_what_the_target_computes(target: Target) -> None:
    with counter() as counted:
        target.prefix(torch.randint(0, 384, (2, LENGTH)))
    shape = TargetShape.from_config(target.config)
    assert 2 * LENGTH * shape.forward_flops(LENGTH) == pytest.approx(counted.get_total_flops(), rel=0.03)


def test_the_known_shapes_have_the_sizes_of_their_names() -> None:
    for shape, billions in ((LLAMA_3_8B, 8.03), (LLAMA_3_70B, 70.6)):
        embeddings = 2 * shape.vocab_size * shape.hidden_size
        assert (shape.block_parameters + embeddings) / 1e9 == pytest.approx(billions, rel=0.005)


def test_cached_bytes_follow_layers_and_dtype() -> None:
    assert cache_bytes(LLAMA_3_8B, 1, 2) == 8192 + 5
    assert cache_bytes(LLAMA_3_8B, 4, 1, scaled=True) == 4 * (4096 + 4) + 5
    assert file_a_sample_bytes(LLAMA_3_8B, 4) == 4 * 8192 + 16
    assert DrafterPlan("eagle3", 7).num_cached_layers() == 4
    assert DrafterPlan("eagle3", 7, reads_target_distribution=False).num_cached_layers() == 3


def test_online_pays_the_target_every_epoch_and_stores_nothing() -> None:
    cluster, plan = Cluster(8, 1e15, 0.4, disk_rate=1e15), DrafterPlan("eagle", 1)
    offline = bill(LLAMA_3_8B, plan, cluster, tokens=1e8, epochs=3, length=2048.0)
    online = bill(LLAMA_3_8B, plan, cluster, tokens=1e8, epochs=3, length=2048.0, online=True)
    assert online.hours == pytest.approx(3 * offline.extract_hours + offline.train_hours)
    assert (online.disk_bytes, offline.disk_bytes) == (0.0, 1e8 * (8192 + 5))
    assert not offline.disk_bound


def test_a_slow_disk_decides_and_narrow_states_halve_its_hours() -> None:
    cluster, plan = Cluster(8, 1e15, 0.4, disk_rate=1e9), DrafterPlan("eagle3", 7)
    wide = bill(LLAMA_3_70B, plan, cluster, tokens=1e8, epochs=2, length=2048.0)
    narrow = bill(LLAMA_3_70B, plan, cluster, tokens=1e8, epochs=2, length=2048.0, item_bytes=1)
    assert wide.disk_bound
    assert wide.train_hours == pytest.approx(2 * wide.disk_bytes / 1e9 / 3600)
    assert narrow.train_hours / wide.train_hours == pytest.approx(0.5, abs=0.01)
    assert narrow.disk_bytes / wide.disk_bytes == pytest.approx(0.5, abs=0.01)


def test_a_family_whose_products_are_not_counted_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="family is 'unheard-of'; the products of redrafter, eagle, eagle3 are counted"
    ):
        DrafterPlan("unheard-of", 3)  # type: ignore[arg-type]
