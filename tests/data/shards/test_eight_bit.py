import re
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import EVERY_FAMILY, TWO_LAYERS, for_two_layers, loss_settings, name_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from judging import judge_data, labelled_states, rows_of, save_rows
from training import KeepLosses, make_module, make_trainer

from draftsmith.data.cache.disk_use import bytes_as_files, file_overhead
from draftsmith.data.cache.extract import HiddenStateCache, compare, extract, verify
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.features import _ends_of_copies, features
from draftsmith.data.cache.show import show
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.shards import eight_bit
from draftsmith.data.shards.eight_bit import (
    CODES,
    LARGEST_ERROR,
    EightBitStates,
    dequantise,
    dequantise_plainly,
    quantise,
)
from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import ShardContent, ShardReader, bytes_per_token, write_shard
from draftsmith.models.drafters.family import Family
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.target import Target
from draftsmith.train.batches.data_module import CacheDataModule

SMALL_SHARDS = 0.002
LAYERS = TWO_LAYERS[::-1]


@pytest.fixture
def cache(tmp_path: Path, target: Path, reply_file: Path) -> Path:
    out = tmp_path / "cache"
    extract(
        str(target),
        reply_file,
        out,
        storage=StorageOptions(layers=LAYERS, dtype="float8_e4m3", shard_mib=SMALL_SHARDS, local_horizon=2),
    )
    return out


@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 600),
    exponent=st.floats(-34, 37),
    spread=st.floats(0, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(seed=751892, width=217, exponent=-0.8045923447701142, spread=9.988632340179542, dtype=torch.float32)
@settings(max_examples=200, deadline=None)
def test_a_state_comes_back_within_its_bound_at_any_magnitude(
    seed: int, width: int, exponent: float, spread: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Numbers of one state may differ by many orders of magnitude, as in real models with a few huge dimensions.
    orders_TD = -spread * torch.rand(3, width, generator=generator)
    states_TD = torch.randn(3, width, generator=generator).clamp(-3, 3) * 10**orders_TD
    states_TD = (states_TD / states_TD.abs().amax(dim=-1, keepdim=True) * 10**exponent).to(dtype)
    codes_TD, scales_T = quantise(states_TD)
    assert (codes_TD.dtype, scales_T.dtype) == (torch.float8_e4m3fn, torch.float32)
    back_TD = dequantise(codes_TD, scales_T)
    assert back_TD.dtype == torch.bfloat16
    assert torch.equal(back_TD, dequantise_plainly(codes_TD, scales_T))
    exact_TD, error_TD = states_TD.double(), back_TD.double() - states_TD.double()
    each = torch.maximum(exact_TD.abs() / 16, scales_T.double()[:, None] / 1024)
    each += (exact_TD.abs() + each) / 256 + 2.0**-133  # bfloat16: of what comes back, and among its subnormal ones
    each *= 1 + 1e-6  # float32, in which it is computed
    assert bool((error_TD.abs() <= each).all())
    assert bool((error_TD.norm(dim=-1) <= LARGEST_ERROR * exact_TD.norm(dim=-1)).all())


def test_literal_numbers() -> None:
    states_TD = torch.tensor([[448.0, 16.0, -17.0, 0.0], [0.0, 0.0, 0.0, 0.0], [896.0, 2.0, 1.0, -0.002]])
    codes_TD, scales_T = quantise(states_TD)
    assert scales_T.tolist() == [1.0, 1.0, 2.0]
    # 17 lies between the e4m3 numbers 16 and 18, and goes to the even one; 0.001 is nearest to 2 ** -10 * 0.
    assert dequantise(codes_TD, scales_T).tolist() == [[448, 16, -16, 0], [0, 0, 0, 0], [896, 2, 1, -0.00390625]]


@pytest.mark.parametrize("block", [1, 7, 2**18])
def test_moving_bits_gives_what_converting_numbers_gives_for_every_code(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bit, "_BLOCK", block)
    codes_C = torch.arange(256, dtype=torch.uint8).view(CODES)
    codes_TD = codes_C[~codes_C.to(torch.float32).isnan()].repeat(5).reshape(-1, 2)
    scales_T = 10 ** torch.linspace(-37, 35, codes_TD.shape[0])
    assert codes_TD.numel() == 5 * 254
    assert torch.equal(dequantise(codes_TD, scales_T), dequantise_plainly(codes_TD, scales_T))
    assert dequantise(codes_TD[:0], scales_T[:0]).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_tells_of_a_state_that_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    states_TD = torch.ones(3, 5, dtype=dtype)
    states_TD[1, 2] = bad
    assert quantise(states_TD)[1].isfinite().tolist() == [True, False, True]


def test_what_bfloat16_cannot_hold_is_not_finite_and_what_float32_hardly_can_is_no_division_by_zero() -> None:
    scales_T = quantise(torch.tensor([[3.4028e38], [3.38e38]]))[1]
    assert scales_T.isfinite().tolist() == [False, True]
    codes_TD, scales_T = quantise(torch.tensor([[1e-45, 0.0], [1e-38, 1e-40]]))
    assert bool(codes_TD.to(torch.float32).isfinite().all())
    back_TD = dequantise(codes_TD, scales_T)
    assert float(back_TD.abs().max()) <= 1.1e-38


def test_a_cache_of_eight_bits_gives_bfloat16_states_near_the_whole_ones(
    cache: Path, tmp_path: Path, target: Path, reply_file: Path
) -> None:
    extract(
        str(target),
        reply_file,
        tmp_path / "whole",
        storage=StorageOptions(layers=LAYERS, dtype="float32", local_horizon=2),
    )
    eight, whole = HiddenStateCache(cache), HiddenStateCache(tmp_path / "whole")
    assert len(eight.manifest.shards) > 2
    for sample, exact in zip(eight, whole, strict=True):
        assert torch.equal(sample.input_ids, exact.input_ids)
        assert sample.greedy_ids is not None
        assert exact.greedy_ids is not None
        assert torch.equal(sample.greedy_ids, exact.greedy_ids)
        assert list(sample.hidden) == list(LAYERS)
        for layer in LAYERS:
            states_TD, exact_TD = sample.hidden[layer], exact.hidden[layer]
            assert states_TD.dtype == torch.bfloat16
            error_T = (states_TD.float() - exact_TD).norm(dim=-1) / exact_TD.norm(dim=-1)
            assert 0.005 < float(error_T.mean()) < 0.04
            assert float(error_T.max()) < LARGEST_ERROR
    packed = pack([eight[0], eight[1]], ["layer.0.output"])
    assert torch.equal(packed.hidden["layer.0.output"][: len(eight[0].input_ids)], eight[0].hidden["layer.0.output"])


def test_layers_that_nobody_asks_for_are_not_brought_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = EightBitStates.__getitem__

    def noted(self: EightBitStates, layer: str) -> torch.Tensor:
        asked.append(layer)
        return real(self, layer)

    monkeypatch.setattr(EightBitStates, "__getitem__", noted)
    pack(list(HiddenStateCache(cache)), ["last.pre_norm"])
    assert set(asked) == {"last.pre_norm"}


def test_bytes_of_a_token_are_those_on_the_disk(cache: Path) -> None:
    shard = HiddenStateCache(cache).manifest.shards[0]
    per_token = bytes_per_token(32, 2, CODES, 2)
    assert per_token == 2 * (32 + 4) + 5 + 8
    header = 8 + int.from_bytes((cache / shard.name).read_bytes()[:8], "little")
    assert shard.num_bytes == header + 8 * (shard.num_samples + 1) + per_token * shard.num_tokens
    assert bytes_per_token(32, 2, torch.bfloat16, 0) == 2 * 64 + 5


def test_the_end_of_extraction_compares_with_files_as_they_would_be(
    cache: Path, tmp_path: Path, target: Path, reply_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = HiddenStateCache(cache)
    folder = tmp_path / "files"
    folder.mkdir()
    for sample in opened:
        content = {"input_ids": sample.input_ids, "loss_mask": sample.loss_mask.long()}
        content |= {f"hidden_state_{number}": sample.hidden[layer] for number, layer in enumerate(LAYERS)}
        torch.save(content, folder / f"{sample.id}.ckpt")
    there = sum(path.stat().st_size for path in folder.iterdir())
    assert file_overhead(2) > 1000
    # The container aligns each tensor to 64 bytes, and keeps the file's name in it.
    assert there == pytest.approx(bytes_as_files(opened.manifest), abs=len(opened) * (4 * 64 + 64))
    extract(
        str(target),
        reply_file,
        cache,
        storage=StorageOptions(layers=LAYERS, dtype="float8_e4m3", shard_mib=SMALL_SHARDS, local_horizon=2),
    )
    line = capsys.readouterr().out.splitlines()[-1]
    manifest = opened.manifest
    a_token = sum(shard.num_bytes for shard in manifest.shards) / manifest.num_tokens
    assert f" {a_token:,.0f} bytes a token (float8_e4m3 states)" in line
    assert line.endswith(f"would take {bytes_as_files(manifest) / 1e6:,.1f} MB")


def test_verify_allows_what_eight_bits_lose_and_no_more(
    cache: Path, capsys: pytest.CaptureFixture[str], target: Path
) -> None:
    verify(cache, samples=20)
    assert "12 samples recomputed, all within 0.09" in capsys.readouterr().out
    rows = list(compare(HiddenStateCache(cache), Target.load(str(target)), 20, 0))
    assert all(0.0 < row.relative_difference < LARGEST_ERROR for row in rows)
    assert all(row.greedy_agreement == 1 for row in rows)
    with pytest.raises(ValueError, match=r"differ by more than 0.001"):
        verify(cache, tolerance=0.001)
    with pytest.raises(ValueError, match="samples is 0; recompute at least 1"):
        verify(cache, samples=0)


def test_verify_notices_eight_bit_states_of_another_layer(tmp_path: Path, target: Path, reply_file: Path) -> None:
    extract(
        str(target),
        reply_file,
        tmp_path / "off",
        storage=StorageOptions(layers=("layer.0.output",), dtype="float8_e4m3"),
    )
    for path in (tmp_path / "off" / "manifest.json", tmp_path / "off" / "shard-00000.safetensors"):
        path.write_bytes(path.read_bytes().replace(b"layer.0.output", b"layer.1.output"))
    with pytest.raises(ValueError, match="does not hold this target's states"):
        verify(tmp_path / "off", check="off")


def test_show_and_the_checks_work_on_eight_bits(
    cache: Path, capsys: pytest.CaptureFixture[str], target: Path, reply_file: Path
) -> None:
    show(cache)
    assert "s0: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another cache \(dtype: here 'float8_e4m3', wanted 'bfloat16'\)"):
        extract(
            str(target),
            reply_file,
            cache,
            storage=StorageOptions(layers=LAYERS, shard_mib=SMALL_SHARDS, local_horizon=2),
        )
    path = cache / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors was altered"):
        HiddenStateCache(cache)


def test_a_shard_without_its_scales_is_refused(cache: Path, tmp_path: Path) -> None:
    opened = HiddenStateCache(cache)
    reader = ShardReader(cache / "shard-00000.safetensors", opened.manifest.shards[0], opened.manifest.identity)
    content = ShardContent(
        ids=reader.ids,
        offsets=torch.tensor(reader.offsets),
        input_ids=torch.zeros(reader.offsets[-1], dtype=torch.int32),
        loss_mask=torch.ones(reader.offsets[-1], dtype=torch.bool),
        hidden={layer: torch.zeros(reader.offsets[-1], 32).to(CODES) for layer in LAYERS},
        greedy_ids=torch.zeros(reader.offsets[-1], 2),
    )
    record = write_shard(tmp_path / "shard.safetensors", content)
    with pytest.raises(ValueError, match=r"lacks the tensors \['scale.last.pre_norm', 'scale.layer.0.output'\]"):
        ShardReader(tmp_path / "shard.safetensors", record, opened.manifest.identity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused_before_they_become_codes(
    cache: Path, target: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Target.load(str(target))
    real = loaded.prefix

    def poisoned(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = real(ids, *args, **kwargs)
        output.pre_norm[1, 2, 7] = bad
        return output

    monkeypatch.setattr(loaded, "prefix", poisoned)
    samples = [TokenizedSample(name, [5, 6, 7, 8], [False, True, True, True]) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"sample b: last.pre_norm at position 2 is NaN or infinite"):
        features(loaded, samples, HiddenStateCache(cache).manifest.identity)


def test_the_pages_example_runs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "cache.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "runs/cache8" in code
    capsys.readouterr()
    exec(compile(code.replace("runs/cache8", str(cache)), "docs/reference/cache.md", "exec"), {})
    assert capsys.readouterr().out == "torch.bfloat16 (7, 32)\n"


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=name_of)
def test_every_family_learns_from_eight_bits_nearly_what_it_learns_from_whole_states(
    cache: Path, tmp_path: Path, target: Path, reply_file: Path, family: Family
) -> None:
    extract(
        str(target),
        reply_file,
        tmp_path / "whole",
        storage=StorageOptions(layers=LAYERS, dtype="float32", local_horizon=2),
    )
    losses: dict[str, list[float]] = {}
    for folder in (cache, tmp_path / "whole"):
        losses[folder.name] = []
        trainer = make_trainer(tmp_path, max_steps=3, max_epochs=-1, callbacks=[KeepLosses(losses[folder.name])])
        module = make_module(target, drafter=for_two_layers(family), num_steps=2, **loss_settings(family))
        trainer.fit(module, CacheDataModule(folder, val_fraction=0.2, tokens_per_batch=60))
    assert len(losses["cache"]) == 3
    assert losses["cache"] == pytest.approx(losses["whole"], rel=0.03)
    assert losses["cache"] != losses["whole"]


def test_a_judge_reads_states_of_eight_bits(cache: Path, tmp_path: Path) -> None:
    rows = rows_of(cache)
    data = judge_data(cache, save_rows(tmp_path, rows))
    data.setup()
    data.read_states()
    read = torch.cat([data.tokens(split).features for split in ("train", "validation")])
    states = labelled_states(cache, rows)[0]
    assert len(read) == len(states) > 60
    assert torch.equal(read.sort(dim=0).values, states.sort(dim=0).values)


def test_copies_are_waited_for_on_the_devices_that_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current device, which is cuda:0 in a process that torchrun has put on cuda:3."""

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def record_event(self) -> torch.device:
            return self.device

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    devices = {torch.device(name) for name in ("cpu", "cuda:1", "cuda:3")}
    assert sorted(map(str, _ends_of_copies(devices))) == ["cuda:1", "cuda:3"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_process_on_the_second_gpu_stores_the_states_of_its_own_forwards(
    tmp_path: Path, target: Path, reply_file: Path
) -> None:
    extract(
        str(target),
        reply_file,
        tmp_path / "second",
        where=PlacementOptions(device="cuda:1"),
        storage=StorageOptions(shard_mib=SMALL_SHARDS),
    )
    verify(tmp_path / "second", samples=12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_codes_that_a_cpu_reads(cache: Path, target: Path) -> None:
    states_TD = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    codes_TD, scales_T = quantise(states_TD.cuda())
    torch.testing.assert_close(scales_T.cpu(), quantise(states_TD)[1])
    error_T = (dequantise(codes_TD.cpu(), scales_T.cpu()).float() - states_TD).norm(dim=-1) / states_TD.norm(dim=-1)
    assert float(error_T.max()) < LARGEST_ERROR
    assert torch.equal(dequantise(codes_TD, scales_T).cpu(), dequantise(codes_TD.cpu(), scales_T.cpu()))
    rows = list(compare(HiddenStateCache(cache), Target.load(str(target), device="cuda"), 20, 0))
    assert all(row.relative_difference < LARGEST_ERROR + 0.02 for row in rows)
