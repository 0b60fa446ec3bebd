"""`draftsmith doctor` from outside: a healthy run has no fault, whatever its family, dtype and place."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from doctor_runs import Found, Run, faults, labelled_ids, skip_all_but
from tiny import EOS
from torch import Tensor

from draftsmith.cli import main
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.evaluate.doctor.case import Use
from draftsmith.evaluate.doctor.doctor_command import NAMES, Bounds
from draftsmith.models import Eagle, Eagle3, Target, TargetEnds


def test_a_healthy_run_has_no_fault(run: Run, look: Callable[..., Found], capsys: pytest.CaptureFixture[str]) -> None:
    found = look(run.train, prompts=run.held_out, use=Use(draft_length=2, temperature=0.0))
    assert list(found) == [name for name in NAMES if name != "judge"]  # which nobody asked for
    assert faults(found) == []
    unchecked = [name for name, one in found.items() if one["verdict"] == "not checked"]
    assert unchecked == []
    assert found["re-projection"]["figures"]["as named"] == 1.0
    assert found["shifts"]["figures"]["labels +0"] > 0.5
    assert found["train-serve"]["figures"]["agreement"] == 1.0
    # Greedy chains on greedy replies: the promise is not an estimate.
    assert found["acceptance"]["figures"]["trained prompts"] == pytest.approx(
        found["acceptance"]["figures"]["promised"]
    )
    assert all(one["remedy"] for one in found.values() if one["verdict"] == "warning")
    text = capsys.readouterr().out
    assert "re-projection" in text
    assert "<|user|>" in text
    assert "«" in text  # what is trained on is marked


def test_its_export_is_held_to_the_folder_that_it_was_made_of(run: Run, look: Callable[..., Found]) -> None:
    found = look(run.exported, skip=skip_all_but("drafter-file", "train-serve", "shifts"))
    assert [found[name]["verdict"] for name in ("drafter-file", "train-serve", "shifts")] == ["ok"] * 3
    assert str(run.train / "drafter") in found["drafter-file"]["measured"]


def test_the_ends_alone_find_the_same_without_a_forward(run: Run, look: Callable[..., Found]) -> None:
    found = look(run.train, ends_only=True, skip=["overfit"])
    assert faults(found) == []
    assert found["re-projection"]["verdict"] == "ok"
    assert found["states"]["verdict"] == "not checked"
    assert "--ends-only" in found["states"]["measured"]


def test_the_command_exits_with_1_where_something_is_at_fault(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--drafter", str(run.train), "--skip", *skip_all_but("fingerprints")]
    assert main(words) == 0
    assert f"1 ok, {len(NAMES) - 2} not checked" in capsys.readouterr().out
    assert main([*words, "--target", str(run.target), "--cache", str(run.replies)]) == 1
    assert "no hidden-state cache" in capsys.readouterr().err
    config = run.target / "config.json"
    before = config.read_bytes()
    assert main([*words, "--out", str(config)]) == 1
    assert "name another file" in capsys.readouterr().err
    assert config.read_bytes() == before


def test_the_same_seed_draws_the_same_samples(run: Run, look: Callable[..., Found]) -> None:
    only = skip_all_but("shifts", "sound-states")
    first, again = (look(run.train, bounds=Bounds(samples=5, seed=3), skip=only) for _ in range(2))
    assert first == again
    assert first["sound-states"]["figures"]["samples"] == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3"])
def test_a_cache_of_fewer_bits_is_no_fault(run: Run, look: Callable[..., Found], tmp_path: Path, dtype: Any) -> None:
    extract(str(run.target), run.replies, tmp_path / "narrow", storage=StorageOptions(dtype=dtype))
    found = look(run.train, cache=str(tmp_path / "narrow"), skip=["overfit"])
    assert faults(found) == []
    assert [found[name]["verdict"] for name in ("states", "re-projection", "own-text")] == ["ok"] * 3


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
def test_every_family_can_be_looked_at(run: Run, look: Callable[..., Found], tmp_path: Path, family: str) -> None:
    layers = ["layer.0.output", "layer.1.output", "last.pre_norm"]
    extract(
        str(run.target), run.replies, tmp_path / "cache", storage=StorageOptions(dtype="float32", layers=tuple(layers))
    )
    ends = TargetEnds.load(str(run.target))
    torch.manual_seed(0)
    ids = torch.tensor(sorted({*labelled_ids(run), EOS}))
    drafter = (
        Eagle.for_target(ends, num_draft_steps=3)
        if family == "eagle"
        else Eagle3.for_target(ends, layers=layers, draft_token_ids=ids)
    )
    drafter.save_pretrained(tmp_path / "drafter")
    found = look(tmp_path / "drafter", cache=str(tmp_path / "cache"))
    assert set(faults(found)) <= {"shifts"}  # it is fresh: an EAGLE-1 begins by handing on the state that it is given
    for name in ("overfit", "train-serve", "acceptance", "draft-vocabulary"):
        assert found[name]["verdict"] == "ok", found[name]


def test_a_run_with_the_target_in_the_loop_is_looked_at_through_fresh_states(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path]
) -> None:
    def forget(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("hidden.")]:
            del tensors[name]

    tokens = str(plant(forget, layers=[]))
    found, whole = look(run.train, cache=tokens), look(run.train)
    assert faults(found) == []
    assert [found[name]["verdict"] for name in ("sound-states", "states", "re-projection")] == ["not checked"] * 3
    for name in ("labels", "own-text", "shifts", "steps", "train-serve", "acceptance"):
        assert found[name]["figures"] == pytest.approx(whole[name]["figures"], abs=1e-4)
    assert "--ends-only" in look(run.train, cache=tokens, ends_only=True)["shifts"]["measured"]


def test_a_cache_behind_a_url_is_sampled_and_not_read_whole(
    run: Run, look: Callable[..., Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fetched"))
    folder = fsspec.filesystem("memory")
    for file in run.cache.iterdir():
        folder.pipe_file(f"/doctor/{file.name}", file.read_bytes())
    rows = run.held_out.read_text().splitlines() + run.prompts.read_text().splitlines()[:1]
    (tmp_path / "test.jsonl").write_text("\n".join(rows) + "\n")
    options = {"cache": "memory://doctor", "prompts": tmp_path / "test.jsonl", "skip": ["overfit", "acceptance"]}
    found = look(run.train, **options)
    assert faults(found) == []
    assert found["states"]["verdict"] == "ok"
    assert "--source" in found["overlap"]["measured"]
    found = look(run.train, **options, source=run.replies)
    assert faults(found) == ["overlap"]
    assert found["duplicates"]["verdict"] == "ok"


def test_the_page_explains_every_check() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "how-to" / "measure" / "doctor.md").read_text(
        encoding="utf-8"
    )
    explained = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert sorted(explained) == sorted(NAMES)
    told = page.partition("## What each finding means")[2].partition("\n## ")[0]
    headings = ", ".join(re.findall(r"^\*\*(.*?)\.\*\*", told, re.MULTILINE))
    assert sorted(headings.split(", ")) == sorted(NAMES)


def test_the_target_is_loaded_once(run: Run, look: Callable[..., Found], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = Target.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Target, "load", classmethod(lambda cls, *a, **k: (loads.append(a[0]), load(cls, *a, **k))[1]))
    look(run.train, prompts=run.held_out)
    assert loads == [str(run.target)]
