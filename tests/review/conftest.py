from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Request

    from tests.review.serving import ReviewServer


SHOWN = """() => {
    const main = document.querySelector("main[aria-busy=false]");
    return main !== null && main.dataset.shown === location.hash;
}"""
"""The page shows what its address asks for; a new address is heard of only a moment later."""


class Visit:
    """A page of the browser with all that it did: requests, answers, messages, dialogs."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        self.requests: list[str] = []
        self.answers: list[str] = []
        self.problems: list[str] = []
        self.dialogs: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfinished", lambda request: self.answers.append(_body(request)))
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

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as fast as the browser takes them."""
        for key in keys:
            self.page.keyboard.press(key)

    def answers_with(self, words: str) -> str:
        """Return all answers once one holds some words: we hear of one after the page does."""
        for _ in range(600):
            if words in "".join(self.answers):
                break
            self.page.wait_for_timeout(100)
        return "".join(self.answers)

    def current_step(self) -> str:
        """Return the heading of the current step."""
        return self.page.locator("article.current h3").inner_text()


def _body(request: "Request") -> str:
    if "/api/" not in request.url:
        return ""
    return request.response().text()


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Visit]:
    """A visit that must end without a message in the console, a dialog or a request elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(60_000)
    made = Visit(context.new_page())
    yield made
    hosts = {url.split("/")[2].split(":")[0] for url in made.requests if "://" in url}
    context.close()
    assert made.problems == []
    assert made.dialogs == []
    assert hosts <= {"127.0.0.1"}
