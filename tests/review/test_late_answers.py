"""The review page where answers come late: what was asked for in the meantime is what counts."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from srft_prep.types import Message, Trajectory
from tests.review.conftest import Visit
from tests.review.serving import ReviewServer
from tests.stages import trajectory, write_trajectories

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser

TEXT = "\n".join(f"line {number:06d}" for number in range(20_000))
LONG = Trajectory(
    trajectory_id="long",
    instance_id="long",
    format="messages",
    model="",
    messages=(
        Message(role="assistant", kind="action", content="look"),
        Message(role="tool", kind="observation", content=TEXT),
    ),
    resolved=False,
)
MANY = [trajectory(f"filler-{number:03d}", num_steps=1) for number in range(300)]

HELD = """
const ask = window.fetch;
const held = [];
window.counts = { asked: 0, held: 0, taken: 0 };
window.release = () => held.splice(0).forEach((resolve) => resolve());
window.fetch = async (address, options) => {
  const isHeld = /ies[?]search=filler-2[0-9]|[/]text[?]|offset=[23]00/.test(address);
  if (!isHeld) return ask(address, options);
  counts.asked += 1;
  const answer = await ask(address, options);
  const content = await answer.json();
  counts.held += 1;
  await new Promise((resolve) => held.push(resolve));
  answer.json = async () => {
    setTimeout(() => { counts.taken += 1; }); // when the page has done with it what it does
    return content;
  };
  return answer;
};
"""
"""Holds some answers back until they are released, and counts those that the page has taken."""
ALL_HELD = "() => counts.asked > 0 && counts.held === counts.asked"
ALL_TAKEN = "() => counts.taken === counts.asked"
CLICK = "element => element.click()"


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trajectories(tmp_path_factory.mktemp("review") / "trajectories", [LONG, *MANY])


@pytest.fixture(scope="module")
def server(trajectories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewServer]:
    gold = tmp_path_factory.mktemp("gold") / "gold.jsonl"
    with ReviewServer(trajectories, "--annotator", "ada", "--gold", gold) as running:
        yield running


@pytest.fixture
def late(visit: Visit) -> Visit:
    """A visit where some answers are held back."""
    visit.page.add_init_script(HELD)
    return visit


def release(page: "Page") -> None:
    page.evaluate("release()")
    page.wait_for_function(ALL_TAKEN)


def click_twice(page: "Page", button: "Locator") -> None:
    """Click again while the answer to the first click is under way, and wait for all answers."""
    button.evaluate(CLICK)
    page.wait_for_function(ALL_HELD)
    button.evaluate(CLICK)
    page.wait_for_function(ALL_HELD)
    release(page)


def test_an_answer_to_an_earlier_filter_is_dropped(server: ReviewServer, late: Visit) -> None:
    late.open(server)
    search = late.page.locator("#filter-search")
    search.fill("filler-29")
    late.page.wait_for_function(ALL_HELD)
    search.fill("filler-0")
    late.page.get_by_text("100 trajectories").wait_for()
    release(late.page)
    assert late.page.locator("form.filters output").inner_text() == "100 trajectories"
    assert late.page.locator("#row-0 .id").inner_text() == "filler-000"


def test_more_of_a_text_or_a_table_asked_for_twice_is_shown_once(
    trajectories: Path, tmp_path: Path, late: Visit
) -> None:
    gold = tmp_path / "gold.jsonl"
    rows = [
        {"trajectory_id": run.trajectory_id, "step_index": 0, "label": label, "annotator": name}
        for run in MANY
        for name, label in (("ada", "good"), ("bob", "harmful"))
    ]
    gold.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    with ReviewServer(trajectories, "--read-only", "--gold", gold) as server:
        late.open(server, "#t=0")
        late.press("o")
        observation = late.page.locator("#step-0 .observation")
        click_twice(late.page, observation.get_by_role("button", name="Show more"))
        text = observation.locator("pre").evaluate("element => element.textContent")
        assert len(text) > 4_000
        assert text == TEXT[: len(text)]
        assert f"{len(text):,} of" in late.page.locator("#step-0 .more").inner_text()
        late.page.locator("#tab-disagreements").click()
        late.page.locator("h2", has_text="Disagreements").wait_for()
        more = late.page.get_by_role("button", name="Show more")
        click_twice(late.page, more)
        assert more.is_hidden()
        shown = late.page.locator("tbody td.id").all_inner_texts()
        assert shown == [run.trajectory_id for run in MANY]
        late.reload()
        more.wait_for()
        server.stop(signal.SIGKILL)
        with late.losing_the_server():
            more.click()
        late.page.get_by_text("The server does not answer").wait_for()


@pytest.mark.parametrize(("keys", "opened"), [("Enter", 290), ("Escape j j Enter", 292)])
def test_keys_are_about_the_rows_of_a_filter_that_is_under_way(
    server: ReviewServer, late: Visit, keys: str, opened: int
) -> None:
    late.open(server)
    late.press("j", "/")
    late.page.locator("#filter-search").fill("filler-29")
    late.page.wait_for_function(ALL_HELD)
    for key in keys.split():
        late.page.keyboard.press(key)
    late.page.evaluate("release()")
    late.page.locator(".about h2", has_text=f"filler-{opened}").wait_for()


def test_enter_opens_a_row_that_is_not_here_yet(server: ReviewServer, late: Visit) -> None:
    late.open(server)
    late.page.keyboard.press("End")
    late.page.wait_for_function(ALL_HELD)
    late.page.keyboard.press("Enter")
    late.page.evaluate("release()")
    late.page.locator(".about h2", has_text="filler-299").wait_for()
