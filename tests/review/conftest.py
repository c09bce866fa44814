from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Request

    from tests.review.serving import ReviewServer


SETTLED = "() => document.querySelector('main[aria-busy=false]:not([data-has-keys])') !== null"
"""No view is under way, and no key waits for its turn or for an answer."""
SHOWN = """() => {
    const main = document.querySelector("main[aria-busy=false]:not([data-has-keys])");
    return main !== null && main.dataset.shown === location.hash;
}"""
"""It shows what its address asks for, too; a new address is heard of only a moment later."""


class Visit:
    """A page of the browser with all that it did: requests, messages, dialogs."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.dialogs: list[str] = []
        page.set_default_timeout(60_000)
        page.on("request", lambda request: self.requests.append(request))
        page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", self._dismiss)

    def _dismiss(self, dialog: "Dialog") -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def open(self, server: "ReviewServer", words: str = "") -> None:
        """Open the page, or another place of it, and wait until it shows something."""
        self.page.goto(f"{server.address}{words}")
        self.page.wait_for_function(SHOWN)

    def reload(self) -> None:
        """Load the page again, and wait until it shows what its address asks for."""
        self.page.reload()
        self.page.wait_for_function(SHOWN)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as fast as the browser takes them, and let them act.

        What is only typed into the search acts a moment later: wait for what it leads to.
        """
        for key in keys:
            self.page.keyboard.press(key)
        self.page.wait_for_function(SETTLED)

    def answers(self) -> str:
        """Return the answers to all that the page has asked the server since it was loaded."""
        asked = [request for request in self.requests if "/api/" in request.url]
        return "".join(answer.text() for each in asked if (answer := each.response()))

    @contextmanager
    def losing_the_server(self) -> Iterator[None]:
        """Let the console say that the server is gone, and nothing else; it must say so."""
        with self.page.expect_console_message():
            yield
        assert all("ERR_CONNECTION_REFUSED" in problem for problem in self.problems)
        self.problems.clear()

    def current_step(self) -> str:
        """Return the heading of the current step."""
        return self.page.locator("article.current h3").inner_text()


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Visit]:
    """A visit that must end without a message in the console, a dialog or a request elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    made = Visit(context.new_page())
    yield made
    urls = [request.url for request in made.requests]
    hosts = {url.split("/")[2].split(":")[0] for url in urls if "://" in url}
    context.close()
    assert made.problems == []
    assert made.dialogs == []
    assert hosts <= {"127.0.0.1"}
