"""The documentation says what the program does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = (
    "ingest",
    "label",
    "tokenize",
    "merge",
    "pack",
    "train",
    "export",
    "critic-eval",
    "compare",
    "review",
    "stats",
    "inspect",
    "verify",
)


def help_of(*words: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "srft_prep", *words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "COLUMNS": "100"},
    )
    return run.stdout.replace("python -m srft_prep", "srft-prep")


def test_the_command_reference_is_what_help_prints(request: pytest.FixtureRequest) -> None:
    sections = [f"## srft-prep {command}\n\n```\n{help_of(command)}```\n" for command in COMMANDS]
    text = "\n".join(
        [
            "# Command reference\n\nWritten by `make docs` from `--help`; a test compares.\n",
            f"```\n{help_of()}```\n",
            *sections,
        ]
    )
    path = REPOSITORY / "docs" / "cli.md"
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "run make docs"


def test_every_module_is_named_in_the_architecture_page() -> None:
    text = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = (REPOSITORY / "srft_prep").rglob("*.py")
    names = {path.name for path in modules if path.name != "__init__.py"}
    missing = sorted(name for name in names if name not in text)
    assert not missing


def test_links_in_the_documents_lead_to_files() -> None:
    for document in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_files_and_tests_that_the_documents_name_are_there() -> None:
    named = re.compile(
        r"(?<![\w/.])((?:benchmarks|prompts|srft_prep|tests)/[\w/.-]+\.\w+)(?:::(\w+))?"
    )
    for document in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")):
        if document.name in ("CHANGELOG.md", "LOG.md"):  # of their day
            continue
        for path, test in named.findall(document.read_text(encoding="utf-8")):
            file = REPOSITORY / path
            assert file.exists(), f"{document.name}: {path}"
            if test:
                text = file.read_text(encoding="utf-8")
                assert f"def {test}(" in text, f"{document.name}: {path}::{test}"
