"""HTML pages that stand alone: one file, nothing loaded, nothing run that is not ours.

A page can be opened from a disk, sent by mail or published with a paper. Its content security
policy allows styles and one script by its hash, and no request at all, so that even a mistake in
escaping could not send what a trajectory holds to anyone. All text of others goes through
`hostile_text`.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

from srft_prep.hostile_text import attribute, escaped
from srft_prep.storage import write_bytes

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; "
HEAD: Final = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}'
)
"""What every page begins with, by which one is known again."""


@cache
def page_style() -> str:
    """Return the style sheet of all pages."""
    return files("srft_prep").joinpath("page_style.css").read_text(encoding="utf-8")


def document(title: str, body: str, *, script: str = "", style: str = "") -> str:
    """Return a page that is complete in itself.

    Args:
        title: plain text.
        body: HTML, in which all text of others is escaped already.
        script: JavaScript of ours, allowed by its hash; without it the page runs none.
        style: more CSS, behind that of all pages.
    """
    assert "</" not in script, "a script must not hold what could end its element"
    assert "</" not in style
    allowed = f"'sha256-{_hash(script)}'" if script else "'none'"
    return (
        f"{HEAD}script-src {allowed}; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{attribute(title)}</title>\n"
        f"<style>\n{page_style()}{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", label: str = ""
) -> str:
    """Return an HTML table of plain text; the first cell of a row is its header.

    Args:
        head: the header of each column.
        rows: as many cells each as `head`.
        caption: plain text above the table.
        label: what the table is, for who hears the page; needed where there is no caption.
    """
    named, label = escaped(caption), attribute(label or caption)
    lines = [
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>',
        f"<caption>{named}</caption>" if named else "",
        "<thead><tr>" + "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head),
        "</tr></thead><tbody>",
    ]
    for first, *others in rows:
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escaped(first)}</th>{cells}</tr>')
    return "\n".join(line for line in [*lines, "</tbody></table></div>"] if line)


def figure(picture: str, caption: str) -> str:
    """Return a picture (SVG) with its caption (plain text)."""
    return f"<figure>\n{picture}\n<figcaption>{escaped(caption)}</figcaption>\n</figure>"


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all; folders are made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode())


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
