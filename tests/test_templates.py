"""Laws 1 to 4 for every shared chat template, over a sample; docs/TEMPLATES.md is the whole.

The comparison is that of `benchmarks/templates.py`; the oracle is `tests/template_oracle.py`.
"""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests import template_oracle as oracle
from tests.stages import srft_prep

REPOSITORY = Path(__file__).resolve().parents[1]
ALL = oracle.template_names()
USABLE_BY_NONE = {"llama.cpp/fireworks-ai-llama-3-firefunction-v2.jinja"}
"""It wants variables of its own, `functions` and `datetime`."""
SHORT_CHARACTERS = 25_000


def script() -> Any:
    spec = spec_from_file_location("templates", REPOSITORY / "benchmarks" / "templates.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


templates = script()


@pytest.fixture(scope="session")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What is made up, and the longest of the short runs of each of a few sources."""
    found: list[dict[str, Any]] = []
    for source in ("OpenHands__OpenHands", "SWE-agent__SWE-agent", "zhu-yiqi__agent-data-protocol"):
        out = tmp_path_factory.mktemp("sample") / "trajectories"
        srft_prep("ingest", shared_data / "trajectories" / source, "-o", out)
        frame = pl.read_parquet(out / "part-*.parquet")
        lengths = frame["messages"].list.eval(pl.element().struct.field("content").str.len_chars())
        frame = frame.with_columns(length=lengths.list.sum())
        short = frame.filter(pl.col("length") < SHORT_CHARACTERS).sort("length")
        found += short.drop("length").tail(1).iter_rows(named=True)
    assert len(found) == 3
    return [*oracle.synthetic_rows(), *found]


@pytest.mark.parametrize("name", ALL)
def test_ids_spans_and_history_are_those_of_the_oracle(
    name: str, rows: list[dict[str, Any]]
) -> None:
    verdict = templates.judge(name, rows)
    assert verdict.num_mismatches == 0, "\n".join(verdict.examples)
    counts = verdict.counts
    assert counts["rendered"] + counts["refused"] + counts["refused_by_us"] == len(rows)
    assert (verdict.error is not None) == (name in USABLE_BY_NONE)
    if verdict.error is None:
        assert counts["ids"] >= 2
        assert counts["spans"] + counts["contexts"] >= 3


def test_the_table_of_templates_lists_the_folders_and_no_mismatch(shared_data: Path) -> None:
    assert shared_data == oracle.DATA
    table = (REPOSITORY / "docs" / "TEMPLATES.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == ALL, "run benchmarks/templates.py"
    assert "mismatches**" not in table
