"""Folders and files in disorder, and what the doctor cannot look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doctor_runs import Found, Run, faults, skip_all_but, with_record
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith import provenance
from draftsmith.evaluate.doctor.doctor_command import Bounds, doctor
from draftsmith.export.export_command import export
from draftsmith.models import Eagle, ReDrafter, TargetEnds


@pytest.mark.parametrize("content", [{"config": None}, {"config": {"data": None, "lr": None, "drafter": None}}])
def test_a_record_without_paths_leaves_what_the_folder_tells(
    run: Run, look: Callable[..., Found], tmp_path: Path, content: Any
) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "drafter")
    (tmp_path / "drafter" / provenance.FILE_NAME).write_text(json.dumps(content))
    found = look(tmp_path / "drafter")
    assert faults(found) == []
    assert "no cache is known" in found["states"]["measured"]
    found = look(tmp_path / "drafter", cache=str(run.cache), skip=["overlap", "duplicates"])
    assert faults(found) == []
    assert found["overfit"]["verdict"] == "ok"


def test_a_record_that_is_no_object_is_named(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "drafter")
    (tmp_path / "drafter" / provenance.FILE_NAME).write_text("[]")
    with pytest.raises(ValueError, match=r"provenance\.json is not a JSON object but list"):
        doctor(str(tmp_path / "drafter"))


def test_a_cache_that_was_deleted_is_named(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    folder = with_record(run, tmp_path / "moved", data={"cache": "/gone/cache"})
    assert "/gone/cache" in look(folder, skip=skip_all_but("labels"))["labels"]["measured"]


def test_nothing_named_is_not_called_equal(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    ReDrafter.for_target(TargetEnds.load(str(run.target))).save_pretrained(tmp_path / "unbound")
    config = json.loads((tmp_path / "unbound" / "config.json").read_text()) | {"target_fingerprint": ""}
    (tmp_path / "unbound" / "config.json").write_text(json.dumps(config))
    found = look(tmp_path / "unbound", target=str(run.target), skip=skip_all_but("fingerprints"))["fingerprints"]
    assert found["verdict"] == "not checked"


def test_a_folder_of_other_software_without_a_record_is_not_called_equal(
    run: Run, look: Callable[..., Found], tmp_path: Path
) -> None:
    Eagle.for_target(TargetEnds.load(str(run.target))).save_pretrained(tmp_path / "drafter")
    export(tmp_path / "drafter", tmp_path / "served", str(run.target), layout="eagle")
    there = {"target": str(run.target), "skip": skip_all_but("fingerprints", "steps")}
    assert look(tmp_path / "served", **there)["fingerprints"]["verdict"] == "ok", (
        "the record of the export names the target"
    )
    (tmp_path / "served" / provenance.FILE_NAME).unlink()
    assert look(tmp_path / "served", **there)["fingerprints"]["verdict"] == "not checked"


def test_weights_that_were_cut_off_are_answered_in_words(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is cut off .*; export it again"):
        doctor(str(tmp_path / "cut"))


def test_a_drafter_that_is_not_whole_is_not_taken_for_another_layout(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.train / "drafter", tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["rnn_u.bias"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"rnn_u\.bias is missing") as caught:
        doctor(str(tmp_path / "part"))
    assert "another software" not in str(caught.value)


def test_ids_of_another_tokenizer_are_refused_before_the_target_reads_them(
    run: Run, plant: Callable[..., Path], tmp_path: Path
) -> None:
    def foreign(tensors: dict[str, Tensor]) -> None:
        tensors["input_ids"][0] = 5000

    with pytest.raises(ValueError, match=r"holds the token id 5000; ids must be .* below the vocabulary of 300"):
        doctor(str(run.train), cache=str(plant(foreign)))
    (tmp_path / "foreign.jsonl").write_text(json.dumps({"id": "a", "prompt_ids": [5, 999]}) + "\n")
    with pytest.raises(ValueError, match=r"no prompt is left: .* the first is a: a token id that is not below .* 300"):
        doctor(str(run.train), prompts=tmp_path / "foreign.jsonl")
    shutil.copytree(run.replies, tmp_path / "replies")
    settings = json.loads((tmp_path / "replies" / "settings.json").read_text()) | {"tokenizer_fingerprint": "0" * 64}
    (tmp_path / "replies" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds token ids of the tokenizer 0000"):
        doctor(str(run.train), source=tmp_path / "replies")


def test_a_broken_line_of_the_text_is_left_out_and_named(
    run: Run, look: Callable[..., Found], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (run.replies / "responses.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(rows + "{broken\n")
    found = look(run.train, source=tmp_path / "text.jsonl", skip=skip_all_but("labels", "duplicates"))
    assert "text.jsonl:17: not valid JSON" in "".join(capsys.readouterr())
    assert found["duplicates"]["verdict"] == "ok"
    assert found["labels"]["figures"]["labelled"] > 0


def test_a_draft_lm_is_told_what_does_not_concern_it(look: Callable[..., Found], run: Run) -> None:
    found = look(run.target, target=str(run.target), cache=str(run.cache), skip=["duplicates"])
    assert found["overfit"]["verdict"] == "not checked"
    assert "draft LM" in found["train-serve"]["measured"]
    assert found["own-text"]["verdict"] == "ok"


def test_without_a_cache_the_checks_that_need_one_say_so(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    gone = {"data": {"cache": str(tmp_path / "gone")}}
    found = look(with_record(run, tmp_path / "moved", **gone), prompts=run.held_out)
    assert {name for name, one in found.items() if "--cache" in one["measured"]} >= {
        "states",
        "labels",
        "overfit",
        "overlap",
    }
    assert found["fingerprints"]["verdict"] == "ok"


def refusals() -> Iterator[tuple[str, dict[str, Any], str]]:
    yield "train", {"skip": ["overlaps"]}, "Did you mean overlap"
    yield "replies", {}, "holds no drafter"


@pytest.mark.parametrize(("place", "options", "message"), list(refusals()))
def test_mistakes_are_answered_in_words(run: Run, place: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        doctor(str(getattr(run, place)), **options)


def test_no_sample_is_too_few() -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        Bounds(samples=0)


def test_a_folder_in_another_layout_is_examined_as_it_is(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    Eagle.for_target(TargetEnds.load(str(run.target))).save_pretrained(tmp_path / "drafter")
    export(tmp_path / "drafter", tmp_path / "served", str(run.target), layout="eagle")
    shown = look(tmp_path / "served", cache=str(run.cache), skip=skip_all_but("fingerprints", "steps", "train-serve"))
    assert shown["train-serve"]["verdict"] == "ok"
    assert shown["steps"]["verdict"] != "not checked"
