"""Record what TRL and axolotl train, for tests/test_conventions.py: the answers are theirs.

    python benchmarks/peers/record.py

Asks both tools, in the environments that `environments` makes, about the package's example runs and
the cases in tests/golden/conventions/cases.jsonl, with the example tokenizer and each template
beside the cases. Writes tests/golden/conventions/expected.json: by template and by chat, the number
of tokens and the half-open token ranges that each tool trains.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

from data import EXAMPLES, real_trajectories, write_chats
from environments import REQUIREMENTS, python_of

from srft_prep.chat import tokenizer_path
from srft_prep.config import IngestConfig
from srft_prep.ingest import ingest

HERE: Final = Path(__file__).resolve().parent
GOLDEN: Final = HERE.parents[1] / "tests" / "golden" / "conventions"

Answers = dict[str, dict[str, Any]]


def ask(tool: str, chats: Path, *, tokenizer: str, template: Path) -> Answers:
    """Return what a tool makes of chats, by their ids: `ids` and the ranges `trained`."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.jsonl"
        script = [str(python_of(tool)), str(HERE / "prepare.py"), tool]
        subprocess.run(
            [*script, str(chats), tokenizer, str(template), "1"],
            input=f"{answers}\n",
            text=True,
            check=True,
            capture_output=True,
        )
        rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def write_examples(folder: Path) -> Path:
    """Write the example runs and the cases as chats."""
    ingest([str(EXAMPLES)], folder / "ingested", IngestConfig())
    chats = write_chats(folder / "chats.jsonl", real_trajectories(folder, folder / "ingested"))
    with chats.open("a", encoding="utf-8") as file:
        file.write((GOLDEN / "cases.jsonl").read_text(encoding="utf-8"))
    return chats


def main() -> None:
    """Ask both tools and write their answers."""
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        chats = write_examples(Path(name))
        for template in sorted(GOLDEN.glob("*.jinja")):
            by_chat: dict[str, Any] = expected.setdefault(template.name, {})
            for tool in REQUIREMENTS:
                answers = ask(tool, chats, tokenizer=tokenizer_path("example"), template=template)
                for chat, row in answers.items():
                    entry = by_chat.setdefault(chat, {"tokens": len(row["ids"])})
                    assert entry["tokens"] == len(row["ids"])
                    entry[tool] = row["trained"]
    rows = [
        f" {json.dumps(template)}: {{\n"
        + ",\n".join(f"  {json.dumps(chat)}: {json.dumps(row)}" for chat, row in by_chat.items())
        + "\n }"
        for template, by_chat in expected.items()
    ]
    (GOLDEN / "expected.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
