"""What a killed evaluation had finished, so that the same command resumes there instead of starting over.

Owns the work file beside the report: for each measurement what it depends on, then a line for each finished round. Does not know
how anything is decoded, timed or reported.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.data.replies.reply_sources import Reply
from draftsmith.evaluate.records import Place, Round, Timed
from draftsmith.evaluate.roofline.stage_clock import StageTimes
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.files import JsonlAppender, atomic_write
from draftsmith.json_text import json_text
from draftsmith.ownership import check_begun

WORK_FILE = "unfinished.jsonl"
_FACTS = "facts"
_EARLIER = "identity"  # how the work files of earlier versions begin


@dataclass
class Part:
    """What is done of one measurement, i.e. of one temperature; kept in `log` too where there is one.

    Attributes:
        rounds: by place, what every contender decoded and how long it took.
        stages: stage times by contender, of those that have been clocked.
        played: by prompt number, the target's own reply that later turns of its conversation read.
    """

    key: str = ""
    log: JsonlAppender | None = None
    rounds: dict[Place, Round] = field(default_factory=dict)
    stages: dict[str, StageTimes] = field(default_factory=dict)
    played: dict[int, Reply] = field(default_factory=dict)

    @property
    def num_calls(self) -> int:
        """How many timed calls are done."""
        return sum(len(calls) for calls in self.rounds.values())

    def keep_round(self, place: Place, finished: Round) -> None:
        """Notes a round that every contender has finished."""
        self.rounds[place] = finished
        self._write({"round": place, "runs": {name: asdict(run) for name, run in finished.items()}})

    def keep_stages(self, name: str, times: StageTimes) -> None:
        """Notes the stage times of a contender."""
        self.stages[name] = times
        self._write({"stages": {name: asdict(times)}})

    def keep_played(self, replies: Mapping[int, Reply]) -> None:
        """Notes replies that later turns read."""
        self.played.update(replies)
        self._write({"played": [[number, reply.token_ids, reply.finish] for number, reply in replies.items()]})

    def _write(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write({"part": self.key} | row)

    def restore(self, row: Mapping[str, Any]) -> None:
        """Takes what `_write` wrote."""
        if "round" in row:
            repeat, batch = row["round"]
            self.rounds[repeat, batch] = {name: _timed(run) for name, run in row["runs"].items()}
        elif "played" in row:
            self.played |= {number: Reply(token_ids, finish) for number, token_ids, finish in row["played"]}
        else:
            self.stages |= {name: StageTimes(**times) for name, times in row["stages"].items()}


def _timed(run: Mapping[str, Any]) -> Timed:
    decoded = tuple(
        Decoded(
            tuple(reply["token_ids"]),
            tuple(reply["accepted"]),
            tuple(reply["drafted"]),
            reply["prefill_tokens"],
            reply["cycles_before"],
        )
        for reply in run["decoded"]
    )
    return Timed(tuple(run["samples"]), run["batch"], run["repeat"], run["seconds"], decoded)


@contextmanager
def parts(out: Path, identities: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Part]]:
    """The parts of an evaluation with what earlier runs left of the same measurements in `out`.

    What they left of other measurements is dropped, and printed. When the block ends well, the work file goes; when it does not, the
    next call with the same identities begins where it ended.

    Args:
        out: folder of the report.
        identities: for each measurement everything it depends on, its `temperature` among it; no two are equal.

    Raises:
        ValueError: a file has the work file's name and is not an evaluation's.
    """
    path = out / WORK_FILE
    check_begun(path, "part", _EARLIER)
    heads = [_head(identity) for identity in identities]
    for line in _drop_others(path, heads):
        print(line)
    with JsonlAppender(path) as log:
        begun = {row["part"] for row in log.rows}
        by_digest = {head["part"]: Part(head["part"], log) for head in heads}
        for row in log.rows:
            if _FACTS not in row:
                by_digest[row["part"]].restore(row)
        for head in heads:
            if head["part"] not in begun:
                log.write(head)
        yield list(by_digest.values())
    path.unlink()


def _head(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a part is: a digest of everything, and one of each fact so that a difference can be named."""
    facts = {name: _digest(value) for name, value in identity.items()}
    return {"part": _digest(facts), "temperature": identity["temperature"], _FACTS: facts}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _drop_others(path: Path, heads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Leaves only the rows of these parts in the work file; says what went, a line for each part that had finished anything."""
    if not path.exists():
        return []
    with JsonlAppender(path) as log:
        rows = log.rows
    own = {head["part"] for head in heads}
    others = [row for row in rows if row.get("part") not in own]
    if not others:
        return []
    atomic_write(path, "".join(json_text(row) + "\n" for row in rows if row not in others))
    rounds = Counter(row.get("part") for row in others if "round" in row)
    known = {row["part"]: row for row in others if _FACTS in row}
    return [
        f"{path}: dropped {count} finished rounds of another evaluation, {_unlike(known.get(part), heads)}"
        for part, count in rounds.items()
    ]


def _unlike(other: Mapping[str, Any] | None, heads: Sequence[Mapping[str, Any]]) -> str:
    """Example: `at temperature 1, with other candidates, seed`."""
    if other is None:
        return "which an earlier version wrote"
    own, theirs = heads[0][_FACTS], other[_FACTS]
    names = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    others = ", ".join(name for name in names if name != "temperature")
    return f"at temperature {other['temperature']:g}" + (f", with other {others}" if others else "")
