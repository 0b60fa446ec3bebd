"""What one pass over a corpus finds out: how long its samples are, and where each one lies.

Owns: the columns, and how the surveys of parts become one. Does not know: files, rows, how processes share the work.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from draftsmith.json_rows import Dropped

IDS_AS_GENERATED = "token ids as generated"
COLUMNS = ("lengths", "files", "lines", "places", "numbers")
"""The arrays of a survey: one value a sample."""


@dataclass(frozen=True)
class Survey:
    """What a corpus, or a part of it, holds once it is cut to a length.

    The columns have a number for each sample kept, in order. They are arrays, since a corpus may have ten million samples.

    Attributes:
        lengths: tokens of the sample.
        files: the file of its row.
        lines: the line where its row begins.
        places: the byte where its row begins.
        numbers: which of the row's samples it is.
        num_rows: all samples, kept or not.
        num_labelled: tokens that are trained on.
        num_cut: samples that were cut.
        num_begun_anew: rows of several samples.
        trained_tokens: tokens that are trained on, by `KIND_NAMES`.
        read_tokens: tokens of the assistant that are only read, by the same names.
        modes: tokens that are trained on, by mode; a sample may be in several.
        mask: how loss masks were found.
        dropped: the rows that are no sample, and the samples that nothing is learned from.
    """

    lengths: array = field(default_factory=lambda: array("i"))
    files: array = field(default_factory=lambda: array("i"))
    lines: array = field(default_factory=lambda: array("q"))
    places: array = field(default_factory=lambda: array("q"))
    numbers: array = field(default_factory=lambda: array("i"))
    num_rows: int = 0
    num_labelled: int = 0
    num_cut: int = 0
    num_begun_anew: int = 0
    trained_tokens: dict[str, int] = field(default_factory=dict)
    read_tokens: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    mask: str = IDS_AS_GENERATED
    dropped: Sequence[Dropped] = ()

    @classmethod
    def joined(cls, surveys: Sequence["Survey"]) -> "Survey":
        """Join the surveys of several parts.

        Args:
            surveys: in the order of the parts.

        Returns:
            The survey of all parts.
        """
        whole = cls(
            num_rows=sum(survey.num_rows for survey in surveys),
            num_labelled=sum(survey.num_labelled for survey in surveys),
            num_cut=sum(survey.num_cut for survey in surveys),
            num_begun_anew=sum(survey.num_begun_anew for survey in surveys),
            trained_tokens=_summed(survey.trained_tokens for survey in surveys),
            read_tokens=_summed(survey.read_tokens for survey in surveys),
            modes=_summed(survey.modes for survey in surveys),
            mask=next((survey.mask for survey in surveys if survey.mask != IDS_AS_GENERATED), IDS_AS_GENERATED),
            dropped=[row for survey in surveys for row in survey.dropped],
        )
        for survey in surveys:
            for name in COLUMNS:
                getattr(whole, name).extend(getattr(survey, name))
        return whole


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts by name, summed, in one order whoever made the parts."""
    whole: Counter[str] = Counter()
    for own in counts:
        whole.update(own)
    return dict(sorted(whole.items()))


def begun_anew(count: int) -> str:
    """The message about conversations whose template rewrites earlier turns.

    Args:
        count: of such conversations.

    Returns:
        The message.
    """
    return (
        f"{count} conversations were begun anew at a later turn, because the chat template shows earlier turns otherwise once more follow: "
        "each of their replies is learned in a sample of its own"
    )
