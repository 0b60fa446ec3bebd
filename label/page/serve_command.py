"""The command `draftsmith label serve`: starts the labelling page and says where it is.

Owns the options, the socket and what is printed. Knows nothing of what the page does.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import secrets
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from draftsmith.arguments import FLAT
from draftsmith.escapes import visible
from draftsmith.extras import install_command
from draftsmith.files import atomic_write
from draftsmith.hub_options import OWN_FILES, HubOptions
from draftsmith.json_text import json_text
from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.store.database import database_file
from draftsmith.label.store.store import Store
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.ownership import check_output_file

if TYPE_CHECKING:
    from draftsmith.label.page.access import Gate
    from draftsmith.label.page.target_check import TargetCheck
    from draftsmith.label.row_checks import LeftOut

# As in `store.work_list`, which jsonargparse cannot look behind.
Refine = Literal["steps", "all", "none"]

# A page waits for its reply, so it must learn sooner than a program that somebody else holds the store.
PATIENCE_SECONDS = 5.0
_SECONDS_TO_END = 5
_SHOWN = 20


def serve(
    store: str,
    host: str = "127.0.0.1",
    port: int = 8010,
    shared: float = 0.0,
    target: str | None = None,
    refine: Refine = "steps",
    max_length: int | None = None,
    unserved: Path | None = None,
    where: Annotated[HubOptions, FLAT] = OWN_FILES,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
) -> None:
    """Serves the page on which people mark the first error of each answer, until Ctrl-C.

    Whoever has the printed address may label; each gives a name, and no two get the same answer unless it is shared.

    Args:
        store: path of the store, or an SQLAlchemy URL; import answers into it first.
        host: the address to listen on. Any but a loopback address lets other machines in, over plain HTTP.
        port: the port; 0 takes a free one.
        shared: the share of the answers, from 0 to 1, that two annotators get, so that their agreement can be measured.
        target: path or hub id of a target: answers are cut into its tokenizer's tokens, and those that `label rows` would leave out are
            listed and not served. Without it they are cut into the tokens stored with them, or into words.
        refine: which imported labels wait for a person: those of whole steps, all of them, or none. Those without a place always do.
        max_length: serve no answer of more tokens, as in `label rows`; default: the target's context.
        unserved: file for the answers that are not served, each with its reason, as JSON lines; replaced when it exists.
        where: how the target's files are read; see `HubOptions`.
        rendering: the chat template; see `TemplateChoice`.

    Raises:
        ValueError: a share, a length or a port out of range, settings that need a target, or the store cannot be opened.
    """
    _check_numbers(port, shared, max_length)
    _check_target_options(target, max_length, unserved, where, rendering)
    if unserved is not None and target is not None:
        check_output_file(unserved, filter(None, [database_file(store), Path(target)]))
    _need_the_extra()
    with Store(store, patience_seconds=PATIENCE_SECONDS, refine=refine) as opened:
        cutter = cutter_for(target, where.revision, where.trust_remote_code)
        check = None if target is None else target_check(opened, target, shared, max_length, where, rendering)
        left_out = [] if check is None else check.look()
        if unserved is not None:
            _write_unserved(unserved, left_out)
        if check is not None:
            check.tell = functools.partial(_tell_of_later, check, unserved)
        num_before = opened.num_entries()
        with listen(host, port) as listener:
            token = secrets.token_urlsafe(24)
            print(f"store: {opened.name}, {opened.num_waiting(shared)} answers wait for a label", flush=True)
            print(f"open:  {address(host, listener)}/?token={token}", flush=True)
            _tell_unserved(left_out)
            if not _is_loopback(listener):
                print(
                    "Other machines can reach this, over plain HTTP. A tunnel (ssh -L) to a loopback address is safer."
                )
            print("Ctrl-C ends it.", flush=True)
            _run(_application(opened, cutter, token, host, listener, shared, check), listener)
        print(f"\nended; {opened.num_entries() - num_before} entries were added to {opened.name}")


def _check_numbers(port: int, shared: float, max_length: int | None) -> None:
    if not 0 <= shared <= 1:
        raise ValueError(f"shared is {shared}; it is the share of answers that two annotators get; give 0 to 1")
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; a port is a number up to 65535; give another, or 0 for a free one")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it counts tokens: give at least 1, or nothing for the context")


def _check_target_options(
    target: str | None, max_length: int | None, unserved: Path | None, where: HubOptions, rendering: TemplateChoice
) -> None:
    given = [name for name, value in (("max_length", max_length), ("unserved", unserved)) if value is not None]
    options: tuple[tuple[HubOptions | TemplateChoice, HubOptions | TemplateChoice], ...]
    options = (where, OWN_FILES), (rendering, OWN_TEMPLATE)
    for chosen, default in options:
        names = (field.name for field in fields(chosen))
        given += [name for name in names if getattr(chosen, name) != getattr(default, name)]
    if target is None and given:
        raise ValueError(
            f"{', '.join(given)} {'speak' if len(given) > 1 else 'speaks'} of a target, and none is named; name it with --target"
        )


def address(host: str, listener: socket.socket) -> str:
    """The address to open: that of the listener, or this machine's name where it listens on all of its addresses.

    Args:
        host: as the user gave it.
        listener: the socket.
    """
    bound, port = listener.getsockname()[:2]
    if ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _need_the_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import latex2mathml  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the labelling page needs the package {error.name}; run: "
            f"{install_command('fastapi', 'starlette', 'uvicorn', 'latex2mathml')}"
        ) from error


def target_check(
    store: Store, target: str, shared: float, max_length: int | None, where: HubOptions, rendering: TemplateChoice
) -> TargetCheck:
    """What tells the answers that fit a target from those that do not, as `label rows` does.

    Args:
        store: whose answers are served.
        target: path or hub id.
        shared: the share of the answers that two annotators get.
        max_length: the most tokens; None for the target's context.
        where: how the target's files are read.
        rendering: the chat template.

    Raises:
        ValueError: the target's files cannot be read.
    """
    # Only here: these imports bring torch, which the page does not need otherwise.
    from draftsmith.data.chat_template import chat_of
    from draftsmith.label.page.target_check import TargetCheck
    from draftsmith.label.row_checks import RowChecks
    from draftsmith.models.files.loading import load_tokenizer
    from draftsmith.models.files.model_folder import resolve
    from draftsmith.models.files.pretrained import read_config
    from draftsmith.models.target.context import context_of

    revision, trust = where.revision, where.trust_remote_code
    # A tokenizer of its own: two threads in one fast tokenizer can fail.
    tokenizer = load_tokenizer(target, revision, trust)
    length = max_length or context_of(read_config(resolve(target, revision), trust))
    chat = chat_of(target, tokenizer, rendering.template, revision, trust, rendering.options)
    return TargetCheck(store, RowChecks(tokenizer, chat, length), shared)


def _write_unserved(unserved: Path, left_out: Sequence[LeftOut]) -> None:
    rows = ({"id": reason.item_id, "reason": reason.reason, "detail": reason.detail} for reason in left_out)
    atomic_write(unserved, "".join(json_text(row) + "\n" for row in rows))


def _tell_of_later(check: TargetCheck, unserved: Path | None, new: Sequence[LeftOut]) -> None:
    """Lists answers that came while the page was served."""
    _tell_unserved(new)
    if unserved is not None:
        _write_unserved(unserved, check.left_out)


def _tell_unserved(left_out: Sequence[LeftOut]) -> None:
    if not left_out:
        return
    counts = Counter(reason.reason for reason in left_out)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    lines = [f"not served, as label rows would leave them out: {len(left_out)} answers: {reasons}"]
    lines += [visible(f"  {reason}") for reason in left_out[:_SHOWN]]
    if len(left_out) > _SHOWN:
        lines.append(f"  and {len(left_out) - _SHOWN} more; --unserved FILE lists them all")
    print("\n".join(lines), flush=True)


def cutter_for(target: str | None, revision: str | None = None, trust_remote_code: bool = False) -> Cutter:
    """What cuts answers: the target's tokenizer where one is named.

    Args:
        target: path or hub id; None cuts into stored tokens or words.
        revision: of a hub id.
        trust_remote_code: run Python files that come with the target.

    Raises:
        ValueError: the target has no tokenizer, or one that does not say where its tokens are.
    """
    if target is None:
        return Cutter()
    # Only here: these imports bring torch, which the page does not need otherwise.
    from draftsmith.label.token_labels import tokenize
    from draftsmith.models.files.loading import load_tokenizer

    tokenizer = load_tokenizer(target, revision, trust_remote_code)
    cut = functools.partial(tokenize, tokenizer=tokenizer)
    cut("A tokenizer that cannot tell offsets shall say so before anybody labels.")
    return Cutter(cut, f"tokens of {target}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: address or name.
        port: 0 takes a free one.

    Raises:
        ValueError: the host is not known here, or the port is taken or not allowed.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # Python adds the address to some of these, and a name that is not found has no number of the system's.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ValueError(
            f"cannot listen on {host}, port {port}: {reason}; give another --port (0 takes a free one) or --host"
        ) from error


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _application(
    store: Store,
    cutter: Cutter,
    token: str,
    host: str,
    listener: socket.socket,
    shared: float,
    check: TargetCheck | None,
) -> Gate:
    from draftsmith.label.page.access import LOOPBACK_NAMES
    from draftsmith.label.page.server import build_app

    names = (*LOOPBACK_NAMES, host.lower()) if _is_loopback(listener) else None
    return build_app(store, cutter, token, names, shared, check)


def _run(application: Gate, listener: socket.socket) -> None:
    import uvicorn

    # No access log: it would hold the token of the first address.
    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        # Ctrl-C has done its work: uvicorn ends by itself and then raises it once more.
        return
