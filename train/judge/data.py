"""Labelled tokens for training a judge: rows joined to the states of a hidden-state cache, split by question.

Owns: the split, which rows are this process's, reading states into memory. Does not know: judges, losses, thresholds.

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
from draftsmith.files import sha256_file
from draftsmith.label.token_labels import IGNORED
from draftsmith.models.opinion import DIFFERENCE, NUM_NUMBERS, opinion_of_text
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.batches.labelled_text import LabelledText
from draftsmith.train.batches.resumed import check_same
from draftsmith.train.judge.joined_rows import (
    CachedRow,
    check_one_kind,
    check_same_origin,
    join,
    labelled_positions,
    names_of_paths,
    rows_of_files,
)

Norm = Callable[[Tensor], Tensor]
SPLITS = ("train", "validation")


class JudgeTokens:
    """Labelled tokens in memory, with their features.

    Deliberately no dataclass: Lightning's precision plugins would walk into one and cast its fields.

    Args:
        features: float32 [N, F].
        labels: bool [N], True is correct.
        places: int64 [N], each token's number among those of the whole split, over all processes.
        part_tokens: tokens gone through at a time.
        on_device: whether the features go to the accelerator as a whole, or a part at a time.
        differs: bool [N], True where the target would have chosen another token; None where nobody asked the target.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        places: Tensor,
        part_tokens: int,
        on_device: bool,
        differs: Tensor | None = None,
    ) -> None:
        self.features, self.labels, self.places = features, labels, places
        self.part_tokens, self.on_device = part_tokens, on_device
        self.differs = torch.zeros_like(labels) if differs is None else differs

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> JudgeTokens:
        """The same tokens on another device; Lightning calls this.

        Args:
            device: where to.
            non_blocking: ignored.
        """
        features = self.features.to(device) if self.on_device else self.features
        labels, places, differs = (tensor.to(device) for tensor in (self.labels, self.places, self.differs))
        return JudgeTokens(features, labels, places, self.part_tokens, self.on_device, differs)

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


@dataclass
class _Split:
    """The rows of a split over all processes, in the order of the cache."""

    joined: list[CachedRow]

    def __post_init__(self) -> None:
        labels = [labelled_positions(joined.row)[1].numpy() for joined in self.joined]
        sizes = [len(some) for some in labels]
        self.labels = np.concatenate(labels) if labels else np.zeros(0, dtype=bool)
        names = sorted({joined.row.question for joined in self.joined})
        numbers = {name: number for number, name in enumerate(names)}
        self.questions = np.repeat([numbers[joined.row.question] for joined in self.joined], sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_questions = len(names)


@dataclass(frozen=True)
class _Reader:
    """What is made of states that are read: see `JudgeDataModule.read_states`."""

    norm: Norm | None
    ends: TargetEnds | None
    with_opinion: bool


class JudgeDataModule(pl.LightningDataModule):
    """Labelled tokens with the target's states, from rows (`draftsmith label rows`) and a cache made of the same rows.

    All answers to one question are in training or in validation, never in both. One batch holds all tokens of this process. Sums go over
    all of them, `batch_tokens` at a time. Each row is on exactly one process.

    Args:
        cache: folder that `draftsmith data extract` made of the rows, or several.
        rows: file of labelled rows, or several.
        draft_cache: the draft model's cache of the same samples, or several; for a judge that reads its states too.
        val_fraction: share of the questions held out, at least one; they set the threshold.
        seed: decides which questions are held out.
        max_questions: train on at most this many questions. The held-out ones stay the same, and a smaller number is a part of a larger.
        batch_tokens: tokens in memory at a time; changes the memory only.
        on_device: keep all features on the accelerator; false sends a part at a time, if they do not fit.
        check: when to compare the shards' sha256: at `open`, `lazy` before first use, or `off`.
        join_kinds: learn from mined labels together with others, although the two mean different things by wrong.

    Raises:
        ValueError: settings out of range; in setup(), rows that are not in the cache or have other tokens there, repeated ids, kinds of
            labels that nobody asked to join, or training or validation without one of the classes; when reading, states that are not
            finite, with the sample's id.
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
        join_kinds: bool = False,
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
        self.join_kinds = join_kinds
        self._splits: dict[str, _Split] = {}
        self._read: dict[str, JudgeTokens] = {}

    def settings(self) -> dict[str, Any]:
        """What decides which rows are learnt from, for provenance."""
        names = ("val_fraction", "seed", "max_questions", "join_kinds")
        return {name: getattr(self, name) for name in names}

    def setup(self, stage: str = "fit") -> None:
        """Opens the caches, joins the rows to their samples and divides the questions.

        Raises:
            ValueError: no labelled token, rows that do not fit the caches, or only one class.
        """
        if self._splits:
            return
        self.caches = [HiddenStateCache(path, check=self.check) for path in self.cache_paths]
        self.draft_caches = [HiddenStateCache(path, check=self.check) for path in self.draft_paths]
        check_same_origin(self.caches)
        check_same_origin(self.draft_caches)
        for cache in self.draft_caches:
            cache.check_tokenizer(self.caches[0].manifest.identity.tokenizer_fingerprint)
        rows = [row for row in rows_of_files(self.row_paths) if set(row.labels) - {IGNORED}]
        if not rows:
            raise ValueError(f"{names_of_paths(self.row_paths)} has no labelled token; label answers first")
        if not self.join_kinds:
            check_one_kind(rows)
        joined = join(rows, self.caches, self.draft_caches)
        held_out, trained = self._divide(sorted({row.question for row in rows}))
        for name, questions in (("train", trained), ("validation", held_out)):
            self._splits[name] = _Split([sample for sample in joined if sample.row.question in questions])
            self._check_classes(name)

    def read_states(self, norm: Norm | None = None, ends: TargetEnds | None = None, with_opinion: bool = False) -> None:
        """Reads this process's tokens into memory.

        Args:
            norm: what the target's states go through, as stored [rows, D] -> [rows, D]; None leaves them.
            ends: the target's; they tell which tokens it would not have chosen. None asks nobody.
            with_opinion: whether the target's opinion of each token follows its state.

        Raises:
            ValueError: states that are not finite, rows without a prompt, fewer rows than processes, or an opinion without ends.
        """
        if with_opinion and ends is None:
            raise ValueError("an opinion is the target's; give its ends")
        rank, world_size = self._world()
        for name in SPLITS:
            self._read[name] = self._read_split(name, rank, world_size, _Reader(norm, ends, with_opinion))

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
        check_same(self._layout(), state_dict["layout"], "resume with the same data")

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

    def _read_split(self, name: str, rank: int, world_size: int, reader: _Reader) -> JudgeTokens:
        split = self._splits[name]
        own = range(rank, len(split.joined), world_size)
        if len(split.joined) < world_size:
            raise ValueError(
                f"{name} has {len(split.joined)} rows for {world_size} processes; train on fewer devices, or label more answers"
            )
        sizes = [int(split.starts[number + 1] - split.starts[number]) for number in own]
        num_opinions = NUM_NUMBERS if reader.with_opinion else 0
        features = torch.empty(sum(sizes), sum(self.feature_sizes) + num_opinions, dtype=torch.float32)
        labels, differs = torch.empty(sum(sizes), dtype=torch.bool), torch.zeros(sum(sizes), dtype=torch.bool)
        places = torch.empty(sum(sizes), dtype=torch.int64)
        start = 0
        for number, size in zip(own, sizes, strict=True):
            rows, joined = slice(start, start + size), split.joined[number]
            positions, labels[rows] = labelled_positions(joined.row)
            features[rows], differs[rows] = self._features(joined, positions, reader)
            places[rows] = torch.arange(size) + int(split.starts[number])
            start += size
        return JudgeTokens(features, labels, places, self.batch_tokens, self.on_device, differs)

    def _features(self, joined: CachedRow, positions_N: Tensor, reader: _Reader) -> tuple[Tensor, Tensor]:
        """float32 [N, F], and bool [N]: where the target would have chosen another token."""
        sample = self.caches[joined.cache][joined.index]
        states_TD = sample.hidden[PRE_NORM]
        own_ND = states_TD[positions_N]
        parts = [own_ND if reader.norm is None else reader.norm(own_ND)]
        differs_N = torch.zeros(len(positions_N), dtype=torch.bool)
        if reader.ends is not None:
            if not joined.row.prompt_ids:
                raise ValueError(
                    f"row {joined.row.id} has no prompt token; the target says nothing before its first reply token; leave the row out"
                )
            opinion_N6 = opinion_of_text(reader.ends, states_TD, sample.input_ids, positions_N)
            differs_N = opinion_N6[:, DIFFERENCE] < 0.0
            parts += [opinion_N6] if reader.with_opinion else []
        if joined.draft is not None:
            cache, index = joined.draft
            parts.append(self.draft_caches[cache][index].hidden[PRE_NORM][positions_N])
        features_NF = torch.cat([part.float() for part in parts], dim=-1)
        if not bool(torch.isfinite(features_NF).all()):
            raise ValueError(
                f"the states of sample {joined.row.id} hold NaN or infinity; extract the cache again, in another dtype if they overflow"
            )
        return features_NF, differs_N

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def _paths(given: Path | list[Path] | None) -> list[Path]:
    several = [] if given is None else given if isinstance(given, list) else [given]
    return [Path(path) for path in several]


def _one_batch(tokens: JudgeTokens) -> DataLoader:
    """A list is a data set of one element; without a batch size nothing is collated.

    The sampler is a DistributedSampler, so that Lightning leaves the split over ranks alone: it is made already.
    """
    whole: Any = [tokens]
    return DataLoader(whole, batch_size=None, sampler=DistributedSampler(whole, num_replicas=1, rank=0, shuffle=False))
