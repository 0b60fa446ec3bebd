"""The shipped tokenizer: round trips, single digits, the chat template and its assistant marks."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from draftsmith.embedded import path, sample_problems
from draftsmith.embedded.tokenizer import chat_text, train_tokenizer

CHAT = [
    {"role": "user", "content": "3 + 4?"},
    {"role": "assistant", "content": "3 + 4 = 7 pens.\n#### 7"},
    {"role": "user", "content": "Check it."},
    {"role": "assistant", "content": "Check: all right."},
]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path("target"))


def test_both_models_ship_the_same_tokenizer() -> None:
    assert (path("target") / "tokenizer.json").read_bytes() == (path("draft_lm") / "tokenizer.json").read_bytes()


def test_the_vocabulary_is_small_and_the_special_tokens_are_one_token_each(words: PreTrainedTokenizerBase) -> None:
    assert 512 <= len(words) <= 1024
    for token in ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"):
        assert len(words(token)["input_ids"]) == 1
    assert (words.pad_token, words.eos_token) == ("<|pad|>", "<|end|>")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(words: PreTrainedTokenizerBase, text: str) -> None:
    assert words.decode(words(text)["input_ids"]) == text


def test_digits_are_single_tokens_wherever_they_stand(words: PreTrainedTokenizerBase) -> None:
    digits = {words(digit)["input_ids"][0] for digit in "0123456789"}
    assert len(digits) == 10
    ids = words("First, 120 + 37 = 157 pens.\n#### 157")["input_ids"]
    assert [words.decode([i]) for i in ids if i in digits] == list("12037157157")
    assert not any(any(c.isdigit() for c in words.decode([i])) for i in ids if i not in digits)


def test_questions_are_short_in_tokens(words: PreTrainedTokenizerBase) -> None:
    questions = [problem.question for problem in itertools.islice(sample_problems("test", 0), 200)]
    lengths = [len(ids) for ids in words(questions)["input_ids"]]
    assert sum(lengths) / len(lengths) < 45


def test_the_template_marks_the_assistants_words_and_end_tokens(words: PreTrainedTokenizerBase) -> None:
    chat = words.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    marked = [token for token, kept in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if kept]
    assert words.decode(marked) == "3 + 4 = 7 pens.\n#### 7<|end|>Check: all right.<|end|>"


def test_the_plain_rendering_used_in_training_is_the_templates(words: PreTrainedTokenizerBase) -> None:
    plain = chat_text((message["role"], message["content"]) for message in CHAT)
    assert plain == words.apply_chat_template(CHAT, tokenize=False)


def test_a_generation_prompt_opens_the_assistants_turn(words: PreTrainedTokenizerBase) -> None:
    prompt = words.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>3 + 4?<|end|><|assistant|>"


def test_a_role_the_template_does_not_know_is_refused_by_name(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="role 'system' is not known"):
        words.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 200"):
        train_tokenizer(["a"], vocab_size=200)
