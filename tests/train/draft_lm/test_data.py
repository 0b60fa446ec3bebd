"""Rows for distilling a draft LM: the mixture is exact, every row comes once an epoch, and what does not fit is an error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS, make_tokenizer
from tool_chats import TOOL_ROW, tool_tokenizer

from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.train.draft_lm.data import DistilDataModule, choose_on_policy
from draftsmith.train.draft_lm.texts import DistilText, TextStore

TOKENIZER = make_tokenizer()


def write_replies(path: Path, count: int = 10) -> Path:
    rows = [{"id": f"r{row}", "prompt_ids": [5, 6, 10 + row], "reply_ids": [7, 8, EOS]} for row in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_prompts(path: Path, words: list[str]) -> Path:
    rows = [
        {"id": word, "messages": [{"role": "user", "content": word}], "split": "train", "source": "s"} for word in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(**settings: Any) -> DistilDataModule:
    data = DistilDataModule(**({"val_fraction": 0.0, "batch_size": 3} | settings))
    data.read(TOKENIZER, 256, (EOS,))
    return data


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.floats(0, 1), st.integers(0, 5), st.integers(0, 5))
def test_the_share_is_exact_and_prompts_alone_are_always_on_policy(
    with_reply: list[bool], share: float, seed: int, epoch: int
) -> None:
    wanted = round(share * len(with_reply))
    if with_reply.count(False) > wanted:
        with pytest.raises(ValueError, match="prompts without a reply"):
            choose_on_policy(with_reply, share, seed, epoch)
        return
    chosen = choose_on_policy(with_reply, share, seed, epoch)
    assert chosen.sum() == wanted
    assert all(on_policy or has_reply for on_policy, has_reply in zip(chosen, with_reply, strict=True))
    assert np.array_equal(chosen, choose_on_policy(with_reply, share, seed, epoch))


def test_other_rows_are_on_policy_in_another_epoch(tmp_path: Path) -> None:
    data = read(replies=write_replies(tmp_path / "r.jsonl", 30), on_policy=0.5)
    epochs = [{row for row in data.train_rows if data.is_on_policy(row, epoch)} for epoch in range(3)]
    assert [len(rows) for rows in epochs] == [15, 15, 15]
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_row_comes_once_an_epoch_and_held_out_ones_never(tmp_path: Path) -> None:
    data = read(replies=write_replies(tmp_path / "r.jsonl"), val_fraction=0.2)
    seen = [text.number for batch in data.train_dataloader() for text in batch.texts]
    held_out = [text.number for batch in data.val_dataloader() for text in batch.texts]
    assert sorted(seen + held_out) == list(range(10))
    assert len(held_out) == 2
    assert data.val_prompts(5) == [[5, 6, 10 + number] for number in held_out]


def test_held_out_rows_too_few_for_the_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read(replies=write_replies(tmp_path / "r.jsonl"), val_fraction=0.1)
    monkeypatch.setattr(data, "_world", lambda: (0, 2))
    assert len(data.train_dataloader())
    with pytest.raises(
        ValueError, match=r"val_fraction 0\.1 \(max_val_rows 512\) holds out 1 row\(s\), and each of 2 "
    ):
        data.val_dataloader()


def test_no_more_rows_are_held_out_than_allowed_and_the_others_are_trained_on(tmp_path: Path) -> None:
    path = write_replies(tmp_path / "r.jsonl", 40)
    sizes = [
        (len(data.val_rows), len(data.train_rows))
        for data in (read(replies=path, val_fraction=0.5, max_val_rows=most) for most in (None, 512, 3))
    ]
    assert sizes == [(20, 20), (20, 20), (3, 37)]
    assert not len(read(replies=path, val_fraction=0.0, max_val_rows=3).val_rows)


def test_what_is_kept_of_a_row_beside_its_tokens_is_a_few_numbers_in_arrays(tmp_path: Path) -> None:
    data = read(replies=write_replies(tmp_path / "r.jsonl", 30), val_fraction=0.2, on_policy=0.5)
    assert isinstance(data.is_on_policy(int(data.train_rows[0]), 1), bool)
    assert data._drawn is not None
    kept = [data.train_rows, data.val_rows, data._drawn[1]]
    assert [(array.dtype.name, array.shape) for array in kept] == [("int64", (24,)), ("int64", (6,)), ("bool", (30,))]
    assert not data._drawn[1][data.val_rows].any()


def test_a_store_gives_back_what_was_put_in() -> None:
    store = TextStore()
    store.add([5, 6, 7], [False, True, True])
    store.add([70000, 9], None)
    first, second = store[[0, 1]].texts
    assert (first.ids, first.labelled, first.num_prompt, first.has_reply) == ([5, 6, 7], [False, True, True], 1, True)
    assert (second.ids, second.labelled, second.num_prompt, second.has_reply) == ([70000, 9], [False, False], 2, False)
    cut = first.with_reply([1, 2, 3, 4], max_length=3)
    assert (cut.ids, cut.labelled) == ([5, 1, 2], [False, True, True])


def test_prompts_go_through_the_chat_template_and_those_that_are_answered_are_passed_over(tmp_path: Path) -> None:
    rendered = TOKENIZER.encode("<|user|>\nHow many\n<|assistant|>\n")
    replies = tmp_path / "r.jsonl"
    replies.write_text(json.dumps({"id": "a", "prompt_ids": rendered, "reply_ids": [7]}) + "\n")
    prompts = write_prompts(tmp_path / "p.jsonl", ["How many", "apples"])
    data = read(replies=replies, prompts=prompts)
    assert len(data.train_rows) == 2
    assert data.store.text(0).ids == [*rendered, 7]
    assert data.store.text(1).ids == TOKENIZER.encode("<|user|>\napples\n<|assistant|>\n")
    assert data.store.with_reply().tolist() == [True, False]


def test_the_later_turns_of_a_conversation_are_learned_along_the_targets_replies(tmp_path: Path) -> None:
    turns = [
        {"prompt_ids": [5], "reply_ids": [6, EOS], "finish": "eos"},
        {"prompt_ids": [5, 6, EOS, 7], "reply_ids": [8], "finish": "length"},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"id": "a", "turns": turns}) + "\n")
    text = read(replies=path).store.text(0)
    assert text.ids == [5, 6, EOS, 7, 8]
    assert text.labelled == [False, True, True, False, True]
    assert text.num_prompt == 1


def test_what_leaves_no_room_for_a_reply_is_left_out_and_counted(tmp_path: Path) -> None:
    data = read(prompts=write_prompts(tmp_path / "p.jsonl", ["a", "How many apples does Tom have now?"]), max_length=12)
    assert len(data.train_rows) == 1
    assert data.num_left_out == 1
    with pytest.raises(ValueError, match=r"1 hold no reply to train on, or leave no room for one within max_length 3"):
        read(prompts=write_prompts(tmp_path / "q.jsonl", ["apples"]), max_length=3)


def test_empty_replies_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_replies(tmp_path / "r.jsonl", 4)
    with path.open("a") as file:
        file.write(json.dumps({"id": "silent", "prompt_ids": [5], "reply_ids": []}) + "\n")
    with caplog.at_level("INFO"):
        assert len(read(replies=path).train_rows) == 4
    assert "1 row(s) left out" in caplog.text


def test_an_empty_file_of_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"p\.jsonl is empty"):
        read(prompts=tmp_path / "p.jsonl")


def test_replies_in_another_tokenizers_ids_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "replies"
    folder.mkdir()
    write_replies(folder / "responses.jsonl")
    settings = {"tokenizer_fingerprint": "0" * 64, "num_rows": 10}
    (folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="token ids of the tokenizer 0000"):
        read(replies=folder)
    settings["tokenizer_fingerprint"] = tokenizer_fingerprint(TOKENIZER)
    (folder / "settings.json").write_text(json.dumps(settings))
    assert len(read(replies=folder).train_rows) == 10


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"template": "{% for m in messages %}{{ m.content }}{% endfor %}"}, "template"), ({"split": None}, "split")],
)
def test_a_run_does_not_resume_with_another_template_or_split(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    if "template" in changes:
        (tmp_path / "other.jinja").write_text(changes["template"])
        changes = {"template": str(tmp_path / "other.jinja")}
    settings = {"prompts": write_prompts(tmp_path / "p.jsonl", ["How many", "apples"]), "split": "train"}
    before = read(**settings)._layout()
    with pytest.raises(ValueError, match=f"made with {name} = "):
        read(**(settings | changes)).load_state_dict({"batches_done": 1, "batches_per_epoch": 1, "layout": before})


def test_a_run_does_not_resume_on_as_many_rows_of_other_tokens(tmp_path: Path) -> None:
    data = read(replies=write_replies(tmp_path / "r.jsonl"))
    state = {"batches_done": 1, "batches_per_epoch": 4, "layout": data._layout() | {"tokens": 59}}
    with pytest.raises(ValueError, match="made with tokens = 59, this run has 60"):
        data.load_state_dict(state)


def test_a_checkpoint_that_does_not_tell_its_template_is_resumed(tmp_path: Path) -> None:
    data = read(replies=write_replies(tmp_path / "r.jsonl"))
    layout = {name: value for name, value in data._layout().items() if name not in ("split", "template", "tokens")}
    data.load_state_dict({"batches_done": 1, "batches_per_epoch": 4, "layout": layout})
    assert len(data.train_dataloader()) == 3


def test_a_run_does_not_resume_on_other_rows_or_another_mixture(tmp_path: Path) -> None:
    path = write_replies(tmp_path / "r.jsonl")
    layout = read(replies=path)._layout()
    for changes, name in (({"on_policy": 0.5}, "on_policy"), ({"batch_size": 2}, "batch_size"), ({"seed": 3}, "seed")):
        with pytest.raises(ValueError, match=f"made with {name}"):
            read(replies=path, **changes).load_state_dict({"layout": layout})
    with pytest.raises(ValueError, match="made with source"):
        read(replies=write_replies(tmp_path / "other.jsonl", 11), max_samples=10).load_state_dict({"layout": layout})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "neither replies nor prompts"),
        ({"replies": "x", "on_policy": 1.5}, "on_policy is 1.5"),
        ({"replies": "x", "val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"replies": "x", "batch_size": 0}, "batch_size is 0"),
        ({"replies": "x", "max_val_rows": 0}, "max_val_rows is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DistilDataModule(**settings)


def test_a_share_too_small_for_the_prompts_is_refused_before_training(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", ["one", "two", "three"])
    with pytest.raises(ValueError, match="3 rows are prompts without a reply"):
        read(replies=write_replies(tmp_path / "r.jsonl", 3), prompts=prompts, on_policy=0.2)


CALL = '<call>weather {"city": "Oslo"}</call><|end|>'
KINDS = [
    ({}, ["<think>I ask.</think>", CALL, "<think>9 is cold.</think>", "No.<|end|>"]),
    ({"train_thoughts": False}, [CALL, "No.<|end|>"]),
    ({"train_replies": False, "train_thoughts": False}, [CALL]),
    ({"train_tool_calls": False, "last_turn_only": True}, ["<think>9 is cold.</think>", "No.<|end|>"]),
]


def tool_text(tmp_path: Path, **trained_on: Any) -> tuple[DistilDataModule, DistilText]:
    (tmp_path / "chats.jsonl").write_text(json.dumps(TOOL_ROW) + "\n")
    data = DistilDataModule(tmp_path / "chats.jsonl", val_fraction=0.0, **trained_on)
    data.read(tool_tokenizer(), 1000, (EOS,))
    return data, data.store.text(0)


def decoded(ids: list[int]) -> str:
    return str(tool_tokenizer().decode(ids))


@pytest.mark.parametrize(("trained_on", "expected"), KINDS)
def test_the_kinds_that_are_asked_for_are_learned_along_the_targets_replies(
    trained_on: dict[str, bool], expected: list[str], tmp_path: Path
) -> None:
    _, text = tool_text(tmp_path, **trained_on)
    learned = [token for token, labelled in zip(text.ids, text.labelled, strict=True) if labelled]
    assert decoded(learned) == "".join(expected)


def test_a_row_whose_thought_is_not_learned_is_answered_from_before_the_thought(tmp_path: Path) -> None:
    _, everything = tool_text(tmp_path)
    data, text = tool_text(tmp_path, train_thoughts=False, train_tool_calls=False)
    assert decoded(text.prompt_ids).endswith("<|tool|>9 C<|assistant|>")
    assert decoded(everything.prompt_ids).endswith("Is it warm?<|assistant|>")
    reply = tool_tokenizer().encode("<think>cold</think>No.<call>a</call>")
    sampled = data.answered(text, reply)
    assert decoded([token for token, own in zip(sampled.ids, sampled.labelled, strict=True) if own]) == "No."
    assert sampled.ids == text.prompt_ids + reply


def test_an_on_policy_row_of_the_last_turn_alone_answers_that_turn(tmp_path: Path) -> None:
    data, text = tool_text(tmp_path, last_turn_only=True)
    assert decoded(text.prompt_ids).endswith("<|tool|>9 C<|assistant|>")
    reply = tool_tokenizer().encode("<think>cold</think>No.")
    assert data.answered(text, reply).labelled == [False] * text.num_prompt + [True] * len(reply)


def test_a_prompt_whose_first_turn_is_answered_is_passed_over_when_the_last_turn_is_learned(tmp_path: Path) -> None:
    turns = [
        {"prompt_ids": TOKENIZER.encode("<|user|>\nHow many\n<|assistant|>\n"), "reply_ids": [7, EOS]},
    ]
    turns.append({"prompt_ids": [*turns[0]["prompt_ids"], 7, EOS, 9], "reply_ids": [8, EOS]})
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": "a", "turns": turns}) + "\n")
    prompts = write_prompts(tmp_path / "p.jsonl", ["How many"])
    data = read(replies=tmp_path / "r.jsonl", prompts=prompts, last_turn_only=True)
    assert [data.store.text(int(number)).num_prompt for number in data.train_rows] == [len(turns[1]["prompt_ids"])]


def test_what_is_not_learned_is_counted_and_a_run_does_not_resume_with_another_choice(tmp_path: Path) -> None:
    data, _ = tool_text(tmp_path, train_thoughts=False)
    told = "the target's replies, held-out rows included: replies 4, tool calls 27, thoughts 19 (read only)"
    assert told in data.labelled_text(1000).remarks
    layout = tool_text(tmp_path)[0]._layout()
    with pytest.raises(ValueError, match="made with trained_on = None, this run has 'replies, tool_calls'"):
        data.load_state_dict({"batches_done": 1, "batches_per_epoch": 1, "layout": layout})


def test_nothing_to_learn_or_no_template_that_tells_the_kinds_apart_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all false, so nothing is trained on"):
        tool_text(tmp_path, train_replies=False, train_tool_calls=False, train_thoughts=False)
    data = DistilDataModule(write_replies(tmp_path / "r.jsonl"), train_thoughts=False)
    with pytest.raises(ValueError, match="no chat template"):
        data.read(tool_tokenizer(None), 1000, (EOS,))
