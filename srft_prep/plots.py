"""Plots as inline SVG that follow the page: its font, its light or dark colours, no background.

Matplotlib draws, with a colour of its own for each word of the palette; those are then replaced by
the variables of `page_style.css`. Every text of a plot goes into the SVG as text, escaped by an XML
writer, never read as mathematics. Same numbers, same bytes. The first plot of a process takes
about a second, since Matplotlib is imported then.
"""

import io
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from srft_prep.errors import ConfigError
from srft_prep.hostile_text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SERIES: Final = 6
_WORDS: Final = (
    *("border", "context", "accent", "good", "unnecessary", "harmful"),
    *("resolved", "unresolved"),
)
_CSS: Final = {
    "text": "currentColor",
    **{name: f"var(--{name})" for name in _WORDS},
    **{f"series-{number}": f"var(--series-{number})" for number in range(1, NUM_SERIES + 1)},
}
COLOURS: Final = {name: f"#01{number:02x}01" for number, name in enumerate(_CSS, 1)}
"""What to give Matplotlib for each word of the palette."""

_SVG: Final = "http://www.w3.org/2000/svg"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a model may be called $x$
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
        COLOURS["text"],
    ),
    "grid.color": COLOURS["border"],
}


def series_colour(number: int) -> str:
    """Return the colour of the number-th series, from 0; after the last they begin again."""
    return COLOURS[f"series-{number % NUM_SERIES + 1}"]


def require_plots(option: str) -> None:
    """Raise where there is no Matplotlib, before any work is done.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            f"{option}: plots need matplotlib, which is not installed; "
            "pip install 'srft-prep[plots]'"
        )


def svg(
    draw: "Callable[[Figure], None]",
    *,
    name: str,
    title: str,
    description: str,
    inches: tuple[float, float] = (11.0, 3.6),
) -> str:
    """Return a plot as an SVG element to stand in a page.

    Args:
        draw: draws on an empty figure, in `COLOURS` alone.
        name: letters and dashes, unlike that of any other plot of the page: its ids begin so.
        title: what the plot shows, for who hears the page.
        description: what can be seen in it, likewise; the numbers stand in a table beside it.
        inches: width and height; the page makes it narrower where it must.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        # the page's font draws the text, whatever Matplotlib's lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches)
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    root = ElementTree.fromstring(file.getvalue())
    for element in list(root):
        styles = element.find(f"{{{_SVG}}}style") is not None  # would be those of the whole page
        if styles or element.tag == f"{{{_SVG}}}metadata":
            root.remove(element)
    root.set("style", "stroke-linejoin: round")
    _rename(root, prefix=name)
    _describe(root, name=name, title=title, description=description)
    ElementTree.register_namespace("", _SVG)
    text = ElementTree.tostring(root, encoding="unicode")
    for word, colour in COLOURS.items():
        text = text.replace(colour, _CSS[word])
    text = re.sub(r"font-family: [^;\"]*;?", "", text)  # the page's own
    return text.replace(f' xmlns="{_SVG}"', "")  # which no element within HTML needs


def _rename(root: ElementTree.Element, *, prefix: str) -> None:
    """Make ids the plot's own, since those of all plots of a page share one space."""
    for element in root.iter():
        if identity := element.get("id"):
            element.set("id", f"{prefix}-{identity}")
        if target := element.attrib.pop(_HREF, None):
            element.set("href", f"#{prefix}-{target.removeprefix('#')}")
        for key, value in element.attrib.items():
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))


def _describe(root: ElementTree.Element, *, name: str, title: str, description: str) -> None:
    for word, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{{{_SVG}}}{word}", {"id": f"{name}-{word}"})
        element.text = printable(text)
        root.insert(0, element)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for key in ("width", "height"):
        root.set(key, root.get(key, "").removesuffix("pt"))
