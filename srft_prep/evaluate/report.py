"""A comparison in words and tables, for a terminal; what `page` says in the same words is here."""

from srft_prep.evaluate.comparison import ENOUGH_RUNS, Comparison, Difference, Summary
from srft_prep.evaluate.intervals import Interval


def lines(found: Comparison) -> list[str]:
    """Return a comparison as lines of text."""
    text = [f"{found.num_instances:,} instances; resolved rate in percent, mean ± sd over rollouts"]
    ks = sorted({k for summary in found.arms.values() for k in summary.pass_at})
    rows = labelled(found)
    width = max(len(label) for label, _ in rows)
    heads = "".join(f" {f'pass@{k}':>8}" for k in ks)
    text.append(f"{'':{width}} {'rollouts':>8} {'resolved %':>12}{heads}")
    text += [_row(label.ljust(width), summary, ks) for label, summary in rows]
    for pair in found.differences:
        text += ["", f"{pair.arm} - {pair.baseline}: {pair.hierarchical.difference:+.2f} points"]
        for name, interval in intervals(pair).items():
            text.append(f"  {name:46} {interval_text(interval)}")
    text += ["", *power_lines(found)]
    text += [f"warning: {warning}" for warning in found.warnings]
    return text


def labelled(found: Comparison) -> list[tuple[str, Summary]]:
    """Return arms and, where an arm has several, its training runs before it."""
    rows = []
    for name, arm in found.arms.items():
        if arm.num_runs > 1:
            rows += [(f"{name} ({run})", summary) for run, summary in found.runs[name].items()]
        rows.append((f"{name} (all {arm.num_runs} runs)" if arm.num_runs > 1 else name, arm))
    return rows


def _row(label: str, summary: Summary, ks: list[int]) -> str:
    cells = "".join(
        f" {summary.pass_at[k]:8.1f}" if k in summary.pass_at else f" {'':8}" for k in ks
    )
    return f"{label} {summary.num_rollouts:8} {rate_text(summary):>12}{cells}"


def rate_text(summary: Summary) -> str:
    """Return mean and standard deviation as in the paper's tables."""
    sd = f" ± {summary.sd:.1f}" if summary.sd is not None else ""
    return f"{summary.mean:.1f}{sd}"


def intervals(pair: Difference) -> dict[str, Interval | None]:
    """Return a difference's intervals by their names, the default first."""
    return {
        "hierarchical bootstrap: runs, then rollouts": pair.hierarchical,
        "Welch t on run means": pair.welch,
        "rollouts only (paper-compatible)": pair.rollouts_only,
    }


def interval_text(interval: Interval | None) -> str:
    """Return an interval, and whether it is without 0."""
    if interval is None:
        return "not possible with 1 training run in an arm"
    verdict = "" if interval.low <= 0 <= interval.high else "  (without 0)"
    return f"[{interval.low:.2f}, {interval.high:.2f}]{verdict}"


def power_lines(found: Comparison) -> list[str]:
    """Return what it would take to settle the gain asked for."""
    if not found.needed_runs:
        return [
            "power: not known, since it takes an arm with two training runs and a run with two "
            "rollouts to tell how much each varies"
        ]
    between, within = found.spread.between_runs, found.spread.within_runs
    assert between is not None
    assert within is not None
    sizes = ", ".join(f"{runs} x {m}" for m, runs in found.needed_runs.items())
    note = "" if between else " (none found between runs: with few of them, perhaps by chance)"
    return [
        f"spread: sd {between**0.5:.2f} between training runs, {within**0.5:.2f} between rollouts"
        f"{note}",
        f"power: a gain of {found.gain:g} points is settled (95%, power 80%) by training runs x "
        f"rollouts an arm: {sizes} (at least {ENOUGH_RUNS} runs)",
    ]
