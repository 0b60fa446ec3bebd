"""A drafter that was trained in one mode and is measured in another is found, with what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctor_runs import Found, Run, skip_all_but
from tool_chats import tool_tokenizer

from draftsmith.data.corpus_survey import IDS_AS_GENERATED
from draftsmith.evaluate.doctor.case import NotChecked
from draftsmith.evaluate.doctor.doctor_command import Bounds
from draftsmith.evaluate.doctor.modes import check_mode
from draftsmith.evaluate.records import Sample


def case(trained: dict[str, int], *prompts: tuple[str, ...], mask: str = "words", before: str = "") -> Any:
    """What the check reads of a case: the cache's modes in 100 tokens, and the prompts' modes."""
    tokenizer = tool_tokenizer()
    ids = tokenizer.encode(before + "<|assistant|>No.")
    sample = SimpleNamespace(input_ids=torch.tensor(ids), loss_mask=torch.arange(len(ids)) >= len(ids) - 3)
    manifest = SimpleNamespace(modes=trained, num_labelled=100, identity=SimpleNamespace(mask=mask))
    samples = [Sample(str(number), "s", (1,), modes=own) for number, own in enumerate(prompts)]
    return SimpleNamespace(
        open_cache=SimpleNamespace(manifest=manifest),
        prompts=samples,
        samples=[sample],
        tokenizer=tokenizer,
        template=None,
        rendering=SimpleNamespace(template_name=None, template_args=None),
    )


def test_prompts_in_the_modes_of_the_text_are_fine() -> None:
    finding = check_mode(case({"thinking": 90, "not thinking": 10}, ("thinking",), ("not thinking",)))
    assert finding.verdict == "ok"
    assert finding.measured.endswith("trained on: thinking 90%, not thinking 10%")


@pytest.mark.parametrize(
    ("trained", "mode", "remedy"),
    [
        ({"not thinking": 100}, "thinking", "enable_thinking=true"),
        ({"thinking": 97, "not thinking": 3}, "not thinking", "enable_thinking=false"),
        ({"thinking": 100}, "tools", "prompts with `tools`"),
        ({"thinking": 100}, "long", "--max-length"),
    ],
)
def test_a_mode_that_the_text_lacks_is_a_fault_where_most_prompts_are_in_it(
    trained: dict[str, int], mode: str, remedy: str
) -> None:
    finding = check_mode(case(trained, (mode,)))
    assert finding.verdict == "fault"
    assert remedy in finding.remedy
    most = next(iter(trained))
    assert check_mode(case(trained, (mode,), (most,), (most,))).verdict == "warning"


def test_own_replies_without_thoughts_are_of_the_mode_that_their_prompts_asked_for() -> None:
    words = {"not thinking": 100}
    assert check_mode(case(words, ("thinking",), mask=IDS_AS_GENERATED)).verdict == "ok"
    closed = case(words, ("thinking",), mask=IDS_AS_GENERATED, before="<|assistant|>")
    closed.samples[0].input_ids = torch.tensor(closed.tokenizer.encode("<|assistant|><think></think>No."))
    closed.samples[0].loss_mask = torch.arange(len(closed.samples[0].input_ids)) >= 3
    assert check_mode(closed).verdict == "fault"


def test_without_prompts_or_modes_nothing_is_checked() -> None:
    with pytest.raises(NotChecked, match="name those of the evaluation"):
        check_mode(case({"thinking": 100}))
    with pytest.raises(NotChecked, match="extract it again"):
        check_mode(case({}, ("thinking",)))


def test_a_whole_run_finds_prompts_in_another_mode(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    rows = [
        {"id": "plain", "prompt_ids": [9, 8, 7]},
        *({"id": f"t{n}", "prompt_ids": [9, n], "tools": tools} for n in (8, 7)),
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finding = look(run.train / "drafter", prompts=prompts, bounds=Bounds(samples=4), skip=skip_all_but("mode"))["mode"]
    assert finding["verdict"] == "fault"
    assert "tools 67%; trained on: not thinking 100%" in finding["measured"]
    assert "prompts with `tools`" in finding["remedy"]
    fine = look(run.train / "drafter", prompts=run.held_out, bounds=Bounds(samples=4), skip=skip_all_but("mode"))[
        "mode"
    ]
    assert fine["verdict"] == "ok"
