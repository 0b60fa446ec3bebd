"""The web application behind `draftsmith label serve`: its pages, and what they ask for.

Owns routes, what a request must look like, and the replies to bad requests. Knows nothing of the token and the checks before it
(`access`), of how the server is started, or of how the page looks (`web/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from draftsmith.label.page.access import Gate
from draftsmith.label.page.actions import LabellingActions
from draftsmith.label.page.decisions import DecidingActions
from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.page.request_fields import read_object
from draftsmith.label.page.target_check import TargetCheck
from draftsmith.label.store.database import Conflict, Unavailable
from draftsmith.label.store.store import NotOpen, Store

RETRY_SECONDS = 3

_PAGES = {"/": "label.html", "/agreement": "agreement.html"}
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


async def request_fields(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds.

    Args:
        request: of the page.

    Raises:
        BadRequest: it is something else.
    """
    return read_object(request.headers.get("content-type", ""), await request.body())


Fields = Annotated[dict[str, Any], Depends(request_fields)]


def build_app(
    store: Store,
    cutter: Cutter,
    token: str,
    host_names: tuple[str, ...] | None,
    shared: float,
    check: TargetCheck | None = None,
) -> Gate:
    """The application, behind its gate.

    Args:
        store: where answers come from and labels go; any number of threads may use it.
        cutter: what an answer is cut into.
        token: who knows it may label; see `Gate`.
        host_names: see `Gate`.
        shared: the share of the items that two annotators get; see `Store.assign`.
        check: which answers fit the target; None serves all.
    """
    app = FastAPI(title="draftsmith label", openapi_url=None, docs_url=None, redoc_url=None)
    _add_pages(app)
    _add_refusals(app)
    actions = LabellingActions(store, cutter, shared, check)
    deciding = DecidingActions(store, cutter)
    routes: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "/api/next": actions.next,
        "/api/label": actions.label,
        "/api/skip": actions.skip,
        "/api/undo": actions.undo,
        "/api/compare": deciding.compare,
        "/api/decide": deciding.decide,
        "/api/reopen": deciding.reopen,
    }
    for path, action in routes.items():
        app.post(path)(_endpoint(action))
    app.get("/api/agreement")(deciding.agreement)
    return Gate(app, token, host_names)


def _endpoint(action: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Fields], dict[str, Any]]:
    # Not async: the store waits for the disk, so FastAPI shall run it in a thread.
    def endpoint(fields: Fields) -> dict[str, Any]:
        return action(fields)

    return endpoint


def _add_pages(app: FastAPI) -> None:
    def page(name: str) -> Callable[[], Response]:
        kind = _KINDS[name[name.index(".") :]]
        content = files("draftsmith.label.page").joinpath("web", name).read_bytes()
        return lambda: Response(content, media_type=kind)

    for path, name in _PAGES.items():
        app.get(path)(page(name))
    for entry in files("draftsmith.label.page").joinpath("web").iterdir():
        if not entry.name.endswith(".html"):
            app.get(f"/web/{entry.name}")(page(entry.name))


def _add_refusals(app: FastAPI) -> None:
    def error_reply(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": sentence}, status, headers)

    @app.exception_handler(ValueError)
    def refuse(_: Request, error: ValueError) -> Response:
        if isinstance(error, Unavailable | Conflict):
            sentence = "the store is busy or cannot be written; nothing was written; try again in a few seconds"
            return error_reply(503, sentence, {"retry-after": str(RETRY_SECONDS)})
        return error_reply(409 if isinstance(error, NotOpen) else 400, str(error))

    @app.exception_handler(404)
    def absent(request: Request, _: Exception) -> Response:
        return error_reply(404, f"there is nothing at {request.url.path}; open /")

    @app.exception_handler(405)
    def not_that_way(request: Request, _: Exception) -> Response:
        return error_reply(405, f"{request.url.path} does not take {request.method}; open /")
