"""Who may talk to a page that is served on this machine: its own browser tabs, and nobody through another site."""

import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

_LARGEST_REQUEST = 64 * 1024  # bytes; a vote has a few hundred


class Doorkeeper:
    """Passes on what the page itself sends: to one of its names, from no other site, small, and no upload.

    A browser lets any site send requests to this machine, under a name that the site's owner points here.

    Args:
        app: the page (ASGI).
        host: address that it is served at.
        names: more names that it may be asked for.
    """

    def __init__(self, app: Any, host: str, names: Sequence[str]) -> None:
        self.app = app
        self.local = _is_loopback(host)
        here = socket.gethostname()
        known = ["localhost", host, *names, *([] if self.local else [here, f"{here}.local"])]
        self.names = {name.lower() for name in known}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "http" and not (refusal := self._refusal(scope)):
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        status, reason = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": reason.encode()})

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Status and reason, or None if the request is welcome."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin")
        if not self._is_ours(f"//{headers.get('host', '')}") or (origin and not self._is_ours(origin)):
            return 403, "not a name of this page: open it under the address that was printed (--allow-host)"
        if "upload" in scope["path"].split("/"):
            return 403, "this page takes no files"
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal() or int(length) > _LARGEST_REQUEST:
            return 413, f"more than {_LARGEST_REQUEST} bytes"
        return None

    def _is_ours(self, url: str) -> bool:
        try:
            name = urlsplit(url).hostname or ""
            return name in self.names or _is_loopback(name) or (not self.local and bool(ip_address(name)))
        except ValueError:  # no URL, or neither a name of ours nor an address
            return False


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
