"""The prompts of an evaluation as token ids.

Owns which rows count as prompts and which are too long. Does not know what decodes them.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from draftsmith.data.benchmark_fields import benchmark_fields, is_question
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.modes import modes
from draftsmith.data.chats.reply_marks import ReplyMarks, marks_of
from draftsmith.data.chats.tool_calls import read_tools
from draftsmith.data.formats import row_id
from draftsmith.data.prompt_ids import chat_for, check_prompt, first_prompt_ids
from draftsmith.data.prompts import PROMPT_FILE, Prompt, PromptSelection, read_prompts, read_question_set, say_dropped
from draftsmith.data.replies.dialogues import Dialogue
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.data.rows_of_ids import token_ids
from draftsmith.escapes import visible
from draftsmith.evaluate.records import Sample
from draftsmith.files import read_jsonl
from draftsmith.json_rows import Dropped, UnusableRow, summary
from draftsmith.models.target.options import TokenizerOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateChoice, TemplateOptions
from draftsmith.models.target.target import Target

Turn = tuple[int, Sequence[int]]
"""The number of a prompt, by which it draws its noise, and what the target reads."""
Answer = Callable[[Sequence[Turn]], Sequence[Reply]]
"""The target's own replies to some turns."""


@dataclass(frozen=True)
class Questions:
    """The prompts of an evaluation, and the conversations that some of them open.

    Attributes:
        samples: the first turn of each.
        conversations: sample id -> its prompt, where the user has several turns.
        chat: renders later turns; None where there are none.
    """

    samples: list[Sample]
    conversations: Mapping[str, Prompt] = field(default_factory=dict)
    chat: ChatTemplate | None = None

    @property
    def num_turns(self) -> int:
        """Prompts with all their later turns."""
        own = [self.conversations.get(sample.id) for sample in self.samples]
        return sum(1 if prompt is None else len(prompt.user_turns()) for prompt in own)

    def played(self, answer: Answer, context: int | None) -> list[Sample]:
        """Every turn as a prompt of its own: a later one reads the target's own replies to the turns before.

        All first turns come first, then all second ones, and so on, so that a turn's number does not depend on later turns.

        Args:
            answer: the target's replies; it is asked for no reply to a last turn.
            context: the target's context in tokens, None for no limit. A conversation that fills it ends there.

        Returns:
            The prompts.
        """
        samples = list(self.samples)
        opened = [self.conversations.get(sample.id) for sample in samples]
        waiting = [
            (number, Dialogue(prompt, list(samples[number].prompt_ids)))
            for number, prompt in enumerate(opened)
            if prompt is not None
        ]
        while waiting:
            replies = answer([(number, dialogue.next_ids or []) for number, dialogue in waiting])
            following = []
            for (number, dialogue), reply in zip(waiting, replies, strict=True):
                assert self.chat is not None
                dialogue.take(reply, self.chat, context)
                if dialogue.next_ids is not None:
                    turn, first = len(dialogue.turns) + 1, samples[number].id.removesuffix(f"/{len(dialogue.turns)}")
                    ids = tuple(dialogue.next_ids)
                    own_modes = _modes(ids, bool(dialogue.prompt.tools), self.chat.marks)
                    samples.append(
                        replace(samples[number], id=f"{first}/{turn}", prompt_ids=ids, turn=turn, modes=own_modes)
                    )
                    if turn < len(dialogue.prompt.user_turns()):
                        following.append((len(samples) - 1, dialogue))
            waiting = following
        return samples


def selected_questions(
    path: Path,
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    selection: PromptSelection,
    rendering: TemplateChoice,
    where: TokenizerOptions,
    max_turns: int | None = None,
) -> Questions:
    """As `selected_samples`, with the later turns of conversations.

    Args:
        path: the prompts.
        target: path or hub id.
        tokenizer: the target's.
        selection: which prompts.
        rendering: the chat template.
        where: how the target's files are read.
        max_turns: most turns of each conversation; None for all.

    Raises:
        ValueError: as `read_samples`.
    """
    ends = where.end_tokens(target, tokenizer)
    template, options = rendering.template, rendering.options
    return _read(path, tokenizer, template, selection.split, selection.limit, ends, options, max_turns)


def selected_samples(
    path: Path,
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    selection: PromptSelection,
    rendering: TemplateChoice,
    where: TokenizerOptions,
) -> list[Sample]:
    """As `read_samples`, by the options of a command.

    Args:
        path: the prompts.
        target: path or hub id.
        tokenizer: the target's.
        selection: which prompts.
        rendering: the chat template.
        where: how the target's files are read.

    Raises:
        ValueError: as `read_samples`.
    """
    ends = where.end_tokens(target, tokenizer)
    return read_samples(path, tokenizer, rendering.template, selection.split, selection.limit, ends, rendering.options)


def read_samples(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    eos_ids: Iterable[int] = (),
    options: TemplateOptions = NO_OPTIONS,
) -> list[Sample]:
    """Prompts of a file that `draftsmith data prompts` wrote, of a benchmark's own file, or of JSONL rows that carry `prompt_ids`.

    A prompt is what `draftsmith data respond` asks. Rows with ids are taken as they are: what the target read when it made its
    replies. Rows that are no prompt, and those that the template fails on, are left out and counted on standard error.

    Args:
        path: the file, or a folder of `draftsmith data prompts`.
        tokenizer: the target's.
        template: Jinja file of a chat template, or `none`; None takes the tokenizer's own.
        split: only rows of this split; None takes all.
        limit: only the first so many samples; None takes all.
        eos_ids: tokens that end a reply.
        options: the chat template's name and variables.

    Raises:
        ValueError: the file or a template is missing, options of a template go with token ids, or no prompt is left.
    """
    return _read(path, tokenizer, template, split, limit, eos_ids, options, max_turns=1).samples


def _read(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    split: str | None,
    limit: int | None,
    eos_ids: Iterable[int],
    options: TemplateOptions,
    max_turns: int | None,
) -> Questions:
    """Prompts of a file, and those with later turns by the ids of their samples."""
    file = path / PROMPT_FILE if path.is_dir() else path
    dropped: list[Dropped] = []
    conversations: dict[str, Prompt] = {}
    chat: ChatTemplate | None = None
    kinds = () if file.suffix == ".parquet" else (_has_ids(row) for _, row in read_jsonl(file, []))
    kind = next((kind for kind in kinds if kind is not None), None)
    if kind:
        if options != NO_OPTIONS:
            raise ValueError(
                f"{file} has token ids, which no template renders; leave template_name and template_args out"
            )
        rows = read_jsonl(file, dropped)
        marks = marks_of(tokenizer, template)
        converted = (_or_dropped(_from_ids, (line, row, marks), f"{file}:{line}", dropped) for line, row in rows)
    else:
        is_benchmark = kind is None and _is_benchmark(file)
        prompts = (read_question_set if is_benchmark else read_prompts)(file, split, dropped)[:limit]
        prompts = [_first_turns(prompt, max_turns) for prompt in prompts]
        chat = chat_for(prompts, tokenizer, template, eos_ids, options)
        conversations = {prompt.id: prompt for prompt in prompts if len(prompt.user_turns()) > 1}
        converted = (_or_dropped(_from_prompt, (prompt, chat), prompt.place, dropped) for prompt in prompts)
    samples = [sample for sample in converted if sample is not None]
    if not samples:
        raise ValueError(f"no prompt is left of {file}: {summary(dropped)}")
    say_dropped(dropped)
    return Questions(samples[:limit], conversations, chat)


def _first_turns(prompt: Prompt, max_turns: int | None) -> Prompt:
    """A prompt with its first turns alone."""
    turns = prompt.user_turns()
    if max_turns is None or len(turns) <= max_turns:
        return prompt
    return replace(prompt, messages=tuple(message for turn in turns[:max_turns] for message in turn))


def _or_dropped(
    make: Callable[..., Sample], arguments: tuple[Any, ...], place: str, dropped: list[Dropped]
) -> Sample | None:
    try:
        return make(*arguments)
    except ValueError as error:
        dropped.append(Dropped(place, str(error)))
        return None


def _has_ids(row: Mapping[str, Any]) -> bool | None:
    """Whether a row says in token ids what the target reads, or in words as this project writes them; None where it says neither."""
    if _asked(row).get("prompt_ids") is not None:
        return True
    return False if not _is_public_question(row) and (row.get("messages") or row.get("text")) else None


def _is_public_question(row: Mapping[str, Any]) -> bool:
    """Whether a row is a benchmark's question as it is published; this project's own prompts have an id, a split and a source."""
    return is_question(row) and not {"id", "split", "source"} <= row.keys()


def _is_benchmark(file: Path) -> bool:
    """Whether a file has a benchmark's questions, and none that this project writes; Parquet files are a public set's."""
    if file.suffix == ".parquet":
        return True
    return any(row.get("turns") or _is_public_question(row) for _, row in read_jsonl(file, []))


def _asked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    turns = row.get("turns")
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) else row


def _from_prompt(prompt: Prompt, chat: ChatTemplate) -> Sample:
    if len(prompt.user_turns()) > 1:
        check_prompt(prompt, chat)
    labels = prompt.category, prompt.sub_category, prompt.difficulty
    ids = tuple(first_prompt_ids(prompt, chat))
    return Sample(prompt.id, prompt.source, ids, *labels, modes=_modes(ids, bool(prompt.tools), chat.marks))


def _modes(ids: Sequence[int], has_tools: bool, marks: ReplyMarks) -> tuple[str, ...]:
    """The modes in which a prompt asks for its reply."""
    return modes(marks.asks_for_thought(ids), has_tools, len(ids))


def _from_ids(line: int, row: Mapping[str, Any], marks: ReplyMarks) -> Sample:
    ids = token_ids(_asked(row), "prompt_ids")
    if not ids:
        raise UnusableRow("prompt_ids is empty")
    source = next((row[name] for name in ("source", "kind") if isinstance(row.get(name), str)), "prompts")
    own_modes = _modes(ids, bool(read_tools(row)), marks)
    return Sample(row_id(row, f"line-{line}"), source, tuple(ids), **benchmark_fields(row), modes=own_modes)


def readable_by(target: Target, samples: list[Sample]) -> list[Sample]:
    """Samples of which the target has every token, and that leave room for at least one new one in its context.

    The others are counted on standard error, with the first one's id.

    Raises:
        ValueError: no prompt is left.
    """
    return readable(samples, target.ends.vocab_size, target.max_positions)


def readable(samples: list[Sample], vocab_size: int, longest: int | None = None) -> list[Sample]:
    """As `readable_by`, by a target's numbers: its vocabulary, and its context where the samples are to be decoded.

    Raises:
        ValueError: no prompt is left.
    """
    fitting, left_out = [], []
    for sample in samples:
        if max(sample.prompt_ids) >= vocab_size:
            left_out.append((sample.id, f"a token id that is not below the vocabulary's {vocab_size}"))
        elif longest is not None and len(sample.prompt_ids) >= longest:
            left_out.append((sample.id, f"fills the context of {longest} tokens"))
        else:
            fitting.append(sample)
    if left_out:
        name, reason = left_out[0]
        message = f"{len(left_out)} of {len(samples)} prompts left out; the first is {name}: {reason}"
        if not fitting:
            raise ValueError(f"no prompt is left: {message}")
        print(visible(message), file=sys.stderr)
    return fitting
