"""What of an assistant's turns is trained on: words, tool calls, thoughts; in all turns or in the last one.

Owns: the kinds of an assistant's tokens, the options that choose among them, and their counts. Does not know: templates, rows.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum


class Kind(IntEnum):
    """What a token of a conversation belongs to."""

    ASKED = 0
    REPLY = 1
    TOOL_CALL = 2
    THOUGHT = 3


KIND_NAMES = {Kind.REPLY: "replies", Kind.TOOL_CALL: "tool_calls", Kind.THOUGHT: "thoughts"}
"""What options, manifests and messages call the assistant's kinds."""


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """What of the assistant's turns is trained on.

    Args:
        train_replies: Train on the words of replies.
        train_tool_calls: Train on tool calls.
        train_thoughts: Train on thoughts.
        last_turn_only: Train on the last assistant turn of each conversation alone.

    Raises:
        ValueError: nothing is left to train on.
    """

    train_replies: bool = True
    train_tool_calls: bool = True
    train_thoughts: bool = True
    last_turn_only: bool = False

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError(
                "train_replies, train_tool_calls and train_thoughts are all false, so nothing is trained on; set one to true"
            )

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of tokens that are trained on."""
        chosen = {
            Kind.REPLY: self.train_replies,
            Kind.TOOL_CALL: self.train_tool_calls,
            Kind.THOUGHT: self.train_thoughts,
        }
        return frozenset(kind for kind, wanted in chosen.items() if wanted)

    @property
    def as_text(self) -> str | None:
        """The choice in words, for manifests and records, such as `replies, thoughts; last turn only`; None for everything."""
        if self == EVERYTHING:
            return None
        names = ", ".join(name for kind, name in KIND_NAMES.items() if kind in self.kinds)
        return f"{names}; last turn only" if self.last_turn_only else names


EVERYTHING = TrainedOn()


@dataclass
class KindCounts:
    """How many of an assistant's tokens are of each kind.

    Attributes:
        trained: tokens that are trained on, by `KIND_NAMES`.
        read: tokens of the assistant that are only read.
    """

    trained: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)

    def add(self, other: "KindCounts") -> None:
        """Add the counts of other samples.

        Args:
            other: counts.
        """
        for own, more in ((self.trained, other.trained), (self.read, other.read)):
            for name, count in more.items():
                own[name] = own.get(name, 0) + count

    @property
    def words(self) -> str:
        """The counts in words, such as `replies 12, tool calls 8, thoughts 9 (read only)`; empty where nothing is the assistant's."""
        parts = [
            f"{name.replace('_', ' ')} {counts[name]:,}{note}"
            for name in KIND_NAMES.values()
            for counts, note in ((self.trained, ""), (self.read, " (read only)"))
            if counts.get(name)
        ]
        return ", ".join(parts)


def count_kinds(kinds: Iterable[int], loss_mask: Iterable[bool]) -> KindCounts:
    """Count the assistant's tokens by kind.

    Args:
        kinds: of each token.
        loss_mask: True for the tokens that are trained on.

    Returns:
        The counts, without kinds that do not occur.
    """
    pairs = Counter(zip(kinds, loss_mask, strict=True))
    counts = KindCounts()
    for (kind, kept), count in sorted(pairs.items()):
        if kind != Kind.ASKED:
            (counts.trained if kept else counts.read)[KIND_NAMES[Kind(kind)]] = count
    return counts
