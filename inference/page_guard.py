"""What reaches a page: requests of its own, addressed to it. Foreign names, foreign pages and uploads are refused.

A page that listens on this machine alone is still reached by every page that a browser here has open. DNS rebinding
gives it a foreign name (then the Host header says so), a form or a script on another page sends requests across (then
the Origin header says so).
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from training.utils.errors import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PORTS_TRIED = 100
ALIVE = "/alive"  # answers with `INSTANCE`, so that a page sees that its server is gone, or another one
INSTANCE = secrets.token_hex(8)
THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(eq=False)
class PageGuard:
    """ASGI middleware that answers 403 to what is not the page's own.

    Args:
        app: what it guards.
        hosts: names that the page goes by; empty for any, where visitors give a password instead.
    """

    app: ASGIApp
    hosts: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        reason = self.refusal(scope) if scope["type"] in ("http", "websocket") else ""
        if reason and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        elif reason or (scope["type"] == "http" and scope["path"] == ALIVE):
            from starlette.responses import PlainTextResponse

            answer = PlainTextResponse(reason, 403)
            if not reason:
                answer = PlainTextResponse(INSTANCE, headers={"Cache-Control": "no-store"})
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

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


def address_of(host: str, port: int) -> str:
    """Host and port as they stand in an address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def names_of(host: str, password: bool) -> frozenset[str]:
    """Names that a page goes by.

    Args:
        host: the address that it listens on.
        password: visitors must give one, so the page may go by any name.
    """
    return frozenset() if password else THIS_MACHINE | {name_of(f"//{address_of(host, 0)}")}


def guarded(host: str, password: bool) -> dict[str, Any]:
    """Arguments of gradio's server that put the guard before it; see `names_of`."""
    from starlette.middleware import Middleware

    return {"app_kwargs": {"middleware": [Middleware(PageGuard, hosts=names_of(host, password))]}}


def credentials(host: str, auth: str, share: bool = False) -> tuple[str, str] | None:
    """The user and password of ``--auth``.

    Args:
        host: the address to listen on.
        auth: USER:PASSWORD, or nothing.
        share: the page gets a public address.

    Raises:
        UserError: malformed, or missing although others than this machine could reach the page.
    """
    if auth:
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise UserError("--auth: expected USER:PASSWORD, both not empty")
        return user, password
    if share:
        raise UserError("--share makes the page public: give --auth USER:PASSWORD with it")
    if not is_loopback(host):
        raise UserError(f"--host {host} lets other machines in: give --auth USER:PASSWORD with it")
    return None


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str, port: int) -> int:
    """The first port from ``port`` on that can be listened on.

    Raises:
        UserError: not an address of this machine, or a hundred ports are taken.
    """
    last = min(port + PORTS_TRIED, 65536)
    for candidate in range(port, last):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return candidate
        except PermissionError as error:
            raise UserError(f"--port {candidate} needs more rights; choose one from 1024 on") from error
        except socket.gaierror as error:
            raise UserError(f"--host {host}: {error.strerror}") from error
        except OSError as error:
            if error.errno == 99:  # EADDRNOTAVAIL
                raise UserError(f"--host {host} is not an address of this machine") from error
    raise UserError(f"no free port from {port} to {last - 1}; choose another --port")
