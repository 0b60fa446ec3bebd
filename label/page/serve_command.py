"""The command `draftsmith label serve`: starts the labelling page and says where it is.

Owns the options, the socket and what is printed. Knows nothing of what the page does.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import secrets
import socket
from typing import TYPE_CHECKING, Annotated

from draftsmith.arguments import FLAT
from draftsmith.extras import install_command
from draftsmith.hub_options import OWN_FILES, HubOptions
from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.store.store import Store

if TYPE_CHECKING:
    from draftsmith.label.page.access import Gate

# A page waits for its reply, so it must learn sooner than a program that somebody else holds the store.
PATIENCE_SECONDS = 5.0
_SECONDS_TO_END = 5


def serve(
    store: str,
    host: str = "127.0.0.1",
    port: int = 8010,
    shared: float = 0.0,
    target: str | None = None,
    where: Annotated[HubOptions, FLAT] = OWN_FILES,
) -> None:
    """Serves the page on which people mark the first error of each answer, until Ctrl-C.

    Whoever has the printed address may label; each gives a name, and no two get the same answer unless it is shared.

    Args:
        store: path of the store, or an SQLAlchemy URL; import answers into it first.
        host: the address to listen on. Any but a loopback address lets other machines in, over plain HTTP.
        port: the port; 0 takes a free one.
        shared: the share of the answers, from 0 to 1, that two annotators get, so that their agreement can be measured.
        target: path or hub id of a target: answers are cut into its tokenizer's tokens. Else into the tokens stored with
            them, or into words.
        where: how the target's files are read; see `HubOptions`.

    Raises:
        ValueError: a share or a port out of range, or the store cannot be opened.
    """
    if not 0 <= shared <= 1:
        raise ValueError(f"shared is {shared}; it is the share of answers that two annotators get; give 0 to 1")
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; a port is a number up to 65535; give another, or 0 for a free one")
    _need_the_extra()
    with Store(store, patience_seconds=PATIENCE_SECONDS) as opened:
        cutter = cutter_for(target, where.revision, where.trust_remote_code)
        num_before = opened.num_entries()
        with listen(host, port) as listener:
            token = secrets.token_urlsafe(24)
            print(f"store: {opened.name}, {opened.num_waiting(shared)} answers wait for a label", flush=True)
            print(f"open:  {address(host, listener)}/?token={token}", flush=True)
            if not _is_loopback(listener):
                print(
                    "Other machines can reach this, over plain HTTP. A tunnel (ssh -L) to a loopback address is safer."
                )
            print("Ctrl-C ends it.", flush=True)
            _run(_application(opened, cutter, token, host, listener, shared), listener)
        print(f"\nended; {opened.num_entries() - num_before} entries were added to {opened.name}")


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
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the labelling page needs the package {error.name}; run: {install_command('fastapi', 'uvicorn')}"
        ) from error


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


def _application(store: Store, cutter: Cutter, token: str, host: str, listener: socket.socket, shared: float) -> Gate:
    from draftsmith.label.page.access import LOOPBACK_NAMES
    from draftsmith.label.page.server import build_app

    names = (*LOOPBACK_NAMES, host.lower()) if _is_loopback(listener) else None
    return build_app(store, cutter, token, names, shared)


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
