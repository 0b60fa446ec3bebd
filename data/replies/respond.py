"""The target's own replies to prompts, token by token as it generated them: the better half of distillation.

Owns: batching, resuming, ranks, which rows are written and which prompts have failed. Does not know: turns (`dialogues`), how a reply
is decoded (an engine), caches, training.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from draftsmith import provenance
from draftsmith.arguments import FLAT, WHOLE
from draftsmith.data.progress import progress
from draftsmith.data.prompt_ids import chat_for, first_prompt_ids
from draftsmith.data.prompts import Prompt, read_prompts
from draftsmith.data.replies.dialogues import Failure, answer_batch, answer_independently
from draftsmith.data.replies.reply_settings import Overrides, reply_settings
from draftsmith.data.replies.reply_sources import BundledEngine, IndependentEngine, Reply, ResponseEngine
from draftsmith.data.replies.server_source import NO_SERVER, ServerEngine, ServerOptions
from draftsmith.data.replies.source_settings import check_settings
from draftsmith.data.replies.vllm_source import ONE_GPU, VllmEngine, VllmOptions
from draftsmith.data.shared_work import Share, in_turn, own_share
from draftsmith.data.survey import begun_anew
from draftsmith.data.tokens import ChatTemplate
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.files import JsonlAppender, atomic_write, exclusive
from draftsmith.json_rows import Dropped, dropped_lines, summary
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.outside import parse_json_object
from draftsmith.ownership import check_alone, check_unclaimed
from draftsmith.same_run import differences

__all__ = ["BundledEngine", "Reply", "ResponseEngine", "respond"]

_BATCH = {"batch_rows": 16, "batch_tokens": 16384}
_DTYPE = "float32"


@dataclass(frozen=True)
class Plan:
    """What one rank has to do: prompts with the ids of their first turn, in batches, and those that do not fit.

    `context` is the model's context in tokens, None for no limit. The ids are arrays, since there may be a million prompts.
    """

    batches: list[list[tuple[Prompt, array]]]
    dropped: list[Dropped]
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
    stop: Annotated[tuple[str, ...], WHOLE] = (),
    template: str | None = None,
    limit: int | None = None,
    batch_rows: int = _BATCH["batch_rows"],
    batch_tokens: int = _BATCH["batch_tokens"],
    rank: int | None = None,
    world_size: int | None = None,
    drafter: Path | None = None,
    limits: DraftLimits | None = None,
    dtype: str = _DTYPE,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateOptions, FLAT] = NO_OPTIONS,
    engine: Literal["bundled", "vllm", "server"] = "bundled",
    server: Annotated[ServerOptions, FLAT] = NO_SERVER,
    vllm: Annotated[VllmOptions, FLAT] = ONE_GPU,
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
        rendering: the chat template's name and variables; see `TemplateOptions`.
        engine: what generates: the bundled decoder, vLLM in this process, or a server that gives back token ids.
        server: the server's address and how patiently it is asked; see `ServerOptions`.
        vllm: what vLLM may take; see `VllmOptions`.
    """
    check_unclaimed(out)
    _check_engine(engine, drafter, limits, where)
    _check_other_engines(engine, server, vllm, {"batch_rows": batch_rows, "batch_tokens": batch_tokens, "dtype": dtype})
    share = own_share(rank, world_size)
    unread: list[Dropped] = []
    chosen = read_prompts(prompts, split, unread)[:limit]
    tokenizer = load_tokenizer(target, where.revision, where.trust_remote_code)
    overrides = Overrides(temperature, top_k, top_p, min_p, repetition_penalty)
    settings = reply_settings(
        target,
        tokenizer,
        overrides,
        max_new_tokens,
        seed,
        stop,
        where.revision,
        where.trust_remote_code,
        where.generation_config,
    )
    chat = chat_for(chosen, tokenizer, template, settings.eos_token_ids, rendering)
    identity: dict[str, Any] = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "prompts_sha256": _digest(json.dumps(prompt.fields()) for prompt in chosen),
        "template": chat.digest,
        "settings": json.loads(json.dumps(asdict(settings))),
        "dtype": dtype,
    }
    if rendering != NO_OPTIONS:
        identity |= asdict(rendering)
    chosen_engine: ResponseEngine | IndependentEngine
    if engine == "bundled":
        loaded = where.load(target, dtype)
        fingerprint, context = loaded.fingerprint, loaded.max_positions
        chosen_engine = BundledEngine(loaded, drafter, limits, tokenizer, where.trust_remote_code)
        if where.quantization is not None:
            identity["quantization"] = where.quantization
        if where.context is not None:
            identity["context"] = where.context
    else:
        check_settings(settings)
        ends = where.load_ends(target)
        fingerprint, context = ends.fingerprint, ends.max_positions
        if engine == "server":
            chosen_engine = ServerEngine(server, target, len(tokenizer), context)
            context = chosen_engine.context
            identity |= {"engine": engine, "served_model": chosen_engine.model, "context": context, "url": server.url}
            del identity["dtype"]
        else:
            chosen_engine = VllmEngine(target, tokenizer, vllm, dtype, where.revision, context)
            identity["engine"] = engine
    identity["target_fingerprint"] = fingerprint
    if not isinstance(chosen_engine, IndependentEngine):
        # What replies may depend on where they are computed together.
        identity |= {"batch_rows": batch_rows, "batch_tokens": batch_tokens}
    own = chosen[share.rank :: share.world_size]
    plan = make_plan(own, chat, settings, context, batch_rows, batch_tokens, may_be_empty=share.world_size > 1)
    if share.rank == 0:  # rows that are no prompt are nobody's share
        plan = replace(plan, dropped=[*unread, *plan.dropped])
    config = identity | {"target": target, "split": split, "limit": limit, "drafter": drafter}
    if engine == "server":
        config["concurrency"] = server.concurrency
    inputs = {str(prompts): identity["prompts_sha256"]}
    begun = provenance.record("data respond", config, inputs)
    written = write_replies(out, share, plan, chat, chosen_engine, identity, begun)
    provenance.write(out, provenance.record("data respond", config, inputs))
    print(f"{written} replies in {out}; {summary(plan.dropped)}")
    if anew := _num_begun_anew(out / f"responses{share.suffix}.jsonl"):
        print(begun_anew(anew))
    if written < plan.num_prompts:
        told = (
            f"{plan.num_prompts - written} of {plan.num_prompts} prompts got no reply; the reasons are in "
            f"{out / f'failures{share.suffix}.jsonl'}"
        )
        if not server.skip_failed:
            raise ValueError(
                f"{told}; run the same command again, which asks for these alone, or with --skip_failed true to do without them"
            )
        _write_settings(out, share, identity, written)
        print(told)


def _check_engine(engine: str, drafter: Path | None, limits: DraftLimits | None, where: TargetOptions) -> None:
    """Raises ValueError for an option of the bundled decoder that means nothing to another engine."""
    if engine == "bundled":
        return
    served = engine == "server"
    own = TargetOptions(
        revision=where.revision,
        adapter=where.adapter if served else None,
        trust_remote_code=where.trust_remote_code and served,
        context=where.context,
        generation_config=where.generation_config,
    )
    said = [name for name, value in vars(where).items() if value != getattr(own, name)]
    said += [name for name, value in (("drafter", drafter), ("limits", limits)) if value is not None]
    if said:
        raise ValueError(
            f"--{said[0]} is an option of the bundled decoder; leave it out, and give --engine {engine} its own settings"
        )


def _check_other_engines(engine: str, server: ServerOptions, vllm: VllmOptions, own: Mapping[str, Any]) -> None:
    """No option is dropped in silence. Raises ValueError for one that another engine reads: `own` are those a server does not."""
    if engine != "server" and (said := _changed(vars(server), vars(NO_SERVER))):
        raise ValueError(f"--{said} {getattr(server, said)} goes with --engine server, not with --engine {engine}")
    if engine != "vllm" and (said := _changed(vars(vllm), vars(ONE_GPU))):
        raise ValueError(f"--{said} {getattr(vllm, said)} goes with --engine vllm, not with --engine {engine}")
    if engine == "server" and (said := _changed(own, _BATCH | {"dtype": _DTYPE})):
        raise ValueError(
            f"--{said} {own[said]} is for an engine in this process; a server batches by itself and has a dtype of its own; leave it out"
        )


def _changed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | None:
    """The first option that is not at its default."""
    return next((name for name, value in options.items() if value != defaults[name]), None)


def make_plan(
    prompts: Sequence[Prompt],
    chat: ChatTemplate,
    settings: GenerationSettings,
    context: int | None,
    batch_rows: int,
    batch_tokens: int,
    may_be_empty: bool = False,
) -> Plan:
    """Encodes each first turn, sets aside what the template fails on or what leaves no room for a reply, and groups the rest by length.

    The longest come first, so that a batch too large for the memory fails at once. The plan depends on the prompts and
    the settings only, so a restarted run has the same batches.

    Raises ValueError for a repeated id, and when no prompt fits, unless it `may_be_empty`: one rank of many has nothing to do then.
    """
    fitting: list[tuple[Prompt, array]] = []
    dropped: list[Dropped] = []
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"the prompt id {prompt.id} occurs twice; run `draftsmith data prompts` on the file")
        seen.add(prompt.id)
        try:
            fitting.append((prompt, array("i", _fitting_ids(prompt, chat, context))))
        except ValueError as error:
            dropped.append(Dropped(prompt.place, str(error), id=prompt.id))
    if not fitting and not may_be_empty:
        raise ValueError(
            f"none of {len(prompts)} prompts can be answered" + (f": {dropped[0].reason}" if dropped else "")
        )
    fitting.sort(key=lambda item: (-len(item[1]), item[0].id))
    batches: list[list[tuple[Prompt, array]]] = []
    for item in fitting:
        rows = len(batches[-1]) + 1 if batches else 0
        longest = len(batches[-1][0][1]) + settings.max_new_tokens if batches else 0
        if batches and rows <= batch_rows and rows * longest <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return Plan(batches, dropped, settings, context)


def _fitting_ids(prompt: Prompt, chat: ChatTemplate, context: int | None) -> list[int]:
    """Ids of the first turn. Raises ValueError with the reason where the prompt, or a later turn of it, cannot be answered."""
    ids = first_prompt_ids(prompt, chat)
    for turn in [] if prompt.text is not None else prompt.user_turns()[1:]:
        chat.next_turn_ids(turn, ())  # better left out now than a failure when hours of replies are there
    if not ids:
        raise ValueError("the prompt has no token")
    if context is not None and len(ids) >= context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context {context}: no room for a reply")
    return ids


def write_replies(
    out: Path,
    share: Share,
    plan: Plan,
    chat: ChatTemplate,
    engine: ResponseEngine | IndependentEngine,
    identity: Mapping[str, Any],
    begun: Mapping[str, Any] | None = None,
) -> int:
    """Answers what is not answered yet; gives the number of rows there are in the end.

    `identity` is everything the replies depend on: a folder made with another one is refused, but for a server's address.
    `begun` is a provenance record, written before the first reply so that a killed run has said what it was.
    """
    path = out / f"responses{share.suffix}.jsonl"
    with exclusive(path):
        with in_turn(out / "settings.json"):  # else two ranks that begin at once would not see one another
            _check_other_shares(out, share, identity)
            _begin(out, share, plan, identity)
        if begun is not None:
            provenance.write(out, begun)
        with (
            # A million whole rows would not fit in memory.
            JsonlAppender(path, keep=lambda row: str(row["id"])) as appender,
            progress("respond", plan.num_prompts, "replies", done=len(appender.rows)) as advance,
        ):
            there = set(appender.rows)
            if isinstance(engine, IndependentEngine):
                todo = [item for batch in plan.batches for item in batch if item[0].id not in there]
                with JsonlAppender(out / f"failures{share.suffix}.jsonl") as failures:
                    outcomes = answer_independently(
                        todo, plan.settings, plan.context, chat, engine, trusted=bool(there)
                    )
                    for outcome in outcomes:
                        if isinstance(outcome, Failure):
                            now = datetime.now(UTC).isoformat(timespec="seconds")
                            failures.write(asdict(outcome) | {"time": now})
                        else:
                            appender.write(outcome)
                            advance(1)
                return len(appender.rows)
            for batch in plan.batches:
                if all(prompt.id in there for prompt, _ in batch):
                    continue
                # A batch that was cut short is answered as a whole again: its rows stay the same in the same company.
                answered = answer_batch(batch, plan.settings, plan.context, chat, engine)
                rows = [row for row in answered if row["id"] not in there]
                for row in rows:
                    appender.write(row)
                advance(len(rows))
            return len(appender.rows)


def _begin(out: Path, share: Share, plan: Plan, identity: Mapping[str, Any]) -> None:
    """Writes what this run is, or checks that an earlier one was the same."""
    path = out / f"settings{share.suffix}.json"
    if path.exists():
        earlier = parse_json_object(path.read_bytes(), str(path), "name another folder")
        _check_same(path, earlier, identity)
        if earlier.get("url") != identity.get("url"):
            # Not another run: a server's job may have been started again on another node.
            print(
                f"{out}: begun with {earlier.get('url')}, resumes with {identity.get('url')}; both must serve the same weights"
            )
        if earlier != {**identity, "num_rows": plan.num_prompts}:
            # Fewer rows there mean that an earlier run was content with them; this one has to say so itself.
            _write_settings(out, share, identity, plan.num_prompts)
        return
    for name in ("responses", "failures"):
        check_alone(out / f"{name}{share.suffix}.jsonl", path)
    atomic_write(out / f"dropped{share.suffix}.jsonl", dropped_lines(plan.dropped))
    _write_settings(out, share, identity, plan.num_prompts)


def _write_settings(out: Path, share: Share, identity: Mapping[str, Any], num_rows: int) -> None:
    """What the replies depend on, and how many rows make them whole."""
    content = json.dumps({**identity, "num_rows": num_rows}, indent=2) + "\n"
    atomic_write(out / f"settings{share.suffix}.json", content)


def _check_same(path: Path, earlier: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises ValueError where replies were begun with anything that makes them others; a server's address may change."""
    if "prompts" in earlier:
        raise ValueError(
            f"{path} is of an earlier version, which noted no more of the prompts than their ids: nobody can tell whether they are these; "
            "name another folder or delete this one (replies that are whole may be extracted as they are)"
        )
    wrong = differences(earlier, identity, without=("num_rows", "url"))
    if wrong:
        raise ValueError(
            f"{path.parent} holds replies of another run ({'; '.join(wrong)}), as {path.name} says; name another folder or delete "
            "this one"
        )


def _check_other_shares(out: Path, share: Share, identity: Mapping[str, Any]) -> None:
    """Raises ValueError where another rank's replies are of another world size, or of another run."""
    for path in out.glob("settings*.json"):
        of = path.stem.removeprefix("settings")
        if of[6:] != share.suffix[6:]:
            raise ValueError(
                f"{out} holds {path.name}, of a run with another world size; name another folder or delete this one"
            )
        if of != share.suffix:
            _check_same(path, parse_json_object(path.read_bytes(), str(path), "name another folder"), identity)


def _num_begun_anew(path: Path) -> int:
    """How many rows say so; they are not parsed, since there may be a million. Within a text the mark would be escaped."""
    if not path.is_file():
        return 0
    with open(path, "rb") as rows:
        return sum(b'"begun_anew": [' in row for row in rows)


def _digest(parts: Iterable[str]) -> str:
    """sha256 (hex) of the parts with a zero byte between them; never all of them in memory."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(b"\0" * (number > 0) + part.encode())
    return digest.hexdigest()
