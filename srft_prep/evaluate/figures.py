"""Plots of a comparison: the paper's Figure 2 for one's own arms, differences, pass@k.

Arms and differences stand in rows or have marks of their own, so that colour is not all that tells
them apart.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from srft_prep.evaluate.comparison import Comparison, rates_of
from srft_prep.evaluate.intervals import generator, hierarchical_means, pooled_means
from srft_prep.evaluate.report import intervals
from srft_prep.evaluate.rollouts import Arm
from srft_prep.hostile_text import printable
from srft_prep.plots import COLOURS, series_colour, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

BINS: Final = 60
NAME_LENGTH: Final = 28
"""Characters of an arm's name that a plot shows."""
_MARKS: Final = "osD^vP"


def bootstrap_plot(arms: Sequence[Arm], *, samples: int, seed: int) -> str:
    """Return Figure 2: for each arm, where its mean rate lies when the study is drawn anew.

    The samples are those that the intervals come from: same seed, same draws.
    """
    drawn = [
        (
            hierarchical_means(rates_of(arm), samples, generator(seed, arm.name)),
            pooled_means(rates_of(arm), samples, generator(seed, arm.name)),
        )
        for arm in arms
    ]
    every = np.concatenate([values for pair in drawn for values in pair])
    margin = 0.05 * float(np.ptp(every)) or 0.5
    edges = np.linspace(every.min() - margin, every.max() + margin, BINS + 1)

    def draw(figure: "Figure") -> None:
        rows = figure.subplots(len(arms), 1, sharex=True, squeeze=False)[:, 0]
        for number, (axes, arm, (by_runs, by_rollouts)) in enumerate(
            zip(rows, arms, drawn, strict=True)
        ):
            colour = series_colour(number)
            axes.hist(by_runs, edges, color=colour, alpha=0.45)
            axes.hist(by_rollouts, edges, histtype="step", color=colour, linestyle="--")
            axes.axvline(_mean(arm), color=COLOURS["text"], linewidth=1)
            axes.set_ylabel(shown(arm.name), rotation=0, ha="right", va="center")
            axes.set_yticks([])
            axes.grid(visible=False)
        rows[-1].set_xlabel("resolved rate, % (filled: runs and rollouts drawn; dashed: rollouts)")

    told = "; ".join(
        f"{arm.name}: {_spread(by_runs)}" for arm, (by_runs, _) in zip(arms, drawn, strict=True)
    )
    return svg(
        draw,
        name="bootstrap",
        title="Bootstrap distribution of each arm's mean resolved rate",
        description=f"95% of the means lie between: {told}.",
        inches=(11, 0.9 + 1.1 * len(arms)),
    )


def difference_plot(found: Comparison) -> str:
    """Return the intervals of all differences, one below the other, with the line of no gain."""
    kinds = list(intervals(found.differences[0]))

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        handles: dict[str, Any] = {}
        for row, pair in enumerate(found.differences):
            for place, (kind, interval) in enumerate(intervals(pair).items()):
                if interval is None:
                    continue
                handles[kind] = axes.errorbar(
                    interval.difference,
                    row + 0.22 * (place - 1),
                    xerr=[
                        [interval.difference - interval.low],
                        [interval.high - interval.difference],
                    ],
                    fmt=_MARKS[place],
                    color=series_colour(place),
                    capsize=4,
                )
        names = [f"{shown(pair.arm)} - {shown(pair.baseline)}" for pair in found.differences]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.axvline(0, color=COLOURS["text"], linestyle="--", linewidth=1)
        axes.set_xlabel("difference in points, 95% intervals")
        axes.grid(visible=False)
        ordered = [kind for kind in kinds if kind in handles]
        figure.legend([handles[kind] for kind in ordered], ordered, loc="outside upper right")

    return svg(
        draw,
        name="differences",
        title="Differences of arms with their intervals",
        description="The numbers stand in the table below.",
        inches=(11, 1.9 + 0.8 * len(found.differences)),
    )


def pass_plot(found: Comparison) -> str:
    """Return pass@k by k."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for number, (name, arm) in enumerate(found.arms.items()):
            axes.plot(
                list(arm.pass_at),
                list(arm.pass_at.values()),
                marker=_MARKS[number % len(_MARKS)],
                color=series_colour(number),
                label=shown(name),
            )
        ks = sorted({k for arm in found.arms.values() for k in arm.pass_at})
        axes.set_xticks(ks if len(ks) <= 20 else ks[:: len(ks) // 10])
        axes.set_xlabel("k")
        axes.set_ylabel("pass@k, %")
        figure.legend(loc="outside right upper")

    return svg(
        draw,
        name="passes",
        title="pass@k",
        description="The numbers stand in the table above.",
    )


def shown(name: str) -> str:
    """Return an arm's name as a plot shows it."""
    text = printable(name)
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 3]}..."


def _mean(arm: Arm) -> float:
    return float(np.mean([rollout.rate for rollout in arm.rollouts]))


def _spread(means: "NDArray[np.float64]") -> str:
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{low:.1f} to {high:.1f}"
