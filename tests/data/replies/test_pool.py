"""`draftsmith data pool`: what of a source is kept, and that decoding with it gives the target's own replies."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from draftsmith.data.corpus import Corpus
from draftsmith.data.replies import pool_command as pool_module
from draftsmith.data.replies.pool_command import pool
from draftsmith.data.replies.reply_text import Replies
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import Target
from draftsmith.models.composed.shared_pool import load_pool
from draftsmith.models.composed.suffixes import GAP
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.tree.shapes import parse_shape


def write(path: Path, *answers: str) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_replies_are_kept_in_order_and_prompts_are_not(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool(write(tmp_path / "chats.jsonl", "four five", "six"), str(target), tmp_path / "pool")
    tokenizer = load_tokenizer(str(target))
    kept = load_pool(tmp_path / "pool")
    assert kept.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    texts: list[list[int]] = [[]]
    for token in kept.tokens_T.tolist():
        if token == GAP:
            texts.append([])
        else:
            texts[-1].append(token)
    said = [tokenizer.decode(text, skip_special_tokens=True).strip() for text in texts[:-1]]
    assert said == ["four five", "six"]
    assert texts[-1] == []
    assert f"{kept.num_tokens} of {kept.num_tokens} tokens in" in capsys.readouterr().out
    record = json.loads((tmp_path / "pool" / "provenance.json").read_text())
    assert record["config"]["tokens"] == 2**14


def test_the_end_of_a_long_source_is_kept(target: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", *(f"number {n}" for n in range(50)))
    pool(source, str(target), tmp_path / "whole")
    pool(source, str(target), tmp_path / "short", tokens=20)
    whole, short = load_pool(tmp_path / "whole").tokens_T, load_pool(tmp_path / "short").tokens_T
    assert len(short) == 20
    assert short.tolist() == whole[-20:].tolist()


def test_the_same_command_replaces_its_own_folder_and_no_other(target: Path, tmp_path: Path) -> None:
    for answer in ("four five", "six"):
        pool(write(tmp_path / "chats.jsonl", answer), str(target), tmp_path / "pool")
    tokenizer = load_tokenizer(str(target))
    assert "six" in tokenizer.decode(load_pool(tmp_path / "pool").tokens_T.clamp(min=0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine"):
        pool(tmp_path / "chats.jsonl", str(target), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_bad_numbers_and_sources_without_replies_are_errors(target: Path, tmp_path: Path) -> None:
    for tokens in (1, 2**17 + 1):
        with pytest.raises(
            ValueError, match=f"a shared pool of {tokens} tokens is asked for; it takes from 2 to 131072"
        ):
            pool(write(tmp_path / "a.jsonl", "four"), str(target), tmp_path / "pool", tokens=tokens)
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "one"}]}\n')
    with pytest.raises(ValueError, match="the texts of a shared pool have no token; give replies of this target"):
        pool(tmp_path / "b.jsonl", str(target), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_a_number_out_of_range_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a shared pool of 1 tokens is asked for"):
        pool(tmp_path / "no source", str(tmp_path / "no target"), tmp_path / "pool", tokens=1)


class Run(list[int]):
    """A list that can be watched."""


def test_no_more_of_the_source_is_in_memory_than_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive, most = set[int](), 0

    def runs(before: int, dropped: object) -> Iterator[Run]:
        nonlocal most
        for number in range(100):
            run = Run([number, 7, 7])
            alive.add(id(run))
            weakref.finalize(run, alive.discard, id(run))
            most = max(most, len(alive))
            yield run
            del run

    source = tmp_path / "source.jsonl"
    replies = Replies(cast(Corpus, SimpleNamespace(source=source, fingerprint="f")), 200, "")
    monkeypatch.setattr(Replies, "runs", lambda self, before, dropped: runs(before, dropped))
    monkeypatch.setattr(pool_module, "replies_of", lambda *args: replies)
    source.write_text("{}\n")
    pool(source, "target", tmp_path / "pool", tokens=20)
    assert most <= 3
    assert "15 of 300 tokens in" in capsys.readouterr().out


def test_a_drafter_that_names_the_pool_drafts_from_it_and_changes_no_reply(target: Path, tmp_path: Path) -> None:
    lm, request = Target.load(str(target)), GenerationSettings(max_new_tokens=24)
    prompts = [[5, 9, 30], [40, 7]]
    plain = Engine(lm).generate(prompts, request)
    rows = [
        {"id": str(number), "prompt_ids": prompt, "reply_ids": reply.token_ids}
        for number, (prompt, reply) in enumerate(zip(prompts, plain, strict=True))
    ]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool(tmp_path / "replies.jsonl", str(target), tmp_path / "pool")
    assert load_pool(tmp_path / "pool").num_tokens == sum(len(reply.token_ids) for reply in plain)
    (tmp_path / "own").mkdir()
    fields = {"model_type": "draftsmith_suffix", "shared_pool": "../pool"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(fields))
    engine = Engine(lm, load_drafter(tmp_path / "own"), parse_shape("1x6"))
    replies = engine.generate(prompts, request)
    assert [each.token_ids for each in replies] == [each.token_ids for each in plain]
    alone = Engine(lm, load_drafter(Path("embedded:suffix")), parse_shape("1x6")).generate(prompts, request)
    assert sum(len(each.accepted) for each in replies) < sum(len(each.accepted) for each in alone)
