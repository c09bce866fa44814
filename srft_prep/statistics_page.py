"""The numbers of a data set as a page: plots, and beside each the table of its numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from srft_prep import pages
from srft_prep.config import DEFAULT_SEQ_LEN
from srft_prep.hostile_text import escaped
from srft_prep.plots import COLOURS, svg
from srft_prep.statistics import NUM_PLACES, STEP_EDGES, TOKEN_EDGES, bin_names
from srft_prep.statistics_report import (
    Table,
    cost_table,
    group_table,
    known_outcomes,
    left_out,
    length_table,
    place_table,
    share,
    size_table,
    table_1,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTCOME_COLOURS: Final = {
    "resolved": COLOURS["resolved"],
    "unresolved": COLOURS["unresolved"],
    "unknown": COLOURS["context"],
}
_SHOWN: Final = ("harmful", "unnecessary")
"""Labels that are drawn; the rest is good."""


def page(numbers: dict[str, Any], *, trajectories: Path) -> str:
    """Return the report page of what `collect` returned."""
    body = [
        "<main>",
        f"<h1>Statistics of {escaped(trajectories.name)}</h1>",
        "<h2>By outcome</h2>",
        _table(table_1(numbers)),
        *(f'<p class="note">{note}</p>' for note in left_out(numbers)),
        "<h2>By format</h2>",
        _table(group_table(numbers, "format")),
        "<h2>By model</h2>",
        _table(group_table(numbers, "model")),
    ]
    if numbers["all"].get("labelled_steps"):
        body += [
            "<h2>Where labels stand</h2>",
            _place_plot(numbers),
            _table(place_table(numbers)),
            "<h2>Labels and the number of steps</h2>",
            _size_plot(numbers),
            _table(size_table(numbers)),
        ]
    if numbers["all"].get("requests"):
        body += ["<h2>What the critic took</h2>", _table(cost_table(numbers))]
    if numbers["all"].get("tokens"):
        body += ["<h2>Lengths</h2>", _length_plot(numbers), _table(length_table(numbers))]
    return pages.document(f"Statistics of {trajectories.name}", "\n".join([*body, "</main>"]))


def _table(found: Table) -> str:
    return pages.table(found.head, found.rows, label=found.title)


def _place_plot(numbers: dict[str, Any]) -> str:
    outcomes = [name for name in known_outcomes(numbers) if numbers[name]["labelled_steps"]]

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
        for axes, outcome in zip(panels, outcomes, strict=True):
            _label_bars(axes, numbers[outcome]["by_place"])
            axes.set_title(outcome)
            axes.set_xticks([-0.5, 4.5, 9.5], ["first step", "half", "last step"])
            first, _, last = axes.get_xticklabels()  # kept apart from the neighbours' labels
            first.set_horizontalalignment("left")
            last.set_horizontalalignment("right")
        panels[0].set_ylabel("share of steps")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)

    tenths = [share(labels, "harmful") or 0.0 for labels in numbers["all"]["by_place"]]
    place = max(range(NUM_PLACES), key=tenths.__getitem__)
    picture = svg(
        draw,
        name="places",
        title="Harmful and unnecessary steps by their place in the trajectory",
        description=f"Harmful steps are most frequent in tenth {place + 1} of 10: "
        f"{tenths[place]:.1%} of its labelled steps.",
    )
    caption = (
        "Share of labelled steps that are harmful or unnecessary, by tenth of the trajectory; the "
        "rest is good."
    )
    return pages.figure(picture, caption)


def _size_plot(numbers: dict[str, Any]) -> str:
    found = numbers["all"]["by_steps"]
    names = bin_names(STEP_EDGES)
    shown = [index for index, each in enumerate(found) if each["trajectories"]]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        _label_bars(axes, [found[index]["labels"] for index in shown])
        axes.set_xticks(range(len(shown)), [names[index] for index in shown])
        axes.set_xlabel("steps of the trajectory")
        axes.set_ylabel("share of steps")
        figure.legend(loc="outside upper right", ncols=2)

    picture = svg(
        draw,
        name="sizes",
        title="Harmful and unnecessary steps by the trajectory's number of steps",
        description="The numbers stand in the table below.",
    )
    return pages.figure(picture, "Share of labelled steps that are harmful or unnecessary.")


def _label_bars(axes: "Axes", counts: Sequence[dict[str, int]]) -> None:
    """Draw stacked bars; harmful ones are hatched, so that colour is not all that tells them."""
    bottom = [0.0] * len(counts)
    for label in _SHOWN:
        heights = [share(each, label) or 0.0 for each in counts]
        axes.bar(
            range(len(counts)),
            heights,
            width=0.9,
            bottom=bottom,
            label=label,
            facecolor=COLOURS[label] if label == "harmful" else "none",
            edgecolor=COLOURS[label],
            hatch=None if label == "harmful" else "////",
            linewidth=0.8,
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:.0%}")
    if not any(bottom):
        axes.set_ylim(0, 0.1)


def _length_plot(numbers: dict[str, Any]) -> str:
    outcomes = known_outcomes(numbers)
    bins = range(len(TOKEN_EDGES) + 1)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        bottom = [0] * len(bins)
        for outcome in outcomes:
            counts = numbers[outcome]["by_tokens"]
            axes.bar(
                bins,
                counts,
                width=0.9,
                bottom=bottom,
                label=outcome,
                color=OUTCOME_COLOURS[outcome],
            )
            bottom = [low + count for low, count in zip(bottom, counts, strict=True)]
        axes.axvline(
            TOKEN_EDGES.index(DEFAULT_SEQ_LEN) + 0.5, color=COLOURS["text"], linestyle="--"
        )
        ticks = [f"\N{LESS-THAN OR EQUAL TO} {edge // 1024}k" for edge in TOKEN_EDGES]
        axes.set_xticks(bins, [*ticks, f"> {TOKEN_EDGES[-1] // 1024}k"])
        axes.set_xlabel("tokens (k: 1,024)")
        axes.set_ylabel("sequences")
        figure.legend(loc="outside upper right", ncols=len(outcomes))

    overlong = numbers["all"]["overlong"]
    told = (
        f"{overlong:,} ({numbers['all']['overlong_share']:.1%}) are longer than {DEFAULT_SEQ_LEN:,}"
    )
    picture = svg(
        draw, name="lengths", title="Sequences by their number of tokens", description=f"{told}."
    )
    return pages.figure(picture, f"Sequences by length; {told} (dashed line).")
