"""Who may ask the server anything: the page that was opened from the address it printed.

The server listens on the loopback address, which other users of the machine and every web page in
the same browser can reach, too. So a request must

1. name the secret token as the first part of its path (what is under it is unknown to others), and
   for data, which only our script asks for, once more in a header that no other site can send;
2. be made to a loopback name: a page that had its own name resolve to 127.0.0.1 (DNS rebinding)
   asks under that name. The port is not compared, so that the page works through `ssh -L`;
3. come from the page itself, where the browser says where it comes from.

No cookie is set, so nothing is sent along by itself; no other origin is ever allowed (no CORS). The
answers may not be stored, framed or sniffed, the address is sent to nobody (no referrer), and the
page may load nothing but our own files: no inline script, no inline style, no markup from strings
(Trusted Types).
"""

import hmac
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER: Final = "x-review-token"

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_LOOPBACK: Final = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
_OURS: Final = ("same-origin", "none")
"""What a browser says of a request by our page, or by the user (an address typed or clicked)."""


class Guard:
    """An ASGI application around another one, which sees only what may pass, without the token."""

    def __init__(self, app: "ASGIApp", token: str) -> None:
        self.app = app
        self._token = token

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on, or refuse it; every answer gets the headers."""
        if scope["type"] != "http":  # a start or an end; sockets are not served
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: "Message") -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await PlainTextResponse(f"{refusal}\n", 403)(scope, receive, send_with_headers)
            return
        path = scope["path"].split("/", 2)
        inner = {**scope, "path": f"/{path[2]}" if len(path) > 2 else ""}
        await self.app(inner, receive, send_with_headers)

    def _refusal(self, scope: "Scope") -> str | None:
        """Return why a request may not pass, or None."""
        headers = _headers(scope["headers"])
        host = headers.get("host", "")
        if _LOOPBACK.fullmatch(host) is None:
            return "this server answers under 127.0.0.1 and localhost only"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return "requests from other origins are refused"
        is_visit = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if not is_visit and headers.get("sec-fetch-site", "none") not in _OURS:
            return "requests from other sites are refused"
        parts = scope["path"].split("/", 3)
        if not self._is_token(parts[1] if len(parts) > 1 else ""):
            return "open the address that srft-prep review printed: its token is missing or wrong"
        if parts[2:3] == ["api"] and not self._is_token(headers.get(TOKEN_HEADER, "")):
            return f"a request for data names the token in the header {TOKEN_HEADER}, too"
        return None

    def _is_token(self, given: str) -> bool:
        """Return whether a word is the token, in the same time for all words."""
        return hmac.compare_digest(given.encode(errors="replace"), self._token.encode())


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by name; one that comes twice is neither of the two."""
    found: dict[str, str] = {}
    for name, value in raw:
        key = name.decode("latin-1").lower()
        found[key] = "given twice" if key in found else value.decode("latin-1")
    return found
