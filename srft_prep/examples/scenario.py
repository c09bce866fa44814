"""Scenarios: a small repository with a planted bug, a hidden test, and scripted attempts at it.

A scenario is one file, `scenarios/<instance_id>.txtar`, in Go's txtar form: free text, then files,
each under a line `-- NAME --`. Names mean:

    task.md              the report that the attempts are given
    repo/PATH            a file of the repository, the bug included
    hidden/PATH          a file of the hidden test, laid over the repository after an attempt
    attempt-K.md         the replies of attempt K, literally, with a line `=====` between two
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srft_prep.errors import FormatError

SCENARIO_DIR: Final = Path(__file__).parent / "scenarios"

_FILE_MARK = re.compile(r"^-- (\S+) --\n", re.MULTILINE)
_REPLY_MARK = "\n=====\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A repository with a planted bug, and scripted attempts at mending it."""

    instance_id: str
    """`owner__repository-number`, as in SWE-bench."""
    task: str
    """The report of the problem, as the attempts see it."""
    repository: dict[str, str]
    """Path to text of each file that the working copy starts with, visible tests included."""
    hidden_tests: dict[str, str]
    """Path to text of the files that decide whether an attempt resolved the task."""
    attempts: dict[int, tuple[str, ...]]
    """Number of the attempt (from 1) to its replies, in order."""


def load_scenarios(folder: Path = SCENARIO_DIR) -> list[Scenario]:
    """Return all scenarios of `folder`, by instance id.

    Raises:
        FormatError: a file lacks the task, the repository, the hidden test or the attempts.
    """
    return [read_scenario(path) for path in sorted(folder.glob("*.txtar"))]


def read_scenario(path: Path) -> Scenario:
    """Return the scenario in a txtar file.

    Raises:
        FormatError: the task, the repository, the hidden test or the attempts are missing.
    """
    files = _split_archive(path.read_text(encoding="utf-8"))
    attempts = {
        int(name.removeprefix("attempt-").removesuffix(".md")): tuple(
            reply.strip() for reply in text.split(_REPLY_MARK)
        )
        for name, text in files.items()
        if name.startswith("attempt-")
    }
    scenario = Scenario(
        instance_id=path.stem,
        task=files.get("task.md", "").strip(),
        repository=_files_under("repo/", files),
        hidden_tests=_files_under("hidden/", files),
        attempts=attempts,
    )
    parts = (scenario.task, scenario.repository, scenario.hidden_tests, scenario.attempts)
    if not all(parts):
        raise FormatError(
            f"{path}: expected task.md, repo/..., hidden/... and attempt-K.md, got {sorted(files)}"
        )
    return scenario


def _split_archive(text: str) -> dict[str, str]:
    _, *pieces = _FILE_MARK.split(text)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def _files_under(prefix: str, files: dict[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(prefix): text for name, text in files.items() if name.startswith(prefix)
    }
