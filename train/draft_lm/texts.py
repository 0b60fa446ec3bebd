"""Rows for distilling a draft LM: a prompt, the text behind it, and which of its tokens are trained on.

Owns: one row, a batch of rows, all rows in memory. Does not know: where rows come from, which of them are held out, models.

Shape legend: N rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset


class DistilText:
    """One row: a prompt, and the rest of the text if there is one.

    Deliberately no dataclass, like the batch: Lightning would walk into one.

    Args:
        number: of the row in the run's data.
        ids: token ids, the prompt first.
        labelled: True where a token is trained on.
        num_prompt: tokens before the reply whose tokens are the first that are trained on.
    """

    def __init__(self, number: int, ids: list[int], labelled: list[bool], num_prompt: int) -> None:
        self.number, self.ids, self.labelled, self.num_prompt = number, ids, labelled, num_prompt

    @property
    def has_reply(self) -> bool:
        """Whether there is anything behind the prompt."""
        return len(self.ids) > self.num_prompt

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self.ids[: self.num_prompt]

    def with_reply(
        self, reply_ids: Sequence[int], max_length: int, labelled: Sequence[bool] | None = None
    ) -> DistilText:
        """The prompt with another reply.

        Args:
            reply_ids: token ids of the reply.
            max_length: cut the text to this many tokens.
            labelled: True where a token of the reply is trained on; None trains on all of it.
        """
        room = max_length - self.num_prompt
        reply = list(reply_ids)[:room]
        own = [True] * len(reply) if labelled is None else list(labelled)[:room]
        return DistilText(self.number, self.prompt_ids + reply, [False] * self.num_prompt + own, self.num_prompt)


class TextBatch:
    """Some rows.

    Args:
        texts: the rows.
    """

    def __init__(self, texts: list[DistilText]) -> None:
        self.texts = texts


class TextStore(Dataset):
    """All rows in flat arrays: five bytes a token. Indexing with row numbers gives a batch."""

    def __init__(self) -> None:
        self._ids, self._labelled = array("i"), bytearray()
        self._starts, self._prompts = array("q", [0]), array("q")

    def add(self, ids: Sequence[int], labelled: Sequence[bool] | None, num_prompt: int | None = None) -> None:
        """Appends a row.

        Args:
            ids: token ids, the prompt first.
            labelled: True where a token is trained on; None for a prompt alone.
            num_prompt: tokens of the prompt; None counts those before the first labelled one.
        """
        flags = [False] * len(ids) if labelled is None else labelled
        if num_prompt is None:
            num_prompt = len(ids) if labelled is None else list(labelled).index(True)
        self._ids.extend(ids)
        self._labelled.extend(flags)
        self._starts.append(len(self._ids))
        self._prompts.append(num_prompt)

    def __len__(self) -> int:
        return len(self._prompts)

    def text(self, number: int) -> DistilText:
        """One row."""
        span = slice(self._starts[number], self._starts[number + 1])
        labelled = [bool(flag) for flag in self._labelled[span]]
        return DistilText(int(number), self._ids[span].tolist(), labelled, self._prompts[number])

    @property
    def num_tokens(self) -> int:
        """Of all rows together."""
        return len(self._ids)

    def with_reply(self) -> np.ndarray:
        """Which rows are more than a prompt: bool [N]."""
        return np.diff(np.asarray(self._starts)) > np.asarray(self._prompts)

    def __getitem__(self, numbers: Sequence[int]) -> TextBatch:
        return TextBatch([self.text(number) for number in numbers])
