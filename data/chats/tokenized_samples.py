"""Samples in token ids: what is read, what is trained on, and of which kind the assistant's tokens are.

Owns: the records, and how exchanges in token ids become samples. Does not know: templates, files, rows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from draftsmith.data.chats.token_kinds import EVERYTHING, Kind, KindCounts, TrainedOn, count_kinds

ReplyKinds = Callable[[Sequence[int], Sequence[int]], bytes]
"""The kind of each token of a reply, from the ids of its prompt and its own."""


@dataclass(frozen=True)
class TokenizedSample:
    """One sample. All lists have the same length.

    Attributes:
        id: the conversation's, or `ID#1`, `ID#2`, ... for its further samples.
        input_ids: token ids.
        loss_mask: True for the tokens that are trained on.
        kinds: the `Kind` of each token, one byte each; all that are trained on count as replies where nothing else is known.
        has_tools: whether tools could be called.

    Raises:
        ValueError: the lists have different lengths.
    """

    id: str
    input_ids: list[int]
    loss_mask: list[bool]
    kinds: bytes = field(default=b"", compare=False)
    has_tools: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.loss_mask):
            raise ValueError(f"sample {self.id}: {len(self.input_ids)} ids but {len(self.loss_mask)} mask entries")
        if not self.kinds:
            object.__setattr__(self, "kinds", bytes(map(int, self.loss_mask)))
        if len(self.kinds) != len(self.input_ids):
            raise ValueError(f"sample {self.id}: {len(self.input_ids)} ids but {len(self.kinds)} kinds")

    @property
    def num_labelled(self) -> int:
        """Number of tokens that are trained on."""
        return sum(self.loss_mask)

    @property
    def num_asked(self) -> int:
        """Tokens before the first one of the assistant; all tokens where it wrote none."""
        return next((number for number, kind in enumerate(self.kinds) if kind != Kind.ASKED), len(self.kinds))

    @property
    def num_prompt(self) -> int:
        """Tokens before the reply whose tokens are the first that are trained on; all tokens where none is.

        Example: a prompt of two tokens and a reply of a thought and words give 2, also where only the words are trained on.
        """
        start = self.loss_mask.index(True) if self.num_labelled else len(self.input_ids)
        while self.num_labelled and start and self.kinds[start - 1] != Kind.ASKED:
            start -= 1
        return start

    @property
    def counts(self) -> KindCounts:
        """The assistant's tokens by kind."""
        return count_kinds(self.kinds, self.loss_mask)


@dataclass(frozen=True)
class Turn:
    """One exchange in token ids.

    Attributes:
        prompt_ids: everything the target had read. Those of a later turn begin with the earlier turn's `prompt_ids + reply_ids`.
        reply_ids: what it replied.
        finish: "eos", "stop", "length" (the token budget ended) or "context" (the model's context ended).
    """

    prompt_ids: list[int]
    reply_ids: list[int]
    finish: str


def from_turns(
    sample_id: str,
    turns: Sequence[Turn],
    trained_on: TrainedOn = EVERYTHING,
    reply_kinds: ReplyKinds | None = None,
) -> TokenizedSample:
    """Make a sample from ids as they were read and generated, nothing encoded again.

    Example: turns `([1, 2], [3])` and `([1, 2, 3, 4], [5, 6])` give ids `[1, 2, 3, 4, 5, 6]` and the mask `001011`.

    Args:
        sample_id: the sample's id.
        turns: of one conversation.
        trained_on: what of the replies is trained on.
        reply_kinds: tells thoughts and tool calls in a reply; None: all of it is words.

    Returns:
        The sample.

    Raises:
        ValueError: a turn's prompt does not continue the turn before it.
    """
    ids: list[int] = []
    kinds, mask = bytearray(), []
    for number, turn in enumerate(turns, 1):
        if turn.prompt_ids[: len(ids)] != ids:
            raise ValueError(
                f"sample {sample_id}: the prompt of turn {number - 1} does not begin with the turns before it"
            )
        new = len(turn.prompt_ids) - len(ids)
        ids = turn.prompt_ids + turn.reply_ids
        own = bytes([Kind.REPLY]) * len(turn.reply_ids)
        if reply_kinds is not None:
            own = reply_kinds(turn.prompt_ids, turn.reply_ids)
        learned = not trained_on.last_turn_only or number == len(turns)
        mask += [False] * new + [learned and kind in trained_on.kinds for kind in own]
        kinds += bytes(new) + own
    return TokenizedSample(sample_id, ids, mask, bytes(kinds))


def samples_from_turns(
    sample_id: str,
    turns: Sequence[Turn],
    begun_anew: Collection[int] = (),
    trained_on: TrainedOn = EVERYTHING,
    reply_kinds: ReplyKinds | None = None,
) -> list[TokenizedSample]:
    """As `from_turns`, with a new sample at each turn of `begun_anew`, whose prompt need not continue the turn before it.

    The first one has the conversation's id, the others `ID#1`, `ID#2`, ...

    Args:
        sample_id: the conversation's id.
        turns: of the conversation.
        begun_anew: numbers of turns, from 0.
        trained_on: what of the replies is trained on; of the last turn alone there is one sample.
        reply_kinds: tells thoughts and tool calls in a reply; None: all of it is words.

    Returns:
        The samples.

    Raises:
        ValueError: another turn's prompt does not continue the turn before it.
    """
    groups: list[list[Turn]] = []
    for number, turn in enumerate(turns):
        if number in begun_anew or not groups:
            groups.append([])
        groups[-1].append(turn)
    if trained_on.last_turn_only:
        groups = groups[-1:]
    return numbered([from_turns(sample_id, group, trained_on, reply_kinds) for group in groups])


def numbered(samples: Sequence[TokenizedSample]) -> list[TokenizedSample]:
    """Give each sample of one conversation an id of its own.

    Args:
        samples: in order, all with the conversation's id.

    Returns:
        The samples as `ID`, `ID#1`, `ID#2`, ...
    """
    return [
        replace(sample, id=f"{sample.id}#{number}" if number else sample.id) for number, sample in enumerate(samples)
    ]


def cut(sample: TokenizedSample, max_length: int) -> TokenizedSample:
    """Cut a sample to a length.

    Args:
        sample: whole.
        max_length: in tokens.

    Returns:
        Its first `max_length` tokens.
    """
    if len(sample.input_ids) <= max_length:
        return sample
    ids, mask = sample.input_ids[:max_length], sample.loss_mask[:max_length]
    return replace(sample, input_ids=ids, loss_mask=mask, kinds=sample.kinds[:max_length])


def sample_length(asked: int | None, context: int | None, target: str) -> int:
    """The tokens that samples are cut to: as many as asked for, or the target's whole context.

    Args:
        asked: in tokens; None for the context.
        context: of the target, in tokens; None where nobody knows.
        target: its name, for the message.

    Returns:
        Tokens.

    Raises:
        ValueError: less than 2, more than the context, or neither is known.
    """
    if asked is not None and asked < 2:
        raise ValueError(f"max_length is {asked}; a sample needs at least 2 tokens")
    if context is not None and asked is not None and asked > context:
        raise ValueError(f"max_length is {asked}, but {target} has a context of {context} tokens; set at most that")
    if asked is None and context is None:
        raise ValueError(f"{target} does not say how long its context is; set max_length")
    return asked or context or 0
