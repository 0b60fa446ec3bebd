"""What the comparison with vLLM makes of two engines' replies, and of the folders it decodes; vLLM itself is not needed."""

import json
import os
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.export import vllm_decoding, vllm_layouts
from benchmarks.export.vllm_conformity import RESULT
from benchmarks.export.vllm_decoding import Job, decoded_there, inside, named_folder, outcome, refusal, results_of
from benchmarks.export.vllm_layouts import CASES, CHANGED, DRAFTERS, TARGET, changed, mimo, rename_as_vllm, with_layer
from benchmarks.export.vllm_page import Compared, Decoded, Refused, page
from draftsmith.export.layouts.layouts import load_any, other_software_layouts, write
from draftsmith.models import Target
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.drafters.registry import all_families
from draftsmith.models.families.heads import HeadsFamily
from draftsmith.models.families.riders.mtp import MtpHead
from draftsmith.models.files.model_folder import openable_name
from draftsmith.models.target.target import TargetEnds

OURS = Decoded([[5, 6, 7], [8, 9]], 2)


def text(theirs: Decoded | Refused, **named: Any) -> str:
    row = Compared("eagle", "runs/served", OURS, theirs, **named)
    return page("embedded:target", 4, [row], ["script", "--limit", "2"], "0.32.0")


def test_equal_replies_and_cycles_agree() -> None:
    assert Compared("eagle", "runs/served", OURS, Decoded([[5, 6, 7], [8, 9]], 2)).agrees
    assert "| `runs/served` | `eagle` | 2 of 2 | 5 | 1.50 | 2 | 2 |" in text(OURS)
    assert "differ" not in text(OURS)
    assert "`python -m benchmarks.export.vllm_decoding --limit 2`" in text(OURS)


def test_the_first_difference_is_named() -> None:
    theirs = Decoded([[5, 6, 7], [8, 3]], 2)
    assert not Compared("eagle", "runs/served", OURS, theirs).agrees
    assert "| 1 of 2 |" in text(theirs)
    assert "reply 1 differs from token 1 on" in text(theirs)
    assert "reply 1 differs from token 2 on" in text(Decoded([[5, 6, 7], [8, 9, 4]], 2))
    assert "the numbers of cycles differ" in text(Decoded(OURS.replies, 3))


def test_a_drafter_and_the_settings_of_the_engine_are_named() -> None:
    row = text(OURS, drafter="P-EAGLE", settings={"parallel_drafting": True})
    assert "| P-EAGLE | `runs/served` | `eagle` `parallel_drafting: true` | 2 of 2 |" in row


def test_a_refusal_is_listed_with_the_engines_words_and_not_among_the_decoded() -> None:
    shown = text(Refused("ValueError: no such | method\nhere", "vllm/config/x.py:7"), drafter="DSpark")
    assert "| DSpark | `runs/served` | `eagle` | ValueError: no such / method here | `vllm/config/x.py:7` |" in shown
    assert "of 2 |" not in shown


def test_a_result_is_read_among_other_lines_and_may_be_missing() -> None:
    assert results_of(f"INFO loading\n{RESULT}{json.dumps([1, asdict(OURS)])}\nbye\n") == {1: OURS}
    assert results_of("INFO loading\nkilled\n") == {}
    assert outcome(asdict(Refused("no", "x.py:1"))) == Refused("no", "x.py:1")


def test_an_engine_that_says_nothing_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = [Job("t", folder, "eagle", [[1]], 4, 4) for folder in ("a", "b")]
    ended = subprocess.CompletedProcess([], 3, f"{RESULT}{json.dumps([1, asdict(OURS)])}\n")
    monkeypatch.setattr(vllm_decoding.subprocess, "run", lambda *_, **__: ended)
    first, second = decoded_there(Path("python"), jobs, tmp_path / "work" / "vllm.log")
    assert isinstance(first, Refused)
    assert first.words.startswith("the process ended with 3 and no result; ")
    assert second == OURS


def test_a_job_that_crashes_ends_alone(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = types.ModuleType("vllm")
    engine.LLM = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", engine)
    monkeypatch.setattr(
        vllm_decoding, "decode", lambda job: os._exit(7) if job.drafter == "a" else Refused(job.drafter)
    )
    inside([Job("t", folder, "eagle", [[1]], 4, 4) for folder in ("a", "b")])
    assert results_of(capfd.readouterr().out) == {0: Refused("the process ended with 7"), 1: Refused("b")}


def test_the_words_of_a_refused_config_are_those_of_its_first_fault() -> None:
    class Listed(ValueError):
        def errors(self) -> list[dict[str, Any]]:
            return [{"msg": "Value error, not here", "ctx": {"error": RuntimeError("not here")}}]

    assert refusal(Listed("2 faults")).words == "RuntimeError: not here"
    assert refusal(KeyError("size")).words == "KeyError: 'size'"


def test_a_refusal_names_the_line_of_the_package_that_raised_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(2, 2)(torch.zeros(3))
    assert refusal(caught.value).place.startswith("torch/nn/modules/linear.py:")


def test_a_folder_needs_its_method() -> None:
    assert named_folder("eagle3=runs/a=b") == ("eagle3", "runs/a=b")
    with pytest.raises(SystemExit, match="names no method of vLLM; write eagle=runs/served"):
        named_folder("runs/served")


def test_every_layout_whose_card_names_vllm_is_decoded() -> None:
    named = {
        layout.name
        for family in all_families()
        for layout in other_software_layouts(family)
        if layout.commands is not None and "vLLM" in layout.commands("org/name", 4)
    }
    assert named <= {case.layout for case in CASES}
    assert len({case.key for case in CASES}) == len(CASES)
    assert {case.drafter for case in CASES} == {*DRAFTERS, "embedded:draft_lm"}


@pytest.mark.parametrize("name", [name for name in CHANGED if name.startswith("EAGLE-3")])
def test_a_drafter_begins_with_the_fields_that_no_setting_has(name: str) -> None:
    drafter = changed(name, TARGET)
    assert {field: getattr(drafter.config, field) for field in CHANGED[name]} == CHANGED[name]


def test_a_medusa_under_vllms_names_is_the_same_drafter(target: Path, tmp_path: Path) -> None:
    ends = TargetEnds.load(str(target))
    drafter = HeadsFamily(num_blocks=2).build(ends, None, 3, "")
    for name in ("official", "renamed"):
        (tmp_path / name).mkdir()
        write(drafter, tmp_path / name, "medusa", ends)
    rename_as_vllm(tmp_path / "renamed")
    official, renamed = (load_any(tmp_path / name, ends).state_dict() for name in ("official", "renamed"))
    assert official.keys() == renamed.keys()
    assert all(torch.equal(official[name], renamed[name]) for name in official)


def test_the_embedded_target_as_a_mimo_computes_the_same_and_holds_its_layer(tmp_path: Path) -> None:
    folder = Path(mimo(tmp_path / "mimo"))
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)(ids).logits
            for name in (openable_name(TARGET), folder)
        ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    ends = TargetEnds.load(str(folder))
    drafter = changed("MTP head", str(folder))
    (tmp_path / "layer").mkdir()
    write(drafter, tmp_path / "layer", "mtp", ends)
    served = with_layer(folder, tmp_path / "layer", tmp_path / "served")
    assert json.loads((served / "config.json").read_text())["architectures"] == ["MiMoForCausalLM"]
    read = load_drafter(served, target=TargetBond(Target.load(str(served)).ends))
    assert isinstance(read, MtpHead)
    assert all(torch.equal(tensor, drafter.state_dict()[name]) for name, tensor in read.state_dict().items())
    assert vllm_layouts.MIMO in {case.target for case in CASES}
