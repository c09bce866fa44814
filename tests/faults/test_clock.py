"""A clock that jumps changes nothing: no stage asks it what to do."""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import srft_prep
from tests.faults.commands import finish
from tests.faults.runs import STAGES, STATUS, Runs, assert_same

JUMPING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long jump(void) { return (random() % 2000001 - 1000000) * 600; }  /* 19 years to and fro */

int clock_gettime(clockid_t id, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(id, at);
  if (id == CLOCK_REALTIME) at->tv_sec += jump();
  return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""

ASK_THE_TIME = {
    "critic/api/concurrency.py",  # a server's `retry-after` may be a date; what it asks is bounded
    "critic/batch/journal.py",  # when a job was submitted, and how old it is in another run
    "gold.py",  # when a person labelled a step, for people to read; whether a file was changed
    "train/metrics.py",  # when a step was logged: TensorBoard's axis of time, and its file's name
    "review/columns.py",  # whether a critic's table was changed under the page
}
"""Modules that may look at the clock, and what for; none of it decides what a stage writes."""


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for a clock that jumps")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(JUMPING)
    library = folder / "clock.so"
    options = ("-shared", "-fPIC", "-O1", "-o")
    subprocess.run([compiler, *options, library, folder / "clock.c", "-ldl"], check=True)
    return library


def test_the_jumping_clock_jumps(jumping_clock: Path) -> None:
    code = "import time; print(time.time() - time.time(), time.monotonic() - time.monotonic())"
    environment = {**os.environ, "LD_PRELOAD": str(jumping_clock)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    wall, monotonic = map(float, done.stdout.split())
    assert abs(wall) > 100
    assert -1 < monotonic <= 0


ONE_AFTER_ANOTHER = """
import json, sys
from srft_prep.cli import main

for stage, words in json.loads(sys.argv[1]).items():
    sys.argv = ["srft-prep", *words]
    try:
        main()
    except SystemExit as end:
        print(stage, end.code)
"""
"""Runs commands in one process: its imports take longer than they do."""


def test_a_clock_that_jumps_by_years_changes_no_byte(
    runs: Runs, jumping_clock: Path, tmp_path: Path
) -> None:
    commands = {
        stage: [str(word) for word in runs.command(stage, tmp_path / stage)] for stage in STAGES
    }
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(commands)],
        env={**os.environ, "LD_PRELOAD": str(jumping_clock)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    for stage in STAGES:
        assert f"{stage} {STATUS.get(stage, 0)}" in done.stdout.splitlines(), done.stderr
        assert_same(tmp_path / stage, runs.expected(stage))


def test_times_of_files_in_the_past_and_the_future_change_nothing(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    for path in runs.raw.iterdir():
        os.utime(path, (0, rng.choice((0, 2**31 - 1, 2**33))))
    output = tmp_path / "out"
    finish(("ingest", runs.raw, "-o", output), tmp_path / "log", status=1)
    for path in output.iterdir():
        os.utime(path, (0, rng.choice((0, 2**33))))
    finish(("ingest", runs.raw, "-o", output), tmp_path / "log", status=1)
    assert_same(output, runs.expected("ingest"))


def test_only_known_modules_ask_the_time_of_day_or_of_a_file() -> None:
    root = Path(srft_prep.__file__).parent
    asking = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if (isinstance(node, ast.Attribute) and _asks(node))
        or (isinstance(node, ast.ImportFrom) and node.module == "time" and _names_time(node))
    }
    assert asking == ASK_THE_TIME


def _asks(node: ast.Attribute) -> bool:
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    if owner == "time":
        return node.attr in ("time", "time_ns", "localtime", "gmtime", "ctime", "strftime")
    if owner in ("datetime", "date"):
        return node.attr in ("now", "utcnow", "today")
    return node.attr in ("st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "st_atime")


def _names_time(node: ast.ImportFrom) -> bool:
    return bool({"time", "time_ns"} & {alias.name for alias in node.names})
