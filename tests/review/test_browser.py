"""The review page in a real browser, by its keys."""

import signal
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from srft_prep.gold import read_gold
from srft_prep.types import LABELS, Message, Trajectory
from tests.review.conftest import Visit
from tests.review.serving import ReviewServer
from tests.stages import label_row, trajectory, write_labels, write_trajectories

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

SCRIPT = "<script>alert('ran')</script><img src=x onerror=\"alert('ran')\">"
LINK = '<a href="javascript:alert(1)">click</a> [click](javascript:alert(2))'
COLOURS = "\x1b[31mred\x1b[0m \x1b[2J\x1b]0;title\x07 \x1b[8mconcealed"
REVERSED = "safe\u202egnp.exe\u2066 \u200f"
LONG = "x" * 1_000_000 + "<b>" + "y" * 1_000_000
SECRET = "canary-rationale"

RUNS = [trajectory(f"run-{name}", num_steps=12) for name in "abc"]
HOSTILE = Trajectory(
    trajectory_id=f"hostile {SCRIPT} \u202e../../etc/passwd",
    instance_id="javascript:alert(3)",
    format="messages",
    model="<b onclick=alert(4)>model</b>",
    exit_status=SCRIPT,
    patch="--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old <script>\n+new </script>",
    messages=(
        Message(role="user", kind="prompt", content=f"task {SCRIPT}"),
        Message(
            role="assistant",
            kind="action",
            content=f"thought {LINK}",
            tool_calls=orjson.dumps(
                [{"function": {"name": SCRIPT, "arguments": orjson.dumps({SCRIPT: LINK}).decode()}}]
            ).decode(),
        ),
        Message(role="tool", kind="observation", content=f"{COLOURS}\n{REVERSED}\n\0{SCRIPT}"),
        Message(role="assistant", kind="action", content="long"),
        Message(role="tool", kind="observation", content=LONG),
    ),
    resolved=False,
)
MANY = [trajectory(f"filler-{number:03d}", num_steps=1) for number in range(300)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Trajectories, and labels of a critic that takes every third step for harmful."""
    folder = tmp_path_factory.mktemp("review")
    trajectories = write_trajectories(folder / "trajectories", [*RUNS, HOSTILE, *MANY])
    rows = [
        label_row(run, step, "harmful" if step % 3 == 0 else "good", rationale=f"{SECRET} {step}")
        for run in RUNS
        for step in range(run.num_steps)
    ]
    hostile = label_row(HOSTILE, 0, "harmful", rationale=SCRIPT)
    return trajectories, write_labels(folder / "labels", [*rows, hostile])


@pytest.fixture(scope="module")
def server(
    data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReviewServer]:
    gold = tmp_path_factory.mktemp("gold") / "gold.jsonl"
    options = ("--labels", f"rules={data[1]}", "--annotator", "ada", "--gold", gold)
    with ReviewServer(data[0], *options) as running:
        yield running


def test_thirty_steps_are_labelled_by_keys_alone_and_a_reload_resumes(
    data: tuple[Path, Path], tmp_path: Path, visit: Visit
) -> None:
    gold = tmp_path / "gold.jsonl"
    with ReviewServer(data[0], "--gold", gold, "--annotator", "ada") as server:
        visit.open(server)
        visit.press("/", *"run-", "Enter")
        keys = list(islice(cycle("1232131"), 30))
        visit.press(*(each for key in keys for each in (key, "n")))
        visit.page.get_by_text("30 of").wait_for()
        labels = list(read_gold([gold]).labels.items())
        expected = [(f"run-{run}", step) for run in "abc" for step in range(12)][:30]
        assert labels == [
            (key, LABELS[int(pressed) - 1]) for key, pressed in zip(expected, keys, strict=True)
        ]
        visit.reload()
        assert visit.page.locator(".about h2").inner_text() == "run-c"
        assert visit.current_step() == "Step 6"
        assert (
            visit.page.locator("#step-5 [aria-pressed=true]").inner_text().split()[-1]
            == "unnecessary"
        )


def test_undo_takes_back_label_after_label_across_trajectories(
    data: tuple[Path, Path], tmp_path: Path, visit: Visit
) -> None:
    gold = tmp_path / "gold.jsonl"
    options = ("--gold", gold, "--annotator", "ada")
    with ReviewServer(data[0], *options) as server:
        visit.open(server, "#t=0&s=3")
        visit.press("1", "3", "J", "2")
        visit.page.locator("#step-0 [aria-pressed=true]").wait_for()
        assert read_gold([gold]).labels == {("run-a", 3): "harmful", ("run-b", 0): "unnecessary"}
        visit.reload()
        visit.press("u", "u")
        visit.page.locator(".about h2", has_text="run-a").wait_for()
        assert visit.current_step() == "Step 3"
        assert read_gold([gold]).labels == {("run-a", 3): "good"}
        visit.press("u", "u")
        visit.page.get_by_role("status").get_by_text("nothing to undo").wait_for(state="attached")
        assert read_gold([gold]).labels == {}


def test_a_killed_server_has_every_label_that_the_page_showed_as_saved(
    data: tuple[Path, Path], tmp_path: Path, visit: Visit
) -> None:
    gold = tmp_path / "gold.jsonl"
    options = ("--gold", gold, "--annotator", "ada")
    with ReviewServer(data[0], *options) as server:
        visit.open(server, "#t=0")
        visit.press(*"1j2j3j1j2j3j1")
        visit.page.locator("#step-6 [aria-pressed=true]").wait_for()
        server.stop(signal.SIGKILL)
        assert len(read_gold([gold]).labels) == 7
        with visit.losing_the_server():
            visit.press("j", "3")
        visit.page.get_by_text("The server does not answer").wait_for()
        assert visit.page.locator("#step-7 [aria-pressed=true]").count() == 0
    with ReviewServer(data[0], *options) as server:
        visit.open(server, "#t=0")
        assert visit.current_step() == "Step 7"
        assert visit.page.locator("[aria-pressed=true]").count() == 7


def test_hostile_text_is_shown_as_text_and_does_nothing(server: ReviewServer, visit: Visit) -> None:
    visit.open(server, "#search=HOSTILE")
    shown_id = HOSTILE.trajectory_id.replace("\u202e", "\\u202e")
    assert visit.page.locator("#row-0 .id").get_attribute("title") == shown_id
    visit.press("Enter")
    visit.page.locator("article.current").wait_for()
    assert visit.page.locator(".about h2").inner_text() == shown_id
    visit.press("1", "o")
    visit.page.locator(".rationale").wait_for()
    text = visit.page.locator("main").inner_text()
    for shown in (
        f"task {SCRIPT}",
        f"thought {LINK}",
        "javascript:alert(3)",
        "<b onclick=alert(4)>",
    ):
        assert shown in text
    observation = visit.page.locator("#step-0 .observation pre").text_content()
    assert observation == (
        "red \\x1b[2J\\x1b]0;title\\x07 concealed\nsafe\\u202egnp.exe\\u2066 \\u200f\n"
        f"\\x00{SCRIPT}"
    )
    assert visit.page.locator("#step-0 .observation .fg-1").inner_text() == "red"
    visit.press("r")
    assert visit.page.locator("#step-0 .observation pre").count() == 0
    visit.press("o")
    visit.page.get_by_text("\\x1b[31mred\\x1b[0m \\x1b[2J").wait_for()
    visit.page.locator(".patch summary").click()
    patch = visit.page.locator(".patch")
    assert patch.locator(".gone").text_content() == "-old <script>\n"
    assert patch.locator(".come").text_content() == "+new </script>"
    markup = "main a, main img, main script, main b:not(.escape):not(.rationale > b), main iframe"
    assert visit.page.locator(markup).count() == 0
    assert visit.page.title() == "trajectories - srft-prep review"


def test_a_line_of_two_megabytes_is_cut_and_can_be_had_whole(
    server: ReviewServer, visit: Visit
) -> None:
    visit.open(server, "#t=3&s=1")
    visit.press("o")
    long = visit.page.locator("#step-1 .observation pre")
    length = "element => element.textContent.length"
    assert long.evaluate(length) == 4_000
    visit.page.get_by_role("button", name="Show all 2,000,003 characters").click()
    visit.page.get_by_role("button", name="Show more").wait_for(state="detached")
    assert long.evaluate("element => element.textContent") == LONG
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 1280


def test_a_blind_page_is_sent_no_label_of_a_step_before_the_annotators_own(
    data: tuple[Path, Path], tmp_path: Path, visit: Visit
) -> None:
    options = ("--labels", f"rules={data[1]}", "--annotator", "ada")
    with ReviewServer(data[0], *options, "--gold", tmp_path / "gold.jsonl") as server:
        visit.open(server)
        visit.open(server, "#view=disagreements")
        visit.open(server, "#view=agreement")
        visit.open(server, "#t=1")
        said = visit.page.locator("#step-0 .others")
        assert "hidden until you label it" in said.inner_text()
        assert '"trajectory_id":"run-b"' in visit.answers()
        assert SECRET not in visit.answers()
        assert '"label":"harmful"' not in visit.answers()
        visit.press("1")
        visit.page.get_by_text(f"{SECRET} 0").wait_for()
        assert "rules: harmful, weight 0" in said.inner_text()
        assert f"{SECRET} 0" in visit.answers()
        assert f"{SECRET} 1" not in visit.answers()
        visit.press("Escape", "d")
        assert visit.page.locator(".about h2").inner_text() == "run-b"
        assert visit.current_step() == "Step 0"
        visit.open(server, "#view=agreement")
        cells = visit.page.locator("#pairs tbody tr:first-child > *").all_inner_texts()
        assert cells == ["ada and critic rules", "1", "0.0%", "0.000"]


def test_the_list_holds_the_rows_in_sight_alone_and_its_filters_narrow_it(
    server: ReviewServer, visit: Visit
) -> None:
    visit.open(server)
    visit.page.get_by_text("304 trajectories").wait_for()
    assert 20 < visit.page.locator(".rows .row").count() < 100
    visit.press("End")
    visit.page.locator("#row-303 .id", has_text="filler-299").wait_for()
    visit.press("k", "k")
    assert visit.page.locator("#list").get_attribute("aria-activedescendant") == "row-301"
    visit.page.locator("#filter-state").select_option("labelled")
    visit.page.get_by_text("nothing fits").wait_for()
    visit.page.locator("#filter-state").select_option("unlabelled")
    visit.press("Escape", "/", *"filler-1", "Escape")
    visit.page.get_by_text("100 trajectories").wait_for()
    visit.reload()
    visit.page.get_by_text("100 trajectories").wait_for()


def test_keys_act_after_going_to_the_list_that_is_shown(server: ReviewServer, visit: Visit) -> None:
    visit.open(server, "#t=0")
    visit.press("Escape", "g", "g", "j", "Enter")
    assert visit.page.locator(".about h2").inner_text() == "run-b"


def test_the_list_says_what_its_counts_are_of(server: ReviewServer, visit: Visit) -> None:
    visit.open(server)
    titles = {
        head.inner_text(): head.get_attribute("title")
        for head in visit.page.get_by_role("columnheader").all()
    }
    assert titles["Labelled"] == "steps that you labelled"
    assert "anybody, you, other annotators or critics, labelled harmful" in titles["Harmful"]
    assert "counts under each" in titles["Good"]


def test_the_keyboard_reaches_everything_in_order_and_the_focus_can_be_seen(
    server: ReviewServer, visit: Visit
) -> None:
    here = "document.activeElement.id || document.activeElement.className"
    visit.open(server)
    assert visit.page.evaluate(here) == "list"
    visit.page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(13):
        visit.press("Tab")
        reached.append(visit.page.evaluate(here))
        if not reached[-1]:
            continue  # the browser's own controls, on the way round
        style = "getComputedStyle(document.activeElement)"
        selected = "getComputedStyle(document.querySelector('[aria-selected=true]'))"
        seen = selected if reached[-1] == "list" else style
        assert visit.page.evaluate(f"{seen}.outlineStyle") != "none"
    tabs = ["tab-list", "tab-disagreements", "tab-agreement"]
    fields = ["search", "outcome", "format", "model", "state", "label"]
    expected = ["home", *tabs, "help-button", *(f"filter-{field}" for field in fields), "list"]
    assert [each for each in reached if each in expected] == expected
    visit.open(server, "#t=0")
    assert visit.page.evaluate(here) == "step-0"
    visit.press("Tab")
    assert "label-button good" in visit.page.evaluate(here)
    help_dialog = visit.page.get_by_role("dialog", name="Keys")
    visit.press("?")
    assert help_dialog.is_visible()
    assert visit.page.evaluate("document.activeElement.closest('dialog') !== null")
    visit.press("Escape")
    help_dialog.wait_for(state="hidden")
    assert "label-button good" in visit.page.evaluate(here)
    visit.press("?")
    assert help_dialog.is_visible()
    visit.press("Enter")
    help_dialog.wait_for(state="hidden")


CONTRAST = """
() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return getComputedStyle(document.documentElement).backgroundColor;
  };
  return [...document.querySelectorAll("body *")]
    .filter((each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((each) => each.checkVisibility() && !each.closest(":disabled"))
    .map((each) => {
      const pair = [light(getComputedStyle(each).color), light(ground(each))];
      const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
      return { text: each.textContent.slice(0, 40), contrast };
    });
}
"""
COLOURS_ARE_STILL = "() => document.getAnimations().length === 0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable_in_light_and_dark(
    data: tuple[Path, Path], tmp_path: Path, browser: "Browser", scheme: str
) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 800})
    visit = Visit(context.new_page())
    options = ("--labels", f"rules={data[1]}", "--annotator", "ada")
    with ReviewServer(data[0], *options, "--gold", tmp_path / "gold.jsonl") as server:
        visit.open(server, "#t=2")
        visit.press("1", "j", "2", "j", "3", "o")
        visit.page.locator("#step-2 [aria-pressed=true]").wait_for()
        visit.page.locator("#step-2 .observation pre").wait_for()
        visit.page.wait_for_function(COLOURS_ARE_STILL)
        measured = visit.page.evaluate(CONTRAST)
        visit.open(server)
        visit.page.wait_for_function(COLOURS_ARE_STILL)
        measured += visit.page.evaluate(CONTRAST)
        background = "getComputedStyle(document.documentElement).backgroundColor"
        is_dark = visit.page.evaluate(f"{background}.match(/\\d+/g)[0] < 128")
        context.close()
    assert is_dark == (scheme == "dark")
    assert len(measured) > 100
    assert [each for each in measured if each["contrast"] < 4.5] == []
    assert visit.problems == []


def test_a_reading_page_shows_all_labels_and_takes_none(
    data: tuple[Path, Path], tmp_path: Path, visit: Visit
) -> None:
    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"trajectory_id": "run-a", "step_index": 1, "label": "harmful"}\n')
    options = ("--read-only", "--labels", f"rules={data[1]}", "--gold", gold)
    with ReviewServer(data[0], *options) as server:
        visit.open(server, "#t=0")
        assert "rules: good, weight 1" in visit.page.locator("#step-1 .others").inner_text()
        assert "unnamed: harmful" in visit.page.locator("#step-1 .others").inner_text()
        assert visit.page.locator(".label-button").count() == 0
        visit.press("3")
        visit.page.get_by_role("alert").get_by_text("This page is for reading").wait_for()
        visit.press("d")
        assert visit.current_step() == "Step 1"
    assert len(gold.read_text().splitlines()) == 1
