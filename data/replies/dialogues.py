"""Conversations with the target, turn by turn: a batch of them in step, or many of them each at its own pace.

Owns: turns, which request comes next, the row that a finished dialogue becomes. Does not know: files, resuming, how a reply is made.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from draftsmith.data.benchmark_fields import benchmark_fields
from draftsmith.data.between_turns import History, replaces_reply
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message, as_row
from draftsmith.data.chats.modes import MODES, modes_of_reply
from draftsmith.data.chats.tokenized_samples import Turn
from draftsmith.data.prompt_ids import chat_of_prompt
from draftsmith.data.prompts import Prompt
from draftsmith.data.replies.reply_plan import Plan
from draftsmith.data.replies.reply_sources import (
    BadReply,
    IndependentEngine,
    RawReply,
    RefillingEngine,
    Reply,
    ResponseEngine,
    Unanswered,
)
from draftsmith.data.replies.vllm_sampling import settle
from draftsmith.decode.sampling import GenerationSettings


def noise_number(prompt_id: str, turn: int) -> int:
    """Which noise a reply draws.

    Args:
        prompt_id: of the prompt's row.
        turn: of the conversation, from 0 on.

    Returns:
        The engine's request id.
    """
    return int.from_bytes(hashlib.sha256(f"{prompt_id}\0{turn}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Failure:
    """A prompt without a reply.

    Attributes:
        id: the prompt's.
        reason: why there is none.
        attempts: how often it was asked.
    """

    id: str
    reason: str
    attempts: int


@dataclass
class Dialogue:
    """A conversation while it grows: the user's turns still to come, and the exchanges so far.

    Attributes:
        prompt: what is asked.
        next_ids: what the target reads before its next reply; None where the conversation has ended.
        messages: the turns so far, as text.
        turns: the exchanges so far, as token ids.
        begun_anew: the turns before which the template rewrote earlier turns: their prompts do not continue the turn before.
        modes: those that a reply so far was in.
    """

    prompt: Prompt
    next_ids: list[int] | None
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    begun_anew: list[int] = field(default_factory=list)
    modes: set[str] = field(default_factory=set)
    _history: History | None = None

    @property
    def request_id(self) -> int:
        """Which noise the next turn draws: a property of the prompt, not of its place in the file."""
        return noise_number(self.prompt.id, len(self.turns))

    def take(self, reply: Reply, chat: ChatTemplate, context: int | None) -> None:
        """Append the reply to `next_ids` and prepare the next turn; a conversation that fills the context ends there.

        Args:
            reply: to `next_ids`.
            chat: renders the next turn.
            context: the model's context in tokens, None for no limit.
        """
        ids = self.next_ids or []
        full = context is not None and len(ids) + len(reply.token_ids) >= context and reply.finish == "length"
        self.turns.append(Turn(ids, reply.token_ids, "context" if full else reply.finish))
        self.modes.update(modes_of_reply(chat.marks.kinds(ids, reply.token_ids), bool(self.prompt.tools), len(ids)))
        self.next_ids = None
        users = self.prompt.user_turns()
        done = len(self.turns)
        if self.prompt.text is None:
            # A NUL, which byte-level models may generate, is no text to readers of rows; the ids keep it.
            text = str(chat.tokenizer.decode(reply.token_ids, skip_special_tokens=True)).replace("\0", "\ufffd")
            if replaces_reply(users[done - 1]):
                self.messages.pop()
            self.messages += [*users[done - 1], Message(role="assistant", content=text)]
        if full or done >= len(users):
            return
        if self._history is None:
            self._history = History(chat_of_prompt(self.prompt, chat), users[0])
        if replaces_reply(users[done]):
            longer = self._history.replaced_prompt_ids(users[done])
        else:
            longer = self._history.next_prompt_ids(ids, reply.token_ids, users[done])
        if longer is None:
            return
        if context is not None and len(longer) >= context:
            self.turns[-1] = replace(self.turns[-1], finish="context")
            return
        self.next_ids = longer
        grown = [*ids, *reply.token_ids]
        if longer[: len(grown)] != grown:
            self.begun_anew.append(done)

    def row(self, settings: GenerationSettings) -> dict[str, Any]:
        """The row that is written; it has `begun_anew` only where there is such a turn, and tools and variables where the prompt has them.

        Args:
            settings: of generation.

        Returns:
            The row's fields.
        """
        anew = {"begun_anew": self.begun_anew} if self.begun_anew else {}
        extras = {
            name: self.prompt.fields()[name] for name in ("tools", "chat_template_kwargs") if getattr(self.prompt, name)
        }
        return {
            "id": self.prompt.id,
            "messages": [as_row(message) for message in self.messages],
            "turns": [asdict(turn) for turn in self.turns],
            "source": self.prompt.source,
            "split": self.prompt.split,
            **benchmark_fields(self.prompt.fields()),
            "modes": [mode for mode in MODES if mode in self.modes],
            "settings": asdict(settings),
            **extras,
            **anew,
        }


def answer_batch(
    batch: Iterable[tuple[Prompt, Sequence[int]]],
    settings: GenerationSettings,
    context: int | None,
    chat: ChatTemplate,
    engine: ResponseEngine,
) -> Iterator[dict[str, Any]]:
    """Answer one batch: all user turns of each prompt, every later one on top of the target's own earlier replies.

    Args:
        batch: prompts with the ids of their first turn.
        settings: of generation.
        context: the model's context in tokens, None for no limit.
        chat: renders later turns.
        engine: what generates.

    Yields:
        Rows, in the order of the prompts.
    """
    dialogues = [Dialogue(prompt, list(ids)) for prompt, ids in batch]
    while active := [dialogue for dialogue in dialogues if dialogue.next_ids is not None]:
        prompts = [dialogue.next_ids or [] for dialogue in active]
        requests = [dialogue.request_id for dialogue in active]
        for dialogue, reply in zip(active, engine.reply(prompts, settings, requests), strict=True):
            dialogue.take(reply, chat, context)
    for dialogue in dialogues:
        yield dialogue.row(settings)


class _Turns:
    """The next turns of many dialogues, as an engine asks for them: those under way before those that have not begun."""

    def __init__(self, dialogues: Iterable[Dialogue]) -> None:
        self._fresh = enumerate(dialogues)
        self.under_way: deque[tuple[int, Dialogue]] = deque()
        self.asked: list[tuple[int, Dialogue]] = []

    def __iter__(self) -> _Turns:
        return self

    def __next__(self) -> tuple[int, list[int]]:
        self.asked.append(self.under_way.popleft() if self.under_way else next(self._fresh))
        dialogue = self.asked[-1][1]
        return dialogue.request_id, dialogue.next_ids or []


def answer_in_stretches(
    plan: Plan, there: Container[str], chat: ChatTemplate, engine: RefillingEngine
) -> Iterator[dict[str, Any]]:
    """Answer the prompts of a plan, each in the row of one that has ended. All user turns are played.

    A dialogue whose next turn does not fit into its row waits for the end of its stretch, and continues with others of its length.

    Args:
        plan: the prompts.
        there: ids of prompts that have been answered.
        chat: renders later turns.
        engine: what generates.

    Yields:
        Rows, in an order that the replies alone decide.
    """
    for stretch in plan.stretches(there):
        dialogues = [Dialogue(prompt, list(ids)) for prompt, ids in stretch.prompts]
        room = stretch.room
        while dialogues:
            yield from _answer_in_rows(dialogues, plan, room, chat, engine)
            dialogues = [dialogue for dialogue in dialogues if dialogue.next_ids is not None]
            dialogues.sort(key=lambda dialogue: (-len(dialogue.next_ids or []), dialogue.prompt.id))
            room = max((len(each.next_ids or []) for each in dialogues), default=0) + plan.settings.max_new_tokens


def _answer_in_rows(
    dialogues: list[Dialogue], plan: Plan, room: int, chat: ChatTemplate, engine: RefillingEngine
) -> Iterator[dict[str, Any]]:
    """Play dialogues as far as they fit into their rows; the rows of those that have ended, in their order."""
    turns = _Turns(dialogues)
    written, at_rest = 0, set()
    for index, reply in engine.stream(turns, plan.settings, plan.num_rows(room), room):
        place, dialogue = turns.asked[index]
        dialogue.take(reply, chat, plan.context)
        if dialogue.next_ids is not None and len(dialogue.next_ids) + plan.settings.max_new_tokens <= room:
            turns.under_way.append((place, dialogue))
            continue
        at_rest.add(place)
        while written in at_rest:
            if dialogues[written].next_ids is None:
                yield dialogues[written].row(plan.settings)
            written += 1


def answer_independently(
    prompts: Iterable[tuple[Prompt, Sequence[int]]],
    settings: GenerationSettings,
    context: int | None,
    chat: ChatTemplate,
    engine: IndependentEngine,
    trusted: bool = False,
) -> Iterator[dict[str, Any] | Failure]:
    """Answer prompts one by one, with as many dialogues under way as the engine takes.

    Rows come in the order in which they are finished. A dialogue that got no answer is a Failure, and the others continue. Whenever a
    dialogue ends, the next begins. Threads do nothing but wait for the engine, because tokenizers cannot be shared by threads.

    A bad reply is an error as long as there was no good one. Afterwards it is a Failure like another: one in a million must not keep
    the rest from being answered.

    Args:
        prompts: prompts with the ids of their first turn.
        settings: of generation.
        context: the model's context in tokens, None for no limit.
        chat: renders later turns.
        engine: what generates; it is closed at the end.
        trusted: whether an earlier run had good replies.

    Yields:
        Rows and failures.

    Raises:
        ValueError: the engine reports that no request can go well, the first reply is bad, or one dialogue after another fails.
    """
    waiting = (Dialogue(prompt, list(ids)) for prompt, ids in prompts)
    running: dict[Future[RawReply], Dialogue] = {}
    answers = _Answers(settings, context, chat, engine, trusted)
    with ThreadPoolExecutor(engine.concurrency, thread_name_prefix="ask") as pool:

        def ask(dialogue: Dialogue) -> None:
            running[pool.submit(engine.ask, dialogue.next_ids or [], settings, dialogue.request_id)] = dialogue

        try:
            for dialogue in islice(waiting, engine.concurrency):
                ask(dialogue)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    dialogue = running.pop(future)
                    outcome = answers.take(future, dialogue)
                    following = dialogue if outcome is None else next(waiting, None)
                    if following is not None and not answers.hopeless:
                        ask(following)
                    if outcome is not None:
                        yield outcome
                    answers.check(outcome)
        finally:
            for future in running:
                future.cancel()
            engine.close()


@dataclass
class _Answers:
    """What requests came to: turns of their dialogues, and how many failed in a row."""

    settings: GenerationSettings
    context: int | None
    chat: ChatTemplate
    engine: IndependentEngine
    trusted: bool
    failed_in_a_row: int = 0

    @property
    def patience(self) -> int:
        """How many failures in a row end the run."""
        return max(16, 2 * self.engine.concurrency)

    @property
    def hopeless(self) -> bool:
        """Whether so many failed in a row that nothing more is asked."""
        return self.failed_in_a_row >= self.patience

    def take(self, future: Future[RawReply], dialogue: Dialogue) -> dict[str, Any] | Failure | None:
        """Take in what a request came to.

        Returns:
            The dialogue's row where this answer ended it, a Failure, or None where another turn follows.

        Raises:
            BadReply: the first reply of all is bad.
        """
        try:
            raw, prompt = future.result(), dialogue.next_ids or []
            budget = self.engine.budget(prompt, self.settings)
            dialogue.take(settle(raw, self.settings, budget, self.chat.tokenizer), self.chat, self.context)
        except Unanswered as error:
            self.failed_in_a_row += 1
            return Failure(dialogue.prompt.id, error.reason, error.attempts)
        except BadReply as error:
            if not self.trusted:
                raise
            self.failed_in_a_row += 1
            return Failure(dialogue.prompt.id, str(error), 1)
        self.failed_in_a_row, self.trusted = 0, True
        return dialogue.row(self.settings) if dialogue.next_ids is None else None

    def check(self, outcome: dict[str, Any] | Failure | None) -> None:
        """Check that some dialogue still succeeds.

        Raises:
            ValueError: one dialogue after another failed.
        """
        if self.hopeless:
            raise ValueError(
                f"the last {self.failed_in_a_row} prompts got no answer ({outcome}); repair the engine and run the same command again; it "
                "resumes where this one stopped"
            )
