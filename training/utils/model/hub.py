"""Whether the model hub can be reached from here; without torch."""

from __future__ import annotations

import os
import socket
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from training.utils.errors import UserError

PROXY_SECONDS = 5.0  # for a proxy to take a connection


def is_reachable() -> bool:
    """Whether the hub's name is known to this network, or its proxy answers.

    If not, the hub's libraries are told to use their cache only: they would try for half a minute, with a warning for
    each try.
    """
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(hub.ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    try:
        if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
            at = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
            socket.create_connection((at.hostname, at.port or 80), timeout=PROXY_SECONDS).close()
        else:
            socket.getaddrinfo(address.hostname, address.port or 443)
    except (OSError, ValueError):  # ValueError: a port that is no number
        hub.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return False
    return True


def check_model(name_or_path: str, flag: str) -> None:
    """Refuse the hub name of a model that this machine can have neither from the hub nor from the hub's cache.

    What is no hub name passes.

    Raises:
        UserError: says what to give instead; names ``flag``.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path in ("", "none", "embedded") or path.suffix == ".gguf" or path.exists() or is_reachable():
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str | os.PathLike):
        raise UserError(
            f"{flag} {name_or_path}: no folder here, and this machine does not reach the hub, whose cache has no such "
            f"model; give the folder of a model, or embedded"
        )
