"""A temporary working copy in which scripted commands really run.

Invariant: what a command prints depends on the repository and the command alone. The working copy
is called `/testbed`, whatever the temporary folder; `PATH` holds the tools of `TOOLS` and no other;
hashes, dates and durations are fixed. It keeps scripted commands tidy; it is no security boundary.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srft_prep.errors import ConfigError, FormatError

WORK_PATH: Final = "/testbed"
TIMEOUT_SECONDS: Final = 10
TOOLS: Final = (
    *("bash", "git", "sed", "grep", "cat", "ls", "head", "tail", "find", "sort", "nl", "wc"),
    *("rm", "mv", "cp", "mkdir", "diff", "touch"),
)
"""What attempts may call besides `python`; anything else is `command not found`, on every host."""

_DURATION = re.compile(r"^(Ran \d+ tests? in )\d+\.\d+s$", re.MULTILINE)
_FIXED_ENVIRONMENT: Final = {
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONNODEBUGRANGES": "1",  # carets under a traceback's lines differ between Python versions
    "NO_COLOR": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_PAGER": "cat",
    "GIT_AUTHOR_NAME": "example",
    "GIT_AUTHOR_EMAIL": "example@example.org",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "example",
    "GIT_COMMITTER_EMAIL": "example@example.org",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What one command did."""

    returncode: int
    """Exit status of the shell."""
    output: str
    """Standard output and error in the order of writing, with stable paths and durations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A working copy under git, with the environment that commands run in."""

    work_dir: Path
    """Where the working copy lies; commands and outputs know it as `/testbed`."""
    environment: dict[str, str]
    """The whole environment of a command."""

    def run(self, command: str) -> CommandResult:
        """Run one bash command in the working copy and return what it did.

        Raises:
            FormatError: the command ran past `TIMEOUT_SECONDS`.
        """
        try:
            done = subprocess.run(
                ["bash", "-c", command.replace(WORK_PATH, str(self.work_dir))],
                executable=f"{self.environment['PATH']}/bash",
                cwd=self.work_dir,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FormatError(
                f"expected a command that ends within {TIMEOUT_SECONDS} s, got {command!r}"
            ) from error
        return CommandResult(
            returncode=done.returncode,
            output=self._normalise(done.stdout.decode("utf-8", errors="replace")),
        )

    def write_files(self, files: dict[str, str]) -> None:
        """Write `files` (path to text) into the working copy."""
        for name, text in files.items():
            path = self.work_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def _normalise(self, output: str) -> str:
        output = output.replace(str(self.work_dir), WORK_PATH)
        output = output.replace(sysconfig.get_path("stdlib"), "/usr/lib/python3")
        return _DURATION.sub(r"\g<1>0.001s", output)


@contextmanager
def open_sandbox(files: dict[str, str]) -> Iterator[Sandbox]:
    """Yield a fresh working copy that holds `files` as one commit; it is removed afterwards.

    Raises:
        ConfigError: one of `TOOLS` is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="srft-example-") as folder:
        root = Path(folder).resolve()
        for name in ("work", "bin", "home"):
            (root / name).mkdir()
        _link_tools(root / "bin")
        environment = _FIXED_ENVIRONMENT | {"PATH": f"{root}/bin", "HOME": f"{root}/home"}
        sandbox = Sandbox(work_dir=root / "work", environment=environment)
        sandbox.write_files(files)
        # core.abbrev: the length of abbreviated hashes is otherwise git's own guess.
        made = sandbox.run(
            "git init -q -b main && git config core.abbrev 7"
            " && git add -A && git commit -q -m 'Initial commit'"
        )
        if made.returncode:
            raise ConfigError(f"cannot make a git working copy: {made.output}")
        yield sandbox


def _link_tools(bin_dir: Path) -> None:
    for name in TOOLS:
        found = shutil.which(name)
        if found is None:
            raise ConfigError(f"expected `{name}` on PATH: install it to record the examples")
        (bin_dir / name).symlink_to(found)
    python = os.path.realpath(sys.executable)
    for name in ("python", "python3"):
        # A script, because an interpreter that is started by a link may not find its library.
        (bin_dir / name).write_text(f'#!/bin/sh\nexec "{python}" "$@"\n', encoding="utf-8")
        (bin_dir / name).chmod(0o755)
