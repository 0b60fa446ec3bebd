"""The tokenizer that a GGUF file describes, as llama.cpp reads it, whatever the version of Transformers.

Owns what the fields `tokenizer.*` mean: byte-level vocabularies (`gpt2`) with the split that the file names, and those of sentencepiece
(`llama`). What a file leaves open and what has no rule here is an error. Knows nothing of weights and folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from draftsmith.models.gguf.header import GgufHeader
from draftsmith.models.gguf.splits import SPLITS

_T = TypeVar("_T")
_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens that are found in a text as they are written
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}  # as GGUF names them
_SPACE, _NEWLINE = "▁", "<0x0A>"  # as sentencepiece writes them
_REMEDY = "give the model's folder with safetensors"
_KEEP_WHAT_FOLLOWS = (
    "<unk>",
    "<s>",
    "<|endoftext|>",
)  # special tokens of a Phi-3 that do not take the blanks behind them


def build_tokenizer(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file: its vocabulary, split, special tokens, first and last token, and chat templates.

    Args:
        header: of the file.

    Returns:
        The tokenizer, which can be saved. Token ids are places in the file's list.

    Raises:
        ValueError: the file leaves out, or contradicts itself in, what decides how text becomes tokens; or it names a kind of tokenizer
            or a split that is not known here.
    """
    kind = header.read(f"{_KEY}model", str)
    if kind == "gpt2":
        backend, begins = _byte_level(header)
    elif kind == "llama":
        backend, begins = _sentencepiece(header), True
    else:
        raise ValueError(
            f"{header.file} has a tokenizer of the kind {kind!r:.80} (tokenizer.ggml.model); gpt2 and llama are read; {_REMEDY}"
        )
    backend.add_tokens(list(_written_tokens(header, kind)))
    named = {name: _named_token(header, key) for name, key in _NAMED.items()}
    _add_first_and_last(backend, header, named, begins)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = _templates(header)
    return tokenizer


def _byte_level(header: GgufHeader) -> tuple[Tokenizer, bool]:
    """The tokenizer without special tokens, and whether texts begin with the first token where the file does not say."""
    name = header.read(f"{_KEY}pre", str)
    if name not in SPLITS:
        stated = (
            f"splits text by the rule {name!r:.80}, which is not known here"
            if name
            else "does not say how it splits text"
        )
        raise ValueError(
            f"{header.file} {stated} (tokenizer.ggml.pre), so its token ids cannot be those of the served model; {_REMEDY}, or write a "
            f"known rule into a copy if it is the model's own: gguf-new-metadata --pre-tokenizer NAME (known: {', '.join(sorted(SPLITS))})"
        )
    split, vocabulary = SPLITS[name], _vocabulary(header)
    backend = Tokenizer(BPE(vocabulary, _stated_merges(header, vocabulary), ignore_merges=split.whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, split.begins


def _sentencepiece(header: GgufHeader) -> Tokenizer:
    """A BPE whose merges follow from the scores; every stretch of text between special tokens may get a blank before it."""
    vocabulary = _vocabulary(header)
    merges = _merges_by_score(vocabulary, _array(header, "scores", float))
    unknown = _named_token(header, "unknown")
    if unknown is None and _NEWLINE not in vocabulary:
        raise ValueError(
            f"{header.file} has tokens neither for single bytes nor for the unknown (tokenizer.ggml.unknown_token_id), so some text would "
            f"vanish; {_REMEDY}"
        )
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = header.read(f"{_KEY}add_space_prefix", bool) is not False
    first = [normalizers.Prepend(_SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return backend


def _vocabulary(header: GgufHeader) -> dict[str, int]:
    tokens = _array(header, "tokens", str)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise ValueError(f"{header.file} lists the token {twice!r:.80} twice; {_REMEDY}")
    return vocabulary


def _stated_merges(header: GgufHeader, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _array(header, "merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ValueError(
                f"{header.file} has the merge {merge!r:.80}, whose parts or result are no tokens; {_REMEDY}"
            )
        merges.append((left, right))
    return merges


def _merges_by_score(vocabulary: Mapping[str, int], scores: tuple[float, ...]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the highest score first."""
    pairs = [
        (scores[number], token[:cut], token[cut:])
        for token, number in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: -pair[0])]


def _written_tokens(header: GgufHeader, kind: str) -> Iterator[AddedToken]:
    """The tokens that a text may hold as they are written, such as <|user|>. No split or merge touches them."""
    strips = kind == "llama" and header.architecture == "phi3"
    for token, type_ in zip(_array(header, "tokens", str), _array(header, "token_type", int), strict=True):
        if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            yield AddedToken(
                token,
                normalized=False,
                special=type_ != _USER_DEFINED,
                rstrip=strips and token not in _KEEP_WHAT_FOLLOWS,
            )


def _named_token(header: GgufHeader, key: str) -> str | None:
    """The token that the file names for a purpose, such as bos; None where it names none."""
    number = header.read(f"{_KEY}{key}_token_id", int)
    tokens = _array(header, "tokens", str)
    if number is not None and not 0 <= number < len(tokens):
        raise ValueError(
            f"{header.file} names token {number} (tokenizer.ggml.{key}_token_id), and has {len(tokens)} tokens; {_REMEDY}, or take the "
            f"field out of a copy: gguf-new-metadata --remove-metadata {_KEY}{key}_token_id"
        )
    return None if number is None else tokens[number]


def _add_first_and_last(backend: Tokenizer, header: GgufHeader, named: dict[str, str | None], begins: bool) -> None:
    """Put the first and the last token around each text, where the file says so or, for the first, its kind implies it."""
    stated = header.read(f"{_KEY}add_bos_token", bool)
    wanted = {
        "bos": begins if stated is None else stated,
        "eos": header.read(f"{_KEY}add_eos_token", bool) or False,
    }
    around = dict[str, str]()
    for key in (key for key, is_wanted in wanted.items() if is_wanted):
        token = named[f"{key}_token"]
        if token is None:
            raise ValueError(
                f"{header.file} puts a token {'before' if key == 'bos' else 'behind'} each text (tokenizer.ggml.add_{key}_token) and does "
                f"not say which (tokenizer.ggml.{key}_token_id); {_REMEDY}, or name it in a copy: gguf-new-metadata "
                f"--special-token-by-id {key} NUMBER"
            )
        around[key] = token
    if around:
        before, behind = ([around[key]] if key in around else [] for key in ("bos", "eos"))
        first, second = [*before, "$A", *behind], [f"{part}:1" for part in (*before, "$B", *behind)]
        backend.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *second],
            special_tokens=[(token, backend.token_to_id(token)) for token in around.values()],
        )


def _templates(header: GgufHeader) -> str | dict[str, str] | None:
    """The chat template; several by their names."""
    key = "tokenizer.chat_template"
    default = header.read(key, str)
    others = {
        name.removeprefix(f"{key}."): header.read(name, str) for name in header.fields if name.startswith(f"{key}.")
    }
    named = {"default": default, **others}
    return {name: text for name, text in named.items() if text is not None} if others else default


def _array(header: GgufHeader, name: str, kind: type[_T]) -> tuple[_T, ...]:
    """An array with a value for each token; merges may have any length."""
    values = header.read(f"{_KEY}{name}", tuple)
    if values is None:
        raise ValueError(f"{header.file} has no {_KEY}{name}, without which its text cannot become tokens; {_REMEDY}")
    if any(type(value) is not kind for value in values[:1]):
        raise ValueError(
            f"{header.file} gives {_KEY}{name} as {type(values[0]).__name__}, not {kind.__name__}; {_REMEDY}"
        )
    num_tokens = len(header.fields.get(f"{_KEY}tokens", ()))
    if name != "merges" and len(values) != num_tokens:
        raise ValueError(f"{header.file} has {num_tokens} tokens and {len(values)} values of {_KEY}{name}; {_REMEDY}")
    return values
