"""What a user may not expect of an ingest that succeeded, read off its counts."""

from collections.abc import Iterator
from typing import Any

from srft_prep.config import IngestConfig


def ingest_hints(
    config: IngestConfig, counts: dict[str, Any], *, outcomes_given: bool
) -> Iterator[str]:
    """Yield what a user may not expect of an ingest that succeeded, a line each."""
    reports, conflicts, unnamed = (
        counts.get(name, 0)
        for name in ("outcome_records", "outcome_conflicts", "not_checked_for_exclusion")
    )
    matches = ("outcomes_joined", "outcomes_ambiguous", "outcomes_confirmed", "outcome_conflicts")
    if reports and not outcomes_given:
        yield f"{reports} outcome reports lie among the sources; --outcomes PATH joins them"
    if outcomes_given and not any(counts.get(name) for name in matches):
        yield "--outcomes: no outcome matched a run (instance ids or folders differ)"
    if conflicts:
        yield f"{conflicts} runs have an outcome of their own that a report contradicts; it is kept"
    if config.exclude:
        names = len(config.exclude)
        matched = names - counts.get("exclusions_without_run", 0)
        excluded = counts["excluded"]
        yield f"--exclude: {matched} of {names} names matched a run; {excluded} runs excluded"
    if unnamed:
        yield f"warning: --exclude: {unnamed} runs name no instance and were not checked"
    for word, asked in (config.sample or {}).items():
        if missing := counts.get(f"missing_for_sample_{word}", 0):
            yield f"--sample: only {asked - missing} {word}, {asked} were asked for"
