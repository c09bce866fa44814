"""The page's server: on the loopback address alone, until Ctrl-C."""

import os
import secrets
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import uvicorn

from srft_prep.errors import ConfigError
from srft_prep.review.app import review_app
from srft_prep.review.session import Session

HOST = "127.0.0.1"
TOKEN_BYTES = 24


def serve(session: Session, *, port: int, ready: Callable[[str], None], browser: bool) -> None:
    """Serve the page until the process is interrupted.

    Args:
        session: what is behind the page.
        port: to listen on; 0 lets the system choose one.
        ready: called with the page's address once requests are taken.
        browser: whether to open the page in the user's browser, where there is a display.

    Raises:
        ConfigError: the port is not to be had.
    """
    token = secrets.token_urlsafe(TOKEN_BYTES)
    config = uvicorn.Config(
        review_app(session, token),
        access_log=False,  # it would hold the token
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    with _listening(port) as listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
        ready(address)
        show = _opened(address) if browser and _has_display() else nullcontext()
        # Ctrl-C is how one ends it: nothing is lost, every label is on the disk
        with show, suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port}: {error.strerror}; leave it out, and the system chooses a free one"
            ) from None
        listener.listen(128)
        yield listener
    finally:
        listener.close()


def _has_display() -> bool:
    names = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform == "darwin" or any(os.environ.get(name) for name in names)


@contextmanager
def _opened(address: str) -> Iterator[None]:
    """Open the page by way of a file that only this user may read.

    An address on a browser's command line would show its token to everybody on the machine.
    """
    with tempfile.TemporaryDirectory(prefix="srft-prep-review-") as folder:
        page = Path(folder) / "open.html"
        page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
        webbrowser.open(page.as_uri())
        yield
