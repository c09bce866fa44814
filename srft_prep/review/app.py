"""The page's requests: each is one call of the session and its answer as JSON.

GET  /                          the page; its files lie beside it
GET  api/session                who labels what, how
GET  api/trajectories           rows of the list (a filter, offset, limit)
GET  api/trajectories/ROW       one trajectory; ROW is a number: no id is ever part of an address
GET  api/trajectories/ROW/text  more of a long text (message, block, start)
GET  api/next                   the next step that is unlabelled, or labelled differently
GET  api/disagreements, api/agreement
POST api/labels                 {"row", "step", "label"}: answered when it is on the disk
POST api/undo
"""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route

from srft_prep.errors import SrftError
from srft_prep.review.filters import filter_of
from srft_prep.review.guard import Guard
from srft_prep.review.session import Session
from srft_prep.types import LABELS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

MAX_BODY_BYTES: Final = 1 << 16
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


def review_app(session: Session, token: str) -> "ASGIApp":
    """Return the application, behind its guard."""
    static = _static_files()

    async def page(request: "Request") -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in static:
            return _failure(f"there is no {name[:80]}", 404)
        return Response(static[name], media_type=_TYPES[f".{name.rpartition('.')[2]}"])

    async def missing(_request: "Request", _error: Exception) -> Response:
        return _failure("there is nothing at this address", 404)

    routes = [
        Route("/", page),
        *(Route(path, _answering(call, session)) for path, call in _QUESTIONS.items()),
        *(
            Route(path, _answering(call, session), methods=["POST"])
            for path, call in _COMMANDS.items()
        ),
        Route("/{name}", page),
    ]
    app = Starlette(routes=routes, exception_handlers={404: missing, SrftError: _refused})
    return Guard(app, token)


def _refused(_request: "Request", error: Exception) -> Response:
    return _failure(str(error), 400)


def _failure(message: str, status: int) -> Response:
    return Response(
        orjson.dumps({"error": message}), status_code=status, media_type="application/json"
    )


def _static_files() -> dict[str, bytes]:
    """Return the files of the page by name, so that no request ever names a path."""
    package = files("srft_prep")
    folder = package.joinpath("review", "static")
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    return found | {"page_style.css": package.joinpath("page_style.css").read_bytes()}


Call = Callable[[Session, "Request", Any], dict[str, Any]]


def _answering(call: Call, session: Session) -> "Callable[[Request], Any]":
    """Return an endpoint that makes one call in a thread and answers with what it returns."""

    async def endpoint(request: "Request") -> Response:
        body: Any = None
        if request.method == "POST":
            content = await _content(request)
            if content is None:
                return _failure("the request is too long", 413)
            try:
                body = orjson.loads(content or b"{}")
            except orjson.JSONDecodeError:
                return _failure("expected a body of JSON", 400)
            if not isinstance(body, dict):
                return _failure("expected a JSON object", 400)
        try:
            found = await run_in_threadpool(call, session, request, body)
        except OSError as error:  # a full disk, say: the label was not saved, and the page says so
            return _failure(f"not saved: {error.filename or ''} {error.strerror or error}", 500)
        return Response(orjson.dumps(found), media_type="application/json")

    return endpoint


async def _content(request: "Request") -> bytes | None:
    """Return a request's body; None where it is too long, whatever its headers say."""
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BODY_BYTES:
            return None
    return content


def _number(query: Mapping[str, Any], name: str, default: int) -> int:
    """Return a whole number of a query, or its default where there is none."""
    text = str(query.get(name, default))
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise SrftError(f"{name}: expected a whole number, got {text[:20]!r}")
    return int(text)


def _row(request: "Request") -> int:
    return _number(request.path_params, "row", -1)


def _session(session: Session, _request: "Request", _body: Any) -> dict[str, Any]:
    return session.describe()


def _rows(session: Session, request: "Request", _body: Any) -> dict[str, Any]:
    query = request.query_params
    offset, limit = max(0, _number(query, "offset", 0)), max(0, _number(query, "limit", 200))
    return session.rows(filter_of(query), offset=offset, limit=limit)


def _trajectory(session: Session, request: "Request", _body: Any) -> dict[str, Any]:
    return session.trajectory(_row(request), filter_of(request.query_params))


def _text(session: Session, request: "Request", _body: Any) -> dict[str, Any]:
    query = request.query_params
    message, block = _number(query, "message", 0), _number(query, "block", 0)
    start = max(0, _number(query, "start", 0))
    return session.text(_row(request), message=message, block=block, start=start)


def _next(session: Session, request: "Request", _body: Any) -> dict[str, Any]:
    query = request.query_params
    row, step = _number(query, "row", -1), _number(query, "step", -1)
    return session.next_step(query.get("kind", ""), filter_of(query), row=row, step=step)


def _disagreements(session: Session, request: "Request", _body: Any) -> dict[str, Any]:
    query = request.query_params
    offset, limit = max(0, _number(query, "offset", 0)), max(0, _number(query, "limit", 200))
    return session.disagreements(offset=offset, limit=limit)


def _agreement(session: Session, _request: "Request", _body: Any) -> dict[str, Any]:
    return session.agreement()


def _label(session: Session, _request: "Request", body: Any) -> dict[str, Any]:
    row, step, label = body.get("row"), body.get("step"), body.get("label")
    if type(row) is not int or type(step) is not int or label not in LABELS:
        raise SrftError(f"expected row, step and a label of {', '.join(LABELS)}")
    return session.label(row, step, label)


def _undo(session: Session, _request: "Request", _body: Any) -> dict[str, Any]:
    return session.undo()


_QUESTIONS: Final[dict[str, Call]] = {
    "/api/session": _session,
    "/api/trajectories": _rows,
    "/api/trajectories/{row}": _trajectory,
    "/api/trajectories/{row}/text": _text,
    "/api/next": _next,
    "/api/disagreements": _disagreements,
    "/api/agreement": _agreement,
}
_COMMANDS: Final[dict[str, Call]] = {"/api/labels": _label, "/api/undo": _undo}
