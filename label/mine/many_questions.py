"""Mining over many questions at once: rows at different swaps advance together, and the next question takes a finished row's place.

Owns which rows share a forward. Knows nothing of the procedure (:mod:`draftsmith.label.mine.question_mining`) nor of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from draftsmith.label.mine.kept_rows import CHUNK, CachedRows, RowInput
from draftsmith.label.mine.question_mining import MiningQuestion, MiningResult, QuestionMining, Rules
from draftsmith.models.target.target import Target


@dataclass(frozen=True)
class ForwardCounts:
    """What a model computed.

    Attributes:
        forwards: of the model.
        tokens: that they read.
        padding: that they computed besides.
    """

    forwards: int = 0
    tokens: int = 0
    padding: int = 0

    def since(self, earlier: ForwardCounts) -> ForwardCounts:
        """What came after an earlier count.

        Args:
            earlier: of the same model.
        """
        return ForwardCounts(
            self.forwards - earlier.forwards, self.tokens - earlier.tokens, self.padding - earlier.padding
        )

    def plus(self, other: ForwardCounts) -> ForwardCounts:
        """Both together.

        Args:
            other: another count.
        """
        return ForwardCounts(self.forwards + other.forwards, self.tokens + other.tokens, self.padding + other.padding)


class Miner:
    """Mines with one target and one draft LM of the same tokenizer.

    Args:
        target: continues behind each swap; greedy.
        draft: whose tokens are tried.
        rules: how answers are found and judged. The labels hold for greedy decoding in the target's dtype; in float32 they do not
            depend on what shares a forward (docs/exactness.md).
        batch_rows: most questions in flight.

    Raises:
        ValueError: `batch_rows` is below 1.
    """

    def __init__(self, target: Target, draft: Target, rules: Rules, batch_rows: int = 8) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows is {batch_rows}; it must be at least 1; raise it")
        self._models = (target, draft)
        self._rules = rules
        self._batch_rows = batch_rows
        self._rows: tuple[CachedRows, CachedRows] | None = None

    def forwards(self) -> tuple[ForwardCounts, ForwardCounts]:
        """Of the target and of the draft, in the current call of :meth:`mine`."""
        if self._rows is None:
            return ForwardCounts(), ForwardCounts()
        target, draft = (ForwardCounts(rows.num_forwards, rows.num_tokens, rows.num_padding) for rows in self._rows)
        return target, draft

    def mine(self, questions: Sequence[MiningQuestion]) -> Iterator[MiningResult]:
        """Mines questions.

        Args:
            questions: with prompts in token ids.

        Yields:
            each question's outcome as soon as it is known.

        Raises:
            ValueError: a prompt without a token, or one that leaves no room in the target's context.
        """
        check_questions(questions, self._rules)
        if not questions:
            return
        num_rows = min(self._batch_rows, len(questions))
        longest = max(map(self._longest, questions))
        target, draft = self._models
        rules = self._rules
        chunk = max(CHUNK, 1 + rules.draft_window, 1 + rules.draft_length, rules.look_ahead)
        self._rows = (
            CachedRows(target, num_rows, longest, chunk=chunk),
            CachedRows(draft, num_rows, longest, target.ends.vocab_size, chunk),
        )
        waiting = iter(questions)
        minings: dict[int, QuestionMining] = {}
        while True:
            for row in range(num_rows):
                question = None if row in minings else next(waiting, None)
                if question is not None:
                    minings[row] = QuestionMining(question, self._rules)
            if not minings:
                return
            self._propose(minings)
            self._ask_target(minings)
            self._ask_draft(minings)
            for row in [row for row, mining in minings.items() if mining.phase == "done"]:
                yield minings.pop(row).mined()

    def _propose(self, minings: dict[int, QuestionMining]) -> None:
        """Lets the draft guess on where no known answer does, token by token."""
        assert self._rows is not None
        while chosen := {row: mining for row, mining in minings.items() if mining.wants_guess()}:
            reads = [RowInput(row, mining.target_tokens()[0], 1) for row, mining in chosen.items()]
            for row, reading in self._rows[1].read(reads).items():
                chosen[row].charge(reading.num_tokens, reading.num_forwards, ahead=True)
                chosen[row].guess(reading.next_tokens[0])

    def _ask_target(self, minings: dict[int, QuestionMining]) -> None:
        """Prompts have a forward of their own: they are longer than what the other rows read."""
        assert self._rows is not None
        for prompts in (True, False):
            chosen = {
                row: mining
                for row, mining in minings.items()
                if mining.needs_target and (mining.phase == "prompt") == prompts
            }
            reads = [RowInput(row, *mining.target_tokens()) for row, mining in chosen.items()]
            for row, reading in self._rows[0].read(reads).items() if reads else ():
                chosen[row].charge(reading.num_tokens, reading.num_forwards)
                chosen[row].take_target(reading.next_tokens)

    def _ask_draft(self, minings: dict[int, QuestionMining]) -> None:
        assert self._rows is not None
        while chosen := {row: mining for row, mining in minings.items() if mining.phase == "draft"}:
            reads = [RowInput(row, *mining.draft_tokens()) for row, mining in chosen.items()]
            for row, reading in self._rows[1].read(reads).items():
                chosen[row].charge(reading.num_tokens, reading.num_forwards)
                chosen[row].take_draft(reading.next_tokens)

    def _longest(self, question: MiningQuestion) -> int:
        """Most tokens that a row of this question may hold: a reply may grow by one token beyond its limit."""
        reply = max(self._rules.max_new_tokens, len(question.reply_ids or ())) + 2
        return len(question.prompt_ids) + reply


def check_questions(questions: Sequence[MiningQuestion], rules: Rules) -> None:
    """Checks questions before the first forward.

    Args:
        questions: with prompts in token ids.
        rules: of the mining.

    Raises:
        ValueError: a prompt without a token, or one that leaves no room in the context, or a given reply that does not fit into it.
    """
    for question in questions:
        num_prompt, num_reply = len(question.prompt_ids), len(question.reply_ids or ())
        if not num_prompt:
            raise ValueError(
                f"{question.id}: the prompt has no token; a model needs one to continue; leave the question out"
            )
        if question.reply_ids is not None and not num_reply:
            raise ValueError(
                f"{question.id}: the given reply has no token; there is nothing to walk along; leave the question out"
            )
        if rules.context is not None and num_prompt + max(1, num_reply) > rules.context:
            raise ValueError(
                f"{question.id}: prompt and reply have {num_prompt} and {num_reply} tokens; the target's context holds "
                f"{rules.context}, one new token included; leave the question out or shorten it"
            )
