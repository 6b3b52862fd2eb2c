"""What reaches the page: requests of its own, addressed to it. Foreign names, foreign pages and uploads are refused.

A page that listens on this machine alone is still reached by every page that a browser here has open. DNS rebinding
gives it a foreign name (then the Host header says so), a form or a script on another page sends requests across (then
the Origin header says so).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})


class PageGuard:
    """ASGI middleware that answers 403 to what is not the page's own.

    Args:
        app: what it guards.
        hosts: names that the page goes by; empty for any, where visitors give a password instead.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        reason = self.refusal(scope) if scope["type"] in ("http", "websocket") else ""
        if not reason:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            await PlainTextResponse(reason, 403)(scope, receive, send)

    def refusal(self, scope: Scope) -> str:
        """Why a request is not served; empty if it is."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if self.hosts and name_of(f"//{host}") not in self.hosts:
            return "this page does not go by that name"
        if origin and origin != "null" and urlsplit(origin).netloc not in (host, headers.get("x-forwarded-host")):
            return "this request comes from another page"
        if origin == "null" and scope.get("method") not in ("GET", "HEAD", None):
            return "this request comes from another page"
        if scope["path"].rstrip("/").endswith("/upload"):
            return "nothing is uploaded here"
        return ""


def name_of(address: str) -> str:
    """The host's name in an address such as ``//[::1]:7860``, empty if there is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def guarded(host: str, password: bool) -> dict[str, Any]:
    """Arguments of gradio's server that put the guard before it.

    Args:
        host: the address that it listens on.
        password: visitors must give one, so the page may go by any name.
    """
    from starlette.middleware import Middleware

    hosts = frozenset() if password else THIS_MACHINE | {name_of(f"//[{host}]" if ":" in host else f"//{host}")}
    return {"app_kwargs": {"middleware": [Middleware(PageGuard, hosts=hosts)]}}
