"""A file of labelled answers read whole, as tests want it; `label import` takes it row by row."""

from dataclasses import dataclass
from pathlib import Path

from draftsmith.label.formats.counting import FirstStep
from draftsmith.label.formats.detection import Format
from draftsmith.label.formats.importers import LabelledFile
from draftsmith.label.schema import Answer
from draftsmith.label.store.label_source import LabelSource


@dataclass(frozen=True)
class Imported:
    """What a file gave: answers with their labels, the rows left out, their format, and what was decided for the whole file."""

    answers: list[Answer]
    left_out: list[str]
    format: Format
    notes: tuple[str, ...] = ()


def read_labelled(path: Path, row_format: Format, origin: LabelSource, first_step: FirstStep = "auto") -> Imported:
    """All that a file gives; see `LabelledFile` for the arguments and errors."""
    left_out: list[str] = []
    file = LabelledFile(path, row_format, origin, first_step)
    answers = list(file.answers(left_out.append))
    return Imported(answers, left_out, file.format, tuple(file.notes))
