"""Layouts change no number: packed, padded and single samples, blocks of attention, and steps shared by other processes."""

import contextlib
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import judge_data, rows_of, save_rows
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from training import VOCAB, KeepLosses, MakeCache, make_module, make_trainer, tiny_config

from draftsmith.data.cache.extract import verify
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.eight_bit import EightBitStates, quantise
from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import CachedSample, ShardContent, write_shard
from draftsmith.models.drafters import rollout_attention
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.drafters.rollout_attention import RolloutAttention
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.losses import TopEmphasis
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run
from draftsmith.train.judge.data import JudgeTokens
from draftsmith.train.judge.fit import SweepProblem, measure_scaling

STEPS = 3
LAYERS = ("layer.0.output", PRE_NORM)
DRAFT_IDS = torch.arange(1, VOCAB, 2)
RECIPES: dict[str, tuple[DrafterFamily, Objective, torch.Tensor | None]] = {
    "redrafter, none": (ReDrafterFamily(), Objective(STEPS, "none"), None),
    "redrafter, path, half the tokens": (ReDrafterFamily(), Objective(STEPS, "path"), DRAFT_IDS),
    "redrafter, local": (ReDrafterFamily(), Objective(STEPS, "local"), None),
    "eagle, none": (EagleFamily(), Objective(1, "none"), None),
    "eagle, path, features": (EagleFamily(), Objective(1, "path", feature_weight=1.0, logit_weight=0.1), DRAFT_IDS),
    "hass": (
        EagleFamily(),
        Objective(STEPS, "path", feature_weight=1.0, logit_weight=0.1, emphasis=TopEmphasis(1.0, 5)),
        None,
    ),
    "eagle3": (Eagle3Family(layers=list(LAYERS)), Objective(STEPS, "path", 0.8), None),
    "eagle3, half the tokens": (
        Eagle3Family(layers=list(LAYERS)),
        Objective(STEPS, "path", 0.8, skip_outside=True),
        DRAFT_IDS,
    ),
}


@pytest.fixture(scope="module")
def samples(target: Target) -> list[CachedSample]:
    """Texts of very different lengths with the target's own states; the shortest has nothing to learn from."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate([9, 30, 4, 17, 12, 2]):
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        with torch.no_grad():
            states = target.prefix(ids[None], layers=LAYERS)
        found.append(
            CachedSample(
                id=f"s{number}",
                input_ids=ids,
                loss_mask=torch.arange(length) >= 2,
                hidden={layer: states.feature(layer)[0] for layer in LAYERS},
                greedy_ids=torch.randint(0, VOCAB, (length, STEPS + 1), generator=generator),
            )
        )
    return found


def shaken(family: DrafterFamily, target: Target, draft_ids: torch.Tensor | None) -> Drafter:
    torch.manual_seed(0)
    drafter = family.build(target.ends, draft_ids, STEPS, "")
    for weight in drafter.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return drafter


def learn(
    drafter: Drafter, target: Target, objective: Objective, batches: list[PackedBatch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss over the rows of all batches together, and its gradients."""
    lessons = [prepare(objective, batch, inverse_draft_ids(drafter.draft_ids(), VOCAB)) for batch in batches]
    rows = torch.stack([lesson.loss_rows for lesson in lessons]).sum(0)
    weights = objective.horizon_weights(rows.device) / rows
    drafter.zero_grad()
    total = torch.zeros(())
    for lesson in lessons:
        sums = run(objective, lesson, drafter, target.ends, weights, metrics=True)
        sums.total.backward()
        total = total + sums.total.detach()
    return total, {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_bucketed_and_single_samples_teach_the_same(
    target: Target, samples: list[CachedSample], recipe: str
) -> None:
    family, objective, draft_ids = RECIPES[recipe]
    drafter = shaken(family, target, draft_ids)
    by_length = sorted(samples, key=lambda sample: len(sample.input_ids))
    layouts = {
        "single": [pack([sample]) for sample in samples],
        "packed": [pack(samples)],
        "two packs": [pack(samples[:2]), pack(samples[2:])],
        "padded": [pack(samples, pad_to=8)],
        "bucketed": [pack(by_length[:3], pad_to=4), pack(by_length[3:], pad_to=4)],
    }
    expected, gradients = learn(drafter, target, objective, layouts.pop("single"))
    assert float(expected) != 0.0
    assert gradients
    for name, batches in layouts.items():
        loss, found = learn(drafter, target, objective, batches)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, msg=name)
        assert found.keys() == gradients.keys()
        for weight, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[weight], rtol=1e-4, atol=1e-6, msg=f"{name}: {weight}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_stands_in_the_padding_matters_to_nobody(target: Target, samples: list[CachedSample], recipe: str) -> None:
    family, objective, draft_ids = RECIPES[recipe]
    drafter = shaken(family, target, draft_ids)
    batch = pack(samples, pad_to=16)
    is_padding = batch.document_ids >= len(samples)
    assert 0.3 < is_padding.float().mean() < 0.7
    other = replace(
        batch,
        input_ids=batch.input_ids.masked_fill(is_padding, 5),
        hidden={name: states.masked_fill(is_padding[:, None], 1e3) for name, states in batch.hidden.items()},
    )
    loss, gradients = learn(drafter, target, objective, [batch])
    other_loss, other_gradients = learn(drafter, target, objective, [other])
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_padding_lies_behind_each_sample_in_documents_of_its_own(samples: list[CachedSample]) -> None:
    chosen = [samples[2], samples[5]]
    batch = pack(chosen, pad_to=3)
    assert batch.document_ids.tolist() == [0, 0, 0, 0, 2, 2, 1, 1, 3, 3, 3, 3]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 0, 1, 2, 3]
    assert batch.loss_mask.tolist() == [False, False, True, True, *[False] * 8]
    assert batch.input_ids[:4].tolist() == chosen[0].input_ids.tolist()
    assert batch.input_ids[[4, 5, 8, 9, 10, 11]].tolist() == [0] * 6
    assert batch.hidden[PRE_NORM][[4, 5, 8, 9, 10, 11]].abs().sum() == 0
    torch.testing.assert_close(batch.hidden[PRE_NORM][6:8], chosen[1].hidden[PRE_NORM])
    assert batch.greedy_ids is not None
    assert batch.greedy_ids.shape == (12, STEPS + 1)
    with pytest.raises(ValueError, match="pad_to is 0"):
        pack(chosen, pad_to=0)


@pytest.mark.parametrize("pad_to", [None, 8])
def test_states_of_eight_bits_are_packed_as_each_sample_has_them(
    samples: list[CachedSample], pad_to: int | None
) -> None:
    narrow = []
    for sample in samples:
        pairs = {layer: quantise(states) for layer, states in sample.hidden.items()}
        codes, scales = ({layer: [pair[place]] for layer, pair in pairs.items()} for place in (0, 1))
        narrow.append(replace(sample, hidden=EightBitStates(codes, scales, [sample.id])))
    wide = [replace(sample, hidden=dict(sample.hidden)) for sample in narrow]
    for layers in (None, [PRE_NORM]):
        found, expected = pack(narrow, layers, pad_to), pack(wide, layers, pad_to)
        assert found.hidden.keys() == expected.hidden.keys()
        assert all(torch.equal(states, expected.hidden[layer]) for layer, states in found.hidden.items())
    assert expected.hidden[PRE_NORM].dtype == torch.bfloat16


def test_the_judges_loss_is_the_same_over_any_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator)
    labels = torch.rand(50, generator=generator) > 0.3
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    l2 = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    theta = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    found = []
    for part_tokens in (1, 7, 50, 4096):
        tokens = JudgeTokens(features, labels, torch.arange(50), part_tokens, on_device=True)
        scaling = measure_scaling(tokens, 6, torch.device("cpu"), lambda values: values)
        problem = SweepProblem(tokens, labels, weights / weights.sum(), scaling, l2, lambda values: values)
        problem.open(theta)
        found.append((problem.losses(theta), problem.gradient(theta)))
    for losses, gradient in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-10, atol=1e-13)


def attention_case(
    lengths: list[int], num_further: int, seed: int = 0, size: int = 4, device: str = "cpu"
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, size, generator=generator).to(device).requires_grad_()

    positions = torch.cat([torch.arange(length) for length in lengths])
    anchors = torch.nonzero(torch.rand(len(positions), generator=generator) < 0.6).flatten()
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return {
        "document_ids": document_ids.to(device),
        "positions": positions.to(device),
        "anchors": anchors.to(device),
        "keys": rows(len(positions), 2),
        "values": rows(len(positions), 2),
        "queries": rows(len(anchors), 4),
        "further": [(rows(len(anchors), 2), rows(len(anchors), 2)) for _ in range(num_further)],
    }


def made(case: dict[str, Any], **chosen: Any) -> RolloutAttention:
    return RolloutAttention(
        *(case[name] for name in ("document_ids", "positions", "anchors", "keys", "values")), **chosen
    )


def gradients_of(output: torch.Tensor, case: dict[str, Any]) -> list[torch.Tensor]:
    """Those of a sum that weighs every entry differently."""
    leaves = [case["queries"], case["keys"], case["values"], *(part for pair in case["further"] for part in pair)]
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), leaves))


def plainly(case: dict[str, Any]) -> torch.Tensor:
    """Every query against every key, masked."""
    keys, values = (
        torch.cat([case[name], *(pair[place] for pair in case["further"])])
        for place, name in enumerate(("keys", "values"))
    )
    pairs = torch.meshgrid(torch.arange(len(case["anchors"])), torch.arange(len(keys)), indexing="ij")
    mask = made(case).sees()(torch.zeros(()), torch.zeros(()), *pairs)
    layout = (part.transpose(0, 1)[None] for part in (case["queries"], keys, values))
    attended = torch.nn.functional.scaled_dot_product_attention(*layout, attn_mask=mask, enable_gqa=True)
    return attended[0].transpose(0, 1)


def one_by_one(case: dict[str, Any]) -> torch.Tensor:
    """The definition, in loops: the anchor's own document up to itself, then its own steps."""
    document_of, rows = case["document_ids"].tolist(), []
    for query, anchor in enumerate(case["anchors"].tolist()):
        seen = [place for place in range(anchor + 1) if document_of[place] == document_of[anchor]]
        keys = torch.cat([case["keys"][seen], *(key[query][None] for key, _ in case["further"])])
        values = torch.cat([case["values"][seen], *(value[query][None] for _, value in case["further"])])
        heads = []
        for head, own in enumerate(case["queries"][query]):
            weights = torch.softmax(keys[:, head // 2] @ own / own.shape[0] ** 0.5, dim=0)
            heads.append(weights @ values[:, head // 2])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def detached(case: dict[str, Any]) -> dict[str, Any]:
    """flex_attention has no backward pass on a CPU, and refuses what might need one."""
    further = [(key.detach(), value.detach()) for key, value in case["further"]]
    return {name: part.detach() for name, part in case.items() if name != "further"} | {"further": further}


@pytest.mark.parametrize("num_further", [0, 2])
@pytest.mark.parametrize("flexible", [False, True])
def test_attention_is_that_of_its_definition(num_further: int, flexible: bool) -> None:
    case = detached(attention_case([13, 1, 6, 2, 21, 5, 6], num_further))
    expected = one_by_one(case)
    output = made(case, flexible=flexible)(case["queries"], case["further"])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plainly(case), expected, rtol=1e-4, atol=1e-6)


def test_batches_of_every_size_share_a_few_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up compiling after eight variants, and then every score would be in memory."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(rollout_attention, "_flex", lambda device_type: compiled)
    for seed, lengths in enumerate([[300, 7, 200], [90], [151, 152, 20], [129], [3, 3], [640, 64], [77, 78], [260, 1]]):
        for num_further in range(3):
            case = detached(attention_case(lengths, num_further, seed))
            output = made(case, flexible=True)(case["queries"], case["further"])
            torch.testing.assert_close(output, made(case)(case["queries"], case["further"]), rtol=1e-4, atol=1e-6)
    assert 0 < counter.frame_count < torch._dynamo.config.recompile_limit
    torch._dynamo.reset()


@pytest.mark.parametrize("num_further", [0, 2])
@pytest.mark.parametrize("block_scores", [1, 60, 500, 3000, 2**23])
def test_attention_in_blocks_equals_that_over_every_pair(num_further: int, block_scores: int) -> None:
    case = attention_case([13, 1, 6, 2, 21, 5, 6], num_further)
    plain = plainly(case)
    output = made(case, flexible=False, block_scores=block_scores)(case["queries"], case["further"])
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-6)
    for found, expected in zip(gradients_of(output, case), gradients_of(plain, case), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_further", [0, 2])
def test_on_a_gpu_attention_needs_neither_scores_nor_a_mask_of_every_pair(num_further: int) -> None:
    lengths = [300, 7, 500, 60, 400]
    case, plain_case = (attention_case(lengths, num_further, size=16, device=device) for device in ("cuda", "cpu"))
    output, plain = made(case)(case["queries"], case["further"]), plainly(plain_case)
    torch.testing.assert_close(output.cpu(), plain, rtol=1e-2, atol=1e-2)
    for found, expected in zip(gradients_of(output.cpu(), case), gradients_of(plain, plain_case), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
    # 10 k anchors and 16 k tokens: every pair would take 160 MB a byte and step, and positions eight times that.
    long = attention_case([16_000, 300, 84], num_further, size=16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients_of(made(long)(long["queries"], long["further"]), long)
    assert torch.cuda.max_memory_allocated() - before < 2**28


def test_attention_over_long_text_keeps_no_scores() -> None:
    """A text of 700 tokens has 2 million scores in 4 heads; kept for the backward pass are far fewer numbers."""
    case = attention_case([700, 10, 10, 30], 2)
    kept = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept = max(kept, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = made(case, flexible=False, block_scores=50_000)(case["queries"], case["further"])
        gradients_of(output, case)
    assert 0 < kept <= 60_000


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 2), st.integers(0, 3))
def test_the_block_mask_is_the_one_found_by_asking_for_every_pair(
    lengths: list[int], num_further: int, seed: int
) -> None:
    case = attention_case(lengths, num_further, seed)
    if not len(case["anchors"]):
        return
    attention = made(case)
    num_keys = len(case["keys"]) + num_further * len(case["anchors"])
    asked = create_block_mask(attention.sees(), None, None, len(case["anchors"]), num_keys, device="cpu")
    own = attention.block_mask(num_further)
    assert own.shape == asked.shape
    full, asked_full = (blocks(mask.full_kv_num_blocks, mask.full_kv_indices) for mask in (own, asked))
    assert full == asked_full
    partial, asked_partial = (blocks(mask.kv_num_blocks, mask.kv_indices) for mask in (own, asked))
    assert partial >= asked_partial
    # A block may be asked in vain where a document in its midst has no anchors, and at the seam of text and steps.
    assert len(partial - asked_partial) <= 2 + len(lengths)


def blocks(counts: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int]]:
    rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return {(number, index) for number, (count, row) in enumerate(rows) for index in row[:count]}


@pytest.fixture(scope="module")
def in_shards(make_cache: MakeCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eight shards of five samples."""
    whole = HiddenStateCache(make_cache([7 + (5 * number) % 11 for number in range(40)]))
    folder = tmp_path_factory.mktemp("shards")
    manifest = replace(whole.manifest, shards=(), complete=False)
    for number in range(8):
        own = [whole[index] for index in range(5 * number, 5 * number + 5)]
        content = ShardContent(
            ids=[sample.id for sample in own],
            offsets=torch.tensor([0, *(len(sample.input_ids) for sample in own)]).cumsum(0),
            input_ids=torch.cat([sample.input_ids for sample in own]),
            loss_mask=torch.cat([sample.loss_mask for sample in own]),
            hidden={PRE_NORM: torch.cat([sample.hidden[PRE_NORM] for sample in own])},
            greedy_ids=None,
        )
        manifest = manifest.with_shard(write_shard(folder / f"shard-{number:05d}.safetensors", content))
    manifest.save(folder)
    return folder


@pytest.fixture(scope="module")
def url(in_shards: Path) -> Iterator[str]:
    """The same cache behind a URL."""
    place = "memory://layouts/cache"
    file_system, root = fsspec.core.url_to_fs(place)
    for file in in_shards.iterdir():
        file_system.pipe_file(f"{root}/{file.name}", file.read_bytes())
    yield place
    file_system.rm("/layouts", recursive=True)


def batch_ids(data: CacheDataModule, loader: Any) -> list[tuple[str, ...]]:
    found = [batch.sample_ids for batch in loader]
    data.teardown("fit")
    return found


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_from_a_url_are_those_of_the_folder_read_shard_by_shard(
    in_shards: Path, url: str, tmp_path: Path, batching: Any, num_workers: int
) -> None:
    chosen: dict[str, Any] = {"tokens_per_batch": 50, "val_fraction": 0.2, "batching": batching, "window_shards": 2}
    local = CacheDataModule(in_shards, shuffle="windowed", **chosen)
    local.setup()
    assert len({index // 5 for index in local.val_set.indices}) == 2  # type: ignore[union-attr]  # whole shards
    far = CacheDataModule(url, num_workers=num_workers, shard_cache=tmp_path / "node", **chosen)
    far.setup()
    assert not list((tmp_path / "node").glob("*.safetensors"))
    for make in (CacheDataModule.train_dataloader, CacheDataModule.val_dataloader):
        expected, found = (batch_ids(data, make(data)) for data in (local, far))
        assert found == expected
        assert len(found) > 1
    assert torch.equal(far.token_counts(VOCAB), local.token_counts(VOCAB))
    assert far.val_prompts(3) == local.val_prompts(3)
    batches = zip(local.val_dataloader(), far.val_dataloader(), strict=True)
    assert all(torch.equal(one.packed.hidden[PRE_NORM], other.packed.hidden[PRE_NORM]) for one, other in batches)
    far.teardown("fit")


def test_a_drafter_trained_from_a_url_is_that_of_the_folder(
    in_shards: Path, url: str, target_dir: Path, tmp_path: Path
) -> None:
    weights = []
    for place, shuffle in ((in_shards, "windowed"), (url, True)):
        module = make_module(target_dir)
        data = CacheDataModule(
            place, tokens_per_batch=60, shuffle=shuffle, window_shards=2, shard_cache=tmp_path / "node"
        )
        make_trainer(tmp_path).fit(module, data)
        weights.append(module.evaluated.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_judges_tokens_come_from_a_url_as_from_the_folder(
    in_shards: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = save_rows(tmp_path, rows_of(in_shards))
    far, near = judge_data(Path(url), rows), judge_data(in_shards, rows)
    for data in (far, near):
        data.setup()
        data.read_states()
    assert torch.equal(far.tokens("train").features, near.tokens("train").features)
    assert len(list((tmp_path / "draftsmith/shards").glob("*.safetensors"))) == 8


def test_a_cache_behind_a_url_is_verified(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verify(Path(url), samples=2)
    assert "2 samples recomputed" in capsys.readouterr().out


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "batches.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    small = code.replace("10_000_000, 25_000", "10_000, 50")
    assert small != code
    exec(compile(small, "docs/reference/batches.md", "exec"), {})
    assert capsys.readouterr().out.count("batches a rank") == 3


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_a_step_of_bucketed_batches_learns_what_its_samples_teach(
    in_shards: Path, target_dir: Path, tmp_path: Path, batching: Any
) -> None:
    """A whole epoch in one step, so that both layouts hold the same samples."""
    losses: list[float] = []
    data = CacheDataModule(in_shards, tokens_per_batch=10_000, batching=batching, pad_to=8)
    make_trainer(tmp_path, callbacks=[KeepLosses(losses)]).fit(make_module(target_dir), data)
    other: list[float] = []
    plain = CacheDataModule(in_shards, tokens_per_batch=10_000)
    make_trainer(tmp_path, callbacks=[KeepLosses(other)]).fit(make_module(target_dir), plain)
    assert losses == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        ({"cache": "memory://layouts/cache", "shuffle": "full"}, "use 'windowed'"),
        ({"cache": "x", "window_shards": 0}, "window_shards is 0; it must be at least 1$"),
        ({"cache": "x", "pad_to": 0}, "pad_to is 0; it must be at least 1$"),
        ({"cache": "x", "max_samples": 0}, "max_samples is 0; it must be at least 1, or null for all"),
    ],
)
def test_layouts_that_cannot_be_are_refused(chosen: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        CacheDataModule(**chosen)


def test_a_folder_too_small_for_the_windows_is_refused_before_training(url: str, tmp_path: Path) -> None:
    size = sum(record.num_bytes for record in HiddenStateCache(url, shard_cache=tmp_path).manifest.shards) / 2**30
    data = CacheDataModule(url, window_shards=1, tokens_per_batch=20, shard_cache=tmp_path, shard_cache_gib=size * 0.4)
    data.setup()
    with pytest.raises(ValueError, match=r"windows of up to .* raise it, or lower window_shards"):
        data.train_dataloader()
    CacheDataModule(
        url, window_shards=1, tokens_per_batch=20, shard_cache=tmp_path, shard_cache_gib=size * 1.01
    ).setup()


def bytes_in(node: Path) -> int:
    """Of the shards there; some may go while they are counted."""
    total = 0
    for path in node.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_through_a_folder_that_holds_less_than_the_cache(
    in_shards: Path, url: str, tmp_path: Path, num_workers: int
) -> None:
    node = tmp_path / "node"
    size = sum(record.num_bytes for record in HiddenStateCache(in_shards).manifest.shards)
    limit = size * 7 // 8
    chosen: dict[str, Any] = {"tokens_per_batch": 20, "val_fraction": 0.0, "window_shards": 1}
    local = opened(in_shards, shuffle="windowed", **chosen)
    far = opened(url, shard_cache=node, shard_cache_gib=limit / 2**30, num_workers=num_workers, **chosen)
    loaders = [data.train_dataloader() for data in (local, far)]
    for epoch in range(3):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for expected, found in zip(*loaders, strict=True):
            assert found.sample_ids == expected.sample_ids
            assert torch.equal(found.packed.hidden[PRE_NORM], expected.packed.hidden[PRE_NORM])
            assert bytes_in(node) <= limit
    far.teardown("fit")


def test_a_worker_that_reads_little_of_each_window_holds_little(url: str, tmp_path: Path) -> None:
    """With many workers each reads few shards of a window; kept open, those of old windows would fill the folder."""
    data = opened(Path(url), shard_cache=tmp_path / "node", val_fraction=0.0)
    train, cache = data.train_set, data.open_cache()
    assert train is not None
    for numbers in ([0, 6], [12], [39, 1]):
        assert len(train[numbers].sample_ids) == len(numbers)
        assert set(cache._readers) == {number // 5 for number in numbers}
    data.teardown("fit")


def on_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, rank: int = 0) -> None:
    monkeypatch.setattr(CacheDataModule, "_world", lambda data: (rank, world_size))


def opened(cache: Path, **chosen: Any) -> CacheDataModule:
    data = CacheDataModule(cache, **chosen)
    data.setup()
    return data


def test_one_process_of_a_node_compares_the_shards_for_all(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(HiddenStateCache, "verify_integrity", lambda cache: compared.append(str(cache.path)))
    first, second = (CacheDataModule(in_shards, val_cache=in_shards) for _ in range(2))
    first.prepare_data()
    assert compared == [str(in_shards)] * 2
    first.setup()
    second.trainer = SimpleNamespace(local_rank=1, global_rank=1, world_size=2)  # type: ignore[assignment]
    second.setup()
    assert len(compared) == 2
    # Without Lightning nobody has called prepare_data().
    opened(in_shards)
    assert len(compared) == 3


def test_fewer_held_out_samples_than_processes_are_refused(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(in_shards, val_fraction=0.05)
    on_ranks(monkeypatch, 4)
    with pytest.raises(
        ValueError, match=r"2 sample\(s\) are held out .* each of 4 processes needs one; raise val_fraction"
    ):
        data.val_dataloader()


def test_whole_shards_that_hold_out_far_more_than_asked_are_told(
    in_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        opened(in_shards, shuffle="windowed", val_fraction=0.01)
    assert re.search(
        r"\d+ of 40 samples are held out for validation instead of 1, because whole shards are", caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        opened(in_shards, val_fraction=0.01)
    assert "held out" not in caplog.text


def checkpoint(data: CacheDataModule, batches_done: int) -> dict[str, Any]:
    """As state_dict() gives it within a fit."""
    return {
        "batches_done": batches_done,
        "batches_per_epoch": len(data.train_dataloader()),
        "layout": data._layout(),
    }


def steps(monkeypatch: pytest.MonkeyPatch, data: CacheDataModule, world_size: int) -> list[list[str]]:
    """The samples of each step over all processes, from where the run stands."""
    shares = []
    for rank in range(world_size):
        on_ranks(monkeypatch, world_size, rank)
        shares.append([batch.sample_ids for batch in data.train_dataloader()])
    return [sorted(name for share in step for name in share) for step in zip(*shares, strict=True)]


@pytest.mark.parametrize(
    "settings_", [{}, {"shuffle": "windowed", "window_shards": 2}, {"batching": "bucketed", "pad_to": 4}]
)
@pytest.mark.parametrize("change", [(4, 1), (1, 4), (4, 3), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes_and_the_same_samples_a_step(
    in_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings_: dict[str, Any],
    change: tuple[int, int],
) -> None:
    before, now = change
    chosen = {"tokens_per_batch": 96 // before, **settings_}
    on_ranks(monkeypatch, before)
    interrupted = opened(in_shards, **chosen)
    saved = checkpoint(interrupted, 2)
    expected = steps(monkeypatch, interrupted, before)[2:]
    on_ranks(monkeypatch, now)
    resumed = opened(in_shards, **chosen)
    with caplog.at_level(logging.INFO):
        resumed.load_state_dict(saved)
    assert f"resumes with {now} instead of {before} processes" in caplog.text
    assert f"its 96 tokens, each process now takes {96 / now:g}" in caplog.text
    assert steps(monkeypatch, resumed, now) == expected
    # And once more, from its own checkpoint, with as many processes.
    on_ranks(monkeypatch, now)
    again = opened(in_shards, **chosen)
    again.load_state_dict(checkpoint(resumed, 3))
    assert steps(monkeypatch, again, now) == expected[1:]


def test_a_setting_that_keeps_the_tokens_of_a_step_is_as_good(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, 2)
    saved = checkpoint(opened(in_shards, tokens_per_batch=48), 1)
    on_ranks(monkeypatch, 4)
    data = opened(in_shards, tokens_per_batch=24)
    data.load_state_dict(saved)
    assert data._budget() == 24
    on_ranks(monkeypatch, 5)
    uneven = opened(in_shards, tokens_per_batch=48)
    uneven.load_state_dict(saved)
    assert uneven._budget() == Fraction(96, 5)


@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        ({"tokens_per_batch": 30}, "made with tokens_per_batch = 48, this run has 30"),
        ({"seed": 1}, "made with seed = 0, this run has 1"),
        ({"max_samples": 20}, "made with samples = 39, this run has 20"),
        ({"shuffle": False}, "made with shuffle = True, this run has False"),
        ({"shuffle": "windowed"}, "made with windows = None, this run has 32"),
        ({"batching": "bucketed"}, r"made with buckets = None, this run has \[64, 16\]"),
    ],
)
@pytest.mark.parametrize("now", [1, 2, 4])
def test_other_differences_stay_refused(
    in_shards: Path, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any], rule: str, now: int
) -> None:
    on_ranks(monkeypatch, 2)
    saved = checkpoint(opened(in_shards, tokens_per_batch=48), 1)
    for name in ("windows", "buckets", "joint_tokens"):  # as earlier versions saved it
        del saved["layout"][name]
    on_ranks(monkeypatch, now)
    with pytest.raises(ValueError, match=rule):
        opened(in_shards, **{"tokens_per_batch": 48, **chosen}).load_state_dict(saved)


def test_steps_too_small_for_the_processes_are_refused(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint(opened(in_shards, tokens_per_batch=12), 1)
    on_ranks(monkeypatch, 4)
    with pytest.raises(ValueError, match="too few samples to be the same for 4 processes as for 1; resume with 1"):
        opened(in_shards, tokens_per_batch=12).load_state_dict(saved)


def train(config: Path, *arguments: str) -> None:
    script = Path(__file__).resolve().parents[3] / "train.py"
    command = [sys.executable, str(script), "fit", f"--config={config}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dataloader is not resumable" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_for_some_steps_and_then_one_end_as_one_all_along(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([7, 12, 9, 15, 8, 11, 14, 9, 10, 13, 8, 12])
    results = {}
    for name, devices, tokens in (("two", 2, 20), ("then one", 1, 20), ("one", 1, 40)):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        config = tiny_config(folder, target_dir, cache)
        every = config.read_text().replace("save_top_k: 0", "save_top_k: -1, filename: '{step}'")
        config.write_text(every)
        more = [f"--trainer.devices={devices}", f"--data.init_args.tokens_per_batch={tokens}"]
        more += ["--trainer.strategy=ddp"] if devices > 1 else []
        if name == "then one":
            shutil.copy(tmp_path / "two" / "run" / "checkpoints" / "step=2.ckpt", folder / "from.ckpt")
            more += [f"--ckpt_path={folder / 'from.ckpt'}"]
        train(config, *more)
        results[name] = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {result["global_step"] for result in results.values()} == {6}
    for name in ("two", "then one"):
        for weight, value in results["one"]["state_dict"].items():
            torch.testing.assert_close(results[name]["state_dict"][weight], value, rtol=1e-4, atol=1e-6)
