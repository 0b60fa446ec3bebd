"""The folder of replies while it grows: rows, settings, failures.

Owns: resuming, the shares of ranks, which rows are written. Does not know: turns (`dialogues`), how a reply is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from draftsmith import provenance
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.progress import progress
from draftsmith.data.replies.dialogues import Failure, answer_batch, answer_in_stretches, answer_independently
from draftsmith.data.replies.reply_plan import Plan
from draftsmith.data.replies.reply_sources import IndependentEngine, RefillingEngine, ResponseEngine
from draftsmith.data.shared_work import Share, in_turn
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.files import JsonlAppender, atomic_write, exclusive
from draftsmith.json_rows import dropped_lines
from draftsmith.json_text import parse_json_object
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import TargetOptions
from draftsmith.models.target.prompt_template import TemplateChoice
from draftsmith.ownership import check_alone
from draftsmith.provenance import differences


def run_identity(
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate,
    settings: GenerationSettings,
    rendering: TemplateChoice,
    where: TargetOptions,
) -> dict[str, Any]:
    """What any replies of a target depend on besides its weights and the prompts.

    Args:
        tokenizer: the target's.
        chat: renders the prompts.
        settings: of generation.
        rendering: what the template was made with.
        where: the target's options, resolved: the dtype is recorded.

    Returns:
        Fields that JSON can hold.
    """
    return {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "template": chat.digest,
        "settings": json.loads(json.dumps(asdict(settings))),
        "dtype": where.dtype,
        **rendering.recorded,
    }


def loaded_here(where: TargetOptions) -> dict[str, Any]:
    """What replies of a target in this process depend on besides.

    Args:
        where: the target's options.

    Returns:
        The settings that are not at their default.
    """
    given = {"quantization": where.quantization, "context": where.context}
    return {name: value for name, value in given.items() if value is not None}


def write_replies(
    out: Path,
    share: Share,
    plan: Plan,
    chat: ChatTemplate,
    engine: ResponseEngine | IndependentEngine,
    identity: Mapping[str, Any],
    begun: Mapping[str, Any] | None = None,
) -> int:
    """Answer the prompts that have no reply yet.

    Args:
        out: the folder of the replies.
        share: this process's part.
        plan: its prompts, in batches.
        chat: renders later turns.
        engine: what generates.
        identity: everything the replies depend on. A folder made with another one is an error, except for a server's address.
        begun: a provenance record, written before the first reply, so that a run which is killed has recorded what it was.

    Returns:
        How many rows the folder holds in the end.

    Raises:
        ValueError: the folder holds replies of another run, or the engine cannot answer.
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
            if isinstance(engine, IndependentEngine):
                failures = out / f"failures{share.suffix}.jsonl"
                _write_independent(appender, failures, plan, chat, engine, advance)
            elif isinstance(engine, RefillingEngine):
                for row in answer_in_stretches(plan, set(appender.rows), chat, engine):
                    appender.write(row)
                    advance(1)
            else:
                _write_batches(appender, plan, chat, engine, advance)
            return len(appender.rows)


def _write_independent(
    appender: JsonlAppender,
    failures_file: Path,
    plan: Plan,
    chat: ChatTemplate,
    engine: IndependentEngine,
    advance: Callable[[int], None],
) -> None:
    """Rows in the order in which the engine finishes them; prompts without a reply go to the file of failures."""
    there = set(appender.rows)
    todo = [item for batch in plan.batches for item in batch if item[0].id not in there]
    with JsonlAppender(failures_file) as failures:
        outcomes = answer_independently(todo, plan.settings, plan.context, chat, engine, trusted=bool(there))
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                now = datetime.now(UTC).isoformat(timespec="seconds")
                failures.write(asdict(outcome) | {"time": now})
            else:
                appender.write(outcome)
                advance(1)


def _write_batches(
    appender: JsonlAppender, plan: Plan, chat: ChatTemplate, engine: ResponseEngine, advance: Callable[[int], None]
) -> None:
    """Rows batch by batch. A batch that was cut short is answered whole again: its rows stay the same in the same company."""
    there = set(appender.rows)
    for batch in plan.batches:
        if all(prompt.id in there for prompt, _ in batch):
            continue
        answered = answer_batch(batch, plan.settings, plan.context, chat, engine)
        rows = [row for row in answered if row["id"] not in there]
        for row in rows:
            appender.write(row)
        advance(len(rows))


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
            write_settings(out, share, identity, plan.num_prompts)
        return
    for name in ("responses", "failures"):
        check_alone(out / f"{name}{share.suffix}.jsonl", path)
    atomic_write(out / f"dropped{share.suffix}.jsonl", dropped_lines(plan.dropped))
    write_settings(out, share, identity, plan.num_prompts)


def write_settings(out: Path, share: Share, identity: Mapping[str, Any], num_rows: int) -> None:
    """Write what the replies depend on, and how many rows make them whole.

    Args:
        out: the folder of the replies.
        share: this process's part.
        identity: everything the replies depend on.
        num_rows: of this share.
    """
    content = json.dumps({**identity, "num_rows": num_rows}, indent=2) + "\n"
    atomic_write(out / f"settings{share.suffix}.json", content)


def _check_same(path: Path, earlier: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Check that replies were begun with the same settings; a server's address may change.

    Raises:
        ValueError: a setting differs.
    """
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
    """Check that the replies of other ranks are of this run.

    Raises:
        ValueError: they are of another world size, or of another run.
    """
    for path in out.glob("settings*.json"):
        of = path.stem.removeprefix("settings")
        if of[6:] != share.suffix[6:]:
            raise ValueError(
                f"{out} holds {path.name}, of a run with another world size; name another folder or delete this one"
            )
        if of != share.suffix:
            _check_same(path, parse_json_object(path.read_bytes(), str(path), "name another folder"), identity)


def num_begun_anew(path: Path) -> int:
    """Count the rows that have `begun_anew`. They are not parsed, since there may be a million. Within a text the mark would be escaped.

    Args:
        path: of the rows.

    Returns:
        How many.
    """
    if not path.is_file():
        return 0
    with open(path, "rb") as rows:
        return sum(b'"begun_anew": [' in row for row in rows)
