"""A comparison as a page: plots, and beside each the table of its numbers."""

from collections.abc import Iterator, Sequence

from srft_prep import pages
from srft_prep.evaluate.comparison import Comparison
from srft_prep.evaluate.figures import bootstrap_plot, difference_plot, pass_plot
from srft_prep.evaluate.report import interval_text, intervals, labelled, power_lines, rate_text
from srft_prep.evaluate.rollouts import Arm
from srft_prep.hostile_text import escaped, printable


def page(found: Comparison, arms: Sequence[Arm], *, samples: int, seed: int) -> str:
    """Return the report page of a comparison.

    Args:
        found: what `compare` returned.
        arms: what it was given.
        samples: bootstrap samples, and
        seed: their seed, as it was given.
    """
    title = " against ".join(printable(arm.name) for arm in arms)
    body = "\n".join(["<main>", *_body(title, found, arms, samples=samples, seed=seed), "</main>"])
    return pages.document(title, body)


def _body(
    title: str, found: Comparison, arms: Sequence[Arm], *, samples: int, seed: int
) -> Iterator[str]:
    yield f"<h1>{escaped(title)}</h1>"
    yield f"<p>{found.num_instances:,} instances. Rates are in percent, differences in points.</p>"
    for warning in found.warnings:
        yield f'<p class="warning">{escaped(warning)}</p>'
    yield "<h2>Resolved rates</h2>"
    yield pages.figure(
        bootstrap_plot(arms, samples=samples, seed=seed),
        f"Each arm's mean over {samples:,} bootstrap samples: where it would lie if the study were "
        "done again. Filled: training runs are drawn, then rollouts; dashed: rollouts alone, the "
        "trained models being as they are (the paper's appendix B).",
    )
    yield _rates(found)
    if found.differences:
        yield "<h2>Differences</h2>"
        yield pages.figure(
            difference_plot(found),
            "An interval that crosses the dashed line does not tell a gain from noise.",
        )
        yield _differences(found)
    yield "<h2>pass@k</h2>"
    yield pages.figure(
        pass_plot(found),
        "Share of instances that one of k rollouts resolves, unbiased; an arm's is the mean of its "
        "training runs'. The numbers stand in the table of rates.",
    )
    yield "<h2>What would settle it</h2>"
    yield from (f"<p>{escaped(line)}</p>" for line in power_lines(found))


def _rates(found: Comparison) -> str:
    ks = sorted({k for summary in found.arms.values() for k in summary.pass_at})
    rows = [
        [
            printable(label),
            str(summary.num_rollouts),
            rate_text(summary),
            *(f"{summary.pass_at[k]:.1f}" if k in summary.pass_at else "" for k in ks),
        ]
        for label, summary in labelled(found)
    ]
    head = ["arm (training run)", "rollouts", "resolved %", *(f"pass@{k}" for k in ks)]
    return pages.table(head, rows, label="resolved rates, mean ± standard deviation over rollouts")


def _differences(found: Comparison) -> str:
    rows = [
        [
            printable(f"{pair.arm} - {pair.baseline}"),
            f"{pair.hierarchical.difference:+.2f}",
            *(interval_text(interval) for interval in intervals(pair).values()),
        ]
        for pair in found.differences
    ]
    head = ["arms", "points", *intervals(found.differences[0])]
    return pages.table(head, rows, label="differences in points with 95% intervals")
