import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, save_target
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.data.cache.extract import HiddenStateCache, extract
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.data.corpus import source_files
from draftsmith.data.prompts import Prompt, prompts, read_prompts
from draftsmith.data.replies import engine_choice
from draftsmith.data.replies.dialogues import Dialogue
from draftsmith.data.replies.reply_files import write_replies
from draftsmith.data.replies.reply_plan import BatchOptions, make_plan
from draftsmith.data.replies.reply_settings import SamplingOverrides, reply_settings
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.data.replies.respond import respond
from draftsmith.data.replies.server_source import ServerOptions
from draftsmith.data.replies.vllm_source import VllmOptions
from draftsmith.data.shared_work import Share, ShareOptions
from draftsmith.decode.constraints import Constraints
from draftsmith.decode.sampling import GenerationSettings, ReplyOptions
from draftsmith.json_rows import parse_object
from draftsmith.models import ReDrafter, TargetEnds, tokenizer_fingerprint
from draftsmith.models.target.options import TargetOptions


class CountingEngine:
    """Replies with one token a request that says how long the prompt was, then the end token."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.batches: list[list[list[int]]] = []
        self.fail_after = fail_after

    def reply(self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(prompts)
        return [Reply([10 + len(prompt) % 200, EOS], "eos") for prompt in prompts]


def asking(*turns: str, name: str = "p") -> Prompt:
    return Prompt(name, tuple(Message(role="user", content=turn) for turn in turns), "train", "test")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate(tokenizer)


SETTINGS = GenerationSettings(max_new_tokens=8, eos_token_ids=(EOS,))
SIXTEEN = ReplyOptions(max_new_tokens=16)
MANY = [asking("word " * (n % 7 + 1) + str(n), name=f"p{n}") for n in range(20)]


def test_each_prompt_gets_one_row_whatever_the_batches(tmp_path: Path, chat: ChatTemplate) -> None:
    for rows in (1, 3, 100):
        plan = make_plan(MANY, chat, SETTINGS, 128, BatchOptions(batch_rows=rows, batch_tokens=10_000))
        write_replies(tmp_path / str(rows), Share(), plan, chat, CountingEngine(), {})
    written = [sorted(rows_of(tmp_path / str(rows) / "responses.jsonl"), key=lambda r: r["id"]) for rows in (1, 3, 100)]
    assert {row["id"] for row in written[0]} == {p.id for p in MANY}
    assert written[0] == written[1] == written[2]


def test_batches_hold_the_row_and_token_budgets_longest_first(chat: ChatTemplate) -> None:
    plan = make_plan(MANY, chat, SETTINGS, 128, BatchOptions(batch_rows=4, batch_tokens=80))
    sizes = [[len(ids) for _, ids in batch] for batch in plan.batches]
    assert all(len(batch) <= 4 and len(batch) * (batch[0] + 8) <= 80 for batch in sizes)
    flat = [size for batch in sizes for size in batch]
    assert flat == sorted(flat, reverse=True)
    assert len(flat) == len(MANY)


def test_later_turns_stand_on_the_targets_own_replies_and_ids_are_never_encoded_again(
    tmp_path: Path, chat: ChatTemplate
) -> None:
    tokenizer = chat.tokenizer
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "apples"]
    assert tokenizer.encode("apples") != spelled

    class Speller:
        def reply(self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
            return [Reply([*spelled, EOS], "eos") for _ in prompts]

    plan = make_plan([asking("What?", "And?")], chat, SETTINGS, 128, BatchOptions(batch_rows=4, batch_tokens=1000))
    write_replies(tmp_path, Share(), plan, chat, Speller(), {})
    row = rows_of(tmp_path / "responses.jsonl")[0]
    first, second = row["turns"]
    start = len(first["prompt_ids"])
    assert second["prompt_ids"][: start + 7] == [*first["prompt_ids"], *spelled, EOS]
    assert [m["content"] for m in row["messages"]] == ["What?", "apples", "And?", "apples"]
    assert tokenizer.decode(second["prompt_ids"][start:]) == "apples<|end|>\n<|user|>\nAnd?\n<|assistant|>\n"


def test_a_reply_with_a_nul_in_it_is_a_row_that_can_be_read_with_its_ids(chat: ChatTemplate) -> None:
    nul = chat.tokenizer.convert_tokens_to_ids("\u0100")  # as byte-level tokenizers write it
    assert chat.tokenizer.decode([nul]) == "\0"
    dialogue = Dialogue(asking("How many?"), [1, 2])
    dialogue.take(Reply([nul, EOS], "eos"), chat, context=None)
    row = parse_object(json.dumps(dialogue.row(GenerationSettings())).encode())
    assert row["turns"][0]["reply_ids"] == [nul, EOS]
    assert row["messages"][-1]["content"] == "\ufffd"


def test_a_prompt_longer_than_the_context_is_dropped_with_a_record(tmp_path: Path, chat: ChatTemplate) -> None:
    long = asking("apples " * 100, name="long")
    plan = make_plan([long, asking("Hi")], chat, SETTINGS, 64, BatchOptions(batch_rows=4, batch_tokens=1000))
    write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {})
    assert [row["id"] for row in rows_of(tmp_path / "responses.jsonl")] == ["p"]
    dropped = rows_of(tmp_path / "dropped.jsonl")
    assert dropped[0]["id"] == "long"
    assert "context 64: no room for a reply" in dropped[0]["reason"]


def test_nothing_but_prompts_too_long_is_an_error(chat: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="none of 1 prompts can be answered: the prompt has"):
        make_plan([asking("apples " * 100)], chat, SETTINGS, 64, BatchOptions(batch_rows=4, batch_tokens=1000))


def test_a_conversation_that_fills_the_context_ends_there(tmp_path: Path, chat: ChatTemplate) -> None:
    plan = make_plan([asking("Hi", "apples " * 60)], chat, SETTINGS, 64, BatchOptions(batch_rows=4, batch_tokens=1000))
    write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {})
    turns = rows_of(tmp_path / "responses.jsonl")[0]["turns"]
    assert [turn["finish"] for turn in turns] == ["context"]


def test_an_interrupted_run_continues_to_the_same_rows_and_answers_nothing_twice(
    tmp_path: Path, chat: ChatTemplate
) -> None:
    plan = make_plan(MANY, chat, SETTINGS, 128, BatchOptions(batch_rows=3, batch_tokens=10_000))
    write_replies(tmp_path / "whole", Share(), plan, chat, CountingEngine(), {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        write_replies(tmp_path / "cut", Share(), plan, chat, CountingEngine(fail_after=3), {"a": 1})
    path = tmp_path / "cut" / "responses.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # a row torn by the kill
    engine = CountingEngine()
    write_replies(tmp_path / "cut", Share(), plan, chat, engine, {"a": 1})
    assert len(engine.batches) == len(plan.batches) - 2
    assert path.read_bytes() == (tmp_path / "whole" / "responses.jsonl").read_bytes()


def test_another_runs_folder_is_refused_with_the_difference(tmp_path: Path, chat: ChatTemplate) -> None:
    plan = make_plan(MANY[:2], chat, SETTINGS, 128, BatchOptions(batch_rows=3, batch_tokens=1000))
    write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {"seed": 1})
    with pytest.raises(ValueError, match=r"another run \(seed: there 1, now 2\)"):
        write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {"seed": 2})


def test_replies_of_an_earlier_version_are_completed_where_its_settings_are_these(
    tmp_path: Path, chat: ChatTemplate
) -> None:
    """That version wrote down no constraints, so it had none."""
    plan = make_plan(MANY[:2], chat, SETTINGS, 128, BatchOptions(batch_rows=1, batch_tokens=1000))
    now = json.loads(json.dumps(asdict(SETTINGS)))
    forced = {**now, "constraints": {"min_length": 3}}
    before = {name: value for name, value in now.items() if name != "constraints"}
    with pytest.raises(KeyboardInterrupt):
        write_replies(tmp_path, Share(), plan, chat, CountingEngine(fail_after=1), {"settings": before})
    with pytest.raises(ValueError, match=r"another run \(settings\.constraints: there None, now {'min_length': 3}\)"):
        write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {"settings": forced})
    assert write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {"settings": now}) == 2
    assert json.loads((tmp_path / "settings.json").read_text())["settings"] == now


def test_ranks_share_the_prompts_and_a_missing_rank_is_noticed(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Question {n}"}) + "\n" for n in range(7)))
    prompts(str(source), tmp_path / "prompts")
    out = tmp_path / "replies"
    respond(
        str(target),
        tmp_path / "prompts",
        out,
        reply=ReplyOptions(max_new_tokens=3),
        share=ShareOptions(rank=0, world_size=2),
    )
    with pytest.raises(ValueError, match="1 of 2 ranks"):
        source_files(out)
    respond(
        str(target),
        tmp_path / "prompts",
        out,
        reply=ReplyOptions(max_new_tokens=3),
        share=ShareOptions(rank=1, world_size=2),
    )
    ids = [row["id"] for file in source_files(out) for row in rows_of(file)]
    assert len(ids) == len(set(ids)) == 7
    with pytest.raises(ValueError, match="another world size"):
        respond(str(target), tmp_path / "prompts", out, reply=ReplyOptions(max_new_tokens=3))


def test_a_rank_without_prompts_writes_that_it_has_none(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path]
) -> None:
    prompts(str(write_jsonl([{"prompt": "Hi"}, {"prompt": "apples " * 400}])), tmp_path / "prompts")
    out = tmp_path / "out"
    for rank in range(4):
        respond(
            str(target),
            tmp_path / "prompts",
            out,
            reply=ReplyOptions(max_new_tokens=3),
            share=ShareOptions(rank=rank, world_size=4),
        )
    counts = [json.loads(path.read_text())["num_rows"] for path in sorted(out.glob("settings*.json"))]
    assert sorted(counts) == [0, 0, 0, 1]
    assert len(list(out.glob("responses*.jsonl"))) == 4
    [file] = source_files(out)
    assert len(rows_of(file)) == 1
    extract(str(target), out, tmp_path / "cache")
    assert len(HiddenStateCache(tmp_path / "cache")) == 1


def test_replies_of_ranks_that_all_had_nothing_to_answer_are_refused(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path]
) -> None:
    prompts(str(write_jsonl([{"prompt": "apples " * 400}])), tmp_path / "prompts")
    for rank in range(2):
        respond(
            str(target),
            tmp_path / "prompts",
            tmp_path / "out",
            reply=ReplyOptions(max_new_tokens=3),
            share=ShareOptions(rank=rank, world_size=2),
        )
    with pytest.raises(ValueError, match="no rank had a prompt that could be answered"):
        source_files(tmp_path / "out")


def test_ranks_of_different_runs_do_not_share_a_folder(
    tmp_path: Path, target: Path, other_target: Path, write_jsonl: Callable[..., Path]
) -> None:
    prompts(str(write_jsonl([{"prompt": f"Question {n}"} for n in range(4)])), tmp_path / "prompts")
    out = tmp_path / "out"
    common: dict[str, Any] = {"prompts": tmp_path / "prompts", "out": out, "reply": ReplyOptions(max_new_tokens=3)}
    first, second = (ShareOptions(rank=rank, world_size=2) for rank in range(2))
    respond(str(target), share=first, sampling=SamplingOverrides(temperature=0.0), **common)
    with pytest.raises(ValueError, match=r"temperature.*as settings-00000-of-00002\.json says"):
        respond(str(target), share=second, sampling=SamplingOverrides(temperature=1.0), **common)
    with pytest.raises(ValueError, match="target_fingerprint: there"):
        respond(str(other_target), share=second, sampling=SamplingOverrides(temperature=0.0), **common)
    assert not (out / "settings-00001-of-00002.json").exists()
    respond(str(target), share=second, sampling=SamplingOverrides(temperature=0.0), **common)
    assert len(source_files(out)) == 2


@pytest.mark.parametrize("changed", [{"seed": 1}, {"test": 0.6}, {"prefix_words": 2}])
def test_the_same_texts_as_other_prompts_are_another_run(tmp_path: Path, target: Path, changed: dict[str, Any]) -> None:
    (tmp_path / "s.txt").write_text("\n\n".join(f"Tom has {n} apples and Ann {n} pears." for n in range(12)))
    options = {"validation": 0.3, "test": 0.3, "prefix_words": 3}
    ids = []
    for number, more in enumerate(({}, changed)):
        prompts(str(tmp_path / "s.txt"), tmp_path / str(number), **(options | more))
        ids.append([prompt.id for prompt in read_prompts(tmp_path / str(number))])
    assert ids[0] == ids[1]
    respond(str(target), tmp_path / "0", tmp_path / "out", reply=ReplyOptions(max_new_tokens=3))
    with pytest.raises(ValueError, match=r"another run \(prompts_sha256: there"):
        respond(str(target), tmp_path / "1", tmp_path / "out", reply=ReplyOptions(max_new_tokens=3))


def test_replies_whose_record_has_the_prompts_ids_alone_are_refused_with_the_remedy(
    tmp_path: Path, chat: ChatTemplate
) -> None:
    plan = make_plan(MANY[:2], chat, SETTINGS, 128, BatchOptions(batch_rows=3, batch_tokens=1000))
    write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {"prompts": "abc"})
    with pytest.raises(ValueError, match=r"no more of the prompts than their ids.*delete this one"):
        write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {"prompts_sha256": "abc"})


def test_replies_of_few_bits_are_another_run_than_those_of_whole_weights(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path], few_bits: None
) -> None:
    prompts(str(write_jsonl([{"prompt": f"Question {n}"} for n in range(3)])), tmp_path / "prompts")
    narrow = TargetOptions(quantization="4bit")
    respond(str(target), tmp_path / "prompts", tmp_path / "out", reply=ReplyOptions(max_new_tokens=3), where=narrow)
    with pytest.raises(ValueError, match=r"another run \(quantization: there '4bit', now None\)"):
        respond(str(target), tmp_path / "prompts", tmp_path / "out", reply=ReplyOptions(max_new_tokens=3))


@pytest.mark.parametrize(
    ("engine", "option", "told"),
    [
        ("bundled", {"server": ServerOptions(served_model="m")}, "--served_model m goes with --engine server"),
        ("vllm", {"server": ServerOptions(concurrency=3)}, "--concurrency 3 goes with --engine server"),
        ("bundled", {"server": ServerOptions(skip_failed=True)}, "--skip_failed True goes with --engine server"),
        ("bundled", {"vllm": VllmOptions(tensor_parallel=8)}, "--tensor_parallel 8 goes with --engine vllm"),
        ("server", {"vllm": VllmOptions(memory_share=0.5)}, "--memory_share 0.5 goes with --engine vllm"),
        ("server", {"batches": BatchOptions(batch_rows=99)}, "--batch_rows 99 has no effect on a server"),
        ("server", {"batches": BatchOptions(batch_tokens=99)}, "--batch_tokens 99 has no effect on a server"),
        ("server", {"where": TargetOptions(dtype="bfloat16")}, "--dtype bfloat16 has no effect on a server"),
    ],
)
def test_an_option_that_the_engine_does_not_read_is_refused(
    tmp_path: Path, engine: Any, option: dict[str, Any], told: str
) -> None:
    url = {"server": ServerOptions("http://x")} if engine == "server" else {}
    with pytest.raises(ValueError, match=told):
        respond("org/name", tmp_path / "prompts", tmp_path / "out", engine=engine, **(url | option))


def test_a_rank_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        respond("x", tmp_path, tmp_path, share=ShareOptions(rank=2, world_size=2))


def test_an_unfinished_run_is_not_taken_for_a_whole_one(tmp_path: Path, chat: ChatTemplate) -> None:
    plan = make_plan(MANY, chat, SETTINGS, 128, BatchOptions(batch_rows=3, batch_tokens=10_000))
    with pytest.raises(KeyboardInterrupt):
        write_replies(tmp_path, Share(), plan, chat, CountingEngine(fail_after=2), {})
    with pytest.raises(ValueError, match="6 of 20 replies; run the same"):
        source_files(tmp_path)


def test_replies_are_the_targets_greedy_ones(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"prompt": "How many apples" + "?" * n}) + "\n" for n in range(5)))
    prompts(str(source), tmp_path / "prompts")
    respond(
        str(target),
        tmp_path / "prompts",
        tmp_path / "out",
        reply=ReplyOptions(max_new_tokens=6),
        batches=BatchOptions(batch_rows=2),
    )
    model = AutoModelForCausalLM.from_pretrained(target)
    for row in rows_of(tmp_path / "out" / "responses.jsonl"):
        turn = row["turns"][0]
        expected = model.generate(torch.tensor([turn["prompt_ids"]]), max_new_tokens=6, do_sample=False)
        assert turn["prompt_ids"] + turn["reply_ids"] == expected[0].tolist()


def test_sampled_replies_do_not_depend_on_the_batch(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Question {n}"}) + "\n" for n in range(5)))
    prompts(str(source), tmp_path / "prompts")
    replies = []
    for rows in (1, 5):
        out = tmp_path / str(rows)
        respond(
            str(target),
            tmp_path / "prompts",
            out,
            reply=ReplyOptions(max_new_tokens=6),
            sampling=SamplingOverrides(temperature=1.0),
            batches=BatchOptions(batch_rows=rows),
        )
        replies.append({row["id"]: row["turns"] for row in rows_of(out / "responses.jsonl")})
    assert replies[0] == replies[1]
    assert len({json.dumps(turns[0]["reply_ids"]) for turns in replies[0].values()}) > 1


def test_a_drafter_changes_no_reply_and_a_missing_one_is_said(
    tmp_path: Path, target: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    ends = TargetEnds.load(str(target))
    fingerprint = tokenizer_fingerprint(tokenizer)
    ReDrafter.for_target(ends, tokenizer_fingerprint=fingerprint).save_pretrained(tmp_path / "drafter")
    source = tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Question {n}"}) + "\n" for n in range(4)))
    prompts(str(source), tmp_path / "prompts")
    for name, drafter in (("plain", None), ("drafted", tmp_path / "drafter")):
        respond(
            str(target),
            tmp_path / "prompts",
            tmp_path / name,
            reply=ReplyOptions(max_new_tokens=8),
            sampling=SamplingOverrides(temperature=0.8),
            drafter=drafter,
        )
    plain, drafted = (tmp_path / name / "responses.jsonl" for name in ("plain", "drafted"))
    assert plain.read_bytes() == drafted.read_bytes()
    with pytest.raises(ValueError, match="gone"):
        respond(str(target), tmp_path / "prompts", tmp_path / "x", drafter=tmp_path / "gone")


def test_documents_are_continued_from_their_first_words(tmp_path: Path) -> None:
    base = save_target(tmp_path / "base", seed=3, template=None)
    (tmp_path / "s.txt").write_text("Tom has  three apples.\n\nHe has seven apples.")
    prompts(str(tmp_path / "s.txt"), tmp_path / "prompts", prefix_words=3)
    respond(str(base), tmp_path / "prompts", tmp_path / "out", reply=ReplyOptions(max_new_tokens=3))
    tokenizer = ChatTemplate(_tokenizer(base), "none").tokenizer
    starts = {tokenizer.decode(row["turns"][0]["prompt_ids"]) for row in rows_of(tmp_path / "out" / "responses.jsonl")}
    assert starts == {"Tom has  three", "He has seven"}


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from draftsmith.models.files.loading import load_tokenizer

    return load_tokenizer(str(path))


def test_the_models_own_settings_hold_unless_the_run_names_others(tmp_path: Path) -> None:
    folder = save_target(tmp_path / "m", seed=0)
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [4, 2], "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(config))
    tokenizer = _tokenizer(folder)
    own = reply_settings(str(folder), tokenizer, SamplingOverrides(), SIXTEEN)
    assert (own.temperature, own.top_p, own.top_k, own.repetition_penalty) == (0.6, 0.9, 0, 1.1)
    assert own.eos_token_ids == (4, 2)
    greedy = reply_settings(str(folder), tokenizer, SamplingOverrides(temperature=0.0), SIXTEEN)
    assert (greedy.temperature, greedy.repetition_penalty) == (0.0, 1.1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert reply_settings(str(folder), tokenizer, SamplingOverrides(), SIXTEEN).temperature == 0.0


def test_what_a_model_forbids_is_not_drawn_unless_its_config_is_ignored(tmp_path: Path) -> None:
    folder = save_target(tmp_path / "m", seed=0)
    config = {"eos_token_id": 4, "suppress_tokens": [7, 8], "min_new_tokens": 5, "stop_strings": ["@@"]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    tokenizer = _tokenizer(folder)
    own = reply_settings(str(folder), tokenizer, SamplingOverrides(), SIXTEEN, stop_strings=("##",))
    assert own.constraints == Constraints(suppress_tokens=(7, 8), min_new_tokens=5)
    assert own.stop_strings == ("##", "@@")
    ignored = reply_settings(
        str(folder), tokenizer, SamplingOverrides(), SIXTEEN, where=TargetOptions(generation_config="none")
    )
    assert ignored == GenerationSettings(16, eos_token_ids=(4,))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 4, "num_beams": 3}))
    with pytest.raises(ValueError, match="sets num_beams to 3"):
        reply_settings(str(folder), tokenizer, SamplingOverrides(), SIXTEEN)


def test_two_processes_do_not_write_the_same_replies(tmp_path: Path, chat: ChatTemplate) -> None:
    plan = make_plan(MANY, chat, SETTINGS, 128, BatchOptions(batch_rows=3, batch_tokens=10_000))

    class Intruder(CountingEngine):
        def reply(self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
            with pytest.raises(ValueError, match="written by another process"):
                write_replies(tmp_path, Share(), plan, chat, CountingEngine(), {})
            return super().reply(prompts, settings, request_ids)

    assert write_replies(tmp_path, Share(), plan, chat, Intruder(), {}) == len(MANY)


@contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """The system itself refuses to let any file grow past this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_replying_loses_no_whole_row_and_the_next_run_finishes(
    tmp_path: Path, chat: ChatTemplate
) -> None:
    many = [asking(f"Question {n}", name=f"p{n}") for n in range(120)]
    plan = make_plan(many, chat, SETTINGS, 128, BatchOptions(batch_rows=3, batch_tokens=10_000))
    write_replies(tmp_path / "whole", Share(), plan, chat, CountingEngine(), {})
    with disk_full_after(20_000), pytest.raises(OSError, match="File too large"):
        write_replies(tmp_path / "full", Share(), plan, chat, CountingEngine(), {})
    engine = CountingEngine()
    write_replies(tmp_path / "full", Share(), plan, chat, engine, {})
    assert 0 < len(engine.batches) < len(plan.batches)
    whole, full = (tmp_path / name / "responses.jsonl" for name in ("whole", "full"))
    assert full.read_bytes() == whole.read_bytes()


def test_a_full_disk_while_prompts_are_written_leaves_the_earlier_ones(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    prompts(str(write_jsonl([{"prompt": "a"}])), tmp_path / "out", test=0.0)
    rows = write_jsonl([{"prompt": f"Question {n}"} for n in range(300)], "more.jsonl")
    with disk_full_after(20_000), pytest.raises(OSError, match="File too large"):
        prompts(str(rows), tmp_path / "out", test=0.0)
    assert len(read_prompts(tmp_path / "out")) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


SLOW_RESPOND = """
import sys, time
from pathlib import Path
from draftsmith.data.replies import engine_choice
from draftsmith.data.replies.reply_plan import BatchOptions
from draftsmith.data.replies.reply_settings import SamplingOverrides
from draftsmith.data.replies.respond import respond
from draftsmith.decode.sampling import ReplyOptions
class Slow(engine_choice.BundledEngine):
    def reply(self, *arguments):
        time.sleep(float(sys.argv[4]))
        return super().reply(*arguments)
engine_choice.BundledEngine = Slow
respond(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]),
    reply=ReplyOptions(max_new_tokens=4), sampling=SamplingOverrides(temperature=1.0), batches=BatchOptions(batch_rows=2))
"""


def test_a_run_says_what_it_is_before_its_first_reply_and_again_at_its_end(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(str(write_jsonl([{"prompt": f"Question {n}"} for n in range(3)])), tmp_path / "prompts")
    out = tmp_path / "out"
    moments = iter(["begun", "refused"])
    monkeypatch.setattr(provenance, "machine", lambda: {"cpu": next(moments)})
    with monkeypatch.context() as patched:
        patched.setattr(engine_choice, "BundledEngine", lambda *arguments: CountingEngine(fail_after=0))
        with pytest.raises(KeyboardInterrupt):
            respond(str(target), tmp_path / "prompts", out, reply=ReplyOptions(max_new_tokens=4))
    begun = provenance.read(out)
    assert begun["machine"] == {"cpu": "begun"}
    assert begun["config"]["settings"]["max_new_tokens"] == 4
    with pytest.raises(ValueError, match="replies of another run"):
        respond(str(target), tmp_path / "prompts", out, reply=ReplyOptions(max_new_tokens=5))
    assert provenance.read(out) == begun
    moments = iter(["begun again", "ended"])
    respond(str(target), tmp_path / "prompts", out, reply=ReplyOptions(max_new_tokens=4))
    assert provenance.read(out)["config"] == begun["config"]
    assert provenance.read(out)["machine"] == {"cpu": "ended"}


def test_kill_9_while_replying_then_the_same_rows(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Question {n}"}) + "\n" for n in range(40)))
    prompts(str(source), tmp_path / "prompts")
    killed = tmp_path / "killed" / "responses.jsonl"
    command = [sys.executable, "-c", SLOW_RESPOND, str(target), str(tmp_path / "prompts"), str(killed.parent)]
    process = subprocess.Popen([*command, "0.5"], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while (
        (not killed.exists() or killed.stat().st_size == 0) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < killed.read_bytes().count(b"\n") < 40
    for out in (killed.parent, tmp_path / "whole"):
        respond(
            str(target),
            tmp_path / "prompts",
            out,
            reply=ReplyOptions(max_new_tokens=4),
            sampling=SamplingOverrides(temperature=1.0),
            batches=BatchOptions(batch_rows=2),
        )
    assert killed.read_bytes() == (tmp_path / "whole" / "responses.jsonl").read_bytes()
