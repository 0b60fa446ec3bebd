"""Answers that outlive a killed run: a line for each, so that the same command continues behind the last one.

Owns the work file: what the answers in it depend on, a line an answer, and which of them a run uses again. Does not know how problems are
decoded or judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.decode import Generation
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.files import JsonlAppender
from draftsmith.label.commands.checked_answers import digest
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import shape_text
from draftsmith.ownership import check_begun
from draftsmith.provenance import differences

HEAD = "answers_of"
_DIGITS = 16


@dataclass(frozen=True)
class Given:
    """An answer.

    Attributes:
        reply: what was decoded.
        right: whether a checker calls it right; None where none does.
    """

    reply: Generation
    right: bool | None


@dataclass
class KeptAnswers:
    """The answers that earlier starts of a run gave, by the way of decoding (see `way_of`) and the number of the problem.

    Attributes:
        log: takes new answers; None keeps nothing.
        judged: whether verdicts are a checker's. Others follow from the answers, and are not kept.
    """

    log: JsonlAppender | None = None
    judged: bool = True
    _there: dict[str, dict[int, Given]] = field(default_factory=dict)

    def begin(self, ways: Sequence[str], num_problems: int) -> int:
        """Say how many of the kept answers these ways of decoding use.

        Args:
            ways: of this run.
            num_problems: that each may answer.

        Returns:
            How many.
        """
        used = sum(self.num_of(way, range(num_problems)) for way in dict.fromkeys(ways))
        others = sum(map(len, self._there.values())) - used
        if self.log is not None and (used or others):
            unused = f", {others} of other settings are not" if others else ""
            print(f"{self.log.path}: {used} answers of an earlier start are used again{unused}")
        return used

    def num_of(self, way: str, problems: range) -> int:
        """How many of these problems have an answer that nobody has taken.

        Args:
            way: of decoding.
            problems: numbers.
        """
        return sum(number in problems for number in self._there.get(way, ()))

    def take(self, way: str, number: int) -> Given | None:
        """A kept answer, which is then forgotten here; None where there is none.

        Args:
            way: of decoding.
            number: of the problem.
        """
        return self._there.get(way, {}).pop(number, None)

    def keep(self, way: str, number: int, reply: Generation, right: bool) -> None:
        """Write an answer down.

        Args:
            way: of decoding.
            number: of the problem.
            reply: what was decoded.
            right: the verdict.
        """
        if self.log is not None:
            verdict = right if self.judged else None
            self.log.write({"way": way, "problem": number, "right": verdict, "reply": asdict(reply)})

    def restore(self, row: Mapping[str, Any]) -> None:
        """Take in what `keep` wrote, the last row first. Where a problem is there twice, the first answer counts.

        Args:
            row: of the log.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            self._there.setdefault(row["way"], {})[row["problem"]] = Given(Generation(**row["reply"]), row["right"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"an answer has other fields than this version's ({error})") from error


@contextmanager
def kept_answers(path: Path, facts: Mapping[str, Any], judged: bool) -> Iterator[KeptAnswers]:
    """The answers in a work file. When the block ends well, the file goes; when it does not, the next call continues with it.

    Args:
        path: of the work file, which need not be there. A torn last line is cut off.
        facts: everything the answers depend on besides the way of decoding; what JSON can hold.
        judged: see `KeptAnswers`.

    Raises:
        ValueError: the file is not this command's, or holds answers that depend on something else.
    """
    check_begun(path, HEAD)
    own = json.loads(json.dumps(facts))
    with JsonlAppender(path) as log:
        head, *answers = log.rows or [{}]
    begun = bool(answers)
    if begun:
        _check_same(path, head[HEAD], own)
    else:
        path.unlink()
    # What is written from here on is not held: whoever asked for an answer has it.
    with JsonlAppender(path, keep=lambda row: None) as log:
        kept = KeptAnswers(log, judged)
        while answers:  # from the end, and each is let go: whoever takes an answer is then the only one to hold it
            _restore(kept, answers.pop(), f"{path}:{len(answers) + 2}")
        if not begun:
            log.write({HEAD: own})
        try:
            yield kept
        except BaseException:
            if len(log.rows) == 1:  # stopped before the first answer
                path.unlink()
            raise
    path.unlink()


def _check_same(path: Path, there: Any, own: Mapping[str, Any]) -> None:
    if not isinstance(there, dict):
        raise ValueError(f"{path}:1: {HEAD} is no JSON object; delete the file, or name another folder")
    wrong = differences(there, own)
    if wrong:
        raise ValueError(
            f"{path} holds answers of another run ({'; '.join(wrong)}), which was stopped; repeat that command, or delete the file, or "
            "name another folder"
        )


def _restore(kept: KeptAnswers, row: Mapping[str, Any], place: str) -> None:
    try:
        kept.restore(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; delete the line, and its problem is answered again") from error


def way_of(limits: DraftLimits | None, rule: LossyRule | None) -> str:
    """A way of decoding in a word that no other way has: its shape, its rule, and a digest of all that the rule decides by.

    Args:
        limits: how much is drafted; None for plain decoding.
        rule: None for lossless verification.
    """
    if limits is None:
        return "plain"
    return f"{shape_text(limits)} {'lossless' if rule is None else f'{rule} {_rule_digest(rule)}'}"


def _rule_digest(rule: LossyRule) -> str:
    fields: dict[str, Any] = {"kind": type(rule).__name__, **vars(rule)}
    if isinstance(rule, JudgeRule):
        tensors = {name: tensor.tolist() for name, tensor in rule.judge.state_dict().items()}
        fields = {"config": rule.judge.config.to_dict(), "tensors": tensors}
    return digest(fields)[:_DIGITS]
