import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_plans_of_the_page_are_those_of_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/scale_plan.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tables, _, last = done.stdout.rstrip("\n").rpartition("\n")
    assert last.startswith('{"benchmark":"scale_plan"')
    assert "SWE-ZERO" in tables
    assert tables.strip() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
