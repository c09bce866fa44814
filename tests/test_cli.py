"""The command line as a user meets it: exit statuses, last lines, answers at once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

RUNS = Path(__file__).resolve().parents[1] / "srft_prep" / "examples" / "runs"
COMMANDS = ("ingest", "label", "tokenize", "pack", "stats", "inspect", "verify")
HEAVY = (
    "polars",
    "transformers",
    "torch",
    "pyarrow",
    "tokenizers",
    "numpy",
    "starlette",
    "uvicorn",
    "matplotlib",
)
TRAJECTORY = "attempt-1/example__slots-12"

Run = subprocess.CompletedProcess[str]


def srft_prep(*words: str | Path) -> Run:
    command = [sys.executable, "-m", "srft_prep", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in run.stderr, run.stderr
    return run


def best_seconds(*words: str) -> float:
    return min(seconds_alone(*words) for _ in range(3))


def seconds_alone(*words: str) -> float:
    """Return how long a command takes, without its waiting for processors that others use."""
    command = [sys.executable, "-m", "srft_prep", *words]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - begin
        told = Path(f"/proc/{process.pid}/schedstat")  # not every kernel has it
        waited_ns = int(told.read_text().split()[1]) if told.exists() else 0
    return seconds - waited_ns / 1e9


def heavy_modules_after(*words: str) -> list[str]:
    """Return which heavy packages a command has loaded by its end."""
    code = (
        "import atexit, sys\n"
        f"heavy = {HEAVY!r}\n"
        "atexit.register(lambda: print('loaded:', *(m for m in heavy if m in sys.modules)))\n"
        "from srft_prep.cli import main\n"
        f"sys.argv = ['srft-prep', *{list(words)!r}]\n"
        "main()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    return run.stdout.splitlines()[-1].removeprefix("loaded:").split()


ANSWERED_AT_ONCE = {
    "help": (("--help",), 0),
    "no command": ((), 2),
    "version": (("--version",), 0),
    **{f"{command} help": ((command, "--help"), 0) for command in COMMANDS},
    **{f"{command} -h": ((command, "-h"), 0) for command in COMMANDS},
    "unknown command": (("frobnicate",), 2),
    "unknown option": (("ingest", ".", "-o", "x", "--frobnicate"), 2),
    "missing argument": (("ingest", "-o", "x"), 2),
    "missing output": (("label", "."), 2),
    "missing tokenizer": (("tokenize", ".", "-o", "x"), 2),
    "bad choice": (("pack", ".", "-o", "x", "--recipe", "best"), 2),
    "bad number": (("pack", ".", "-o", "x", "--seq-len", "many"), 2),
    "no such folder": (("stats", "/no/such/folder"), 2),
    "scripted without labels": (("label", ".", "-o", "x", "--critic", "scripted"), 2),
    "rules with a model": (("label", ".", "-o", "x", "--model", "m"), 2),
}

each_answer = pytest.mark.parametrize(
    ("words", "status"), ANSWERED_AT_ONCE.values(), ids=list(ANSWERED_AT_ONCE)
)


@each_answer
def test_help_and_usage_errors_answer_within_half_a_second(
    words: tuple[str, ...], status: int
) -> None:
    run = srft_prep(*words)
    assert run.returncode == status, run.stderr
    assert (run.stdout if status == 0 else run.stderr).strip()
    assert best_seconds(*words) < 0.5


@each_answer
def test_help_and_usage_errors_load_no_heavy_package(words: tuple[str, ...], status: int) -> None:
    del status
    assert heavy_modules_after(*words) == []


def test_every_command_is_listed_in_the_help() -> None:
    listed = srft_prep("--help").stdout.partition("Commands:")[2].split()
    assert set(COMMANDS) <= set(listed)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of every stage, made of the example runs."""
    folder = tmp_path_factory.mktemp("stages")
    for words in stage_commands(folder).values():
        run = srft_prep(*words)
        assert run.returncode == 0, run.stderr
    return folder


def stage_commands(folder: Path) -> dict[str, tuple[str | Path, ...]]:
    return {
        "ingest": ("ingest", RUNS, "--outcomes", RUNS, "-o", folder / "ingest"),
        "label": ("label", folder / "ingest", "-o", folder / "label"),
        "tokenize": (
            *("tokenize", folder / "ingest", "-o", folder / "tokenize"),
            *("--tokenizer", "example", "--workers", "1"),
        ),
        "pack": ("pack", folder / "tokenize", "--labels", folder / "label", "-o", folder / "pack"),
    }


@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_a_finished_command_given_again_changes_nothing_and_exits_the_same(
    stage: str, stages: Path
) -> None:
    before = contents(stages / stage)
    run = srft_prep(*stage_commands(stages)[stage], "--json")
    assert run.returncode == 0
    assert contents(stages / stage) == before
    document = json.loads(run.stdout.splitlines()[-1])
    assert document["stage"] == stage
    assert document["path"] == str(stages / stage)
    manifest = orjson.loads((stages / stage / "manifest.json").read_bytes())
    assert document == {**document, **manifest["counts"]}


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder but the manifest of labels, which counts the last run."""
    accumulates = (folder / "labels.parquet").exists()
    names = {path.name for path in folder.iterdir()} - ({"manifest.json"} if accumulates else set())
    return {name: (folder / name).read_bytes() for name in names}


def test_json_is_the_last_line_of_the_commands_that_only_print(stages: Path) -> None:
    numbers = json.loads(
        srft_prep(
            *("stats", stages / "ingest", "--labels", stages / "label"),
            *("--tokens", stages / "tokenize", "--json"),
        ).stdout.splitlines()[-1]
    )
    assert numbers["all"]["trajectories"] == 24
    report = json.loads(srft_prep("verify", stages / "pack", "--json").stdout.splitlines()[-1])
    assert report["problems"] == []
    assert report["stage"] == "pack"


@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_verify_finds_nothing_wrong_with_fresh_output(stage: str, stages: Path) -> None:
    run = srft_prep("verify", stages / stage)
    assert run.returncode == 0
    assert run.stdout.startswith(f"ok: {stage}, ")


@pytest.mark.parametrize("stage", ["ingest", "tokenize", "pack"])
def test_inspect_shows_a_trajectory_of_every_stage(stage: str, stages: Path) -> None:
    run = srft_prep("inspect", stages / stage, "--id", TRAJECTORY)
    assert run.returncode == 0
    assert TRAJECTORY in run.stdout
    assert "\x1b[" not in run.stdout


def test_rejected_records_exit_with_1_and_name_the_file_of_reasons(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    words = ("ingest", tmp_path / "bad.json", RUNS, "-o", tmp_path / "out", "--json")
    for _ in range(2):
        run = srft_prep(*words)
        assert run.returncode == 1
        assert str(tmp_path / "out" / "rejected.jsonl") in run.stderr
        assert json.loads(run.stdout.splitlines()[-1])["rejected"] == 1


def test_failed_requests_exit_with_1_and_are_asked_again_only_on_demand(
    stages: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        json.dumps({"trajectory_id": TRAJECTORY, "step_index": 0, "label": "good"}) + "\n"
    )
    words = (
        *("label", stages / "ingest", "-o", tmp_path / "out", "--json"),
        *("--critic", "scripted", "--model", labels, "--only", "all"),
    )
    for again, asked in (((), 24), ((), None), (("--retry-failed",), 24)):
        run = srft_prep(*words, *again)
        assert run.returncode == 1
        document = json.loads(run.stdout.splitlines()[-1])
        assert document["failures"] == 24
        assert document.get("asked") == asked


OTHER_SETTINGS = {
    "ingest": ("--limit", "3"),
    "tokenize": ("--history", "full"),
    "pack": ("--seq-len", "2048"),
}


@pytest.mark.parametrize("stage", list(OTHER_SETTINGS))
def test_other_settings_are_refused_without_overwrite_and_replaced_with_it(
    stage: str, stages: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = [output if word == stages / stage else word for word in stage_commands(stages)[stage]]
    shutil.copytree(stages / stage, output)
    before = contents(output)
    other = (*words, *OTHER_SETTINGS[stage])
    refused = srft_prep(*other)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"Error: {output}: holds a finished {stage} with other ")
    assert "--overwrite" in refused.stderr
    assert contents(output) == before
    assert srft_prep(*other, "--overwrite").returncode == 0
    replaced = contents(output)
    assert replaced["manifest.json"] != before["manifest.json"]
    fresh = [tmp_path / "fresh" if word == output else word for word in other]
    assert srft_prep(*fresh).returncode == 0
    del replaced["manifest.json"]
    assert replaced.items() <= contents(tmp_path / "fresh").items()


@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_a_folder_with_other_files_is_refused_and_left_alone(
    stage: str, stages: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    words = [output if word == stages / stage else word for word in stage_commands(stages)[stage]]
    run = srft_prep(*words)
    assert run.returncode == 2
    assert run.stderr == (
        f"Error: {output}: is not empty and no srft-prep directory (it holds thesis.tex); "
        "choose another -o\n"
    )
    assert contents(output) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ingest", "no-such-runs", "-o", "OUT"), "no-such-runs: no such file or folder"),
        (("ingest", RUNS, "-o", "OUT", "--sample", "solved=3"), "--sample: expected resolved=N"),
        (("ingest", RUNS, "-o", "OUT", "--outcomes", RUNS / "attempt-1/example__slots-12"), "no "),
        (("label", RUNS, "-o", "OUT"), "expected srft-prep ingest output, but there is no manifes"),
        (("tokenize", "LABEL", "-o", "OUT", "--tokenizer", "example"), "this is one of label"),
        (("tokenize", "INGEST", "-o", "OUT", "--tokenizer", "/no/such"), "/no/such"),
        (("pack", "TOKENIZE", "-o", "OUT"), "give --labels DIR"),
        (("pack", "TOKENIZE", "-o", "OUT", "--weights", "good=x"), "--weights"),
        (("inspect", "INGEST", "--id", "nobody"), "no trajectory 'nobody'"),
        (("verify", RUNS), "there is no manifest.json"),
    ],
)
def test_a_configuration_error_exits_with_2_says_what_to_do_and_writes_nothing(
    words: tuple[str | Path, ...], message: str, stages: Path, tmp_path: Path
) -> None:
    places = {"OUT": tmp_path / "out"}
    places |= {stage.upper(): stages / stage for stage in ("ingest", "label", "tokenize")}
    run = srft_prep(*(places.get(str(word), word) for word in words))
    assert run.returncode == 2
    assert run.stderr.startswith("Error: ")
    assert message in run.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = srft_prep("ingest", RUNS, "-o", tmp_path / "file" / "out")
    assert run.returncode == 2
    assert "cannot be made a directory" in run.stderr


def test_a_full_disk_exits_with_2_and_the_same_command_continues(tmp_path: Path) -> None:
    words = ["ingest", str(RUNS), "-o", str(tmp_path / "out")]
    command = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", sys.executable, "-m", "srft_prep"]
    full = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert full.stderr.startswith("Error: ")
    assert "Traceback" not in full.stderr
    assert srft_prep(*words).returncode == 0


def test_a_reader_that_closes_the_pipe_is_no_error(stages: Path) -> None:
    command = f"{sys.executable} -m srft_prep inspect {stages / 'ingest'} --id {TRAJECTORY} --full"
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -n 1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert run.stdout.startswith("trajectory")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stats", "."], "interrupted\n"),
        (["ingest", ".", "-o", "out"], "interrupted; the same command continues\n"),
    ],
)
def test_only_a_command_that_keeps_something_promises_to_continue(
    tmp_path: Path, words: list[str], said: str
) -> None:
    program = (
        "import os, signal, sys\nfrom srft_prep import cli\n"
        # a shell's background job, and what it starts, ignores SIGINT
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv[1:] = {words!r}\n"
        f"cli.{words[0]}.callback = lambda **_: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main()\n"
    )
    child = [sys.executable, "-c", program]
    run = subprocess.run(child, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (run.returncode, run.stderr.lstrip("\n")) == (130, said)
