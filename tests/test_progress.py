"""Progress on a real terminal and on a pipe, whatever the words are."""

import os
import pty
import subprocess
import sys

CODE = """
import time
from srft_prep.progress import shown

with shown("ingest", total=3, unit="[b]trajectories") as progress:
    for note in ("a.json", "[/no-tag].json", "[red]x"):
        progress.advance(1, note)
        progress.say(f"said [/of] {note}")
        time.sleep(0.15)
print("done")
"""


def test_words_with_brackets_are_shown_as_they_are_on_a_terminal() -> None:
    parent, child = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=child, env={**os.environ}
    )
    os.close(child)
    shown = b""
    try:
        while piece := os.read(parent, 65536):
            shown += piece
    except OSError:  # the terminal's other end is closed
        pass
    assert run.communicate()[0] == b"done\n", shown
    assert b"Traceback" not in shown
    assert b"said [/of] [red]x" in shown
    assert b"[/no-tag].json" in shown


def test_a_pipe_gets_plain_lines() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        f"ingest: said [/of] {note}" for note in ("a.json", "[/no-tag].json", "[red]x")
    ]
