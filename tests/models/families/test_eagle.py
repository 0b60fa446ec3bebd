"""EAGLE's two architectures: training against serving, packing, save and load, targets of other families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles import BOS, draft, family_configs, random_target, served_logits
from transformers import AutoModel, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from draftsmith.models import DraftLimits, Eagle, Eagle3, PackedBatch, Target, data_rollout, local_rollout
from draftsmith.models.families.eagle3 import default_layers
from draftsmith.models.families.eagle_base import EagleBase
from draftsmith.models.families.eagle_config import rope_of
from draftsmith.models.families.eagle_layer import Rotation
from draftsmith.models.slots.rollout_attention import RolloutAttention

FAMILIES = (Eagle, Eagle3)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def shaken(drafter: EagleBase, seed: int = 0) -> EagleBase:
    """Random weights everywhere, so that no part is an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return drafter.eval()


def packed(target: Target, drafter: EagleBase, texts: list[list[int]], prompt_length: int) -> PackedBatch:
    outputs = [target.prefix(torch.tensor([text]), layers=drafter.features) for text in texts]
    return PackedBatch(
        input_ids=torch.tensor([token for text in texts for token in text]),
        loss_mask=torch.tensor([place >= prompt_length for text in texts for place in range(len(text))]),
        document_ids=torch.tensor([number for number, text in enumerate(texts) for _ in text]),
        positions=torch.tensor([place for text in texts for place in range(len(text))]),
        hidden={name: torch.cat([output.feature(name)[0] for output in outputs]).clone() for name in drafter.features},
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_ids", [None, [3, 5, 6, 20, 21, 22, 23, 24, 40]])
def test_training_and_serving_give_the_same_logits_at_every_step(
    target: Target, family: type[EagleBase], draft_ids: list[int] | None
) -> None:
    ids = None if draft_ids is None else torch.tensor(draft_ids)
    drafter = shaken(family.for_target(target.ends, draft_token_ids=ids))
    text, prompt_length, steps = [BOS, 5, 6, 20, 21, 22, 23, 24, 5], 3, 5
    batch = packed(target, drafter, [text], prompt_length)
    with torch.no_grad():
        head_inputs = drafter.teacher_forced(batch, data_rollout(batch, steps))
        taught = torch.nn.functional.linear(head_inputs, drafter.head_weight)
    served = served_logits(target, drafter, text[: prompt_length + steps], steps)
    torch.testing.assert_close(served, taught[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_give_what_single_ones_give(target: Target, family: type[EagleBase]) -> None:
    drafter = shaken(family.for_target(target.ends))
    texts = [[BOS, 5, 6, 20, 21, 22, 23], [BOS, 9, 8], [BOS, 40, 41, 42, 43]]
    both = packed(target, drafter, texts, 2)
    rollout = data_rollout(both, 3)
    together = drafter.teacher_forced(both, rollout)
    alone = [packed(target, drafter, [text], 2) for text in texts]
    apart = torch.cat([drafter.teacher_forced(one, data_rollout(one, 3)) for one in alone], dim=1)
    torch.testing.assert_close(together[rollout.valid.T], apart[rollout.valid.T], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("further_steps", [0, 1, 3])
def test_attention_without_score_matrices_equals_the_dense_one(further_steps: int, sliding_window: int | None) -> None:
    generator = torch.Generator().manual_seed(further_steps)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    document_ids = torch.tensor([0] * 7 + [1] * 4 + [2] * 9)
    positions = torch.cat([torch.arange(7), torch.arange(4), torch.arange(9)])
    anchors = torch.tensor([2, 3, 5, 8, 9, 12, 13, 18])
    keys, values, queries = rows(20, 2, 8), rows(20, 2, 8), rows(8, 4, 8)
    further = [(rows(8, 2, 8), rows(8, 2, 8)) for _ in range(further_steps)]
    dense, flexible = (
        RolloutAttention(
            document_ids, positions, anchors, keys, values, flexible=flexible, sliding_window=sliding_window
        )(queries, further)
        for flexible in (False, True)
    )
    torch.testing.assert_close(flexible, dense, rtol=1e-4, atol=1e-5)
    for number, anchor in enumerate(anchors.tolist()):
        seen = (document_ids == document_ids[anchor]) & (torch.arange(20) <= anchor)
        if sliding_window is not None:
            seen &= torch.arange(20) > anchor + further_steps - sliding_window
        own_keys = torch.cat([keys[seen], *(key[number : number + 1] for key, _ in further)])
        own_values = torch.cat([values[seen], *(value[number : number + 1] for _, value in further)])
        by_hand = torch.nn.functional.scaled_dot_product_attention(
            queries[number][:, None], own_keys.transpose(0, 1), own_values.transpose(0, 1), enable_gqa=True
        )
        torch.testing.assert_close(dense[number], by_hand[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_drafter_comes_back_whole(target: Target, family: type[EagleBase], tmp_path: Path) -> None:
    ids = torch.tensor([3, 5, 6, 20, 21])
    drafter = shaken(family.for_target(target.ends, draft_token_ids=ids))
    drafter.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).attach(target.ends).eval()
    assert type(again) is family
    assert again.features == drafter.features
    text = [BOS, 5, 6, 20, 21, 22]
    assert all(torch.equal(tensor, drafter.state_dict()[name]) for name, tensor in again.state_dict().items())
    served = served_logits(target, again, text, 3)
    torch.testing.assert_close(served, served_logits(target, drafter, text, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(family_configs()))
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_of_every_family_get_a_drafter_of_the_llama_kind(name: str, family: type[EagleBase]) -> None:
    target = random_target(name)
    drafter = family.for_target(target.ends).eval()
    tree = draft(target, drafter, [[BOS, 5, 6, 7]], DraftLimits(3, 3, node_budget=6))
    assert int(tree.valid_BN.sum()) == 7
    assert drafter.config.head_dim * drafter.config.num_attention_heads == drafter.layer.self_attn.q_proj.out_features


def test_the_target_s_own_rotation_and_sizes_are_taken_over() -> None:
    target = random_target("qwen3")
    config = Eagle.for_target(target.ends).config
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (2, 8, target.config.rms_norm_eps)
    assert config.rope == rope_of(target.config)
    assert rope_of(random_target("gemma3").config)["rope_theta"] == 1_000_000.0
    assert rope_of(random_target("gpt2").config) == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_angles_are_those_of_the_targets_own_rotation(rope: dict[str, object]) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    positions, like = torch.tensor([[0, 3, 17], [40, 5, 63]]), torch.zeros(1)
    cosines, sines = Rotation(config)(positions, like)
    for row in range(2):
        expected = LlamaRotaryEmbedding(config)(like, positions[row : row + 1])
        torch.testing.assert_close(cosines[row, :, 0], expected[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sines[row, :, 0], expected[1][0], rtol=1e-6, atol=1e-6)


def test_angles_stay_exact_when_the_weights_are_narrowed(target: Target) -> None:
    drafter = Eagle.for_target(target.ends)
    before = drafter.rotation(torch.tensor([50]), torch.zeros(1))
    drafter.to(torch.bfloat16)
    assert drafter.fc.weight.dtype == torch.bfloat16
    after = drafter.rotation(torch.tensor([50]), torch.zeros(1))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_default_layers_are_those_of_the_serving_engines_or_stay_distinct() -> None:
    assert default_layers(32) == ("layer.1.output", "layer.15.output", "layer.28.output")
    assert default_layers(8) == ("layer.1.output", "layer.3.output", "layer.4.output")
    assert default_layers(5) == ("layer.0.output", "layer.2.output", "layer.3.output")
    assert default_layers(3) == ("layer.0.output", "layer.1.output", "last.pre_norm")
    with pytest.raises(ValueError, match="fuses three layers, the target has 2"):
        default_layers(2)


def test_steps_off_the_text_are_refused(target: Target) -> None:
    drafter = Eagle.for_target(target.ends)
    batch = packed(target, drafter, [[BOS, 5, 6, 7, 8]], 2)
    with_greedy = PackedBatch(**{**vars(batch), "greedy_ids": torch.zeros(5, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="use 'path' or 'none'"):
        drafter.teacher_forced(with_greedy, local_rollout(with_greedy, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_a_supervised_token_still_reaches_every_weight(target: Target, family: type[EagleBase]) -> None:
    drafter = family.for_target(target.ends)
    batch = packed(target, drafter, [[BOS, 5, 6, 7]], 4)
    outputs = drafter.teacher_forced(batch, data_rollout(batch, 2))
    assert outputs.shape[:2] == (2, 0)
    outputs.sum().backward()
    trained = [name for name, weight in drafter.named_parameters() if weight.grad is None and "lm_head" not in name]
    assert not trained


def test_detached_steps_pass_no_gradient_to_those_before(target: Target) -> None:
    drafter = Eagle.for_target(target.ends)
    batch = packed(target, drafter, [[BOS, 5, 6, 7, 8, 9]], 1)
    batch.hidden["last.pre_norm"].requires_grad_(True)

    def reached(detach: bool) -> float:
        drafter.detach_steps = detach
        drafter.zero_grad()
        # The last anchor's second step sees its own first output only through fc and the keys of the text.
        outputs = drafter.teacher_forced(batch, data_rollout(batch, 2))
        (grad,) = torch.autograd.grad(outputs[1, 0].sum(), batch.hidden["last.pre_norm"])
        return float(grad.abs().sum())

    assert reached(detach=True) < reached(detach=False)


def test_noise_is_added_in_training_only(target: Target) -> None:
    drafter = Eagle.for_target(target.ends)
    drafter.feature_noise = 0.1
    batch = packed(target, drafter, [[BOS, 5, 6, 7, 8, 9]], 1)
    rollout = data_rollout(batch, 1)
    assert not torch.equal(drafter.train().teacher_forced(batch, rollout), drafter.teacher_forced(batch, rollout))
    assert torch.equal(drafter.eval().teacher_forced(batch, rollout), drafter.teacher_forced(batch, rollout))
