import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftsmith.data.cache.extract import HiddenStateCache, extract, verify
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.features import features, length_batches
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.shards import shards
from draftsmith.data.shards.manifest import Manifest
from draftsmith.files import exclusive
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.target import Target

SMALL_SHARDS = 0.003  # MiB: a few samples each


def cache_bytes(folder: Path) -> dict[str, bytes]:
    names = [*folder.glob("shard-*"), folder / "manifest.json"]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture
def cache(tmp_path: Path, target: Path, reply_file: Path) -> Path:
    out = tmp_path / "cache"
    extract(str(target), reply_file, out, storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2))
    return out


def test_every_sample_comes_back_in_order_with_its_mask(cache: Path, reply_file: Path) -> None:
    opened = HiddenStateCache(cache)
    rows = [json.loads(line) for line in reply_file.read_text().splitlines()]
    assert len(opened.manifest.shards) > 2
    assert opened.sample_lengths == [len(row["prompt_ids"]) + len(row["reply_ids"]) for row in rows]
    for row, sample in zip(rows, opened, strict=True):
        assert sample.id == row["id"]
        assert sample.input_ids.dtype == torch.int64
        assert sample.input_ids.tolist() == row["prompt_ids"] + row["reply_ids"]
        assert sample.loss_mask.dtype == torch.bool
        assert sample.loss_mask.tolist() == [False] * len(row["prompt_ids"]) + [True] * len(row["reply_ids"])


def test_cached_states_are_the_models_own(tmp_path: Path, target: Path, reply_file: Path) -> None:
    layers = ("last.pre_norm", "layer.0.output")
    extract(
        str(target), reply_file, tmp_path / "c", storage=StorageOptions(layers=layers, dtype="float32", batch_tokens=40)
    )
    model = AutoModelForCausalLM.from_pretrained(target)
    for sample in HiddenStateCache(tmp_path / "c"):
        with torch.no_grad():
            expected = model(sample.input_ids[None], output_hidden_states=True).hidden_states
            normed = model.model.norm(sample.hidden["last.pre_norm"])
        torch.testing.assert_close(normed, expected[-1][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.hidden["layer.0.output"], expected[1][0], rtol=1e-4, atol=1e-4)


def test_greedy_continuations_are_what_the_model_generates(cache: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target)
    sample = HiddenStateCache(cache)[5]
    assert sample.greedy_ids is not None
    for end in range(1, len(sample.input_ids) + 1):
        generated = model.generate(
            sample.input_ids[None, :end], max_new_tokens=2, min_new_tokens=2, do_sample=False, eos_token_id=None
        )
        assert sample.greedy_ids[end - 1].tolist() == generated[0, end:].tolist()


def test_the_same_input_gives_the_same_bytes(cache: Path, tmp_path: Path, target: Path, reply_file: Path) -> None:
    extract(
        str(target), reply_file, tmp_path / "again", storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2)
    )
    assert cache_bytes(cache) == cache_bytes(tmp_path / "again")


def test_samples_read_alone_are_views_of_the_file(cache: Path) -> None:
    opened = HiddenStateCache(cache)
    first, second = opened[0].hidden["last.pre_norm"], opened[1].hidden["last.pre_norm"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.storage_offset() == first.numel()


def test_a_cache_travels_to_workers_without_its_open_files(cache: Path) -> None:
    opened = HiddenStateCache(cache)
    before = opened[3].hidden["last.pre_norm"]
    copy = pickle.loads(pickle.dumps(opened))
    assert torch.equal(copy[3].hidden["last.pre_norm"], before)
    assert len(pickle.dumps(opened)) < 20_000


def flip_byte(path: Path, offset: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_lazy_check_hashes_a_shard_before_its_first_sample_and_no_other(cache: Path) -> None:
    flip_byte(cache / "shard-00002.safetensors")
    opened = HiddenStateCache(cache, check="lazy")
    assert sum(opened.sample_lengths) == opened.manifest.num_tokens
    assert opened[0].id == "s0"
    with pytest.raises(ValueError, match=r"shard-00002.safetensors was altered"):
        opened[len(opened) // 2 + 1], opened[len(opened) // 2]


@pytest.mark.parametrize("check", ["open", "lazy"])
def test_one_altered_byte_is_refused(cache: Path, check: Any) -> None:
    flip_byte(cache / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"shard-00001.safetensors was altered"):
        list(HiddenStateCache(cache, check=check))


def test_a_cut_off_shard_is_refused_even_unchecked(cache: Path) -> None:
    path = cache / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00002.safetensors has \d+ bytes, its record says"):
        HiddenStateCache(cache, check="off")


def test_a_missing_shard_a_missing_cache_and_a_broken_manifest_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no hidden-state cache"):
        HiddenStateCache(tmp_path / "gone")
    (cache / "shard-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is missing"):
        HiddenStateCache(cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"schema": "other/1"}))
    with pytest.raises(ValueError, match="schema 'other/1'"):
        HiddenStateCache(cache)
    (cache / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "num_tokens"}))
    with pytest.raises(ValueError, match=r"lacks \['num_tokens'\]"):
        HiddenStateCache(cache)
    (cache / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        HiddenStateCache(cache)


def test_an_incomplete_cache_is_refused_with_the_way_to_finish_it(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest |= {"complete": False, "shards": manifest["shards"][:2]}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"incomplete: \d+ of 12 samples; run the same `draftsmith data extract` again"
    ):
        HiddenStateCache(cache)


def test_another_targets_cache_is_refused(cache: Path, target: Path, other_target: Path) -> None:
    opened = HiddenStateCache(cache)
    opened.check_target(Target.load(str(target)).fingerprint)
    with pytest.raises(ValueError, match="extract a cache with this target"):
        opened.check_target(Target.load(str(other_target)).fingerprint)
    with pytest.raises(ValueError, match="extract a cache with this tokenizer"):
        opened.check_tokenizer("0" * 64)
    with pytest.raises(ValueError, match="extract a cache with this target"):
        verify(cache, target=str(other_target))


def test_extraction_mends_a_damaged_cache(cache: Path, target: Path, reply_file: Path) -> None:
    before = cache_bytes(cache)
    flip_byte(cache / "shard-00001.safetensors")
    extract(str(target), reply_file, cache, storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2))
    assert cache_bytes(cache) == before


def test_a_folder_with_another_cache_or_other_files_is_refused(
    cache: Path, tmp_path: Path, target: Path, reply_file: Path
) -> None:
    with pytest.raises(ValueError, match=r"another cache \(dtype: here 'bfloat16', wanted 'float32'\)"):
        extract(
            str(target),
            reply_file,
            cache,
            storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2, dtype="float32"),
        )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no cache"):
        extract(str(target), reply_file, tmp_path / "used")


def test_two_processes_do_not_write_one_cache(tmp_path: Path, target: Path, reply_file: Path) -> None:
    with exclusive(tmp_path / "cache"), pytest.raises(ValueError, match="written by another process"):
        extract(str(target), reply_file, tmp_path / "cache")


def test_a_full_disk_keeps_whole_shards_and_the_next_run_finishes(
    tmp_path: Path, target: Path, reply_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(str(target), reply_file, tmp_path / "whole", storage=StorageOptions(shard_mib=SMALL_SHARDS))
    real = shards.atomic_write

    def full(path: Path, data: bytes, **options: Any) -> None:
        if path.name == "shard-00002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_write", full)
        with pytest.raises(ValueError, match=r"No space left on device.*free space and run the same command again"):
            extract(str(target), reply_file, tmp_path / "cache", storage=StorageOptions(shard_mib=SMALL_SHARDS))
    assert len(Manifest.load(tmp_path / "cache").shards) == 2
    extract(str(target), reply_file, tmp_path / "cache", storage=StorageOptions(shard_mib=SMALL_SHARDS))
    assert cache_bytes(tmp_path / "cache") == cache_bytes(tmp_path / "whole")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused_with_their_place(
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


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, target: Path, write_jsonl: Callable[..., Path]) -> None:
    source = write_jsonl([{"prompt_ids": [5], "reply_ids": [100_000]}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: reply_ids has the token id 100000; ids go from 0 to 299"):
        extract(str(target), source, tmp_path / "c")


def test_long_samples_are_cut_and_those_without_labels_left_are_recorded(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [
        {"id": "a", "prompt_ids": [5] * 4, "reply_ids": [6] * 9},
        {"id": "b", "prompt_ids": [5] * 9, "reply_ids": [6]},
    ]
    extract(str(target), write_jsonl(rows), tmp_path / "c", storage=StorageOptions(max_length=8))
    opened = HiddenStateCache(tmp_path / "c")
    assert opened.sample_lengths == [8]
    assert (opened.manifest.num_cut, opened.manifest.num_dropped) == (2, 1)
    dropped = json.loads((tmp_path / "c" / "dropped.jsonl").read_text())
    assert dropped["id"] == "b"
    assert "at 9, past the 8 tokens" in dropped["reason"]
    with pytest.raises(ValueError, match="context of 256"):
        extract(str(target), write_jsonl(rows), tmp_path / "d", storage=StorageOptions(max_length=500))


def test_a_row_whose_id_no_encoder_takes_is_listed_with_its_place(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path]
) -> None:
    ids = {"prompt_ids": [5, 6], "reply_ids": [7]}
    source = write_jsonl([{"id": "a"} | ids, {"id": "\ud83d"} | ids, {"id": "c\ud83d"} | ids | {"reply_ids": 7}])
    extract(str(target), source, tmp_path / "c")
    assert len(HiddenStateCache(tmp_path / "c").sample_lengths) == 1
    dropped = [json.loads(line) for line in (tmp_path / "c" / "dropped.jsonl").read_text().splitlines()]
    assert [row["place"].rpartition(":")[2] for row in dropped] == ["2", "3"]
    assert all("half a surrogate pair" in row["reason"] for row in dropped)


def test_rows_of_a_file_whose_name_is_no_utf8_have_ids(tmp_path: Path, target: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    source.write_text(json.dumps({"prompt_ids": [5, 6], "reply_ids": [7]}) + "\n")
    extract(str(target), source, tmp_path / "c")
    assert len(HiddenStateCache(tmp_path / "c").sample_lengths) == 1


def test_a_corpus_without_labels_is_refused_before_anything_is_written(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path]
) -> None:
    source = write_jsonl([{"id": "q", "messages": [{"role": "user", "content": "Hello there"}]}])
    with pytest.raises(ValueError, match=r"labelled fraction 0.*Sample q.*Hello there"):
        extract(str(target), source, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a"}, r"rows.jsonl:1: no known format has the fields \['id'\]"),
        (
            {
                "turns": [
                    {"prompt_ids": [1], "reply_ids": [2], "finish": "eos"},
                    {"prompt_ids": [9], "reply_ids": [], "finish": ""},
                ]
            },
            "turn 1 does not",
        ),
    ],
)
def test_a_row_that_cannot_be_read_names_its_line(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path], row: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract(str(target), write_jsonl([row]), tmp_path / "c")


def test_verify_recomputes_and_notices_states_of_another_layer(
    cache: Path, tmp_path: Path, target: Path, reply_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(cache, samples=3)
    assert "3 samples recomputed" in capsys.readouterr().out
    extract(
        str(target), reply_file, tmp_path / "off", storage=StorageOptions(layers=("layer.0.output",), shard_mib=1.0)
    )
    manifest = (tmp_path / "off" / "manifest.json").read_text()
    (tmp_path / "off" / "manifest.json").write_text(manifest.replace("layer.0.output", "layer.1.output"))
    with pytest.raises(ValueError, match=r"lacks the tensors \['hidden.layer.1.output'\]"):
        verify(tmp_path / "off")
    shard = tmp_path / "off" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"layer.0.output", b"layer.1.output"))
    with pytest.raises(ValueError, match="does not hold this target's states"):
        verify(tmp_path / "off", check="off")


def test_states_of_few_bits_are_told_from_those_of_whole_weights(
    cache: Path, tmp_path: Path, target: Path, reply_file: Path, few_bits: None, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = tmp_path / "narrow"
    extract(
        str(target),
        reply_file,
        narrow,
        storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2),
        where=PlacementOptions(quantization="4bit"),
    )
    with pytest.raises(ValueError, match=r"another cache \(target_quantization: here '4bit', wanted None\)"):
        extract(str(target), reply_file, narrow, storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2))
    with pytest.raises(ValueError, match=r"another cache \(target_quantization: here None, wanted '4bit'\)"):
        extract(
            str(target),
            reply_file,
            cache,
            storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2),
            where=PlacementOptions(quantization="4bit"),
        )
    fingerprint = Target.load(str(target)).fingerprint
    assert HiddenStateCache(narrow).manifest.identity.target_fingerprint == fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HiddenStateCache(cache).check_target(fingerprint)
        verify(narrow, samples=3)
        verify(narrow, samples=3, target=str(target))
    assert capsys.readouterr().out.count("3 samples recomputed") == 2
    with pytest.warns(UserWarning, match="with 4bit weights, this run's target has whole ones"):
        HiddenStateCache(narrow).check_target(fingerprint)
    # Whoever knows better than the cache may say so, and gets a warning.
    with (
        pytest.warns(UserWarning, match="with whole weights, this run's target has 4bit ones"),
        pytest.raises(ValueError, match="does not hold this target's states"),
    ):
        verify(cache, samples=3, where=PlacementOptions(quantization="4bit"))


def test_caches_made_before_quantization_was_noted_are_read_and_gone_on_with(
    cache: Path, target: Path, reply_file: Path
) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["identity"]["target_quantization"]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert HiddenStateCache(cache).manifest.identity.target_quantization is None
    extract(str(target), reply_file, cache, storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2))


def test_verify_takes_the_revision_that_the_cache_names_and_no_other_targets(
    cache: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(manifest.replace('"target_revision": null', '"target_revision": "v2"'))
    asked, load = [], Target.load

    def noting(path: str, dtype: str, device: str, device_map: str | None, revision: str | None, *more: Any) -> Target:
        asked.append(revision)
        return load(path, dtype, device, device_map, None, *more)

    monkeypatch.setattr(Target, "load", noting)
    verify(cache, samples=1)
    verify(cache, samples=1, where=PlacementOptions(revision="v3"))
    verify(cache, samples=1, target=str(target))
    assert asked == ["v2", "v3", None]


def test_length_buckets_hold_the_budget_and_every_sample_once() -> None:
    assert length_batches([2, 9, 8, 3], 18) == [[1, 2], [3, 0]]
    lengths = [3, 50, 7, 7, 20, 1]
    batches = length_batches(lengths, 21)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 21 for b in batches)


def test_a_cache_records_what_auto_means_and_resumes_under_either_name(
    target: Path, reply_file: Path, tmp_path: Path
) -> None:
    extract(str(target), reply_file, tmp_path / "c", target_dtype="auto", where=PlacementOptions(device="cpu"))
    assert HiddenStateCache(tmp_path / "c").manifest.identity.target_dtype == "float32"
    before = (tmp_path / "c" / "manifest.json").read_bytes()
    extract(str(target), reply_file, tmp_path / "c", target_dtype="float32", where=PlacementOptions(device="cpu"))
    assert (tmp_path / "c" / "manifest.json").read_bytes() == before


SLOW_EXTRACT = """
import sys, time
from pathlib import Path
from draftsmith.data.cache import extraction
from draftsmith.data.cache.extract import extract
real = extraction.features
def slow(*arguments):
    time.sleep(0.5)
    return real(*arguments)
extraction.features = slow
storage = extraction.StorageOptions(shard_mib=0.003, local_horizon=2)
extract(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), storage=storage)
"""


def test_kill_9_while_extracting_then_the_same_bytes(
    cache: Path, tmp_path: Path, target: Path, reply_file: Path
) -> None:
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", SLOW_EXTRACT, str(target), str(reply_file), str(killed)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (killed / "shard-00000.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="incomplete"):
        HiddenStateCache(killed)
    extract(str(target), reply_file, killed, storage=StorageOptions(shard_mib=SMALL_SHARDS, local_horizon=2))
    assert cache_bytes(killed) == cache_bytes(cache)
