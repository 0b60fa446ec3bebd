"""The web application behind `draftsmith label serve`: its pages, and what they ask for.

Owns routes, what a request must look like, and the replies to bad requests. Knows nothing of the token and the checks before it
(`access`), of how the server is started, or of how the page looks (`web/`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from draftsmith.label.page.access import Gate
from draftsmith.label.page.markable_spans import Cutter, segments
from draftsmith.label.schema import Answer, Label, Span
from draftsmith.label.store.agreement import Agreement, agreements
from draftsmith.label.store.database import Conflict, Unavailable
from draftsmith.label.store.store import LogEntry, NotOpen, Store

MAX_NAME = 64
MAX_SECONDS = 86_400.0
RETRY_SECONDS = 3

_PAGES = {"/": "label.html", "/agreement": "agreement.html"}
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class BadRequest(ValueError):
    """A request that is not one of those the page sends."""


async def request_fields(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds.

    Args:
        request: of the page.

    Raises:
        BadRequest: it is something else.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("the request is not JSON; send it as application/json")
    try:
        fields = json.loads(await request.body(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request cannot be read as JSON; send one object") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the request is a {type(fields).__name__}; send one JSON object")
    return fields


Fields = Annotated[dict[str, Any], Depends(request_fields)]


def build_app(store: Store, cutter: Cutter, token: str, host_names: tuple[str, ...] | None, shared: float) -> Gate:
    """The application, behind its gate.

    Args:
        store: where answers come from and labels go; any number of threads may use it.
        cutter: what an answer is cut into.
        token: who knows it may label; see `Gate`.
        host_names: see `Gate`.
        shared: the share of the items that two annotators get; see `Store.assign`.
    """
    app = FastAPI(title="draftsmith label", openapi_url=None, docs_url=None, redoc_url=None)
    _add_pages(app)
    _add_refusals(app)
    actions = LabellingActions(store, cutter, shared)
    routes: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "/api/next": actions.next,
        "/api/label": actions.label,
        "/api/skip": actions.skip,
        "/api/undo": actions.undo,
    }
    for path, action in routes.items():
        app.post(path)(_endpoint(action))
    app.get("/api/agreement")(actions.agreement)
    return Gate(app, token, host_names)


class LabellingActions:
    """What an annotator may do, each as one request: fields in, what the page then shows out.

    Every method with fields rejects those that are missing, unknown or of the wrong type, and passes on what the store raises.

    Args:
        store: where answers come from and labels go.
        cutter: what an answer is cut into.
        shared: the share of the items that two annotators get.
    """

    def __init__(self, store: Store, cutter: Cutter, shared: float) -> None:
        self._store = store
        self._cutter = cutter
        self._shared = shared

    def next(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The open item of an annotator, or a new one, and how far they are.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        _only(fields, "annotator")
        annotator = _name(fields)
        answer = self._store.assign(annotator, self._shared)
        progress = self._store.progress(annotator, self._shared)
        return {"item": None if answer is None else self._shown(answer), "progress": asdict(progress)}

    def label(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a label of the annotator's open item.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        _only(fields, "annotator", "item", "verdict", "error", "note", "seconds")
        verdict = fields.get("verdict")
        if verdict not in ("correct", "wrong"):
            raise BadRequest(f"verdict is {_short(verdict)}; it is 'correct' or 'wrong'; send one of them")
        label = Label(verdict, _name(fields), "person", _span(fields), note=_text(fields, "note", ""))
        item = _text(fields, "item")
        if label.error is not None:
            self._check_covers_a_piece(item, label.error)
        return {"entry": self._store.annotate(item, label, _seconds(fields), assigned=True)}

    def skip(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the annotator's open item back.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        _only(fields, "annotator", "item", "reason")
        reason = _text(fields, "reason", "").strip() or "skipped"
        self._store.release(_text(fields, "item"), _name(fields), reason)
        return {}

    def undo(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the annotator's last label back. The reply holds what it said.

        Args:
            fields: of the request.

        Raises:
            BadRequest: a field is missing, unknown or of the wrong type.
        """
        _only(fields, "annotator", "entry")
        number = fields.get("entry")
        if type(number) is not int or not 0 <= number < 2**63:
            raise BadRequest(
                f"entry is {_short(number)}; it is the number of a label; send the one that the page received"
            )
        item = self._store.undo(_name(fields), number)
        return {"item": item, "label": _undone_label(self._store.history(item), number)}

    def agreement(self) -> dict[str, Any]:
        """Every pair of annotators with an answer that both have labelled."""
        pairs = agreements(self._store.answers(), lambda answer: self._cutter.pieces(answer)[0])
        return {"pairs": [_pair(pair) for pair in pairs]}

    def _shown(self, answer: Answer) -> dict[str, Any]:
        pieces, cut = self._cutter.pieces(answer)
        return {
            "id": answer.id,
            "source": answer.source,
            "messages": [dict(message) for message in answer.messages],
            "cut": cut,
            "segments": [[segment.text, *(segment.span or ())] for segment in segments(answer.response, pieces)],
        }

    def _check_covers_a_piece(self, item: str, error: Span) -> None:
        answer = self._store.answer(item)
        pieces, cut = self._cutter.pieces(answer)
        inside = 0 <= error[0] < error[1] <= len(answer.response)  # if not, the store says so
        if inside and not any(max(start, error[0]) < min(end, error[1]) for start, end in pieces):
            raise BadRequest(f"error is {list(error)}; it covers none of the {cut}; mark at least one of them")


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


def _undone_label(history: list[LogEntry], number: int) -> dict[str, Any] | None:
    label = next((entry.label for entry in history if entry.number == number), None)
    return None if label is None else {"verdict": label.verdict, "error": label.error, "note": label.note}


def _pair(agreement: Agreement) -> dict[str, Any]:
    distances = agreement.distances()
    return {
        "first": agreement.first,
        "second": agreement.second,
        "num_items": len(agreement.comparisons),
        "observed": agreement.observed(),
        "kappa": agreement.kappa(),
        "num_marked": len(distances),
        "num_same_token": sum(distance == 0 for distance in distances),
        "median_distance": statistics.median(distances) if distances else None,
        "mean_distance": statistics.fmean(distances) if distances else None,
        "differences": [
            asdict(comparison) for comparison in agreement.comparisons if not comparison.agrees() or comparison.distance
        ],
    }


def _only(fields: Mapping[str, Any], *known: str) -> None:
    for field in fields:
        if field not in known:
            raise BadRequest(f"the field {_short(field)} is not known; the fields are {', '.join(known)}; leave it out")


def _name(fields: Mapping[str, Any]) -> str:
    name = _text(fields, "annotator")
    if not name or name != name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        rule = f"a name is 1 to {MAX_NAME} printable characters, without space around it"
        raise BadRequest(f"annotator is {_short(name)}; {rule}; give another")
    return name


def _text(fields: Mapping[str, Any], field: str, default: str | None = None) -> str:
    value = fields.get(field, default)
    if not isinstance(value, str):
        raise BadRequest(f"{field} is {_short(value)}; it is text; send text")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRequest(f"{field} holds a NUL or half a character; no database keeps these; leave them out")
    return value


def _span(fields: Mapping[str, Any]) -> Span | None:
    value = fields.get("error")
    if value is None:
        return None
    # bool is an int for Python.
    if not isinstance(value, list) or len(value) != 2 or any(type(number) is not int for number in value):
        raise BadRequest(f"error is {_short(value)}; it is two whole numbers, start and end; send [start, end]")
    return (value[0], value[1])


def _seconds(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("seconds")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise BadRequest(
            f"seconds is {_short(value)}; it is a number from 0 to {MAX_SECONDS:.0f}; send the time it took"
        )
    return float(value)


def _short(value: object) -> str:
    try:
        shown = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
