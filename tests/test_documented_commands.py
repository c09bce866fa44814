"""Every command in the documents is run here, or says what it needs that is not here.

A block that begins with ```` ```sh ```` is run line by line, in a folder where the names that the
documents use exist; one with a word behind it (`needs-gpu`) is not, but its options must exist too.
A ```` ```console ```` block holds what the commands behind its `$` print, too, which must be true:
`...` on a line of its own stands for what is left out, and lines may be broken anywhere. A word
behind it is the status that they end with (`status-1`). A block with a file's name
(```` ```json labels.json ````) is that file, for the commands below it.
"""

import csv
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import orjson
import pytest

from srft_prep.cli import cli
from srft_prep.examples.record import RUNS_DIR
from tests.stages import srft_prep

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(path for path in REPOSITORY.glob("*.md") if path.name != "CHANGELOG.md"),
    *(path for path in (REPOSITORY / "docs").glob("*.md") if path.name not in ("LOG.md", "cli.md")),
]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
FILE_BLOCK = re.compile(
    r"^```[a-z]+ (?P<name>\S*[.]\w+)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL
)
LEFT_OUT = re.compile(r"^\.\.\.$", re.MULTILINE)
NEEDS = {
    "needs-gpu", "needs-key", "needs-hub", "needs-docker", "needs-server", "needs-cluster",
    "needs-person",
}  # fmt: skip
SUBSTITUTES = {
    "Qwen/Qwen2.5-Coder-7B-Instruct": "example",
    "Qwen/Qwen2.5-Coder-32B-Instruct": "example",
    "RUN": "attempt-2/example__vercmp-40",
}
"""What has to be fetched, or is anybody's -> what comes with the package."""
STAGES = (
    ("ingest", "RUNS", "--outcomes", "REPORTS", "-o", "out/trajectories"),
    ("label", "out/trajectories", "--critic", "rules", "--only", "all", "-o", "out/labels"),
    ("tokenize", "out/trajectories", "--tokenizer", "example", "-o", "out/tokens"),
    ("pack", "out/tokens", "--labels", "out/labels", "--seq-len", "4096", "-o", "out/shards"),
)
"""What is there already in the documents that do not begin with ingest."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a document."""

    words: list[str]
    """Behind `srft-prep`."""
    shown: str = ""
    """What the document says that it prints."""


def blocks(document: Path) -> Iterator[tuple[str, list[Command]]]:
    """Yield each block's info string and its srft-prep commands."""
    for fence in FENCE.finditer(document.read_text(encoding="utf-8")):
        body = fence["body"].replace("\\\n", " ")
        texts = body.splitlines()
        if fence["info"].startswith("console"):
            texts = re.split(r"^\$ ", body, flags=re.MULTILINE)
        found = []
        for text in texts:
            line, _, shown = text.partition("\n")
            line = re.sub(r"\$\{?\w+\}?", "1", line)  # a variable of the shell
            if "srft-prep " in line or "-m srft_prep " in line:
                words = shlex.split(re.split(r"\|\||&&|[|;>]", line)[0], comments=True)
                program = {"srft-prep", "srft_prep"}.intersection(words)
                if program:
                    words = words[words.index(program.pop()) + 1 :]
                    found.append(Command(words=words, shown=shown))
        if found:
            yield fence["info"].strip(), found


ALL = [
    pytest.param(command.words, id=f"{document.name}: {' '.join(command.words)[:60]}")
    for document in DOCUMENTS
    for _, commands in blocks(document)
    for command in commands
]


def named(document: Path) -> str:
    return document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_a_block_of_commands_is_run_or_says_what_it_needs(document: Path) -> None:
    for info, commands in blocks(document):
        language, *marks = info.split()
        allowed = {"sh": NEEDS, "console": {"status-1", "status-2"}}
        assert language in allowed, (info, commands[0])
        assert set(marks) <= allowed[language], (info, commands[0])


@pytest.mark.parametrize("words", ALL)
def test_a_documented_command_has_only_options_that_exist(words: list[str]) -> None:
    command = cli.commands[words[0]]
    context = click.Context(command, info_name=words[0])
    values, _, _ = command.make_parser(context).parse_args(list(words[1:]))
    for parameter in command.get_params(context):
        given = values.get(parameter.name)
        if parameter.required:
            assert given, f"{parameter.name} is missing"
        if given is not None and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, given)


def rollouts(folder: Path) -> None:
    """Write three training runs of three rollouts for each of two arms, as SWE-bench does."""
    instances = [f"project__task-{number}" for number in range(50)]
    with (folder / "rollouts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arm", "training_run", "rollout", "instance_id", "resolved"])
        for arm, solved in (("rft", 14), ("srft", 18)):
            for run in range(3):
                place = folder / "rollouts" / arm / f"train-{run}"
                place.mkdir(parents=True)
                for rollout in range(3):
                    ids = instances[run + rollout : run + rollout + solved]
                    summary = {"resolved_ids": ids, "total_instances": len(instances)}
                    summary["submitted_ids"] = instances
                    (place / f"rollout-{rollout}.json").write_bytes(orjson.dumps(summary))
                    rows.writerows([arm, run, rollout, each, each in ids] for each in instances)


def gold(folder: Path) -> None:
    """Write labels of four of the example runs, as `review` does."""
    names = ("pathglob-7", "plaintable-18", "runstats-22", "slots-12")
    rows = [
        {
            "trajectory_id": f"attempt-1/example__{name}",
            "step_index": step,
            "label": "harmful" if step >= place else "good",
        }
        for place, name in enumerate(names)
        for step in range(4)
    ]
    (folder / "gold.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names that documents use: inputs, and the stages' outputs."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("RUNS", "REPORTS"):
        shutil.copytree(RUNS_DIR, folder / name)
    (folder / "swe-bench-verified.txt").write_text("astropy__astropy-12907\n")
    rollouts(folder)
    gold(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in STAGES:
            assert srft_prep(*words).status == 0, words
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_the_commands_of_a_document_run(
    document: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runnable = [
        (info, command)
        for info, commands in blocks(document)
        if info == "sh" or info.startswith("console")
        for command in commands
    ]
    if not runnable:
        return
    folder = tmp_path / "work"
    made_here = runnable[0][1].words[0] == "ingest"
    shutil.copytree(
        prepared, folder, ignore=lambda _, names: {"out"} & set(names) if made_here else ()
    )
    for file in FILE_BLOCK.finditer(document.read_text(encoding="utf-8")):
        (folder / file["name"]).parent.mkdir(exist_ok=True)
        (folder / file["name"]).write_text(file["body"], encoding="utf-8")
    monkeypatch.chdir(folder)
    for info, command in runnable:
        done = srft_prep(*(SUBSTITUTES.get(word, word) for word in command.words))
        status = int(info.partition("status-")[2] or 0)
        assert done.status == status, (command.words, done.stderr)
        printed = " ".join(f"{done.stderr} {done.stdout}".split())
        for piece in LEFT_OUT.split(command.shown):
            assert " ".join(piece.split()) in printed, command.words
