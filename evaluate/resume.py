"""What a killed evaluation had finished, so that the same command goes on there instead of starting over.

Owns the work file beside the report: a fingerprint of the evaluation, then a line for each finished round. Does not know
how anything is decoded, timed or reported.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.decode import Ledger
from draftsmith.evaluate.records import Decoded, Place, Round, Timed
from draftsmith.files import JsonlAppender

WORK_FILE = "unfinished.jsonl"


@dataclass
class Part:
    """What is done of one measurement, i.e. of one temperature; kept in `log` too where there is one.

    Attributes:
        rounds: by place, what every contender decoded and how long it took.
        ledgers: stage times by contender; empty until they are all there.
    """

    number: int = 0
    log: JsonlAppender | None = None
    rounds: dict[Place, Round] = field(default_factory=dict)
    ledgers: dict[str, Ledger] = field(default_factory=dict)

    @property
    def num_calls(self) -> int:
        """How many timed calls are done."""
        return sum(len(one) for one in self.rounds.values())

    def keep_round(self, place: Place, finished: Round) -> None:
        """Notes a round that every contender has finished."""
        self.rounds[place] = finished
        self._write({"round": place, "runs": {name: asdict(run) for name, run in finished.items()}})

    def keep_ledgers(self, ledgers: Mapping[str, Ledger]) -> None:
        """Notes the stage times of all contenders."""
        self.ledgers.update(ledgers)
        self._write({"ledgers": {name: vars(ledger) for name, ledger in ledgers.items()}})

    def _write(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write({"part": self.number} | row)

    def restore(self, row: Mapping[str, Any]) -> None:
        """Takes what `_write` wrote."""
        if "round" in row:
            repeat, batch = row["round"]
            self.rounds[repeat, batch] = {name: _timed(run) for name, run in row["runs"].items()}
        else:
            self.ledgers = {name: Ledger(**ledger) for name, ledger in row["ledgers"].items()}


def _timed(run: Mapping[str, Any]) -> Timed:
    decoded = tuple(
        Decoded(tuple(one["token_ids"]), tuple(one["accepted"]), tuple(one["drafted"]), one["prefill_tokens"])
        for one in run["decoded"]
    )
    return Timed(tuple(run["samples"]), run["batch"], run["repeat"], run["seconds"], decoded)


@contextmanager
def parts(out: Path, num_parts: int, identity: Mapping[str, Any]) -> Iterator[Sequence[Part]]:
    """The parts of an evaluation with what an earlier run of the same one left in `out`.

    When the block ends well, the work file goes; when it does not, the next call with the same `identity` begins where
    it ended.

    Args:
        out: folder of the report.
        num_parts: how many measurements there are.
        identity: everything the measurements depend on. Where it differs from the earlier run's, that is thrown away.
    """
    head = {"identity": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}
    path = out / WORK_FILE
    with _opened(path, head) as log:
        found = [Part(number, log) for number in range(num_parts)]
        for row in log.rows[1:]:
            found[row["part"]].restore(row)
        yield found
    path.unlink()


def _opened(path: Path, head: Mapping[str, Any]) -> JsonlAppender:
    """The log that begins with `head`; one that does not is replaced."""
    log = JsonlAppender(path)
    if log.rows[:1] != [head]:
        log.close()
        path.unlink()
        log = JsonlAppender(path)
        log.write(dict(head))
    return log
