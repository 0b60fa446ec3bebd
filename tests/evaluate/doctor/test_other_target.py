"""A target, chat template or use that differs from that of training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_runs import Found, Run, faults, save_drafter, skip_all_but
from tiny import save_target

from draftsmith.data.cache.extract import extract
from draftsmith.data.prompts import PromptSelection
from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.respond import respond
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.evaluate.doctor.case import Use
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.prompt_template import TemplateChoice


def test_another_target_and_another_template(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    other = save_target(tmp_path / "other", seed=9)
    found = look(run.train, target=str(other), skip=skip_all_but("fingerprints", "states"))
    assert faults(found) == ["fingerprints", "states"]
    assert any("the cache names the target" in line for line in found["fingerprints"]["details"])
    shutil.copytree(run.target, tmp_path / "same")
    tokenizer = load_tokenizer(str(run.target))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "same")
    found = look(run.train, target=str(tmp_path / "same"), skip=skip_all_but("fingerprints"))
    assert found["fingerprints"]["verdict"] == "warning"
    assert "rendered otherwise" in found["fingerprints"]["remedy"]


@pytest.fixture
def alike(run: Run, tmp_path: Path) -> Path:
    """A template file that renders as the tokenizer's own does."""
    path = tmp_path / "alike.jinja"
    path.write_text(load_tokenizer(str(run.target)).chat_template + "{# alike #}")
    return path


def test_a_cache_of_conversations_is_held_to_the_template_that_is_given(
    run: Run, look: Callable[..., Found], tmp_path: Path, alike: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "He has seven apples."}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row) + "\n")
    only = skip_all_but("fingerprints")
    for template, measured in ((str(alike), "5 compared, all equal"), ("none", "5 compared, all equal")):
        cache = str(tmp_path / Path(template).stem)
        extract(str(run.target), tmp_path / "talk.jsonl", Path(cache), rendering=TemplateChoice(template=template))
        found = look(run.train, cache=cache, rendering=TemplateChoice(template=template), skip=only)["fingerprints"]
        assert (found["verdict"], found["measured"]) == ("ok", measured)
    found = look(run.train, cache=cache, rendering=TemplateChoice(template=str(alike)), skip=only)["fingerprints"]
    assert (found["verdict"], found["measured"]) == ("warning", "1 of 5 differ")
    found = look(run.train, cache=cache, skip=only)["fingerprints"]
    assert (found["verdict"], found["measured"]) == ("ok", "4 compared, all equal; chat template not compared")
    assert "give doctor the same --template" in found["details"][0]


def test_replies_kept_as_ids_are_held_to_the_template_that_they_were_rendered_by(
    run: Run, look: Callable[..., Found], tmp_path: Path, alike: Path
) -> None:
    only, equal = skip_all_but("fingerprints"), ("ok", "7 compared, all equal")
    replies, other = tmp_path / "replies", str(alike)
    respond(
        str(run.target),
        run.prompts,
        replies,
        reply=ReplyOptions(max_new_tokens=2),
        sampling=SamplingOverrides(temperature=0.0),
        selection=PromptSelection(limit=2),
        rendering=TemplateChoice(template=other),
    )

    def measured(cache: str, template: str | None) -> tuple[str, str]:
        found = look(run.train, cache=str(tmp_path / cache), rendering=TemplateChoice(template=template), skip=only)[
            "fingerprints"
        ]
        return found["verdict"], found["measured"]

    untold = ("ok", "6 compared, all equal; chat template not compared")
    for name, template in (("told", other), ("default", None)):
        extract(str(run.target), replies, tmp_path / name, rendering=TemplateChoice(template=template))
        assert measured(name, other) == equal
        assert measured(name, None) == untold
        assert measured(name, "none") == ("warning", "1 of 7 differ")
    extract(str(run.target), run.replies, tmp_path / "own", rendering=TemplateChoice(template=other))
    assert measured("own", None) == equal  # the replies were rendered by the tokenizer's


def test_states_of_few_bits_and_whole_weights_are_told_apart(
    run: Run, look: Callable[..., Found], plant: Callable[..., Path]
) -> None:
    cache = str(plant(lambda tensors: None, target_quantization="4bit"))
    found = look(run.train, cache=cache, skip=skip_all_but("fingerprints"))["fingerprints"]
    assert (found["verdict"], found["measured"]) == ("warning", "1 of 9 differ")
    assert f"the cache names the weights 4bit, {run.target} has whole" in found["details"]
    assert "--quantization" in found["remedy"]


def test_use_that_differs_from_training(run: Run, look: Callable[..., Found], tmp_path: Path) -> None:
    only = skip_all_but("draft-length", "temperature", "score-scale")
    found = look(run.train, use=Use(draft_length=8, temperature=1.0), skip=only)
    assert [found[name]["verdict"] for name in ("draft-length", "temperature")] == ["warning", "warning"]
    assert look(save_drafter(run, tmp_path / "fresh"), skip=only)["score-scale"]["verdict"] == "warning"
