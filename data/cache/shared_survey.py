"""A survey of a corpus that several processes make together: each part is read and tokenized once, by one of them.

Owns: the folder of the parts done, and who does which. Does not know: what a survey is for, caches.
"""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from draftsmith.data.corpus import Corpus
from draftsmith.data.corpus_survey import Survey
from draftsmith.data.progress import metered
from draftsmith.data.shared_work import Share, if_free
from draftsmith.files import atomic_write
from draftsmith.json_rows import Dropped

_POLL_SECONDS = 0.1
_ATTEMPTS = 10
_COLUMNS = {
    "lengths": torch.int32,
    "files": torch.int32,
    "lines": torch.int64,
    "places": torch.int64,
    "numbers": torch.int32,
}


def shared_survey(corpus: Corpus, folder: Path, share: Share) -> Survey:
    """Survey a whole corpus, by however many processes call this with the same folder.

    Each does its own parts first, then those that nobody has taken up: a process that never came or died is replaced.

    Args:
        corpus: the samples.
        folder: for the parts that are done; this corpus's, tokenizer's and template's own.
        share: this process's part.

    Returns:
        The survey, the same in every process.

    Raises:
        ValueError: as `Corpus.survey`.
    """
    parts = corpus.parts
    own = share.own(len(parts))
    files = [folder / f"part-{number:05d}.safetensors" for number in range(len(parts))]
    done: dict[int, Survey] = {}
    left = [*own, *(number for number in range(len(parts)) if number not in own)]
    with metered(f"tokenize {corpus.source}", len(parts), "parts", brief=True) as meter:
        while left:
            for number in list(left):
                survey = _read(files[number])
                if survey is None:
                    with if_free(files[number]) as free:
                        # Looked for again: it may have appeared between the look and the lock.
                        if free and (survey := _read(files[number])) is None:
                            survey = corpus.survey_part(parts[number])
                            _write(files[number], survey)
                if survey is not None:
                    done[number] = survey
                    left.remove(number)
                    meter.advance(1)
            if left:
                meter.say("others are at the rest")
                time.sleep(_POLL_SECONDS)
    return corpus.joined([done[number] for number in range(len(parts))])


def _write(path: Path, survey: Survey) -> None:
    """Again where the folder goes while it is written: a rank of another world size that completes the cache clears it away."""
    columns = {name: torch.tensor(getattr(survey, name), dtype=dtype) for name, dtype in _COLUMNS.items()}
    rest = {name: value for name, value in asdict(survey).items() if name not in _COLUMNS}
    payload = safetensors.torch.save(columns, metadata={"survey": json.dumps(rest)})
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            atomic_write(path, payload)
            return
    atomic_write(path, payload)


def _read(path: Path) -> Survey | None:
    """A part that is done; None where there is none, or a damaged one, which is then made again."""
    empty = Survey()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in _COLUMNS:
                getattr(empty, name).frombytes(file.get_tensor(name).numpy().tobytes())
            rest = json.loads(file.metadata()["survey"])
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
    dropped = [Dropped(**row) for row in rest.pop("dropped")]
    columns = {name: getattr(empty, name) for name in _COLUMNS}
    return Survey(**columns, **rest, dropped=dropped)
