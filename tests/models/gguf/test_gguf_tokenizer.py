"""A GGUF file's tokenizer gives the tokens that llama.cpp gives, under every version of Transformers; or one error in words."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from draftsmith.models.files.pretrained import read_tokenizer
from draftsmith.models.gguf.header import read_header
from draftsmith.models.gguf.splits import SPLITS
from draftsmith.models.gguf.tokenizer import build_tokenizer

if importlib.util.find_spec("gguf") is None:
    pytest.skip("needs the gguf package: pip install 'draftsmith[gguf]'", allow_module_level=True)
from gguf_files import write_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ALPHABET = [(letter, NORMAL) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())]
TEXT = "I'LL pay 12345 to HTTPServer's\n\n  x/y 3"


def byte_level(folder: Path, *more: tuple[str, int], **fields: Any) -> PreTrainedTokenizerBase:
    settings = {"model": "gpt2", "pre": "gpt-2", "merges": ["h i"], **fields}
    file = write_tokenizer(folder / "tiny.gguf", [*ALPHABET, ("hi", NORMAL), *more], **settings)
    return build_tokenizer(read_header(file))


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, **arguments: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, **arguments))


def words_of(tokenizer: PreTrainedTokenizerBase, text: str = TEXT) -> list[str]:
    """The words of a text before its bytes are merged, with blanks and line ends as in the text."""
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in words]


CONTRACTED = ["I", "'LL", " pay", " "]
WORDS = {
    "gpt-2": ["I", "'", "LL", " pay", " 12345", " to", " HTTPServer", "'s", "\n\n ", " x", "/", "y", " 3"],
    "smollm": ["I", "'", "LL", " pay", " ", *"12345", " to", " HTTPServer", "'s", "\n\n ", " x", "/", "y", " ", "3"],
    "llama-bpe": [*CONTRACTED, "123", "45", " to", " HTTPServer", "'s", "\n\n", " ", " x", "/y", " ", "3"],
    "qwen2": [*CONTRACTED, *"12345", " to", " HTTPServer", "'s", "\n\n", " ", " x", "/y", " ", "3"],
    "tekken": ["I", "'LL", " pay", " ", *"12345", " to", " HTTPServer", "'s", "\n\n", " ", " x", "/y", " ", "3"],
    "gpt-4o": ["I'LL", " pay", " ", "123", "45", " to", " HTTPServer's", "\n\n", " ", " x", "/y", " ", "3"],
    "deepseek-coder": ["I", "'", "LL", " pay", " ", *"12345", " to", " HTTPServer", "'", "s", "\n", "\n", " ", " x", "/", "y", " ", "3"],
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_text_is_split_by_the_rule_that_the_file_names(tmp_path: Path, name: str) -> None:
    assert words_of(byte_level(tmp_path, pre=name, add_bos_token=False)) == WORDS[name]


def test_a_rule_for_marks_above_letters_keeps_them_in_the_word(tmp_path: Path) -> None:
    hindi = "नमस्ते"  # letters with vowel signs
    assert words_of(byte_level(tmp_path, pre="qwen35"), hindi) != words_of(byte_level(tmp_path, pre="qwen2"), hindi)
    assert len(words_of(byte_level(tmp_path, pre="qwen35"), hindi)) == 1


TEXTS = [
    TEXT,
    "naïve Äpfel 2½ \uff13\uff14",
    "  def f(x):\n\treturn x**2  # ok\r\n\r\n",
    "नमस्ते 你好\uff0c世界! don't DON'T",
    "a  b   \n c\u00a0d",
]


def test_where_transformers_knows_a_name_it_splits_alike(tmp_path: Path) -> None:
    mapping = importlib.import_module("transformers.integrations.gguf")
    if not hasattr(mapping, "GGUF_TOKENIZER_MAPPING"):
        pytest.skip("transformers 5.17 has no rules by name")
    theirs = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    assert {"llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"} <= theirs.keys() & SPLITS.keys()
    for name in sorted(theirs.keys() & SPLITS.keys()):
        ours = pre_tokenizers.Split(regex_of(theirs[name]), behavior="isolated")
        for text in TEXTS:
            cuts = [cut for _, cut in ours.pre_tokenize_str(text)]
            tokenizer = byte_level(tmp_path, pre=name, add_bos_token=False)
            assert [cut for _, cut in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] == cuts, name


def regex_of(pattern: str) -> Any:
    return importlib.import_module("tokenizers").Regex(pattern)


@pytest.mark.parametrize(("name", "is_whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_a_word_that_is_a_token_stays_whole_where_the_rule_says_so(tmp_path: Path, name: str, is_whole: bool) -> None:
    tokenizer = byte_level(tmp_path, ("xyz", NORMAL), pre=name, add_bos_token=False)
    assert tokens_of(tokenizer, "hi") == ["hi"]
    assert tokens_of(tokenizer, "xyz") == (["xyz"] if is_whole else ["x", "y", "z"])


def test_special_and_user_defined_tokens_are_found_as_they_are_written(tmp_path: Path) -> None:
    more = [("<\uff5cUser\uff5c>", CONTROL), ("<think>", USER_DEFINED), ("  ", USER_DEFINED), ("[PAD1]", 5)]
    tokenizer = byte_level(tmp_path, *more)
    text = "<\uff5cUser\uff5c>hi<think>  hi[PAD1]"
    expected = ["<\uff5cUser\uff5c>", "hi", "<think>", "  ", "hi", *"[PAD1]"]
    assert tokens_of(tokenizer, text) == expected
    assert len(tokenizer) == len(ALPHABET) + 1 + len(more)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi<think>  hi[PAD1]"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"pre": "gpt-2"}, ["hi"]),
        ({"pre": "llama-bpe"}, ["<s>", "hi"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["hi"]),
        ({"pre": "gpt-2", "add_bos_token": True}, ["<s>", "hi"]),
        ({"pre": "gpt-2", "add_eos_token": True}, ["hi", "</s>"]),
        ({"pre": "tekken", "add_eos_token": True}, ["<s>", "hi", "</s>"]),
    ],
)
def test_texts_get_the_first_and_last_token_that_the_file_says_or_implies(
    tmp_path: Path, fields: dict[str, Any], expected: list[str]
) -> None:
    first = len(ALPHABET) + 1
    more = [("<s>", CONTROL), ("</s>", CONTROL)]
    tokenizer = byte_level(tmp_path, *more, bos_token_id=first, eos_token_id=first + 1, **fields)
    assert tokens_of(tokenizer, "hi") == expected
    assert tokens_of(tokenizer, "hi", add_special_tokens=False) == ["hi"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", None)


PIECES = {
    "<unk>": (0.0, UNKNOWN), "<s>": (0.0, CONTROL), "</s>": (0.0, CONTROL), "<0x0A>": (0.0, BYTE),
    "▁": (-6.0, NORMAL), "a": (-7.0, NORMAL), "b": (-8.0, NORMAL), "c": (-9.0, NORMAL),
    "bc": (-1.0, NORMAL), "ab": (-2.0, NORMAL), "▁a": (-3.0, NORMAL), "abc": (-4.0, NORMAL), "<tool>": (-9.0, USER_DEFINED),
}  # fmt: skip


def sentencepiece(
    folder: Path, pieces: dict[str, tuple[float, int]] = PIECES, **fields: Any
) -> PreTrainedTokenizerBase:
    tokens = [(piece, kind) for piece, (_, kind) in pieces.items()]
    scores = [score for score, _ in pieces.values()]
    settings = {
        "model": "llama",
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **fields,
    }
    return build_tokenizer(read_header(write_tokenizer(folder / "tiny.gguf", tokens, **settings)))


def test_pieces_are_merged_by_their_scores(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, add_space_prefix=False)
    assert tokens_of(tokenizer, "abc") == ["<s>", "abc"]  # bc before ab: a + bc
    assert tokens_of(tokenizer, "abab c") == ["<s>", "ab", "ab", "▁", "c"]
    assert tokens_of(tokenizer, "b\nxc") == ["<s>", "b", "<0x0A>", "<unk>", "c"]


@pytest.mark.parametrize(("stated", "before"), [({}, ["▁a"]), ({"add_space_prefix": False}, ["a"])])
def test_each_stretch_of_text_gets_the_blank_that_the_file_asks_for(
    tmp_path: Path, stated: dict[str, bool], before: list[str]
) -> None:
    tokenizer = sentencepiece(tmp_path, **stated)
    assert tokens_of(tokenizer, "a</s>a<tool>a") == ["<s>", *before, "</s>", *before, "<tool>", *before]
    assert tokenizer.decode(tokenizer.encode("a b a"), skip_special_tokens=True) == "a b a"


def test_a_phi_3_takes_the_blanks_behind_its_special_tokens(tmp_path: Path) -> None:
    pieces = {**PIECES, "<|user|>": (0.0, CONTROL)}
    stated = {"add_space_prefix": False, "add_bos_token": False}
    phi = sentencepiece(tmp_path, pieces, architecture="phi3", **stated)
    assert tokens_of(phi, "<|user|>\na<s>\na") == ["<|user|>", "a", "<s>", "<0x0A>", "a"]
    assert tokens_of(sentencepiece(tmp_path, pieces, **stated), "<|user|>\na") == ["<|user|>", "<0x0A>", "a"]


SAVED = [("<s>", CONTROL), ("<think>", USER_DEFINED), ("12", NORMAL), ("34", NORMAL), ("1234", NORMAL)]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_is_the_same_when_it_is_saved_beside_a_config_and_read_again(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    first = len(ALPHABET) + 1
    tokenizer = (
        byte_level(tmp_path, *SAVED, pre="llama-bpe", merges=["h i", "1 2", "3 4", "12 34"], bos_token_id=first)
        if kind == "gpt2"
        else sentencepiece(tmp_path)
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = read_tokenizer(tmp_path / "saved")
    for text in [*TEXTS, "a b <s>abc <think> hi"]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_chat_templates_are_the_file_s_by_their_names(tmp_path: Path) -> None:
    assert byte_level(tmp_path).chat_template is None
    path = tmp_path / "several.gguf"
    write_tokenizer(
        path, [*ALPHABET, ("hi", NORMAL)], model="gpt2", pre="gpt-2", merges=["h i"], templates=("one", "two")
    )
    assert build_tokenizer(read_header(path)).chat_template == {"default": "one", "tool_use": "two"}


HI = ("hi", NORMAL)
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown split": ({"pre": "youtu"}, r"splits text by the rule 'youtu'.*gguf-new-metadata --pre-tokenizer NAME"),
    "no split": ({"pre": None}, "does not say how it splits text"),
    "an unknown kind": ({"model": "bert"}, "a tokenizer of the kind 'bert'"),
    "no kind": ({"model": None}, "a tokenizer of the kind None"),
    "no merges": ({"merges": None}, r"has no tokenizer\.ggml\.merges"),
    "a merge of nothing": ({"merges": ["q z"]}, "has the merge 'q z', whose parts or result are no tokens"),
    "merges that are numbers": ({"merges": [3]}, r"gives tokenizer\.ggml\.merges as int, not str"),
    "no scores": ({"model": "llama"}, r"has no tokenizer\.ggml\.scores"),
    "too few scores": ({"model": "llama", "scores": [0.5]}, r"257 tokens and 1 values of tokenizer\.ggml\.scores"),
    "no first token": ({"add_bos_token": True}, r"before each text .* does not say which \(tokenizer\.ggml\.bos_token_id\)"),
    "no first token of llama-bpe": ({"pre": "llama-bpe"}, "before each text .* does not say which"),
    "no last token": ({"add_eos_token": True}, r"behind each text .* does not say which \(tokenizer\.ggml\.eos_token_id\)"),
    "a last token that is not there": ({"eos_token_id": 999}, r"names token 999 .*, and has 257 tokens"),
    "a flag that is a text": ({"add_bos_token": "yes"}, r"gives tokenizer\.ggml\.add_bos_token as 'yes', which is no bool"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_file_leaves_open_is_one_error_that_names_it(tmp_path: Path, fault: str) -> None:
    fields, message = FAULTS[fault]
    kept = {"model": "gpt2", "pre": "gpt-2", "merges": ["h i"], **fields}
    stated = {name: value for name, value in kept.items() if value is not None}
    file = write_tokenizer(tmp_path / "bad.gguf", [*ALPHABET, HI], **stated)
    with pytest.raises(ValueError, match=message) as error:
        build_tokenizer(read_header(file))
    assert str(file) in str(error.value)


def test_tokens_that_text_cannot_reach_unseen_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lists the token 'hi' twice"):
        byte_level(tmp_path, HI)
    bare = {piece: value for piece, value in PIECES.items() if piece not in ("<unk>", "<0x0A>")}
    with pytest.raises(ValueError, match="so some text would vanish"):
        sentencepiece(tmp_path, bare, unknown_token_id=None)
