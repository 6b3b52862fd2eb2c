"""The page's server: what a browser gets and may say. Which model has written what is not in it before the results."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from page_guard import PageGuard
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ranking.items import Item
from ranking.ledger import DEMONSTRATIONS, RANKINGS, Event, Ledger, judge_name
from training.utils.errors import UserError

STATIC = Path(__file__).parent / "page"
LONGEST_REQUEST = 2**20  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def with_headers(app: ASGIApp) -> ASGIApp:
    """ASGI middleware that adds `HEADERS` to every answer: the page fetches nothing from anywhere else."""

    async def handled(scope: Scope, receive: Receive, send: Send) -> None:
        """The request, its answer with the headers."""

        async def send_with_headers(message: Message) -> None:
            """A part of the answer; its start gets the headers."""
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await app(scope, receive, send_with_headers)

    return handled


def with_password(app: ASGIApp, login: tuple[str, str]) -> ASGIApp:
    """ASGI middleware that asks for a user and a password (RFC 7617)."""
    expected = ":".join(login).encode()

    async def handled(scope: Scope, receive: Receive, send: Send) -> None:
        """The request, or a question for the password."""
        if scope["type"] != "http" or secrets.compare_digest(_login_of(scope), expected):
            await app(scope, receive, send)
        else:
            asked = {"WWW-Authenticate": 'Basic realm="Tripod", charset="UTF-8"'}
            await Response("a password is needed", 401, asked)(scope, receive, send)

    return handled


def _login_of(scope: Scope) -> bytes:
    """What a request gives, ``user:password``."""
    scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    try:
        return base64.b64decode(given, validate=True) if scheme.lower() == b"basic" else b""
    except binascii.Error:
        return b""


def build_app(ledger: Ledger, hosts: frozenset[str], login: tuple[str, str] | None = None) -> Starlette:
    """The page of a ledger.

    Args:
        ledger: what is judged, and what has been said.
        hosts: names that the page goes by, see `PageGuard`.
        login: user and password that visitors must give.
    """
    routes = [*_judging(ledger), *_reading(ledger), *_static()]
    guards = [Middleware(PageGuard, hosts=hosts)] + ([Middleware(with_password, login=login)] if login else [])
    return Starlette(routes=routes, middleware=[Middleware(with_headers), *guards])


def _judging(ledger: Ledger) -> list[Route]:
    """What judges do; each answer is what the page shows next."""

    def state(judge: str, item: Item | None, before: Event | None = None) -> JSONResponse:
        """What the page shows next."""
        found: dict[str, Any] = {"item": None, "progress": ledger.progress(judge), "warning": ledger.behind}
        if item is not None:
            order = item.shuffled(judge)
            texts = [item.texts[i] for i in order]
            found["item"] = {"id": item.id, "digest": item.digest, "prompt": item.prompt, "answers": texts}
            found["item"]["pair"] = len(texts) == 2
            if before is not None:
                places = [before["ranks"][i] for i in order]
                found["before"] = {name: before[name] for name in ("act", "note", "better")} | {"places": places}
        return JSONResponse(found)

    def next_(said: Mapping[str, Any]) -> JSONResponse:
        """The prompt that is open to a judge."""
        judge = judge_name(said["judge"])
        return state(judge, ledger.next_for(judge))

    def save(said: Mapping[str, Any]) -> JSONResponse:
        """A judgement; the answer is the next prompt."""
        judge = judge_name(said["judge"])
        item = ledger.items.get(said["item"])
        if item is not None and said["digest"] != item.digest:
            raise UserError("This prompt has other answers than you see; load the page again.")
        ledger.save(judge, said["item"], said["act"], said["places"], said["note"], said["better"])
        return state(judge, ledger.next_for(judge))

    def undo(said: Mapping[str, Any]) -> JSONResponse:
        """The last judgement is taken back; the answer is its prompt."""
        judge = judge_name(said["judge"])
        return state(judge, *ledger.undo(judge, said["mine"]))

    acts = {"next": next_, "save": save, "undo": undo}
    return [Route(f"/api/{name}", _answered(act), methods=["POST"]) for name, act in acts.items()]


def _reading(ledger: Ledger) -> list[Route]:
    """What has been judged so far."""

    async def results(request: Request) -> Response:
        """Agreement and win rates; these name the models."""
        agreed = ledger.agreement()
        found = {"progress": ledger.progress(""), "agreement": vars(agreed), "win_rates": ledger.win_rates()}
        found["rows"] = {RANKINGS: len(ledger.rankings.rows), DEMONSTRATIONS: len(ledger.demonstrations.rows)}
        return JSONResponse(found)

    async def export(request: Request) -> Response:
        """One of the files for training, as it is now."""
        files = {RANKINGS: ledger.rankings, DEMONSTRATIONS: ledger.demonstrations}
        name = request.path_params["name"]
        if name not in files:
            return Response("there is no such file", 404)
        head = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(b"".join(files[name].rows.values()), 200, head, "application/jsonl")

    return [Route("/api/results", results), Route("/export/{name}", export)]


def _static() -> list[Route]:
    """The page's files, and whether the server is there."""

    async def ping(request: Request) -> Response:
        """Whether the server is there."""
        return Response("here")

    async def static(request: Request) -> Response:
        """The page's own three files."""
        name = request.path_params.get("name", "page.html")
        return FileResponse(STATIC / name) if (STATIC / name) in STATIC.iterdir() else Response("not found", 404)

    return [Route("/", static), Route("/page/{name}", static), Route("/api/ping", ping)]


_TYPES = {"judge": str, "item": str, "digest": str, "act": str, "note": str, "better": str, "places": list, "mine": int}


def _answered(act: Callable[[Mapping[str, Any]], JSONResponse]) -> Callable[[Request], Awaitable[Response]]:
    """A handler for requests with an object in JSON; what is wrong comes back as a line, with status 400."""

    async def handler(request: Request) -> Response:
        """What an act answers, or a line that says what is wrong."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LONGEST_REQUEST:
                return JSONResponse({"error": "This is too long to be saved."}, 413)
        try:
            return act(_checked(body))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    return handler


def _checked(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or "judge" not in said:
        raise UserError("This is no request of the page.")
    for name, kind in _TYPES.items():
        if not isinstance(said.setdefault(name, kind()), kind):
            raise UserError("This is no request of the page.")
    if not all(type(place) is int for place in said["places"]):
        raise UserError("These places are no order of the answers.")
    return said
