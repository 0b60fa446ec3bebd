"""Extraction by several processes that say nothing to one another: one cache, byte for byte that of a single process."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEMPLATE

from draftsmith.data import corpus as corpus_module
from draftsmith.data.cache.extract import HiddenStateCache, extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.shared_survey import shared_survey
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus import Corpus
from draftsmith.data.shards.lengths import read_lengths
from draftsmith.data.shards.manifest import Manifest
from draftsmith.data.shared_work import Share, ShareOptions
from draftsmith.files import exclusive, sha256_file
from draftsmith.models.files.device_and_dtype import resolved_device
from draftsmith.models.target.prompt_template import TemplateChoice

SMALL_SHARDS = 0.002


def shas(folder: Path) -> dict[str, str]:
    """Every file but the record of the run, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json")
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


@pytest.fixture
def chats(write_jsonl: Callable[..., Path]) -> Path:
    """Conversations that must be tokenized, one without an answer, one long."""
    rows: list[dict[str, object]] = [
        {
            "id": f"c{number}",
            "messages": [
                {"role": "user", "content": f"How many apples? {number}"},
                {"role": "assistant", "content": "He has seven apples. " * (1 + number % 4)},
            ],
        }
        for number in range(14)
    ]
    rows.insert(3, {"id": "silent", "messages": [{"role": "user", "content": "Hello"}]})
    rows.append({"id": "long", "messages": [*rows[0]["messages"], {"role": "user", "content": "more " * 90}]})  # type: ignore[misc]
    return write_jsonl(rows, "chats.jsonl")


@pytest.fixture
def alone(tmp_path: Path, target: Path, chats: Path) -> Path:
    out = tmp_path / "alone"
    extract(str(target), chats, out, storage=StorageOptions(shard_mib=SMALL_SHARDS, max_length=120))
    assert sorted(shas(out)) == [
        "dropped.jsonl",
        "lengths.safetensors",
        "manifest.json",
        *(f"shard-{number:05d}.safetensors" for number in range(len(HiddenStateCache(out).manifest.shards))),
    ]
    return out


def ranks(target: Path, source: Path, out: Path, order: list[int], world_size: int) -> None:
    for rank in order:
        extract(
            str(target),
            source,
            out,
            storage=StorageOptions(shard_mib=SMALL_SHARDS, max_length=120),
            share=ShareOptions(rank=rank, world_size=world_size),
        )


@pytest.mark.parametrize(("world_size", "order"), [(1, [0]), (2, [1, 0]), (3, [0, 2, 1]), (40, list(range(40)))])
def test_any_number_of_ranks_in_any_order_gives_the_bytes_of_one_process(
    alone: Path, tmp_path: Path, target: Path, chats: Path, world_size: int, order: list[int]
) -> None:
    ranks(target, chats, tmp_path / "c", order, world_size)
    assert shas(tmp_path / "c") == shas(alone)


def test_a_cache_is_incomplete_until_the_last_rank_is_done(
    alone: Path, tmp_path: Path, target: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    ranks(target, chats, out, [1], 2)
    there = sum(shard.num_samples for shard in Manifest.load(out).shards)
    assert 0 < there < 15
    assert f"rank 1 of 2 is done: {there} of 15 samples" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"incomplete: {there} of 15 samples"):
        HiddenStateCache(out)
    ranks(target, chats, out, [0, 2], 3)  # rank 1 of 2 has made all that rank 1 of 3 would have
    ranks(target, chats, out, [1], 3)
    assert shas(out) == shas(alone)


WORKER = """
import os, sys, time
from pathlib import Path
from draftsmith.data.cache import extraction
from draftsmith.data.cache.extract import extract
real = extraction.features
def slow(*arguments):
    time.sleep(float(os.environ["SLOW"]))
    return real(*arguments)
extraction.features = slow
storage = extraction.StorageOptions(shard_mib=0.002, max_length=120)
extract(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), storage=storage)
"""


@contextmanager
def workers(target: Path, source: Path, out: Path, world_size: int, slow: float) -> Iterator[list[subprocess.Popen]]:
    """Ranks as a launcher starts them, told by their environment; killed when the block ends."""
    command = [sys.executable, "-c", WORKER, str(target), str(source), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SLOW": str(slow), "WORLD_SIZE": str(world_size)}
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.DEVNULL)
        for rank in range(world_size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_killed_ranks_are_replaced_by_another_number_of_them(
    alone: Path, tmp_path: Path, target: Path, chats: Path
) -> None:
    out = tmp_path / "c"
    with workers(target, chats, out, 2, slow=0.7) as processes:
        deadline = time.monotonic() + 200
        while not list(out.glob("shard-*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in processes:
            process.send_signal(signal.SIGKILL)
    whole = len(list(out.glob("shard-*.json")))
    assert 0 < whole < len(HiddenStateCache(alone).manifest.shards)
    with pytest.raises(ValueError, match="incomplete"):
        HiddenStateCache(out)
    ranks(target, chats, out, [2, 0, 1], 3)
    assert shas(out) == shas(alone)


def test_ranks_at_the_same_time_divide_the_work_and_agree(
    alone: Path, tmp_path: Path, target: Path, chats: Path
) -> None:
    with workers(target, chats, tmp_path / "c", 2, slow=0.0) as processes:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert shas(tmp_path / "c") == shas(alone)


def test_the_same_rank_twice_is_refused_and_another_rank_is_not(tmp_path: Path, target: Path, chats: Path) -> None:
    with exclusive(tmp_path / "c-00001-of-00002"):
        with pytest.raises(ValueError, match=r"c-00001-of-00002 is being written by another process"):
            ranks(target, chats, tmp_path / "c", [1], 2)
        ranks(target, chats, tmp_path / "c", [0], 2)


def test_a_place_where_no_cache_can_be_is_refused_before_the_target_is_loaded(
    tmp_path: Path, target: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftsmith.models.target.options.Target", None)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(full)
    for out, complaint in (
        (full, "not empty and no cache"),
        (Path(), "not empty and no cache"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ranks(target, chats, out, [0], 2)
    assert sorted(path.name for path in full.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"layers": ()}, "name at least one"),
        ({"layers": ("last.pre_norm", "last.pre_norm")}, "each once"),
        ({"local_horizon": -1}, "local_horizon is -1"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"shard_mib": 0.0}, "shard_mib is 0.0"),
        ({"shard_mib": float("nan")}, "shard_mib is nan"),
    ],
)
def test_settings_that_no_target_can_follow_are_refused(
    tmp_path: Path, target: Path, chats: Path, setting: dict[str, object], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        extract(str(target), chats, tmp_path / "c", storage=StorageOptions(**setting))  # type: ignore[arg-type]
    assert not (tmp_path / "c").exists()


def test_a_damaged_part_of_the_survey_is_made_again_and_a_damaged_record_says_what_to_do(
    alone: Path, tmp_path: Path, target: Path, chats: Path
) -> None:
    out = tmp_path / "c"
    ranks(target, chats, out, [0], 2)
    [part] = out.glob(".survey-*/part-*.safetensors")
    part.write_bytes(b"")
    record = out / "shard-00000.json"
    content = record.read_bytes()
    record.write_text('{"name": "shard-00000.safetensors"}')
    with pytest.raises(
        ValueError, match=r"shard-00000.json: ShardRecord lacks .* delete it and run the extraction again"
    ):
        ranks(target, chats, out, [1], 2)
    record.write_bytes(content)
    ranks(target, chats, out, [1], 2)
    assert shas(out) == shas(alone)


def test_a_full_disk_is_explained_from_the_first_byte_on(
    tmp_path: Path, target: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, survey: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("draftsmith.data.cache.shared_survey._write", full)
    with pytest.raises(ValueError, match="free space and run the same command again"):
        ranks(target, chats, tmp_path / "c", [0], 2)


def test_each_rank_mends_its_own_shards(alone: Path, tmp_path: Path, target: Path, chats: Path) -> None:
    before = shas(alone)
    path = alone / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (alone / "shard-00002.safetensors").unlink()
    ranks(target, chats, alone, [1], 2)
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is missing"):
        HiddenStateCache(alone)
    ranks(target, chats, alone, [0], 2)
    assert shas(alone) == before


def test_a_cache_of_an_earlier_version_is_read_and_finished(alone: Path, target: Path, chats: Path) -> None:
    before = shas(alone)
    manifest = json.loads((alone / "manifest.json").read_text())
    del manifest["lengths_sha256"]
    (alone / "manifest.json").write_text(json.dumps(manifest))
    (alone / "lengths.safetensors").unlink()
    assert HiddenStateCache(alone).manifest.lengths_sha256 is None
    (alone / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": manifest["shards"][:1]}))
    extract(str(target), chats, alone, storage=StorageOptions(shard_mib=SMALL_SHARDS, max_length=120))
    assert shas(alone) == before


def test_lengths_are_written_with_a_complete_cache_and_vouched_for(alone: Path, chats: Path) -> None:
    opened = HiddenStateCache(alone)
    path = alone / "lengths.safetensors"
    assert opened.manifest.lengths_sha256 == sha256_file(path)
    lengths = read_lengths(path.read_bytes(), opened.manifest, str(path))
    assert lengths.dtype.name == "int32"
    assert lengths.tolist() == [len(sample.input_ids) for sample in opened]


def corpus_of(source: Path, tokenizer: object, split: str | None = None) -> Corpus:
    return Corpus(source, lambda: ChatTemplate(tokenizer), split, 120)  # type: ignore[arg-type]


def test_a_sample_is_read_alone_as_it_is_read_in_passing(chats: Path, tokenizer: object) -> None:
    chats.write_text("\n" + chats.read_text().replace("\n", "\n\n"))  # blank lines are passed over
    corpus = corpus_of(chats, tokenizer)
    survey, passing = corpus.survey(), list(corpus)
    assert list(survey.lengths) == [len(sample.input_ids) for sample in passing]
    assert corpus.samples(survey, 0, len(passing)) == passing
    assert corpus.samples(survey, 5, 7) == passing[5:7]
    chats.write_text(chats.read_text().replace("seven", "eleven plus one"))
    with pytest.raises(ValueError, match=r"chats.jsonl:\d+.* (was changed|not valid JSON)"):
        corpus.samples(survey, 0, len(passing))


def test_a_rank_tokenizes_its_own_part_of_the_survey_and_its_own_shards(
    tmp_path: Path, target: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "_PART_LINES", 2)
    read: list[str] = []
    real = Corpus._samples

    def noted(self: Corpus, row: dict[str, object], file: int, line: int) -> object:
        read.append(str(row["id"]))
        return real(self, row, file, line)

    monkeypatch.setattr(Corpus, "_samples", noted)
    ranks(target, chats, tmp_path / "c", [0], 2)
    first = len(read)
    shards = Manifest.load(tmp_path / "c").shards
    own = sum(shard.num_samples for shard in shards)
    # Alone so far, it surveyed all 16 rows, and read again none but the samples of its own shards.
    assert first == 16 + own
    ranks(target, chats, tmp_path / "c", [1], 2)
    # The survey was there: nothing is read but the samples of the other shards.
    assert len(read) - first == 15 - own


@given(part_lines=st.integers(1, 20), world_size=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_a_shared_survey_is_that_of_one_process(
    part_lines: int, world_size: int, tmp_path_factory: pytest.TempPathFactory, tokenizer: object
) -> None:
    folder = tmp_path_factory.mktemp("survey")
    rows = [
        {"id": str(number), "prompt_ids": [5] * (number % 7), "reply_ids": [6] * (number * 13 % 5), "split": "a"}
        for number in range(23)
    ]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = corpus_of(source, tokenizer).survey()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_PART_LINES", part_lines)
        surveys = [
            shared_survey(corpus_of(source, tokenizer), folder / "parts", Share(rank, world_size))
            for rank in reversed(range(world_size))
        ]
    assert len(list((folder / "parts").glob("part-*"))) == -(-23 // part_lines)
    assert all(survey == whole for survey in surveys)


def test_a_survey_that_is_cleared_away_while_it_is_read_or_written_is_made_again(
    tmp_path: Path, chats: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of another world size does so when it completes the cache."""
    monkeypatch.setattr(corpus_module, "_PART_LINES", 4)
    corpus, parts = corpus_of(chats, tokenizer), tmp_path / "parts"
    whole = shared_survey(corpus, parts, Share())
    cleared = []

    def clearing_once(real: Callable[..., object], name: str) -> Callable[..., object]:
        def clear(*arguments: object, **named: object) -> object:
            if name not in cleared and parts.exists():
                cleared.append(name)
                shutil.rmtree(parts)
            return real(*arguments, **named)

        return clear

    monkeypatch.setattr(safetensors, "safe_open", clearing_once(safetensors.safe_open, "read"))
    monkeypatch.setattr(os, "replace", clearing_once(os.replace, "write"))
    assert shared_survey(corpus, parts, Share()) == whole
    assert cleared == ["read", "write"]


def test_ranks_come_from_flags_or_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (ShareOptions().own(), resolved_device("cuda")) == (Share(0, 1), "cuda")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert ShareOptions().own() == Share(0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ShareOptions().own() == Share(5, 8)
    assert ShareOptions(rank=2, world_size=3).own() == Share(2, 3)
    assert [resolved_device(name) for name in ("cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:3", "cpu"]
    with pytest.raises(ValueError, match="rank 3 of 3 processes does not exist"):
        ShareOptions(rank=3, world_size=3).own()
    with pytest.raises(ValueError, match="give both or neither"):
        ShareOptions(rank=3).own()


@given(pieces=st.integers(0, 200), world_size=st.integers(1, 20))
@settings(deadline=None)
def test_shares_cover_every_piece_once(pieces: int, world_size: int) -> None:
    dealt = [piece for rank in range(world_size) for piece in Share(rank, world_size).own(pieces)]
    assert sorted(dealt) == list(range(pieces))


def test_ranks_with_another_template_are_refused(alone: Path, tmp_path: Path, target: Path, chats: Path) -> None:
    for name, text in (("a", TEMPLATE), ("b", TEMPLATE + "{# another #}")):
        (tmp_path / f"{name}.jinja").write_text(text)
    storage = StorageOptions(shard_mib=SMALL_SHARDS, max_length=120)
    out = tmp_path / "c"
    extract(
        str(target),
        chats,
        out,
        rendering=TemplateChoice(template=str(tmp_path / "a.jinja")),
        share=ShareOptions(rank=0, world_size=2),
        storage=storage,
    )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"another cache \(template_fingerprint: here"):
        extract(
            str(target),
            chats,
            out,
            rendering=TemplateChoice(template=str(tmp_path / "b.jinja")),
            share=ShareOptions(rank=1, world_size=2),
            storage=storage,
        )  # type: ignore[arg-type]
    extract(
        str(target),
        chats,
        out,
        rendering=TemplateChoice(template=str(tmp_path / "a.jinja")),
        share=ShareOptions(rank=1, world_size=2),
        storage=storage,
    )  # type: ignore[arg-type]
    names = [name for name in shas(alone) if name.startswith("shard-")]
    assert {name: shas(out)[name] for name in names} == {name: shas(alone)[name] for name in names}
