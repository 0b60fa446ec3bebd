"""The target's own replies to prompts, token by token as it generated them: the better half of distillation.

Owns: batching, turns, resuming, ranks, and the row that is written. Does not know: how a reply is decoded (an engine
behind `ResponseEngine`), caches, training.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.engines import BundledEngine, Reply, ResponseEngine
from draftsmith.data.formats import Message
from draftsmith.data.progress import progress
from draftsmith.data.prompts import Prompt, read_prompts
from draftsmith.data.reply_settings import Overrides, reply_settings
from draftsmith.data.tokens import NO_TEMPLATE, ChatTemplate, Turn
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.files import JsonlAppender, atomic_write, exclusive
from draftsmith.models.fingerprint import tokenizer_fingerprint
from draftsmith.models.limits import DraftLimits
from draftsmith.models.loading import load_tokenizer
from draftsmith.models.options import DEFAULTS, TargetOptions

__all__ = ["BundledEngine", "Reply", "ResponseEngine", "respond"]


@dataclass(frozen=True)
class Plan:
    """What one rank has to do: prompts with the ids of their first turn, in batches, and those that do not fit.

    `context` is the model's context in tokens, None for no limit.
    """

    batches: list[list[tuple[Prompt, list[int]]]]
    dropped: list[dict[str, str]]
    settings: GenerationSettings
    context: int | None

    @property
    def num_prompts(self) -> int:
        """Prompts that will have a row."""
        return sum(len(batch) for batch in self.batches)


def respond(
    target: str,
    prompts: Path,
    out: Path,
    split: str | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    template: str | None = None,
    limit: int | None = None,
    batch_rows: int = 16,
    batch_tokens: int = 16384,
    rank: int | None = None,
    world_size: int | None = None,
    drafter: Path | None = None,
    limits: DraftLimits | None = None,
    dtype: str = "float32",
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
) -> None:
    """Lets the target answer the prompts itself.

    Writes OUT/responses.jsonl, one row a prompt, with the token ids of prompt and reply as they were read and
    generated. Settings the command does not name are the model's own (its generation config). A killed run continues
    where it was when it is started again.

    Args:
        target: path or hub id of the target.
        prompts: what `data prompts` wrote.
        out: the folder of the replies.
        split: answer only this split.
        max_new_tokens: longest reply of a turn.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample within this probability mass.
        min_p: leave out tokens less likely than this share of the likeliest.
        repetition_penalty: above 1 makes tokens already in the text less likely.
        seed: of sampling; each prompt and turn draws its own numbers from it.
        stop: strings that end a reply.
        template: Jinja file, or `none` for plain text (base models); default: the tokenizer's own.
        limit: answer the first so many prompts only.
        batch_rows: most prompts in a batch.
        batch_tokens: most tokens in a batch, room for replies included.
        rank: which share of the prompts this process answers; default: RANK of the environment, or 0.
        world_size: how many processes share the prompts; default: WORLD_SIZE of the environment, or 1.
        drafter: a trained drafter that makes this faster; the replies stay the same.
        limits: how much the drafter drafts.
        dtype: dtype the target runs in.
        where: the target's devices, revision, adapter and quantization; see `TargetOptions`.
    """
    share = _share(rank, world_size)
    chosen = read_prompts(prompts, split)[:limit]
    tokenizer = load_tokenizer(target, where.revision)
    overrides = Overrides(temperature, top_k, top_p, min_p, repetition_penalty)
    settings = reply_settings(target, tokenizer, overrides, max_new_tokens, seed, stop, where.revision)
    texts_only = all(prompt.text is not None for prompt in chosen)
    chat = ChatTemplate(tokenizer, NO_TEMPLATE if texts_only else template, settings.eos_token_ids)
    loaded = where.load(target, dtype)
    plan = make_plan(
        chosen[share.rank :: share.world_size], chat, settings, loaded.max_positions, batch_rows, batch_tokens
    )
    identity = {
        "target_fingerprint": loaded.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "prompts": _digest([prompt.id for prompt in chosen]),
        "template": _digest([chat.text or ""]),
        "settings": json.loads(json.dumps(asdict(settings))),
        "batch_rows": batch_rows,
        "batch_tokens": batch_tokens,
        "dtype": dtype,
    }
    engine = BundledEngine(loaded, drafter, limits, tokenizer)
    config = identity | {"target": target, "split": split, "limit": limit, "drafter": drafter}
    inputs = {str(prompts): identity["prompts"]}
    begun = provenance.record("data respond", config, inputs)
    written = write_replies(out, share, plan, chat, engine, identity, begun)
    provenance.write(out, provenance.record("data respond", config, inputs))
    print(f"{written} replies in {out}; {len(plan.dropped)} prompts dropped")


@dataclass(frozen=True)
class Share:
    """This process's part of the prompts: every `world_size`-th one, from `rank` on."""

    rank: int = 0
    world_size: int = 1

    @property
    def suffix(self) -> str:
        """What tells this rank's files from another's."""
        return "" if self.world_size == 1 else f"-{self.rank:05d}-of-{self.world_size:05d}"


def make_plan(
    prompts: Sequence[Prompt],
    chat: ChatTemplate,
    settings: GenerationSettings,
    context: int | None,
    batch_rows: int,
    batch_tokens: int,
) -> Plan:
    """Encodes each first turn, sets aside what leaves no room for a reply, and groups the rest by length.

    The longest come first, so that a batch too large for the memory fails at once. The plan depends on the prompts and
    the settings only, so a restarted run has the same batches.

    Raises ValueError for a repeated id, and when no prompt fits.
    """
    fitting: list[tuple[Prompt, list[int]]] = []
    dropped: list[dict[str, str]] = []
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"the prompt id {prompt.id} occurs twice; run `draftsmith data prompts` on the file")
        seen.add(prompt.id)
        ids = first_prompt_ids(prompt, chat)
        if not ids:
            dropped.append({"id": prompt.id, "reason": "the prompt has no token"})
        elif context is not None and len(ids) >= context:
            reason = f"the prompt has {len(ids)} tokens, the model's context {context}: no room for a reply"
            dropped.append({"id": prompt.id, "reason": reason})
        else:
            fitting.append((prompt, ids))
    if not fitting:
        raise ValueError(
            f"none of {len(prompts)} prompts can be answered" + (f": {dropped[0]['reason']}" if dropped else "")
        )
    fitting.sort(key=lambda item: (-len(item[1]), item[0].id))
    batches: list[list[tuple[Prompt, list[int]]]] = []
    for item in fitting:
        rows = len(batches[-1]) + 1 if batches else 0
        longest = len(batches[-1][0][1]) + settings.max_new_tokens if batches else 0
        if batches and rows <= batch_rows and rows * longest <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return Plan(batches, dropped, settings, context)


def first_prompt_ids(prompt: Prompt, chat: ChatTemplate) -> list[int]:
    """Ids the target reads before its first reply: the rendered first turn, or a document's first words."""
    if prompt.text is not None:
        return chat.plain_ids(_first_words(prompt.text, prompt.prefix_words))
    return chat.first_prompt_ids(prompt.user_turns()[0])


def write_replies(
    out: Path,
    share: Share,
    plan: Plan,
    chat: ChatTemplate,
    engine: ResponseEngine,
    identity: Mapping[str, Any],
    begun: Mapping[str, Any] | None = None,
) -> int:
    """Answers what is not answered yet; gives the number of rows there are in the end.

    `identity` is everything the replies depend on: a folder made with another one is refused. `begun` is a provenance
    record, written before the first reply so that a killed run has said what it was.
    """
    path = out / f"responses{share.suffix}.jsonl"
    with exclusive(path):
        _check_other_shares(out, share)
        _begin(out, share, plan, identity)
        if begun is not None:
            provenance.write(out, begun)
        with (
            JsonlAppender(path) as appender,
            progress("respond", plan.num_prompts, "replies", done=len(appender.rows)) as advance,
        ):
            there = {row["id"] for row in appender.rows}
            for batch in plan.batches:
                if all(prompt.id in there for prompt, _ in batch):
                    continue
                # A batch that was cut short is answered as a whole again: its rows stay the same in the same company.
                rows = [row for row in answer(batch, plan, chat, engine) if row["id"] not in there]
                for row in rows:
                    appender.write(row)
                advance(len(rows))
            return len(appender.rows)


@dataclass
class _Dialogue:
    """A conversation while it grows: the user's turns still to come, and the exchanges so far."""

    prompt: Prompt
    next_ids: list[int] | None
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


def answer(
    batch: list[tuple[Prompt, list[int]]], plan: Plan, chat: ChatTemplate, engine: ResponseEngine
) -> Iterator[dict[str, Any]]:
    """Rows of one batch: all user turns of each prompt, every later one on top of the target's own earlier replies."""
    dialogues = [_Dialogue(prompt, ids) for prompt, ids in batch]
    number = 0
    while active := [dialogue for dialogue in dialogues if dialogue.next_ids is not None]:
        prompts = [dialogue.next_ids or [] for dialogue in active]
        requests = [_request_id(dialogue.prompt.id, number) for dialogue in active]
        for dialogue, ids, reply in zip(active, prompts, engine.reply(prompts, plan.settings, requests), strict=True):
            _take(dialogue, ids, reply, chat, plan.context)
        number += 1
    for dialogue in dialogues:
        yield _row(dialogue, plan.settings)


def _take(dialogue: _Dialogue, ids: list[int], reply: Reply, chat: ChatTemplate, context: int | None) -> None:
    """Appends a reply and prepares the next turn; a conversation that fills the context ends there."""
    full = context is not None and len(ids) + len(reply.token_ids) >= context and reply.finish == "length"
    dialogue.turns.append(Turn(ids, reply.token_ids, "context" if full else reply.finish))
    dialogue.next_ids = None
    users = dialogue.prompt.user_turns()
    done = len(dialogue.turns)
    if dialogue.prompt.text is None:
        text = chat.tokenizer.decode(reply.token_ids, skip_special_tokens=True)
        dialogue.messages += [*users[done - 1], Message(role="assistant", content=str(text))]
    if full or done >= len(users):
        return
    longer = ids + reply.token_ids + chat.next_turn_ids(users[done], reply.token_ids)
    if context is None or len(longer) < context:
        dialogue.next_ids = longer
    else:
        dialogue.turns[-1] = replace(dialogue.turns[-1], finish="context")


def _row(dialogue: _Dialogue, settings: GenerationSettings) -> dict[str, Any]:
    return {
        "id": dialogue.prompt.id,
        "messages": dialogue.messages,
        "turns": [asdict(turn) for turn in dialogue.turns],
        "source": dialogue.prompt.source,
        "split": dialogue.prompt.split,
        "settings": asdict(settings),
    }


def _begin(out: Path, share: Share, plan: Plan, identity: Mapping[str, Any]) -> None:
    """Writes what this run is, or checks that an earlier one was the same."""
    path = out / f"settings{share.suffix}.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        wrong = [
            f"{key}: there {earlier.get(key)!r}, now {value!r}"
            for key, value in identity.items()
            if earlier.get(key) != value
        ]
        if wrong:
            raise ValueError(
                f"{out} holds replies of another run ({'; '.join(wrong)}); name another folder or delete this one"
            )
        return
    atomic_write(out / f"dropped{share.suffix}.jsonl", "".join(json.dumps(row) + "\n" for row in plan.dropped))
    atomic_write(path, json.dumps({**identity, "num_rows": plan.num_prompts}, indent=2) + "\n")


def _check_other_shares(out: Path, share: Share) -> None:
    for path in out.glob("settings*.json"):
        of = path.stem.removeprefix("settings")
        if of[6:] != share.suffix[6:]:
            raise ValueError(
                f"{out} holds {path.name}, of a run with another world size; name another folder or delete this one"
            )


def _share(rank: int | None, world_size: int | None) -> Share:
    size = world_size if world_size is not None else int(os.environ.get("WORLD_SIZE", "1"))
    own = rank if rank is not None else int(os.environ.get("RANK", "0"))
    if not 0 <= own < size:
        raise ValueError(f"rank {own} of {size} processes does not exist; ranks run from 0 to world_size - 1")
    return Share(own, size)


def _first_words(text: str, count: int | None) -> str:
    """The first words of a text with their own spacing; `count` None is the whole text."""
    end = 0
    for number, word in enumerate(text.split()):
        if count is not None and number >= count:
            break
        end = text.index(word, end) + len(word)
    return text[:end]


def _request_id(prompt_id: str, turn: int) -> int:
    """Which noise a turn draws: a property of the prompt, not of its place in the file."""
    return int.from_bytes(hashlib.sha256(f"{prompt_id}\0{turn}".encode()).digest()[:4], "big")


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
