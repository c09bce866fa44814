"""An evaluation of critics in words and tables, for a terminal."""

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from srft_prep.evaluate.agreement import Agreement
from srft_prep.evaluate.critic import Contrast, Evaluation, Row
from srft_prep.evaluate.resampling import Estimate
from srft_prep.types import LABELS

VERDICTS: Final = {
    "better": "better than no critic",
    "ranks better": "ranks steps better than no critic, but not at its own threshold",
    "flags better": "better than no critic by its labels (F1), not by its probabilities",
    "flags worse": "worse than no critic by its labels (F1); not told apart by its probabilities",
    "not told apart": "not told from no critic",
    "worse": "worse than no critic",
}
_SIZE: Final = 16
"""Width of a number with its interval."""


def lines(
    found: Evaluation, agreements: Sequence[Agreement] = (), *, may_calibrate: bool = True
) -> list[str]:
    """Return an evaluation as lines of text.

    Args:
        found: the evaluation.
        agreements: of each two critics.
        may_calibrate: whether `--calibrate` would take these labels, so that it may be advised.
    """
    drawn = f"Harmful or not: a value and its 95% interval, drawn by {found.drawn_by}"
    text = [_head(found), "", drawn]
    text += binary_table(found.rows)
    if found.marks_unnecessary:
        text += ["", "Three labels", *_label_table(found.rows)]
    for row in found.rows:
        if row.kind == "critic":
            text += ["", *_confusion(row)]
    for row in found.rows:
        if row.reliability is not None and row.kind == "critic":
            text += ["", *_reliability(row)]
    if found.against_no_critic:
        text += ["", "Is it worth asking? Differences from no critic, paired"]
        critics = {row.name for row in found.rows if row.kind == "critic" and may_calibrate}
        text += _contrasts(found.against_no_critic, calibratable=critics)
    if found.pairs:
        text += ["", "Critics against each other, paired"]
        text += [difference_line(pair, f"{pair.row} - {pair.other}") for pair in found.pairs]
    if agreements:
        text += [
            "",
            "Agreement on all steps that two critics labelled",
            *map(_agreement, agreements),
        ]
    text += _costs(found.rows)
    text += ["", *_counts(found)]
    return [line.rstrip() for line in text]


def _head(found: Evaluation) -> str:
    share = found.num_harmful / found.num_steps
    return (
        f"{found.num_steps:,} gold steps of {found.num_trajectories:,} trajectories, "
        f"{found.num_harmful:,} of them harmful ({share:.1%}); {found.samples:,} bootstrap samples"
    )


def binary_table(rows: Sequence[Row]) -> list[str]:
    """Return rows by how well they tell harmful steps, as lines."""
    names = ("precision", "recall", "f1", "average_precision")
    heads = {"f1": "F1", "average_precision": "average prec."}
    width = _width(rows)
    text = [f"{'':{width}} {'flagged':>7}" + _heads([heads.get(name, name) for name in names])]
    for row in rows:
        cells = "".join(_cell(row.harmful.get(name)) for name in names)
        text.append(f"{row.name:{width}} {row.flagged:7}{cells}")
    text += ["", f"{'':{width}} {'':7}" + _heads(["accuracy", "kappa"])]
    for row in rows:
        cells = "".join(_cell(row.harmful.get(name)) for name in ("accuracy", "kappa"))
        text.append(f"{row.name:{width}} {'':7}{cells}")
    return text


def _label_table(rows: Sequence[Row]) -> list[str]:
    width = _width(rows)
    text = [f"{'':{width}} {'label':11}" + _heads(["precision", "recall", "F1"])]
    for row in rows:
        for label in LABELS:
            cells = "".join(_cell(each) for each in row.labels[label].values())
            text.append(f"{row.name if label == LABELS[0] else '':{width}} {label:11}{cells}")
    text += ["", f"{'':{width}} {'':11}" + _heads(["accuracy", "macro-F1", "kappa"])]
    for row in rows:
        cells = "".join(_cell(row.overall[name]) for name in ("accuracy", "macro_f1", "kappa"))
        text.append(f"{row.name:{width}} {'':11}{cells}")
    return text


def _confusion(row: Row) -> list[str]:
    text = [f"{row.name}: gold down, its labels across"]
    text.append(f"  {'':12}" + "".join(f"{label:>13}" for label in LABELS))
    for label, counts in zip(LABELS, row.confusion, strict=True):
        text.append(f"  {label:12}" + "".join(f"{count:13,}" for count in counts))
    return text


def _reliability(row: Row) -> list[str]:
    assert row.reliability is not None
    text = [f"{row.name}: is P(harmful) what it says? Mean gap {row.calibration_error:.3f}"]
    if lacking := sum(map(sum, row.confusion)) - (row.measured_steps or 0):
        text.append(
            f"  of {row.measured_steps:,} steps; {lacking:,} have no probability, and count as "
            "certain in average precision"
        )
    text.append(f"  {'P(harmful)':12}{'steps':>8}{'mean P':>9}{'harmful':>9}")
    text += [
        f"  {each.low:.1f} - {each.high:.1f}   {each.count:8,}{each.mean_probability:9.3f}"
        f"{each.harmful_share:9.3f}"
        for each in row.reliability
        if each.count
    ]
    return text


def _contrasts(found: Sequence[Contrast], *, calibratable: Collection[str]) -> list[str]:
    text = []
    for each in found:
        verdict = VERDICTS[each.verdict]
        if each.verdict == "ranks better" and each.row in calibratable:
            verdict += ": --calibrate"
        floor = each.floor
        if each.f1.low > 0 and floor is not None and not floor.flags_better:
            verdict += f"; no better than flag all (F1 {_signed(floor.f1)})"
        text += [difference_line(each, each.row), f"    {verdict}"]
    return text


def difference_line(found: Contrast, name: str) -> str:
    """Return the differences of a contrast as a line."""
    text = f"  {name}: F1 {_signed(found.f1)}"
    if found.average_precision is not None:
        text += f", average precision {_signed(found.average_precision)}"
    return text


def _agreement(found: Agreement) -> str:
    return (
        f"  {found.first}, {found.second}: {found.agreement:.1%} of {found.steps:,} steps, kappa "
        f"{_number(found.kappa)}, {found.disagreements:,} disagreements"
    )


def _costs(rows: Sequence[Row]) -> list[str]:
    known = [(row.name, row.cost) for row in rows if row.cost is not None and row.cost.requests]
    if not known:
        return []
    width = max(len(name) for name, _ in known)
    text = ["", "What they took, a trajectory"]
    text.append(
        f"{'':{width}} {'trajectories':>13}{'requests':>10}{'tokens':>10}{'seconds':>10}{'USD':>10}"
    )
    for name, cost in known:
        count = cost.trajectories
        text.append(
            f"{name:{width}} {count:13,}{cost.requests / count:10.2f}{cost.tokens / count:10,.0f}"
            f"{cost.seconds / count:10.3f}{cost.usd / count:10.4f}"
        )
    return text


def _counts(found: Evaluation) -> list[str]:
    text = []
    if found.against_no_critic:
        knows = " and ".join(found.knows)
        text = [f"no critic: a regression on {knows}, predicted by folds of {found.folds}"]
    for label, count in found.samples_without.items():
        if count and (label == "harmful" or found.marks_unnecessary):
            text.append(
                f"intervals of {label}: {count:,} samples without such a gold step are left out"
            )
    for name, count in found.counts.items():
        what, _, critic = name.partition(" ")
        if what == "without_label_of" and count:
            text.append(f"left out: {count:,} gold steps without a label of {critic}")
    if count := found.counts["annotators_disagree"]:
        text.append(f"left out: {count:,} steps that annotators label differently (--annotator)")
    if count := found.counts["gold_not_blind"]:
        text.append(f"left out: {count:,} gold labels that were given with others' labels in view")
    if count := found.counts["labels_without_gold"]:
        text.append(f"left out: {count:,} labels of steps without gold in these trajectories")
    return text + [f"note: {warning}" for warning in found.warnings]


def _width(rows: Sequence[Row]) -> int:
    return max(len(row.name) for row in rows)


def _heads(names: Sequence[str]) -> str:
    return "".join(f"  {name:{_SIZE}}" for name in names)


def _cell(found: Estimate | None) -> str:
    if found is None or np.isnan(found.value):
        return f"  {'-':{_SIZE}}"
    text = f"{_number(found.value)} [{_number(found.low)} {_number(found.high)}]"
    return f"  {text:{_SIZE}}"


def _signed(found: Estimate) -> str:
    if np.isnan(found.value):
        return "-"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _number(value: float) -> str:
    """Return a number as the paper prints it: .604, 1.00, -.12."""
    if np.isnan(value):
        return "-"
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.2f}"
