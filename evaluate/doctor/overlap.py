"""Does the training text hold the evaluation's prompts, and itself twice? One pass over the cache's token ids.

Owns the checks `overlap` (n-gram decontamination) and `duplicates`. Memory holds the prompts' n-grams, a hash a sample, and a block of
the text; the text itself streams by. Does not know states or drafters.

Shape legend: L tokens of a block, G distinct n-grams of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.corpus import Corpus
from draftsmith.evaluate.doctor.case import Case, NotChecked, is_local
from draftsmith.evaluate.doctor.report import Finding
from draftsmith.evaluate.records import Sample

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of an early token is lost
_BLOCK = 2**20  # tokens hashed at a time
_COMMON = 0.10  # an n-gram of more than this share of the prompts (and of three at least) is their template's
_SEEN = 0.9  # share of a prompt's n-grams in the training text from which it counts as seen; less is a likeness of templates
_MANY = 0.01  # share of seen prompts, or of repeated samples, that is a fault or a warning


@dataclass(frozen=True)
class NGrams:
    """The n-grams of some prompts.

    Attributes:
        size: n.
        hashes: uint64 [G], ascending.
        owners: for each of them, which prompts have it.
        texts: for each of them, its tokens: what a hit is compared with.
        counts: of each prompt, how many of these n-grams it has.
        num_short: prompts with fewer than n tokens, of which nothing is known.
        num_common: n-grams left out because so many prompts share them.
    """

    size: int
    hashes: Hashes
    owners: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    num_short: int
    num_common: int


@dataclass(frozen=True)
class Read:
    """What one pass over the text found.

    Attributes:
        occurs: bool a prompt n-gram, whether the text has it.
        example: for an n-gram that the text has, the sample that it first occurs in.
        num_samples, num_tokens: read.
        num_repeated: samples whose tokens are those of an earlier one.
        repeated: ids of some of them.
    """

    occurs: npt.NDArray[np.bool_]
    example: dict[int, str]
    num_samples: int
    num_tokens: int
    num_repeated: int
    repeated: tuple[str, ...]


def rolling_hashes(ids: Ids, size: int) -> Hashes:
    """uint64 [L - size + 1]: a hash of every window of `size` tokens; equal windows have equal hashes.

    Example: ids of 5 tokens and size 3 -> 3 hashes.
    """
    count = len(ids) - size + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    words = ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        hashes = hashes * _BASE + words[place : place + count]  # wraps around at 2**64
    hashes ^= hashes >> np.uint64(29)
    return hashes


def ngrams_of(prompts: Sequence[Sample], size: int) -> NGrams:
    """The n-grams of prompts without those of their common template.

    Raises:
        ValueError: the size is below 1.
    """
    if size < 1:
        raise ValueError(f"ngram is {size}; an n-gram has at least 1 token, 13 are usual")
    owners: dict[tuple[int, ...], set[int]] = {}
    for number, prompt in enumerate(prompts):
        ids = prompt.prompt_ids
        for place in range(len(ids) - size + 1):
            owners.setdefault(ids[place : place + size], set()).add(number)
    limit = max(2.0, _COMMON * len(prompts))
    kept = {text: who for text, who in owners.items() if len(who) <= limit}
    texts = list(kept)
    hashes = (
        rolling_hashes(np.array(texts, dtype=np.int64).reshape(-1), size)[::size]
        if texts
        else rolling_hashes(np.zeros(0, np.int64), 1)
    )
    order = np.argsort(hashes, kind="stable")
    counts = [0] * len(prompts)
    for who in kept.values():
        for number in who:
            counts[number] += 1
    return NGrams(
        size,
        hashes[order],
        tuple(tuple(sorted(kept[texts[place]])) for place in order),
        tuple(texts[place] for place in order),
        tuple(counts),
        sum(len(prompt.prompt_ids) < size for prompt in prompts),
        len(owners) - len(kept),
    )


def blocks(samples: Iterable[tuple[str, Ids]], tokens: int) -> Iterator[list[tuple[str, Ids]]]:
    """Samples in blocks of about so many tokens."""
    block: list[tuple[str, Ids]] = []
    room = tokens
    for sample in samples:
        block.append(sample)
        room -= len(sample[1])
        if room <= 0:
            yield block
            block, room = [], tokens
    if block:
        yield block


def read_text(samples: Iterable[tuple[str, Ids]], wanted: NGrams | None, block_tokens: int = _BLOCK) -> Read:
    """Looks for prompt n-grams and for samples that occur twice, in one pass over (id, tokens int64 [T])."""
    count = 0 if wanted is None else len(wanted.hashes)
    occurs, example = np.zeros(count, dtype=np.bool_), dict[int, str]()
    seen: set[int] = set()
    repeated: list[str] = []
    num_samples = num_tokens = num_repeated = 0
    for block in blocks(samples, block_tokens):
        for name, ids in block:
            key = hash(ids.tobytes())
            if key in seen:
                num_repeated += 1
                repeated += [name] if len(repeated) < 3 else []
            seen.add(key)
            num_tokens += len(ids)
        num_samples += len(block)
        if wanted is not None and count:
            _look(block, wanted, occurs, example)
    return Read(occurs, example, num_samples, num_tokens, num_repeated, tuple(repeated))


def _look(block: list[tuple[str, Ids]], wanted: NGrams, occurs: npt.NDArray[np.bool_], example: dict[int, str]) -> None:
    ids = np.concatenate([tokens for _, tokens in block])
    ends = np.cumsum([len(tokens) for _, tokens in block])
    hashes = rolling_hashes(ids, wanted.size)
    if not len(hashes):
        return
    place = np.searchsorted(wanted.hashes, hashes).clip(max=len(wanted.hashes) - 1)
    starts = np.nonzero((wanted.hashes[place] == hashes) & ~occurs[place])[0]
    owner = np.searchsorted(ends, starts, side="right")
    inside = starts + wanted.size <= ends[owner]  # a window may reach over the end of its sample
    starts, owner = starts[inside], owner[inside]
    for first in np.unique(place[starts], return_index=True)[1].tolist():
        start, which = int(starts[first]), int(place[starts[first]])
        if tuple(ids[start : start + wanted.size].tolist()) == wanted.texts[which]:  # equal hashes are no proof
            occurs[which] = True
            example[which] = block[int(owner[first])][0]


def token_stream(
    cache: HiddenStateCache | None, corpus: Corpus | None, advance: Callable[[int], None]
) -> Iterator[tuple[str, Ids]]:
    """Every sample's id and tokens: of the text where it is given, else of the cache, whose states are not read."""
    if corpus is not None:
        for text in corpus.all_samples():
            advance(1)
            yield text.id, np.array(text.input_ids, dtype=np.int64)
    elif cache is not None:
        for sample in cache:
            advance(1)
            yield sample.id, sample.input_ids.numpy()


def unread(case: Case) -> str:
    """Why the text cannot be read; empty where it can."""
    if case.cache is None:
        return f"{case.inputs.no_cache}, or the replies with --source"
    if not is_local(case.cache):
        return f"the cache is remote, in {len(case.cache.manifest.shards):,} shards: name the replies with --source"
    return ""


def check_overlap(case: Case, read: Read | None, wanted: NGrams | None, reason: str) -> Finding:
    """Prompts whose n-grams occur in the training text.

    Args:
        case: names the prompts.
        read: what the pass over the text found; None where it was not read.
        wanted: the prompts' n-grams.
        reason: why the text was not read.

    Raises:
        NotChecked: no prompts are known, the text was not read, or no prompt is as long as an n-gram.
    """
    if not case.prompts:
        raise NotChecked("no prompts are known: name those of the evaluation with --prompts")
    if read is None or wanted is None:
        raise NotChecked(reason)
    checked = [number for number, count in enumerate(wanted.counts) if count]
    if not checked:
        raise NotChecked(f"no prompt has {wanted.size} tokens of its own: lower --ngram")
    shares, first = _shares(wanted, read)
    touched = [number for number in checked if shares[number] > 0.0]
    seen = [number for number in checked if shares[number] >= _SEEN]
    figures = {
        "n": wanted.size,
        "prompts": len(checked),
        "touched": len(touched),
        "seen": len(seen),
        "tokens read": read.num_tokens,
        "template n-grams left out": wanted.num_common,
        "prompts too short": wanted.num_short,
    }
    measured = f"{len(touched)} of {len(checked)} prompts share a {wanted.size}-gram, {len(seen)} nearly all of theirs"
    expected = "none"
    details = [
        f"{case.prompts[number].id}: {shares[number]:.0%} of its {wanted.size}-grams, first in training sample {first[number]}: "
        + repr(str(case.tokenizer.decode(_hit(wanted, read, number)))[:100])
        for number in sorted(touched, key=lambda number: -shares[number])[:3]
    ]
    details.append(
        f"{read.num_tokens:,} tokens read; left out: {wanted.num_common} n-grams that many prompts share, {wanted.num_short} short prompts"
    )
    remedy = (
        "figures on these prompts flatter the drafter and say little about new ones: take them out of the training prompts (`data prompts` "
        "splits by text, so that a prompt cannot be on both sides) or evaluate on others"
    )
    if len(seen) > _MANY * len(checked):
        return Finding("overlap", "fault", measured, expected, remedy, figures, tuple(details))
    if touched:
        remedy = (
            "read the examples: templates and quotations are alike without harm; where the question is the same one, take it out of the "
            "training prompts or of the evaluation"
        )
        return Finding("overlap", "warning", measured, expected, remedy, figures, tuple(details))
    return Finding("overlap", "ok", measured, expected, "", figures, tuple(details))


def _shares(wanted: NGrams, read: Read) -> tuple[list[float], dict[int, str]]:
    """Of each prompt the share of its n-grams that occur, and a sample that has one of them."""
    hits = [0] * len(wanted.counts)
    first: dict[int, str] = {}
    for which in np.nonzero(read.occurs)[0].tolist():
        for number in wanted.owners[which]:
            hits[number] += 1
            first.setdefault(number, read.example[which])
    return [hit / count if count else 0.0 for hit, count in zip(hits, wanted.counts, strict=True)], first


def _hit(wanted: NGrams, read: Read, number: int) -> list[int]:
    return next(list(wanted.texts[w]) for w in np.nonzero(read.occurs)[0].tolist() if number in wanted.owners[w])


def check_duplicates(case: Case, read: Read | None, reason: str) -> Finding:
    """Samples that are, token for token, an earlier one.

    Args:
        case: what is looked at.
        read: what the pass over the text found; None where it was not read.
        reason: why the text was not read.

    Raises:
        NotChecked: the text was not read.
    """
    if read is None:
        raise NotChecked(reason)
    share = read.num_repeated / max(1, read.num_samples)
    figures = {"samples": read.num_samples, "repeated": read.num_repeated, "share": share}
    measured = f"{read.num_repeated} of {read.num_samples:,} samples repeat an earlier one ({share:.1%})"
    expected = f"below {_MANY:.0%}"
    if share <= _MANY:
        return Finding("duplicates", "ok", measured, expected, "", figures)
    remedy = (
        "`draftsmith data prompts` drops prompts that ask the same; repeated samples also leak into the held-out share"
    )
    return Finding(
        "duplicates", "warning", measured, expected, remedy, figures, (f"such as {', '.join(read.repeated)}",)
    )
