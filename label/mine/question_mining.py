"""One question on its way through AutoJudge's mining (arXiv:2504.20039): which tokens of an answer may be the draft's.

Owns the order of the procedure: the target's answer, the draft's tokens along it, one swap after the other, the answer that follows, the
label. Knows no model: it says what to read, and the caller passes the
tokens that came out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from draftsmith.label.mine.known_answers import SHORTEST_RUN, KnownAnswers
from draftsmith.label.token_labels import CORRECT, WRONG

Against = Literal["answer", "reference"]
Phase = Literal["prompt", "answer", "alternative", "draft", "done"]
Work = Literal["prompt", "answer", "alternative", "draft", "guess"]


@dataclass(frozen=True)
class MiningQuestion:
    """A question to be mined.

    Attributes:
        id: of the question.
        prompt_ids: the prompt in token ids.
        reply_ids: the target's answer, where it is known already.
        reference: what the data set says the answer is.
        parse: replaces the rules' `parse` where reading a reply takes more than the reply.
    """

    id: str
    prompt_ids: list[int]
    reply_ids: list[int] | None = None
    reference: str | None = None
    parse: Callable[[list[int]], str | None] | None = None


@dataclass(frozen=True)
class Rules:
    """How answers are found and judged.

    Attributes:
        parse: what a reply, in token ids, answers; None where it answers nothing.
        eos_token_ids: any of these ends a reply, and is part of it.
        max_new_tokens: most tokens of a reply.
        against: "answer" judges by the target's own answer. "reference" leaves out questions which the target does not answer as their
            reference does.
        max_length: an alternative is at most so many times as long as the first answer; None sets no such bound.
        stop_on_rejoin: if this many last tokens of an alternative are also in a known answer, assume that it continues like that one. A
            guess, not exact; None always lets the target continue.
        context: most tokens of prompt and reply together; None for no limit.
        draft_window: most tokens of a known answer that one forward of the target verifies.
        draft_length: most tokens that the draft guesses for one forward of the target, where no known answer says what comes.
        look_ahead: tokens of the answer along which the draft is asked in one forward.

    Raises:
        ValueError: a number out of range.
    """

    parse: Callable[[list[int]], str | None]
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int = 512
    against: Against = "answer"
    max_length: float | None = None
    stop_on_rejoin: int | None = None
    context: int | None = None
    draft_window: int = 16
    draft_length: int = 5
    look_ahead: int = 16

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "draft_window": 0, "draft_length": 0, "look_ahead": 1, "max_length": 1}
        least["stop_on_rejoin"] = SHORTEST_RUN
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}; it must be at least {bound}; raise it")


@dataclass(frozen=True)
class Swap:
    """A token of the draft in place of the target's.

    Attributes:
        place: of the token in the reply.
        target_token: what the target said.
        draft_token: what the draft said.
        label: 1 may be accepted, 0 is wrong.
    """

    place: int
    target_token: int
    draft_token: int
    label: int


@dataclass
class MiningCost:
    """What mining a question took.

    The target reads the prompt, and finds its answer and the alternatives. The draft says its tokens along the answer ("draft") and guesses
    ahead of the target ("guess").

    Attributes:
        tokens: that were read, by what they were for.
        row_forwards: in which the question took part, likewise.
    """

    tokens: dict[Work, int] = field(default_factory=dict)
    row_forwards: dict[Work, int] = field(default_factory=dict)

    def add(self, work: Work, num_tokens: int, num_forwards: int) -> None:
        """Charges one reading.

        Args:
            work: what it was for.
            num_tokens: that were read.
            num_forwards: in which the question took part.
        """
        self.tokens[work] = self.tokens.get(work, 0) + num_tokens
        self.row_forwards[work] = self.row_forwards.get(work, 0) + num_forwards


@dataclass(frozen=True)
class MiningResult:
    """What came of a question.

    Attributes:
        id: the question's.
        prompt_ids: as the target read them.
        first_reply_ids: the target's answer.
        reply_ids: the answer in the end, every accepted swap in it. A rejected swap at place i was tried behind its first i tokens.
        answer: what it comes to; None where the question was left out.
        swaps: in the order of their places.
        cost: what it took.
        left_out: why the question was left out; None where it was not.
    """

    id: str
    prompt_ids: list[int]
    first_reply_ids: list[int]
    reply_ids: list[int]
    answer: str | None
    swaps: tuple[Swap, ...]
    cost: MiningCost
    left_out: str | None = None


@dataclass
class _PartialReply:
    """A reply that the target continues.

    Its first `first` tokens are given, and it ends at `limit`. `guess` is what may come next, `known` whether it comes from a known answer.
    """

    tokens: list[int]
    limit: int
    first: int = 0
    guess: list[int] = field(default_factory=list)
    known: bool = False


class QuestionMining:
    """A question under way.

    `phase` says what the caller does next. "prompt", "answer", "alternative": the target reads :meth:`target_tokens`, and its next tokens
    go to :meth:`take_target`. "draft": the draft reads :meth:`draft_tokens`, and its next tokens go to :meth:`take_draft`. "done":
    :meth:`mined` gives the outcome.

    Args:
        question: to be mined.
        rules: how answers are found and judged.
    """

    def __init__(self, question: MiningQuestion, rules: Rules) -> None:
        self.question = question
        self.phase: Phase = "prompt"
        self.cost = MiningCost()
        self._rules = rules
        self._parse = question.parse or rules.parse
        self._known = KnownAnswers()
        self._first_reply: list[int] = []
        self._reply: list[int] = []
        self._drafted: list[int] = []
        self._place = 0
        self._limit = 0
        self._answer: str | None = None
        self._swaps: list[Swap] = []
        self._left_out: str | None = None
        self._growing = _PartialReply([], self._within_context(rules.max_new_tokens))

    @property
    def needs_target(self) -> bool:
        """Whether this question waits for the target's next tokens."""
        return self.phase in ("prompt", "answer", "alternative")

    def charge(self, num_tokens: int, num_forwards: int, ahead: bool = False) -> None:
        """Notes what a reading in this phase takes.

        Args:
            num_tokens: that were read.
            num_forwards: in which the question took part.
            ahead: whether it was the draft's, which guesses ahead of the target.
        """
        assert self.phase != "done"
        self.cost.add("guess" if ahead else self.phase, num_tokens, num_forwards)

    def target_tokens(self) -> tuple[list[int], int]:
        """What the target is to read, and after how many tokens at its end the next one is asked."""
        growing = self._growing
        return self.question.prompt_ids + growing.tokens + growing.guess, 1 + len(growing.guess)

    def take_target(self, next_tokens: list[int]) -> None:
        """Takes the target's own choices: those that confirm the guess continue its reply, and one more does.

        Args:
            next_tokens: after each token asked for.
        """
        if self.phase == "prompt" and self.question.reply_ids is not None:
            self._begin(self._cut(self.question.reply_ids))
            return
        guess = self._growing.guess
        kept = next((n for n, token in enumerate(guess) if next_tokens[n] != token), len(guess))
        if self.phase == "prompt":
            self.phase = "answer"
        if self._grow(next_tokens[: kept + 1]):
            (self._begin if self.phase == "answer" else self._judge)(self._growing.tokens)
        else:
            self._look_up()

    def wants_guess(self) -> bool:
        """Whether the draft should guess what the target says next, token by token, because no known answer does."""
        growing = self._growing
        if self.phase not in ("answer", "alternative") or growing.known:
            return False
        ended = bool(growing.guess) and growing.guess[-1] in self._rules.eos_token_ids
        return not ended and len(growing.guess) < self._room(self._rules.draft_length)

    def guess(self, token: int) -> None:
        """Takes the draft's next guess.

        Args:
            token: its id.
        """
        self._growing.guess.append(token)

    def draft_tokens(self) -> tuple[list[int], int]:
        """What the draft is to read, and after how many tokens at its end the next one is asked."""
        end = min(len(self._reply), len(self._drafted) + self._rules.look_ahead)
        return self.question.prompt_ids + self._reply[: end - 1], end - len(self._drafted)

    def take_draft(self, next_tokens: list[int]) -> None:
        """Takes the draft's choices along the answer.

        Args:
            next_tokens: after each token asked for.
        """
        self._drafted += next_tokens
        self._to_next_mismatch()

    def mined(self) -> MiningResult:
        """The outcome."""
        assert self.phase == "done"
        given, swaps = self.question, tuple(self._swaps)
        replies = (self._first_reply, self._reply)
        return MiningResult(given.id, given.prompt_ids, *replies, self._answer, swaps, self.cost, self._left_out)

    def _look_up(self) -> None:
        """Guesses what the target says next from a known answer, if the last tokens are in one."""
        growing = self._growing
        place = self._known.rejoin(growing.tokens)
        growing.guess = [] if place is None else self._known.following(place, self._room(self._rules.draft_window))
        growing.known = bool(growing.guess)

    def _room(self, most: int) -> int:
        """How many of `most` guesses may still count: the target adds one token to those it confirms."""
        return max(0, min(most, self._growing.limit - len(self._growing.tokens) - 1))

    def _grow(self, tokens: list[int]) -> bool:
        """Appends what the target said; True where the reply ends with it."""
        growing, rejoin = self._growing, self._rules.stop_on_rejoin
        for token in tokens:
            growing.tokens.append(token)
            if token in self._rules.eos_token_ids or len(growing.tokens) >= growing.limit:
                return True
            if rejoin is not None and self.phase == "alternative" and len(growing.tokens) - growing.first >= rejoin:
                place = self._known.rejoin(growing.tokens, rejoin)
                if place is not None:
                    growing.tokens += self._known.following(place, growing.limit - len(growing.tokens))
                    return True
        return False

    def _begin(self, reply: list[int]) -> None:
        """Takes the target's answer, by which alternatives are judged, and looks for the first mismatch."""
        rules = self._rules
        self._first_reply = self._reply = reply
        self._answer = self._parse(reply)
        if self._answer is None:
            self._leave_out("the target's reply has no answer that can be read")
            return
        if rules.against == "reference" and self._answer != self.question.reference:
            self._leave_out("the target's answer is not the reference's")
            return
        self._limit = max(rules.max_new_tokens, len(reply))
        if rules.max_length is not None:
            self._limit = min(self._limit, int(rules.max_length * len(reply)))
        self._known.add(reply)
        self._to_next_mismatch()

    def _leave_out(self, reason: str) -> None:
        self._left_out, self._answer, self.phase = reason, None, "done"

    def _to_next_mismatch(self) -> None:
        while self._place < min(len(self._reply), self._limit):
            if self._place >= len(self._drafted):
                self.phase = "draft"
                return
            if self._drafted[self._place] != self._reply[self._place]:
                self._swap()
                return
            self._place += 1
        self.phase = "done"

    def _swap(self) -> None:
        """Puts the draft's token in and lets the target continue, for one token at least, as the reference procedure does."""
        tokens = [*self._reply[: self._place], self._drafted[self._place]]
        first = len(tokens)
        limit = self._within_context(max(self._limit, first + 1))
        self._growing = _PartialReply(tokens, limit, first)
        self.phase = "alternative"
        if tokens[-1] in self._rules.eos_token_ids or limit <= first:
            self._judge(tokens)
        else:
            self._look_up()

    def _judge(self, alternative: list[int]) -> None:
        place = self._place
        kept = self._parse(alternative) == self._answer
        draft_token = alternative[place]
        self._swaps.append(Swap(place, self._reply[place], draft_token, CORRECT if kept else WRONG))
        self._known.add(alternative, place)
        if kept:
            self._reply = alternative
            self._drafted = self._drafted[: place + 1]
        self._place += 1
        # The reference ends its walk behind a swapped end token, whatever became of it.
        if draft_token in self._rules.eos_token_ids:
            self.phase = "done"
        else:
            self._to_next_mismatch()

    def _cut(self, reply: list[int]) -> list[int]:
        """A given reply up to its first end token."""
        ends = (place + 1 for place, token in enumerate(reply) if token in self._rules.eos_token_ids)
        return reply[: next(ends, len(reply))]

    def _within_context(self, limit: int) -> int:
        context = self._rules.context
        return limit if context is None else min(limit, context - len(self.question.prompt_ids))
