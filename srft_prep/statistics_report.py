"""The numbers of a data set as tables, for a terminal and for a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from srft_prep.config import DEFAULT_SEQ_LEN, OUTCOMES
from srft_prep.hostile_text import printable
from srft_prep.statistics import COLUMNS, NUM_PLACES, STEP_EDGES, TOKEN_EDGES, bin_names
from srft_prep.types import LABELS

By = str

LINES: Final = (
    ("trajectories", "trajectories"),
    ("steps", "steps"),
    ("steps in a trajectory, median", "median_steps"),
    ("tokens", "tokens"),
    ("tokens in a sequence, median", "median_tokens"),
    ("tokens in a sequence, longest", "max_tokens"),
    ("labelled steps", "labelled_steps"),
    ("productive steps", "productive_share"),
    ("  good", "good_share"),
    ("  unnecessary", "unnecessary_share"),
    ("harmful steps", "harmful_share"),
    ("critic requests", "requests"),
    ("  failed", "failed_requests"),
    ("critic tokens", "critic_tokens"),
    ("critic cost, USD", "usd"),
)
"""The lines of Table 1 by outcome."""

GROUP_COLUMNS: Final = (
    ("trajectories", "all", "trajectories"),
    ("resolved", "resolved", "trajectories"),
    ("steps", "all", "steps"),
    ("median steps", "all", "median_steps"),
    ("median tokens", "all", "median_tokens"),
    ("labelled steps", "all", "labelled_steps"),
    ("good", "all", "good_share"),
    ("unnecessary", "all", "unnecessary_share"),
    ("harmful", "all", "harmful_share"),
    ("harmful, resolved", "resolved", "harmful_share"),
    ("harmful, unresolved", "unresolved", "harmful_share"),
    ("critic USD", "all", "usd"),
)
"""The columns of Table 1 by format or model: a title, an outcome, and what is told of it."""

COST_LINES: Final = (
    ("USD", "usd", "usd"),
    ("tokens", "tokens", "critic_tokens"),
    ("seconds", "seconds", "seconds"),
)
"""A title, and the keys of what one trajectory took and of what all did."""
COST_COLUMNS: Final = ("mean", "median", "p90", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text; the first cell of each row, and of the head, names it."""

    title: str
    head: list[str]
    rows: list[list[str]]


def table_1(numbers: dict[str, Any]) -> Table:
    """Return Table 1 with a column an outcome; what is not known has no row."""
    rows = [
        [title, *(cell(key, numbers[name][key]) for name in COLUMNS)]
        for title, key in LINES
        if key in numbers["all"]
    ]
    return Table(title="by outcome", head=["", *COLUMNS], rows=rows)


def group_table(numbers: dict[str, Any], by: str) -> Table:
    """Return Table 1 with a row a format or model."""
    columns = [column for column in GROUP_COLUMNS if column[2] in numbers["all"]]
    rows = [
        [printable(name), *(cell(key, found[outcome][key]) for _, outcome, key in columns)]
        for name, found in (*numbers[by].items(), ("all", numbers))
    ]
    return Table(title=f"by {by}", head=[by, *(title for title, _, _ in columns)], rows=rows)


def more_tables(numbers: dict[str, Any]) -> list[Table]:
    """Return where labels stand, what a trajectory cost, and how long sequences are."""
    found = []
    if "labels" in numbers["all"]:
        found += [place_table(numbers), size_table(numbers)]
    if "per_trajectory" in numbers["all"]:
        found.append(cost_table(numbers))
    if "by_tokens" in numbers["all"]:
        found.append(length_table(numbers))
    return found


def place_table(numbers: dict[str, Any]) -> Table:
    """Return shares of labels by the steps' place in their trajectories."""
    rows = []
    for place in range(NUM_PLACES):
        first, last = (100 * edge // NUM_PLACES for edge in (place, place + 1))
        by_outcome = {name: numbers[name]["by_place"][place] for name in COLUMNS}
        rows.append([f"{first}-{last}%", *_label_cells(by_outcome)])
    title = "labels by place in the trajectory, from its first step to its last"
    return Table(title=title, head=["place", *LABEL_COLUMNS], rows=rows)


def size_table(numbers: dict[str, Any]) -> Table:
    """Return shares of labels by the number of steps of the trajectory."""
    rows = []
    for bin_, name in enumerate(bin_names(STEP_EDGES)):
        found = {column: numbers[column]["by_steps"][bin_] for column in COLUMNS}
        if found["all"]["trajectories"]:
            labels = {column: each["labels"] for column, each in found.items()}
            rows.append([name, cell("", found["all"]["trajectories"]), *_label_cells(labels)])
    title = "labels by the trajectory's number of steps"
    return Table(title=title, head=["steps", "trajectories", *LABEL_COLUMNS], rows=rows)


LABEL_COLUMNS: Final = (
    *("labelled steps", *LABELS),
    *(f"harmful, {outcome}" for outcome in ("resolved", "unresolved")),
)


def _label_cells(by_outcome: dict[str, dict[str, int]]) -> list[str]:
    labels = by_outcome["all"]
    return [
        cell("", sum(labels.values())),
        *(cell("_share", share(labels, label)) for label in LABELS),
        *(
            cell("_share", share(by_outcome[name], "harmful"))
            for name in ("resolved", "unresolved")
        ),
    ]


def cost_table(numbers: dict[str, Any]) -> Table:
    """Return what the critic's requests took: all of them, and those about one trajectory."""
    rows = []
    for outcome in (*known_outcomes(numbers), "all"):
        found = numbers[outcome]
        for title, key, in_sum in COST_LINES:
            costs = found["per_trajectory"][key]
            cells = (_amount(key, costs[column]) for column in COST_COLUMNS)
            rows.append([f"{title}, {outcome}", cell(in_sum, found[in_sum]), *cells])
    title = "what the critic took: in sum, and for one trajectory"
    return Table(title=title, head=["", "sum", *COST_COLUMNS], rows=rows)


def length_table(numbers: dict[str, Any]) -> Table:
    """Return how many sequences have how many tokens."""
    rows = [
        [name, *(cell("", numbers[column]["by_tokens"][bin_]) for column in COLUMNS)]
        for bin_, name in enumerate(bin_names(TOKEN_EDGES))
        if any(numbers["all"]["by_tokens"][bin_:])
    ]
    over = [cell("_share", numbers[column]["overlong_share"]) for column in COLUMNS]
    rows.append([f"above {DEFAULT_SEQ_LEN:,}", *over])
    return Table(title="sequences by their length", head=["tokens", *COLUMNS], rows=rows)


def table(numbers: dict[str, Any]) -> str:
    """Return Table 1 by outcome as text; absent numbers have no line."""
    found = table_1(numbers)
    return "\n".join(
        f"{first:33}" + "".join(f"{text:>14}" for text in others)
        for first, *others in (found.head, *found.rows)
    )


def text(numbers: dict[str, Any], *, by: By = "outcome", full: bool = False) -> str:
    """Return Table 1 by outcome, format or model, and with `full` all the other tables."""
    blocks = [table(numbers) if by == "outcome" else aligned(group_table(numbers, by))]
    if full:
        for found in more_tables(numbers):
            blocks += ["", f"{found.title}:", aligned(found)]
    if notes := left_out(numbers):
        blocks += ["", *notes]
    return "\n".join(blocks)


def left_out(numbers: dict[str, Any]) -> list[str]:
    """Return which labels are not counted, in words."""
    counts = numbers.get("labels_left_out", {"stale": 0, "elsewhere": 0})
    found = []
    if count := counts["stale"]:
        found.append(
            f"left out: {count:,} labels of other versions of these trajectories; run label again"
        )
    if count := counts["elsewhere"]:
        found.append(f"left out: {count:,} labels of other trajectories")
    return found


def aligned(found: Table) -> str:
    """Return a table as text, each column as wide as what stands in it."""
    lines = [found.head, *found.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def share(labels: dict[str, int], label: str) -> float | None:
    """Return a label's share among counted labels; None where there are none."""
    total = sum(labels.values())
    return labels[label] / total if total else None


def cell(key: str, value: float | None) -> str:
    """Return a number as it is printed: shares in percent, money with cents, a dash for none."""
    if value is None:
        return "-"
    if key.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,.2f}" if key == "usd" else f"{value:,.0f}"


def _amount(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.0f}" if key == "tokens" else f"{value:,.4f}" if key == "usd" else f"{value:,.2f}"
    )


def known_outcomes(numbers: dict[str, Any]) -> Sequence[str]:
    """Return the outcomes that any trajectory has."""
    return [name for name in OUTCOMES.values() if numbers[name]["trajectories"]]
