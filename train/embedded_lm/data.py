"""Batches of sums conversations for training the embedded language models.

Owns the mixture of conversations and their batching. Rows are whole conversations, sorted by length within a window
and padded to the longest of their batch: there is no packing, so no sample can see another, and padding stays below a
few percent.

Shapes: B batch, T positions.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from draftsmith.embedded.grading import grade
from draftsmith.embedded.mixed_wordings import mixed_solution
from draftsmith.embedded.problems import Problem, Split, sample_problems
from draftsmith.embedded.tokenizer import ASSISTANT, END, PAD, chat_text
from draftsmith.embedded.wordings import ALL_WORDINGS, DRAFT_STYLE, TARGET_STYLE, Style, render
from draftsmith.models.files.pretrained import read_tokenizer

StyleName = Literal["all", "target", "draft"]
STYLES: dict[StyleName, Style] = {"all": ALL_WORDINGS, "target": TARGET_STYLE, "draft": DRAFT_STYLE}

_WINDOW_BATCHES = 32
_IGNORED = -100
_OTHER_MODEL_WEIGHT = 3


@dataclass(frozen=True)
class Mixture:
    """What conversations are made of.

    Args:
        style: the wordings that solutions prefer.
        all_wordings_share: how many conversations use all wordings all the same.
        graded_share: how many end with a request to check the solution, and a verdict. Half of those solutions are wrong.
        follow_up_share: how many have a second problem.
        mixed_share: how many have lines that begin in another wording, or are wholly in it. What chooses that wording is not learnt,
            so that the model continues rightly behind any beginning and still speaks in its own words.

    Raises:
        ValueError: an unknown style, or a share outside 0 to 1.
    """

    style: StyleName = "all"
    all_wordings_share: float = 0.0
    graded_share: float = 0.0
    follow_up_share: float = 0.0
    mixed_share: float = 0.0

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r} is not known; use one of {', '.join(STYLES)}")
        for name in ("all_wordings_share", "graded_share", "follow_up_share", "mixed_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}, a share lies between 0 and 1; correct the mixture")


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation.

    Attributes:
        text: with the marks of its turns.
        foreign_spans: characters that choose another wording than the model's own; they are not learnt.
    """

    text: str
    foreign_spans: tuple[tuple[int, int], ...] = ()


def conversations(mixture: Mixture, split: Split, seed: int) -> Iterator[Conversation]:
    """An endless seeded stream of rendered conversations.

    Args:
        mixture: what they are made of.
        split: whose problems.
        seed: of the stream.
    """
    rng = random.Random(f"lm/{split}/{seed}")
    problems = sample_problems(split, seed)
    while True:
        if mixture.mixed_share and rng.random() < mixture.mixed_share:
            yield _mixed(next(problems), STYLES[mixture.style], rng)
            continue
        style = ALL_WORDINGS if rng.random() < mixture.all_wordings_share else STYLES[mixture.style]
        turns = _turns(next(problems), style, mixture.graded_share, rng)
        if rng.random() < mixture.follow_up_share:
            turns += _turns(next(problems), style, 0.0, rng)
        yield Conversation(chat_text(turns))


def _mixed(problem: Problem, style: Style, rng: random.Random) -> Conversation:
    """One problem; each line of the solution begins in the style with a chance that differs from solution to solution."""
    # The words of the other model are what a decoder with a judge meets most.
    of_other_models = [other for other in STYLES.values() if other not in (style, ALL_WORDINGS)]
    others = [ALL_WORDINGS, *(_OTHER_MODEL_WEIGHT * of_other_models)]
    solution = mixed_solution(problem.steps, style, others, rng.random(), rng)
    text = chat_text([("user", problem.question), ("assistant", solution.text)])
    start = text.rindex(solution.text)
    return Conversation(text, tuple((start + first, start + end) for first, end in solution.foreign_spans))


def _turns(problem: Problem, style: Style, graded_share: float, rng: random.Random) -> list[tuple[str, str]]:
    if rng.random() >= graded_share:
        return [("user", problem.question), ("assistant", render(problem, style, rng))]
    graded = grade(problem, style, rng)
    return [
        ("user", problem.question),
        ("assistant", graded.solution.text),
        ("user", graded.request),
        ("assistant", graded.verdict),
    ]


class LmBatches(Dataset[dict[str, torch.Tensor]]):
    """Collated batches: ``input_ids`` int64 [B, T] and ``labels`` int64 [B, T], -100 where nothing is to be learnt.

    ``labels[b, t]`` is the token *at* t, not the next one; the module shifts.

    Args:
        drawn: the conversations.
        tokenizer: of the model.
        batch_size: B.
        assistant_only: learn the assistant's words only.
        seed: of the order of batches.
    """

    def __init__(
        self,
        drawn: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        assistant_only: bool,
        seed: int,
    ) -> None:
        encoded = tokenizer([conversation.text for conversation in drawn], return_offsets_mapping=True)
        self._rows = [np.asarray(row, dtype=np.int16) for row in encoded["input_ids"]]
        self._foreign_words = [
            _foreign_words(conversation, offsets)
            for conversation, offsets in zip(drawn, encoded["offset_mapping"], strict=True)
        ]
        self._batches = _length_batches([len(row) for row in self._rows], batch_size, seed)
        vocabulary = tokenizer.get_vocab()
        self._pad, self._assistant, self._end = vocabulary[PAD], vocabulary[ASSISTANT], vocabulary[END]
        self._assistant_only = assistant_only

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        numbers = self._batches[index]
        rows = [self._rows[i] for i in numbers]
        length = max(len(row) for row in rows)
        input_ids_BT = torch.full((len(rows), length), self._pad, dtype=torch.int64)
        for place, row in enumerate(rows):
            input_ids_BT[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
        keep_mask_BT = input_ids_BT != self._pad
        if self._assistant_only:
            keep_mask_BT &= assistant_mask(input_ids_BT, self._assistant, self._end)
        for place, number in enumerate(numbers):
            keep_mask_BT[place, self._foreign_words[number]] = False
        return {"input_ids": input_ids_BT, "labels": input_ids_BT.masked_fill(~keep_mask_BT, _IGNORED)}


def _foreign_words(conversation: Conversation, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Positions of the tokens that begin within foreign spans."""
    return [
        position
        for position, (start, _) in enumerate(offsets)
        if any(first <= start < last for first, last in conversation.foreign_spans)
    ]


def assistant_mask(input_ids_BT: torch.Tensor, assistant: int, end: int) -> torch.Tensor:
    """True on the assistant's words and their end token: after ``assistant``, up to and including the next ``end``.

    >>> assistant_mask(torch.tensor([[1, 7, 3, 2, 8, 9, 3, 1]]), assistant=2, end=3).int().tolist()
    [[0, 0, 0, 0, 1, 1, 1, 0]]

    Args:
        input_ids_BT: int64 [B, T].
        assistant: token id that begins the assistant's words.
        end: token id that ends a turn.

    Returns:
        bool [B, T].
    """
    starts_BT = (input_ids_BT == assistant).cumsum(1) - (input_ids_BT == assistant).long()
    positions_T = torch.arange(input_ids_BT.shape[1])
    last_start_BT = torch.where(input_ids_BT == assistant, positions_T, -1).cummax(1).values
    ends_BT = torch.where(input_ids_BT == end, positions_T, -1).cummax(1).values
    ended_before_BT = torch.cat([torch.full_like(ends_BT[:, :1], -1), ends_BT[:, :-1]], dim=1) > last_start_BT
    return (starts_BT > 0) & (last_start_BT >= 0) & (last_start_BT < positions_T) & ~ended_before_BT


def _length_batches(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """Row indices batch by batch: similar lengths together within a window, batches of a window in random order."""
    rng = random.Random(seed)
    batches: list[list[int]] = []
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(lengths), window):
        rows = sorted(range(start, min(start + window, len(lengths))), key=lengths.__getitem__)
        grouped = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(grouped)
        batches += grouped
    return batches


class LmDataModule(pl.LightningDataModule):
    """Draws the corpus when fitting begins. Training uses every conversation once.

    Args:
        tokenizer: directory of the tokenizer.
        mixture: what conversations are made of.
        num_samples: conversations of the train split.
        num_validation: conversations of the validation split.
        batch_size: conversations a batch.
        assistant_only: learn the assistant's words only.
        seed: of the corpus.

    Raises:
        ValueError: the tokenizer's directory does not exist.
    """

    def __init__(
        self,
        tokenizer: Path,
        mixture: Mixture,
        num_samples: int = 50_000,
        num_validation: int = 512,
        batch_size: int = 32,
        assistant_only: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not Path(tokenizer).is_dir():
            raise ValueError(f"tokenizer directory {str(tokenizer)!r} does not exist; build the tokenizer first")
        self._tokenizer_path = tokenizer
        self._mixture = mixture
        self._counts: dict[Split, int] = {"train": num_samples, "validation": num_validation}
        self._batch_size = batch_size
        self._assistant_only = assistant_only
        self._seed = seed
        self._sets: dict[Split, LmBatches] = {}

    def setup(self, stage: str) -> None:
        """Draws both splits, unless they are there."""
        tokenizer = read_tokenizer(self._tokenizer_path)
        for split in self._counts:
            if split not in self._sets:
                self._sets[split] = self._draw(split, tokenizer)

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Batches of the train split."""
        return DataLoader(self._sets["train"], batch_size=None, shuffle=False)

    def val_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Batches of the validation split."""
        return DataLoader(self._sets["validation"], batch_size=None, shuffle=False)

    def _draw(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> LmBatches:
        stream = conversations(self._mixture, split, self._seed)
        drawn = [next(stream) for _ in range(self._counts[split])]
        return LmBatches(drawn, tokenizer, self._batch_size, self._assistant_only, self._seed)
