"""A comparison in words and tables, for a terminal."""

from srft_prep.evaluate.comparison import ENOUGH_RUNS, Comparison, Summary
from srft_prep.evaluate.intervals import Interval


def lines(found: Comparison) -> list[str]:
    """Return a comparison as lines of text."""
    text = [f"{found.num_instances:,} instances; resolved rate in percent, mean ± sd over rollouts"]
    ks = sorted({k for summary in found.arms.values() for k in summary.pass_at})
    rows = _labelled(found)
    width = max(len(label) for label, _ in rows)
    heads = "".join(f" {f'pass@{k}':>8}" for k in ks)
    text.append(f"{'':{width}} {'rollouts':>8} {'resolved %':>12}{heads}")
    text += [_row(label.ljust(width), summary, ks) for label, summary in rows]
    for pair in found.differences:
        text += ["", f"{pair.arm} - {pair.baseline}: {pair.hierarchical.difference:+.2f} points"]
        text.append(_interval("hierarchical bootstrap: runs, then rollouts", pair.hierarchical))
        if pair.welch is None:
            text.append(f"  {'Welch t on run means':46} not possible with 1 training run in an arm")
        else:
            text.append(_interval("Welch t on run means", pair.welch))
        text.append(_interval("rollouts only (paper-compatible)", pair.rollouts_only))
    text += ["", *_power(found)]
    text += [f"warning: {warning}" for warning in found.warnings]
    return text


def _labelled(found: Comparison) -> list[tuple[str, Summary]]:
    rows = []
    for name, arm in found.arms.items():
        if arm.num_runs > 1:
            rows += [(f"{name} ({run})", summary) for run, summary in found.runs[name].items()]
        rows.append((f"{name} (all {arm.num_runs} runs)" if arm.num_runs > 1 else name, arm))
    return rows


def _row(label: str, summary: Summary, ks: list[int]) -> str:
    sd = f" ± {summary.sd:.1f}" if summary.sd is not None else ""
    cells = "".join(
        f" {summary.pass_at[k]:8.1f}" if k in summary.pass_at else f" {'':8}" for k in ks
    )
    return f"{label} {summary.num_rollouts:8} {f'{summary.mean:.1f}{sd}':>12}{cells}"


def _interval(name: str, interval: Interval) -> str:
    verdict = "" if interval.low <= 0 <= interval.high else "  (without 0)"
    return f"  {name:46} [{interval.low:.2f}, {interval.high:.2f}]{verdict}"


def _power(found: Comparison) -> list[str]:
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
