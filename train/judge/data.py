"""Labelled tokens for training a judge: rows joined to the states of a hidden-state cache, split by question.

Owns: the join, the split, which rows are this process's, reading states into memory. Does not know: judges, losses, thresholds.

Shape legend: N labelled tokens, D hidden, F features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.shards import CachedSample
from draftsmith.files import sha256_file
from draftsmith.label.token_labels import CORRECT, IGNORED
from draftsmith.label.token_rows import LabelledRow, read_rows
from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.batches.labelled_text import LabelledText

Norm = Callable[[Tensor], Tensor]
SPLITS = ("train", "validation")


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


class JudgeTokens:
    """Labelled tokens in memory, with their features.

    Deliberately no dataclass: Lightning's precision plugins would walk into one and cast its fields.

    Args:
        features: float32 [N, F].
        labels: bool [N], True is correct.
        places: int64 [N], each token's number among those of the whole split, over all processes.
        part_tokens: tokens gone through at a time.
        on_device: whether the features go to the accelerator as a whole, or a part at a time.
    """

    def __init__(self, features: Tensor, labels: Tensor, places: Tensor, part_tokens: int, on_device: bool) -> None:
        self.features, self.labels, self.places = features, labels, places
        self.part_tokens, self.on_device = part_tokens, on_device

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> JudgeTokens:
        """The same tokens on another device; Lightning calls this.

        Args:
            device: where to.
            non_blocking: ignored.
        """
        features = self.features.to(device) if self.on_device else self.features
        labels, places = self.labels.to(device), self.places.to(device)
        return JudgeTokens(features, labels, places, self.part_tokens, self.on_device)

    def parts(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Rows and features, a part at a time.

        Args:
            device: where the features go.

        Yields:
            a slice of the rows, and their features, float32 [rows, F].
        """
        for start in range(0, len(self), self.part_tokens):
            rows = slice(start, start + self.part_tokens)
            yield rows, self.features[rows].to(device)


@dataclass(frozen=True)
class _CachedRow:
    """A row and its sample: the number of the cache, the sample's index, and both of the draft model's cache."""

    row: LabelledRow
    cache: int
    index: int
    draft: tuple[int, int] | None


@dataclass
class _Split:
    """The rows of a split over all processes, in the order of the cache."""

    joined: list[_CachedRow]

    def __post_init__(self) -> None:
        labels = [labelled_positions(joined.row)[1].numpy() for joined in self.joined]
        sizes = [len(some) for some in labels]
        self.labels = np.concatenate(labels) if labels else np.zeros(0, dtype=bool)
        names = sorted({joined.row.question for joined in self.joined})
        numbers = {name: number for number, name in enumerate(names)}
        self.questions = np.repeat([numbers[joined.row.question] for joined in self.joined], sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_questions = len(names)


class JudgeDataModule(pl.LightningDataModule):
    """Labelled tokens with the target's states, from rows (`draftsmith label rows`) and a cache made of the same rows.

    All answers to one question are in training or in validation, never in both. One batch holds all tokens of this process. Sums go over
    all of them, `batch_tokens` at a time. Each row is on exactly one process.

    Args:
        cache: folder that `draftsmith data extract` made of the rows, or several.
        rows: file of labelled rows, or several.
        draft_cache: the draft model's cache of the same samples, or several; for a judge that reads its states too.
        val_fraction: share of the questions held out, at least one; they set the threshold.
        seed: decides which questions.
        max_questions: train on at most this many questions. The held-out ones stay the same, and a smaller number is a part of a larger.
        batch_tokens: tokens in memory at a time; changes the memory only.
        on_device: keep all features on the accelerator; false sends a part at a time, if they do not fit.
        check: when to compare the shards' sha256: at `open`, `lazy` before first use, or `off`.

    Raises:
        ValueError: settings out of range; in setup(), rows that are not in the cache or have other tokens there, repeated ids, or training
            or validation without one of the classes; when reading, states that are not finite, with the sample's id.
    """

    def __init__(
        self,
        cache: Path | list[Path],
        rows: Path | list[Path],
        draft_cache: Path | list[Path] | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        max_questions: int | None = None,
        batch_tokens: int = 4096,
        on_device: bool = True,
        check: Literal["open", "lazy", "off"] = "open",
    ) -> None:
        super().__init__()
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(
                f"val_fraction is {val_fraction}; the threshold is made from held-out questions; give more than 0 and less than 1"
            )
        for name, value in {"max_questions": max_questions, "batch_tokens": batch_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.cache_paths, self.row_paths, self.draft_paths = _paths(cache), _paths(rows), _paths(draft_cache)
        self.val_fraction, self.seed, self.max_questions = val_fraction, seed, max_questions
        self.batch_tokens, self.on_device, self.check = batch_tokens, on_device, check
        self.caches: list[HiddenStateCache] = []
        self.draft_caches: list[HiddenStateCache] = []
        self._splits: dict[str, _Split] = {}
        self._read: dict[str, JudgeTokens] = {}

    def setup(self, stage: str = "fit") -> None:
        """Opens the caches, joins the rows to their samples and divides the questions.

        Raises:
            ValueError: no labelled token, rows that do not fit the caches, or only one class.
        """
        if self._splits:
            return
        self.caches = [HiddenStateCache(path, check=self.check) for path in self.cache_paths]
        self.draft_caches = [HiddenStateCache(path, check=self.check) for path in self.draft_paths]
        _check_same_origin(self.caches)
        _check_same_origin(self.draft_caches)
        for cache in self.draft_caches:
            cache.check_tokenizer(self.caches[0].manifest.identity.tokenizer_fingerprint)
        rows = [row for row in _rows(self.row_paths) if set(row.labels) - {IGNORED}]
        if not rows:
            raise ValueError(f"{_names(self.row_paths)} has no labelled token; label answers first")
        joined = _join(rows, self.caches, self.draft_caches)
        held_out, trained = self._divide(sorted({row.question for row in rows}))
        for name, questions in (("train", trained), ("validation", held_out)):
            self._splits[name] = _Split([sample for sample in joined if sample.row.question in questions])
            self._check_classes(name)

    def read_states(self, norm: Norm | None = None) -> None:
        """Reads this process's tokens into memory.

        Args:
            norm: what the target's states go through, as stored [rows, D] -> [rows, D]; None leaves them.

        Raises:
            ValueError: states that are not finite, or fewer rows than processes.
        """
        rank, world_size = self._world()
        for name in SPLITS:
            self._read[name] = self._read_split(name, rank, world_size, norm)

    @property
    def feature_sizes(self) -> tuple[int, int]:
        """The target's hidden size, and the draft model's or 0.

        Raises:
            ValueError: setup() has not run.
        """
        sizes = [
            caches[0].manifest.identity.hidden_size if caches else 0 for caches in (self.caches, self.draft_caches)
        ]
        if not sizes[0]:
            raise ValueError("the data module is not set up; call setup() first")
        return sizes[0], sizes[1]

    def labels(self, split: str) -> np.ndarray:
        """Labels of a whole split, over all processes: bool [N].

        Args:
            split: `train` or `validation`.
        """
        return self._splits[split].labels

    def questions(self, split: str) -> np.ndarray:
        """The number of each token's question, of a whole split: int64 [N].

        Args:
            split: `train` or `validation`.
        """
        return self._splits[split].questions

    def tokens(self, split: str) -> JudgeTokens:
        """This process's tokens.

        Args:
            split: `train` or `validation`.

        Raises:
            ValueError: read_states() has not run.
        """
        if split not in self._read:
            raise ValueError("the states are not read; call read_states() first")
        return self._read[split]

    def labelled_text(self, vocab_size: int, passes: int) -> LabelledText:
        """The labelled tokens of the answers to train on.

        Args:
            vocab_size: of the target.
            passes: how often training reads them before a validation.
        """
        train = self._splits["train"]
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for joined in train.joined:
            positions, _ = labelled_positions(joined.row)
            ids = torch.tensor([*joined.row.prompt_ids, *joined.row.reply_ids])[positions]
            counts.scatter_add_(0, ids, torch.ones_like(ids))
        correct = int(train.labels.sum())
        wrong = len(train.labels) - correct
        about = (
            f"{correct} of these tokens are correct and {wrong} wrong, in answers to {train.num_questions} questions"
        )
        share = len(self.labels("validation")) / (passes * len(train.labels))
        size = len(train.joined)
        return LabelledText(counts, size, size, "answers", remarks=(about,), validation_share=share)

    def record(self) -> dict[str, Any]:
        """Where the labels came from and how many there are, for the judge's config."""
        rows = [joined.row for split in self._splits.values() for joined in split.joined]
        return {
            "rows": {str(path): sha256_file(path) for path in self.row_paths},
            "how": dict(sorted(Counter(row.how for row in rows).items())),
            "source": dict(sorted(Counter(row.source for row in rows).items())),
            "questions": {name: split.num_questions for name, split in self._splits.items()},
            "correct": {name: int(split.labels.sum()) for name, split in self._splits.items()},
            "wrong": {name: int((~split.labels).sum()) for name, split in self._splits.items()},
            "seed": self.seed,
        }

    def train_dataloader(self) -> DataLoader:
        """One batch: all of this process's training tokens."""
        return _one_batch(self.tokens("train"))

    def val_dataloader(self) -> DataLoader:
        """One batch: all of this process's held-out tokens."""
        return _one_batch(self.tokens("validation"))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must agree in."""
        return {"layout": self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called on resume.

        Args:
            state_dict: from `state_dict` of the interrupted run.

        Raises:
            ValueError: the tokens or their split differ from those of the interrupted run.
        """
        for name, value in self._layout().items():
            if state_dict["layout"][name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name} = {state_dict['layout'][name]!r}, this run has {value!r}; resume with the same "
                    "data, or start a new run without --ckpt_path"
                )

    def _layout(self) -> dict[str, Any]:
        record = self.record()
        return {
            **{name: record[name] for name in ("questions", "correct", "wrong", "seed")},
            "rows": list(record["rows"].values()),
            "sources": [cache.manifest.identity.source for cache in [*self.caches, *self.draft_caches]],
            "max_questions": self.max_questions,
        }

    def _divide(self, questions: Sequence[str]) -> tuple[set[str], set[str]]:
        """Held-out questions and those trained on."""
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(self.seed)).tolist()
        number = max(1, round(self.val_fraction * len(questions)))
        trained = order[number:] if self.max_questions is None else order[number : number + self.max_questions]
        return {questions[index] for index in order[:number]}, {questions[index] for index in trained}

    def _check_classes(self, name: str) -> None:
        split = self._splits[name]
        correct = int(split.labels.sum())
        wrong = len(split.labels) - correct
        if correct and wrong:
            return
        raise ValueError(
            f"{name} has {correct} correct and {wrong} wrong tokens of {split.num_questions} questions; both kinds are needed; label more "
            "answers, or change val_fraction, max_questions or seed"
        )

    def _read_split(self, name: str, rank: int, world_size: int, norm: Norm | None) -> JudgeTokens:
        split = self._splits[name]
        own = range(rank, len(split.joined), world_size)
        if len(split.joined) < world_size:
            raise ValueError(
                f"{name} has {len(split.joined)} rows for {world_size} processes; train on fewer devices, or label more answers"
            )
        sizes = [int(split.starts[number + 1] - split.starts[number]) for number in own]
        features = torch.empty(sum(sizes), sum(self.feature_sizes), dtype=torch.float32)
        labels = torch.empty(sum(sizes), dtype=torch.bool)
        places = torch.empty(sum(sizes), dtype=torch.int64)
        start = 0
        for number, size in zip(own, sizes, strict=True):
            rows, joined = slice(start, start + size), split.joined[number]
            positions, labels[rows] = labelled_positions(joined.row)
            self._read_features(features[rows], joined, positions, norm)
            places[rows] = torch.arange(size) + int(split.starts[number])
            start += size
        return JudgeTokens(features, labels, places, self.batch_tokens, self.on_device)

    def _read_features(self, into: Tensor, joined: _CachedRow, positions: Tensor, norm: Norm | None) -> None:
        """Fills float32 [rows, F]."""
        states = self.caches[joined.cache][joined.index].hidden[PRE_NORM][positions]
        hidden_size = self.feature_sizes[0]
        into[:, :hidden_size] = states if norm is None else norm(states)
        if joined.draft is not None:
            cache, index = joined.draft
            into[:, hidden_size:] = self.draft_caches[cache][index].hidden[PRE_NORM][positions]
        if not bool(torch.isfinite(into).all()):
            raise ValueError(
                f"the states of sample {joined.row.id} hold NaN or infinity; extract the cache again, in another dtype if they overflow"
            )

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def _paths(given: Path | list[Path] | None) -> list[Path]:
    several = [] if given is None else given if isinstance(given, list) else [given]
    return [Path(path) for path in several]


def _names(paths: Sequence[Path | str]) -> str:
    return ", ".join(map(str, paths))


def _one_batch(tokens: JudgeTokens) -> DataLoader:
    """A list is a data set of one element; without a batch size nothing is collated.

    The sampler is a DistributedSampler, so that Lightning leaves the split over ranks alone: it is made already.
    """
    whole: Any = [tokens]
    return DataLoader(whole, batch_size=None, sampler=DistributedSampler(whole, num_replicas=1, rank=0, shuffle=False))


def _rows(paths: Sequence[Path]) -> Iterator[LabelledRow]:
    seen: dict[str, Path] = {}
    for path in paths:
        for row in read_rows(path):
            if row.id in seen:
                raise ValueError(
                    f"{path}: the id {row.id} is in {seen[row.id]} already; a token is learnt from once; leave one out"
                )
            seen[row.id] = path
            yield row


def _join(
    rows: Sequence[LabelledRow], caches: Sequence[HiddenStateCache], draft_caches: Sequence[HiddenStateCache]
) -> list[_CachedRow]:
    """Rows with their samples, in the order of the caches."""
    wanted = {row.id: row for row in rows}
    places = _places_in_caches(wanted, caches)
    drafts = _places_in_caches(wanted, draft_caches) if draft_caches else {}
    joined = [_CachedRow(row, *places[row.id], drafts.get(row.id)) for row in rows]
    return sorted(joined, key=lambda row: (row.cache, row.index))


def _places_in_caches(wanted: dict[str, LabelledRow], caches: Sequence[HiddenStateCache]) -> dict[str, tuple[int, int]]:
    """Number of the cache and index of the sample of every row."""
    places: dict[str, tuple[int, int]] = {}
    for number, cache in enumerate(caches):
        if PRE_NORM not in cache.manifest.identity.layers:
            raise ValueError(
                f"{cache.path} holds the layers {list(cache.manifest.identity.layers)}; a judge reads {PRE_NORM}; extract a cache with it"
            )
        for index, sample in enumerate(cache):
            if sample.id not in wanted:
                continue
            if sample.id in places:
                raise ValueError(f"{cache.path}: sample {sample.id} comes twice; name each cache once")
            _check_tokens(wanted[sample.id], sample, cache.path)
            places[sample.id] = (number, index)
    missing = sorted(wanted.keys() - places.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} rows are not in {_names([cache.path for cache in caches])} (first: {missing[0]}); run "
            "draftsmith data extract with these very rows as --source"
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


def _check_same_origin(caches: Sequence[HiddenStateCache]) -> None:
    for cache in caches[1:]:
        cache.check_target(caches[0].manifest.identity.target_fingerprint)
        cache.check_tokenizer(caches[0].manifest.identity.tokenizer_fingerprint)
