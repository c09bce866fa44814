"""Is the review page fast with 10,000 trajectories of 60 steps, in a real browser?

    python benchmarks/review.py [--trajectories 10000] [--steps 60] [--visits 7]

Makes the trajectories from steps of the example runs, with a critic's labels; starts the server as
a user does; and visits it in headless Chromium. Times are the browser's own, from the start of the
navigation until the second frame after the rows are there. The ceiling is the same number of rows
as a plain HTML file, without a script, served by Python's http.server to the same browser, in turns
with the page. The last line is one JSON document.
"""

import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson
import pyarrow as pa

from srft_prep.config import IngestConfig
from srft_prep.ingest import ingest
from srft_prep.manifest import read_manifest
from srft_prep.schemas import LABELS, REQUESTS
from srft_prep.storage import StageWriter, write_table
from srft_prep.trajectories import read_trajectories, trajectories_table
from srft_prep.types import LABELS as NAMES
from srft_prep.types import Message, Trajectory

if TYPE_CHECKING:
    from playwright.sync_api import Page

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "srft_prep" / "examples" / "runs"
PART_ROWS = 1_000
ROW_GROUP_ROWS = 32
SHOWN_ROWS = 45
"""Rows that the page draws in a window of 1280 x 800."""

WHEN_SHOWN = """
const watch = new MutationObserver(() => {
  if (!document.querySelector("#row-0 .id, tr + tr")) return;
  watch.disconnect();
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.documentElement.dataset.shown = performance.now();
  }));
});
watch.observe(document, { childList: true, subtree: true });
"""


def synthetic(count: int, num_steps: int, bank: list[tuple[Message, ...]]) -> Iterator[Trajectory]:
    """Yield trajectories whose steps are drawn from a bank of real ones."""
    draw = random.Random(0)
    task = Message(role="user", kind="prompt", content="Mend the failing test.\n" * 40)
    for number in range(count):
        steps = (draw.choice(bank) for _ in range(num_steps))
        yield Trajectory(
            trajectory_id=f"run-{number % 7}/project__task-{number:06d}",
            instance_id=f"project__task-{number:06d}",
            format="messages",
            model=f"model-{number % 5}",
            messages=(task, *(message for step in steps for message in step)),
            resolved=draw.choice([True, False, None]),
        )


def make(folder: Path, count: int, num_steps: int) -> tuple[Path, Path]:
    """Write a trajectory directory and a label directory, and return both."""
    runs = folder / "runs"
    ingest([str(EXAMPLES)], runs, IngestConfig(), outcomes=[str(EXAMPLES)])
    bank = [
        (step.action, *step.observations)
        for trajectory in read_trajectories(read_manifest(runs).parts)
        for step in trajectory.steps
    ]
    trajectories, labels = folder / "trajectories", folder / "labels"
    names: list[str] = []
    keys: list[tuple[str, str]] = []
    source = synthetic(count, num_steps, bank)
    with StageWriter.open(trajectories, stage="ingest", config={}, inputs=[]) as writer:
        for first in range(0, count, PART_ROWS):
            rows = [next(source) for _ in range(min(PART_ROWS, count - first))]
            keys += [(row.trajectory_id, row.content_hash) for row in rows]
            names.append(f"part-{len(names):05d}.parquet")
            table = trajectories_table(rows)
            write_table(table, trajectories / names[-1], row_group_rows=ROW_GROUP_ROWS)
        counts = {"trajectories": count, "steps": count * num_steps, "rejected": 0}
        writer.finish(counts=counts, names=names, command=[])
    with StageWriter.open(labels, stage="label", config={}, inputs=[]) as writer:
        draw = random.Random(1)
        said = [
            {
                "trajectory_id": trajectory_id,
                "content_hash": content_hash,
                "step_index": step,
                "label": draw.choices(["good", "unnecessary", "harmful"], [8, 1, 1])[0],
                "rationale": "edit-refused: No replacement was performed, old_str did not appear",
                "critic_id": "rules@1",
                "prompt_hash": "none",
            }
            for trajectory_id, content_hash in keys
            for step in range(num_steps)
        ]
        table = pa.Table.from_pylist(said, schema=LABELS)
        write_table(table, labels / "labels.parquet", row_group_rows=1 << 16)
        write_table(REQUESTS.empty_table(), labels / "requests.parquet", row_group_rows=8)
        names = ["labels.parquet", "requests.parquet"]
        writer.finish(counts={"failures": 0}, names=names, command=[])
    return trajectories, labels


def plain_page(folder: Path) -> Path:
    """Write as many rows as the page draws as a plain HTML table."""
    cells = "".join(
        f"<td>{word}</td>" for word in ("unresolved", "messages", "model-1", *"1234567")
    )
    rows = "".join(
        f"<tr><td>run/project__task-{row:06d}</td>{cells}</tr>" for row in range(SHOWN_ROWS)
    )
    folder.mkdir()
    (folder / "index.html").write_text(f"<!DOCTYPE html><title>x</title><table>{rows}</table>")
    return folder


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing of a request."""


def shown_ms(page: "Page", address: str) -> float:
    """Return when the rows of a page are on the screen, from the start of its navigation."""
    page.goto("about:blank")
    page.goto(address)
    shown = page.locator("html[data-shown]")
    shown.wait_for(state="attached")
    return float(shown.get_attribute("data-shown") or "nan")


def timed_ms(page: "Page", act: str, until: str) -> float:
    """Return how long it takes from a key to what it leads to."""
    start = time.perf_counter()
    page.keyboard.press(act)
    page.locator(until).first.wait_for()
    return 1e3 * (time.perf_counter() - start)


def measure(
    page: "Page", address: str, plain: str, *, count: int, visits: int
) -> dict[str, list[float]]:
    """Return the times of everything that a user waits for, in milliseconds."""
    found: dict[str, list[float]] = {}
    for visit in range(visits + 1):  # the first visit warms both up
        times = {"plain": shown_ms(page, plain), "list": shown_ms(page, address)}
        times["last page of the list"] = timed_ms(page, "End", f"#row-{count - 1} .id")
        page.keyboard.press("Home")
        times["open a trajectory"] = timed_ms(page, "Enter", "article.current")
        times["next trajectory"] = timed_ms(page, "J", ".about h2:not(:text('000000'))")
        page.keyboard.press("j")
        key = visit % 3  # another label than the visit before gave this step
        pressed = f"article.current .{NAMES[key]}[aria-pressed=true]"
        times["label a step"] = timed_ms(page, str(key + 1), pressed)
        for name, value in times.items():
            if visit:
                found.setdefault(name, []).append(value)
    return found


@click.command()
@click.option("--trajectories", "count", default=10_000, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--visits", default=7, show_default=True)
def main(count: int, steps: int, visits: int) -> None:
    """Print how long a user waits, beside the ceiling."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trajectories, labels = make(folder, count, steps)
        size = sum(path.stat().st_size for path in trajectories.iterdir())
        print(f"{count:,} trajectories of {steps} steps, {size / 1e6:,.0f} MB of Parquet")
        handler = partial(_Quiet, directory=str(plain_page(folder / "plain")))
        ceiling = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=ceiling.serve_forever, daemon=True).start()
        start = time.perf_counter()
        words = [sys.executable, "-m", "srft_prep", "review", str(trajectories), "--no-browser"]
        server = subprocess.Popen(
            [*words, "--labels", str(labels)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert server.stdout is not None
        address = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)))[0]
        started = time.perf_counter() - start
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                page.add_init_script(WHEN_SHOWN)
                plain = f"http://127.0.0.1:{ceiling.server_address[1]}/"
                found = measure(page, address, plain, count=count, visits=visits)
                version = browser.version
                browser.close()
            status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
        finally:
            server.kill()
            server.wait()
            ceiling.shutdown()
    peak_mb = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(f"server: ready in {started:.1f} s, peak RSS {peak_mb:,.0f} MB; Chromium {version}")
    print(f"{'ms':24}{'median':>9}{'worst':>9}   n = {visits}")
    for title, times in found.items():
        print(f"{title:24}{statistics.median(times):9.0f}{max(times):9.0f}")
    print(orjson.dumps({"ready_seconds": started, "peak_mb": peak_mb, "ms": found}).decode())


if __name__ == "__main__":
    main()
