"""All decisions of a pack run: documents, their weighted tokens, their packs and the packs' order.

Made of lengths, spans and weights alone, as columns; no token id is read. Memory: some 100 bytes a
step at most.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from srft_prep.character_weights import by_character
from srft_prep.config import PackConfig
from srft_prep.documents import Documents, cut_rows
from srft_prep.errors import ConfigError
from srft_prep.factors import Factors, multiplied
from srft_prep.hold_out import HeldOutTrajectory, choose_held_out
from srft_prep.judgements import Judgements
from srft_prep.ragged import offsets_of
from srft_prep.runs import Runs, weighted_runs
from srft_prep.step_weights import weigh_steps
from srft_prep.token_columns import TokenColumns
from srft_prep.token_weights import Segments, by_convention, by_part, whole_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray

COUNTED: Final = (
    *("left_out", "missing_label", "overlong", "lost_steps", "lost_tokens", "weightless"),
)
"""Counts that are told even where they are 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is packed."""

    columns: TokenColumns
    documents: Documents
    runs: Runs
    held_out: list[HeldOutTrajectory]
    """Trajectories that are left out so that a run can be measured on them."""
    counts: dict[str, int]


def make_plan(
    columns: TokenColumns,
    config: PackConfig,
    *,
    judgements: Judgements | None = None,
    factors: Sequence[Factors] = (),
) -> Plan:
    """Decide what goes into the shards.

    Raises:
        ConfigError: nothing is left, a row is over-long and must not be, or weights multiply to
            what float32 does not hold.
        LabelError: labels or weights do not fit the tokens.
        ShardError: `hold_out`, and the tokens do not say whose tasks they are.
    """
    counts: Counter[str] = Counter()
    held_out, in_held_out = choose_held_out(columns, config.hold_out)
    counts["held_out"] = len(held_out)
    counts["held_out_tasks"] = len({each.instance_id or each.trajectory_id for each in held_out})
    segments, taken = _weigh(columns, config, judgements, factors, counts)
    taken &= ~in_held_out
    empty = taken & (columns.num_tokens == 0)
    counts["empty"] = int(empty.sum())
    rows = np.flatnonzero(taken & ~empty)
    _count_overlong(columns, rows, config, counts)
    documents = cut_rows(
        rows,
        columns.num_tokens,
        (columns.span_offsets, columns.starts, columns.ends),
        seq_len=config.seq_len,
        overlong=config.overlong,
    )
    weights = np.where(taken[segments.rows], segments.weights, 0)
    segments = replace(segments, weights=weights)
    runs, lost = weighted_runs(segments, documents, num_steps=len(columns.steps))
    counts.update(lost)
    documents, runs = _thinned(documents, runs, config, counts)
    told = {name: counts[name] for name in COUNTED} | +counts
    if not len(documents.rows):
        reasons = ", ".join(f"{count} {name}" for name, count in told.items() if count)
        raise ConfigError(
            f"--recipe {config.recipe} leaves no trajectory to pack ({reasons or 'no tokens'})"
        )
    return Plan(columns=columns, documents=documents, runs=runs, held_out=held_out, counts=told)


def _weigh(
    columns: TokenColumns,
    config: PackConfig,
    judgements: Judgements | None,
    factors: Sequence[Factors],
    counts: Counter[str],
) -> "tuple[Segments, NDArray[np.bool_]]":
    """Return weighted token ranges of all rows, and which rows the recipe takes."""
    steps = weigh_steps(columns, judgements, config, counts)
    given = [*factors]
    if judgements is not None and judgements.factors is not None:
        given.append(judgements.factors.select(steps.judged[judgements.factors.spans]))
    multiplied(steps.weights, given)
    if config.convention != "srft":
        finer = any(weight != 1 for weight in config.part_weights.values())
        if finer or any((each.targets >= 0).any() for each in given):
            raise ConfigError(
                f"--convention {config.convention} trains whole turns: leave out weights of parts "
                "and characters, or choose --convention srft"
            )
        return by_convention(config.convention, columns, steps.weights), steps.rows
    segments = by_part(whole_steps(columns, steps.weights), columns, config.part_weights, given)
    return by_character(segments, columns, given, counts), steps.rows


def _count_overlong(
    columns: TokenColumns, rows: "NDArray[np.int64]", config: PackConfig, counts: Counter[str]
) -> None:
    overlong = rows[columns.num_tokens[rows] > config.seq_len]
    counts["overlong"] = len(overlong)
    if len(overlong) and config.overlong == "error":
        first = overlong[0]
        raise ConfigError(
            f"{columns.names[columns.trajectories[first]]}: {columns.num_tokens[first]} tokens, "
            f"more than --seq-len {config.seq_len}; choose --overlong truncate|windows|drop, or a "
            "longer --seq-len"
        )


def _thinned(
    documents: Documents, runs: Runs, config: PackConfig, counts: Counter[str]
) -> tuple[Documents, Runs]:
    """Leave out what carries no weight, as far as that is asked for."""
    numbers = np.diff(runs.offsets)
    weightless = numbers == 0
    counts["weightless"] = int(weightless.sum())
    if not (config.drop_weightless or config.trim_suffix):
        return documents, runs
    before = int(documents.lengths.sum(dtype=np.int64))
    kept = documents.select(~weightless)
    runs = Runs(
        offsets=offsets_of(numbers[~weightless]),
        starts=runs.starts,
        lengths=runs.lengths,
        weights=runs.weights,
    )
    if config.trim_suffix:
        last = runs.offsets[1:] - 1
        kept = Documents(
            rows=kept.rows,
            starts=kept.starts,
            ends=kept.starts + runs.starts[last] + runs.lengths[last],
            first_steps=kept.first_steps,
            last_steps=kept.last_steps,
        )
        counts["trimmed_tokens"] = before - int(kept.lengths.sum(dtype=np.int64))
    return kept, runs
