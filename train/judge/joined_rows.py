"""Labelled rows joined to the samples of hidden-state caches: which sample holds the states of a row's tokens.

Owns the join and its checks. Knows no split of the rows, no features and no training.

Shape legend: N labelled tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.progress import progress
from draftsmith.data.shards.shards import CachedSample
from draftsmith.label.token_labels import CORRECT, IGNORED
from draftsmith.label.token_rows import LabelledRow, read_rows
from draftsmith.models.target.target import PRE_NORM

MINED = "mined"


@dataclass(frozen=True)
class CachedRow:
    """A row and its sample: the number of the cache, the sample's index, and both of the draft model's cache."""

    row: LabelledRow
    cache: int
    index: int
    draft: tuple[int, int] | None


def labelled_positions(row: LabelledRow) -> tuple[Tensor, Tensor]:
    """Where in its sample a row's labelled tokens are, and their labels.

    The state of a token is the one at its own position, after the target has read it (Judge Decoding, arXiv:2501.19309). It is not the
    state before, which predicts the token.

    Worked example: the prompt 5 6 7 and the reply 8 9 with labels -100 and 0. The position is 4, where the state of 9 is; the label is
        wrong.

    Args:
        row: of labelled tokens.

    Returns:
        positions, int64 [N], and labels, bool [N] (True is correct).
    """
    labels = torch.tensor(row.labels, dtype=torch.int64)
    places = torch.nonzero(labels != IGNORED).flatten()
    return len(row.prompt_ids) + places, labels[places] == CORRECT


def check_one_kind(rows: Sequence[LabelledRow]) -> None:
    """Check that mined labels are not joined to others: for mining, a wrong token is one after which the answer failed.

    Args:
        rows: all that are learnt from.

    Raises:
        ValueError: some are mined and some are not.
    """
    kinds = Counter(row.how for row in rows)
    if any(MINED in kind.split("+") for kind in kinds) and set(kinds) != {MINED}:
        counts = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        raise ValueError(
            f"the rows are labelled by {counts}; a mined label means that the answer fails after the token, the others that the "
            "token is an error; train a judge on each kind, or join them with data.init_args.join_kinds: true"
        )


def rows_of_files(paths: Sequence[Path]) -> Iterator[LabelledRow]:
    """The rows of several files.

    Args:
        paths: the files.

    Yields:
        each row.

    Raises:
        ValueError: an id that is in two files, or a broken row.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        for row in read_rows(path):
            if row.id in seen:
                raise ValueError(
                    f"{path}: the id {row.id} is in {seen[row.id]} already; a token is learnt from once; leave one out"
                )
            seen[row.id] = path
            yield row


def join(
    rows: Sequence[LabelledRow], caches: Sequence[HiddenStateCache], draft_caches: Sequence[HiddenStateCache]
) -> list[CachedRow]:
    """Rows with their samples, in the order of the caches.

    Args:
        rows: distinct ones.
        caches: of the target.
        draft_caches: of the draft model; empty for none.

    Raises:
        ValueError: a row that is in no cache or has other tokens there, or a sample that comes twice.
    """
    wanted = {row.id: row for row in rows}
    places = _places_in_caches(wanted, caches)
    drafts = _places_in_caches(wanted, draft_caches) if draft_caches else {}
    joined = [CachedRow(row, *places[row.id], drafts.get(row.id)) for row in rows]
    return sorted(joined, key=lambda row: (row.cache, row.index))


def _places_in_caches(wanted: dict[str, LabelledRow], caches: Sequence[HiddenStateCache]) -> dict[str, tuple[int, int]]:
    """Number of the cache and index of the sample of every row."""
    places: dict[str, tuple[int, int]] = {}
    for number, cache in enumerate(caches):
        if PRE_NORM not in cache.manifest.identity.layers:
            raise ValueError(
                f"{cache.path} holds the layers {list(cache.manifest.identity.layers)}; a judge reads {PRE_NORM}; extract a cache with it"
            )
        with progress(f"look for the rows in {cache.path}", len(cache), "samples", brief=True) as advance:
            for index, sample in enumerate(cache):
                advance(1)
                if sample.id not in wanted:
                    continue
                if sample.id in places:
                    raise ValueError(f"{cache.path}: sample {sample.id} comes twice; name each cache once")
                _check_tokens(wanted[sample.id], sample, cache.path)
                places[sample.id] = (number, index)
    missing = sorted(wanted.keys() - places.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} rows are not in {names_of_paths([cache.path for cache in caches])} (first: {missing[0]}); "
            "run draftsmith data extract with these very rows as --source"
        )
    return places


def _check_tokens(row: LabelledRow, sample: CachedSample, path: Path | str) -> None:
    ids = row.prompt_ids + row.reply_ids
    if len(ids) != len(sample.input_ids):
        raise ValueError(
            f"{path}: sample {row.id} has {len(sample.input_ids)} tokens, its row {len(ids)}; the cache was cut (--max-length) or made of "
            "other rows; extract it again from these"
        )
    cached = sample.input_ids.tolist()
    if ids != cached:
        place = next(number for number, (own, other) in enumerate(zip(ids, cached, strict=True)) if own != other)
        raise ValueError(
            f"{path}: sample {row.id} has other tokens than its row (at {place}: {cached[place]}, not {ids[place]}); the labels are those "
            "of another tokenizer or text; make rows and cache with the same target"
        )


def check_same_origin(caches: Sequence[HiddenStateCache]) -> None:
    """Check that caches are of one target and tokenizer.

    Args:
        caches: several, or none.

    Raises:
        ValueError: they are not.
    """
    for cache in caches[1:]:
        cache.check_target(caches[0].manifest.identity.target_fingerprint)
        cache.check_tokenizer(caches[0].manifest.identity.tokenizer_fingerprint)


def names_of_paths(paths: Sequence[Path | str]) -> str:
    """Several paths as an error names them.

    Args:
        paths: in order.
    """
    return ", ".join(map(str, paths))
