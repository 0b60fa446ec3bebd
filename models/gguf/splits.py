"""How byte-level tokenizers cut text into words before they merge bytes, by the names that GGUF files give (`tokenizer.ggml.pre`).

Owns the table. A name that is missing here is an error where a file is read: another rule would give other tokens without a word.
The patterns are those that the tokenizers of the models publish, in Oniguruma's syntax.
"""

from __future__ import annotations

from dataclasses import dataclass

_DIGIT = r"\p{N}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|{_DIGIT}|{_MARKS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{_DIGIT}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# Words of one case: capitals that lower-case letters follow, or capitals alone.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALISED, _CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CAPITALISED}|{_CAPITALS}|{_DIGIT}|{_PATHS}|{_SPACES}"
_GPT4O = rf"{_CAPITALISED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"


@dataclass(frozen=True)
class Split:
    """How one name cuts text, and what else it stands for.

    Attributes:
        patterns: each cuts what the one before it left; what lies between two matches is a word, too.
        whole_words: whether a word that is a token stays whole, even where no merges lead to it.
        begins: whether texts begin with the first token (BOS) where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False


def _named(split: Split, *names: str) -> dict[str, Split]:
    return dict.fromkeys(names, split)


SPLITS = {
    **_named(Split((_GPT2,)), "gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "exaone4"),
    **_named(Split((_DIGIT, _GPT2)), "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    **_named(
        Split((_LLAMA3,), whole_words=True, begins=True),
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    ),
    **_named(Split((_LLAMA3,)), "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    **_named(Split((_QWEN2,)), "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open"),
    **_named(Split((_QWEN35,)), "qwen35"),
    **_named(Split((_TEKKEN,), whole_words=True, begins=True), "tekken"),
    **_named(Split((_GPT4O,)), "gpt-4o", "llama4", "kanana2", "minimax-m2"),
    **_named(
        Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _DIGIT)), "deepseek-coder"
    ),
}  # fmt: skip
"""Each name with its rule."""
