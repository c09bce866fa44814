"""Pages stand alone, show text of others as text, and can be read in light and in dark."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep import pages
from srft_prep.hostile_text import attribute, escaped, printable
from tests import strategies
from tests.page_reader import read_page

NASTY = "<script>alert(1)</script>\"'&amp; \x1b[2J\u202eevil\u2066 \r\x00\ud800\u2028 end"


@given(st.text(st.characters(exclude_categories=())) | strategies.texts())
def test_escaped_text_is_shown_whole_with_what_is_unseen_as_escapes(text: str) -> None:
    shown = read_page(f"<p>{escaped(text)}</p>").text
    assert shown == "\n".join(printable(line) for line in text.split("\n"))


@given(st.text(st.characters(exclude_categories=())) | strategies.texts())
def test_an_attribute_holds_its_text_and_no_control_character(text: str) -> None:
    page = read_page(f'<p title="{attribute(text)}"></p>')
    assert page.elements == [("p", {"title": printable(text.replace("\n", " "))})]


def test_an_escape_differs_from_the_same_characters_in_the_text() -> None:
    assert escaped("\u202e") == '<b class="escape">\\u202e</b>'
    assert escaped("\\u202e") == "\\u202e"


def test_a_page_may_load_nothing_and_runs_only_its_own_script() -> None:
    page = read_page(pages.document(NASTY, f"<p>{escaped(NASTY)}</p>", script="let ours = 1;"))
    policy = page.policy
    assert policy["default-src"] == ["'none'"]
    assert policy["base-uri"] == policy["form-action"] == ["'none'"]
    # echo -n "let ours = 1;" | openssl dgst -sha256 -binary | base64
    assert policy["script-src"] == ["'sha256-18FO17hL7QLguMckvWCtvex3pDa3Yp5VQyS2tAul32Y='"]
    assert page.scripts == ["let ours = 1;"]
    assert page.problems() == ["script"]
    assert read_page(pages.document("t", "")).policy["script-src"] == ["'none'"]


def test_a_table_shows_its_cells_as_text() -> None:
    text = pages.table(["<b>", "n"], [["<i>", "&"]], caption="x<y")
    page = read_page(text)
    assert "<b>" in page.text
    assert "x<y" in page.text
    assert {tag for tag, _ in page.elements}.isdisjoint({"b", "i"})
    assert [found["scope"] for tag, found in page.elements if tag == "th"] == ["col", "col", "row"]


SCHEMES = ("light", "dark")


def palette(scheme: str) -> dict[str, tuple[float, float, float]]:
    """Return the colours of the style sheet by name, each as three numbers from 0 to 1."""
    light, dark = re.findall(r":root \{(.*?)\}", pages.page_style(), flags=re.DOTALL)
    found: dict[str, str] = {}
    for block in (light, dark) if scheme == "dark" else (light,):
        found |= dict(re.findall(r"--([a-z0-9-]+): #([0-9a-f]{6});", block))
    return {
        name: tuple(int(text[i : i + 2], 16) / 255 for i in (0, 2, 4))  # type: ignore[misc]
        for name, text in found.items()
    }


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the contrast of two colours as WCAG 2.2 defines it."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(
            share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
        )

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_has_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    colours = palette(scheme)
    grounds = ["background", "raised", *(name for name in colours if name.endswith("-fill"))]
    assert len(grounds) == 5
    for ground in grounds:
        assert contrast(colours["text"], colours[ground]) >= 7, ground
        for name in ("context", "accent"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for label in ("good", "unnecessary", "harmful"):
        for ground in ("background", "raised", f"{label}-fill"):
            assert contrast(colours[label], colours[ground]) >= 4.5, (label, ground)
    for number in range(1, 7):
        assert contrast(colours[f"series-{number}"], colours["background"]) >= 4.5


def test_dark_names_every_colour_that_light_names() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", pages.page_style(), flags=re.DOTALL)
    names = re.findall(r"--([a-z0-9-]+): #", light)
    assert names == re.findall(r"--([a-z0-9-]+): #", dark)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", pages.page_style()))
    assert used <= set(names)


def test_the_reader_of_these_tests_sees_what_a_page_must_not_hold() -> None:
    bad = (
        '<img src="x"><a href="https://x.org">x</a><p onclick="x()">x</p>'
        '<p style="background: url(x.png)">x</p><script>x</script><iframe></iframe>'
    )
    assert len(read_page(bad).problems()) == 6
