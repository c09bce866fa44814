"""The pages that commands write, in a real browser: by keys, in light and in dark."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from srft_prep.config import PackConfig
from srft_prep.shards import pack
from tests.stages import Examples, label_row, srft_prep, trajectory, write_labels
from tests.stages import write_trajectories as write_runs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

SHOWN = "attempt-2/example__pathglob-7"
HOSTILE = "</pre></svg><script>alert(1)</script><img src=x onerror=alert(1)>$x^{$\x1b[2J\u202e"


@pytest.fixture(scope="module")
def files(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, hostile ones among them."""
    folder = tmp_path_factory.mktemp("pages")
    weights = {"good": 1.0, "unnecessary": 0.5, "harmful": 0.0}
    config = PackConfig(recipe="srft", weights=weights, seq_len=8192)
    pack(examples.tokens, folder / "shards", config, labels=examples.labels)
    run = replace(trajectory("run", text=HOSTILE), model=HOSTILE, format=HOSTILE)
    runs = write_runs(folder / "runs", [run])
    labels = write_labels(
        folder / "labels", [label_row(run, step, "harmful", rationale=HOSTILE) for step in range(3)]
    )
    table, name = folder / "rollouts.csv", HOSTILE.replace("=", " ")
    rows = "".join(f"{arm},s,{n},task,{n % 2}\n" for arm in (name, "b") for n in range(3))
    table.write_text(f"arm,training_run,rollout,instance_id,resolved\n{rows}")
    shown = ("--tokens", examples.tokens, "--labels", examples.labels)
    commands = {
        "shards": ("inspect", folder / "shards", "--id", SHOWN, *shown),
        "runs": ("inspect", runs, "--id", "run", "--labels", labels),
        "stats": ("stats", runs, "--labels", labels),
        "compare": ("compare", "--arm", f"{name}={table}", "--arm", f"b={table}"),
    }
    for page, command in commands.items():
        made = srft_prep(*command, "--html", folder / f"{page}.html")
        assert (made.status, made.stderr) == (0, "")
    return {name: folder / f"{name}.html" for name in commands}


class Opened:
    """A page in the browser, and all that it did."""

    def __init__(self, browser: "Browser", file: Path, scheme: Literal["light", "dark"]) -> None:
        self.page: Page = browser.new_page(color_scheme=scheme)
        self.did: list[str] = []
        self.page.on("console", lambda message: self.did.append(message.text))
        self.page.on("pageerror", lambda error: self.did.append(str(error)))
        self.page.on("request", lambda request: self.did.append(request.url))
        self.page.goto(file.as_uri())

    def style(self, place: str, name: str) -> str:
        """Return what an element looks like."""
        found = self.page.locator(place).first.evaluate(
            "(element, name) => getComputedStyle(element)[name]", name
        )
        assert isinstance(found, str)
        return found


@pytest.mark.parametrize("name", ["shards", "runs", "stats", "compare"])
def test_a_page_asks_for_nothing_but_itself_and_says_nothing_to_the_console(
    browser: "Browser", files: dict[str, Path], name: str
) -> None:
    looks = []
    for scheme in ("light", "dark"):
        opened = Opened(browser, files[name], scheme)
        assert opened.page.locator("h1").is_visible()
        assert opened.did == [files[name].as_uri()]
        assert opened.page.locator("script, img, b:not(.escape)").count() == 0
        looks.append((opened.style("html", "backgroundColor"), opened.style("h1", "color")))
        if name in ("stats", "compare"):
            ink = opened.style("svg text", "fill")
            assert ink == opened.style("h1", "color")
        opened.page.close()
    assert looks[0] != looks[1]
    assert looks[0][0] == "rgb(255, 255, 255)"


def test_the_keyboard_alone_opens_context_follows_the_bar_and_shows_where_tokens_begin(
    browser: "Browser", files: dict[str, Path]
) -> None:
    opened = Opened(browser, files["shards"], "light")
    page = opened.page
    page.keyboard.press("Tab")
    assert opened.style("section pre i", "boxShadow") == "none"
    page.keyboard.press("Space")
    assert page.locator("#bounds").is_checked()
    assert opened.style("section pre i", "boxShadow") != "none"
    page.keyboard.press("Space")
    for _ in range(4):
        page.keyboard.press("Tab")
    target = page.locator(":focus").get_attribute("href")
    assert (page.locator(":focus").get_attribute("title") or "").startswith("step 3 | harmful")
    page.keyboard.press("Enter")
    page.wait_for_function("target => location.hash === target", arg=target)
    page.wait_for_function("document.activeElement === document.body")  # the link gave it up
    assert page.locator(f"{target} h3").is_visible()
    page.keyboard.press("Tab")  # from where the link led to: into that step
    assert page.locator(":focus").evaluate("element => element.tagName") == "PRE"
    assert opened.style(":focus i", "boxShadow") != "none"
    folded = page.locator("details").first
    assert not folded.locator("pre").is_visible()
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    assert folded.locator("pre").is_visible()
    assert opened.did == [files["shards"].as_uri()]
    page.close()


def test_a_step_of_half_weight_looks_unlike_trained_and_masked_ones(
    browser: "Browser", files: dict[str, Path]
) -> None:
    opened = Opened(browser, files["shards"], "dark")
    kinds = ("trained", "partly", "harmful", "outside")
    assert len({opened.style(f"section.{kind}", "backgroundColor") for kind in kinds}) == 4
    opened.page.close()
