"""Reads a page as a browser would, as far as tests ask: what it shows, and what it could load."""

import re
from html.parser import HTMLParser
from typing import Final

LOADING: Final = {
    *("img", "iframe", "frame", "object", "embed", "link", "base", "form", "audio", "video"),
    *("source", "track", "image", "foreignobject", "animate", "set", "portal", "applet"),
}
"""Elements that could load, run or send something; `script` is judged by its text."""
VOID: Final = {"meta", "input", "br", "hr", "img", "link", "base"}


class Page(HTMLParser):
    """A page's text, elements and scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.pieces: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in self._open, f"</{tag}> closes nothing"
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        {"script": self.scripts, "style": self.styles}.get(inside, self.pieces).append(data)

    @property
    def text(self) -> str:
        """All text that is shown, and titles."""
        return "".join(self.pieces)

    @property
    def policy(self) -> dict[str, list[str]]:
        """The content security policy by directive."""
        content = next(
            found["content"]
            for tag, found in self.elements
            if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy"
        )
        assert content is not None
        words = (directive.split() for directive in content.split(";"))
        return {name: values for name, *values in words}

    def problems(self) -> list[str]:
        """What could load or run something."""
        found = []
        for tag, attributes in self.elements:
            if tag in LOADING or tag == "script":
                found.append(tag)
            for name, value in attributes.items():
                text = (value or "").strip().lower()
                if name.startswith("on") or name in ("src", "srcset", "srcdoc", "action", "ping"):
                    found += [] if tag in LOADING else [f"{tag} {name}"]
                leads_away = name in ("href", "xlink:href") and not text.startswith("#")
                if leads_away or re.search(r"url\((?!['\"]?#)", text):
                    found.append(f"{tag} {name}={value}")
        found += ["style" for text in self.styles if re.search(r"url\(|@import", text)]
        return found


def read_page(text: str) -> Page:
    """Return a page, parsed to its end."""
    page = Page()
    page.feed(text)
    page.close()
    return page
