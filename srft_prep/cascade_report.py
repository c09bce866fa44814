"""What a cascade did: who settled which share of the steps, what that cost, and was it right.

The later critic is no judge of truth, but the one that would have labelled everything. How far
settled labels agree with its own is told of the steps that both have labelled: of the trajectories
of the audit, which are drawn by their content, and of others that it was asked about nonetheless.
Only the first are a fair sample of what was settled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from srft_prep.config import LabelConfig
from srft_prep.ensembles import label_numbers
from srft_prep.label_metrics import accuracy, binary, cohen_kappa, confusion
from srft_prep.ledger import USAGE
from srft_prep.panel import Panel, Stage, Trajectories, is_audited
from srft_prep.types import LABELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COUNTS: Final = ("trajectories", "steps", "settled", "left", "requests", "failed")


@dataclass(slots=True, kw_only=True)
class StageTally:
    """What one critic of a cascade did."""

    config: LabelConfig
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    """Trajectories and steps that were its to label, steps settled and left, requests
    that were answered and that failed."""
    usage: dict[str, float] = field(default_factory=lambda: dict.fromkeys(USAGE, 0))
    """Sums over its requests."""
    num_measured: int = 0
    """Steps that it gave probabilities for."""
    agreement: "dict[bool, NDArray[np.int64]]" = field(
        default_factory=lambda: {audited: np.zeros((3, 3), np.int64) for audited in (True, False)}
    )
    """How the last critic labelled what this one settled, [last, this], in the audit and beside."""

    def as_dict(self, *, last: bool) -> dict[str, Any]:
        """Return it as JSON values; the last critic agrees with itself."""
        told = {
            "critic_id": self.config.critic_id,
            "prompt_hash": self.config.prompt_hash,
            **self.counts,
            "measured": self.num_measured,
            **self.usage,
        }
        if last:
            return told
        audit, beside = self.agreement[True], self.agreement[False]
        return {**told, "audit": _agreement(audit), "beside": _agreement(beside)}


@dataclass(slots=True, kw_only=True)
class CascadeTally:
    """What all critics of a cascade did."""

    stages: list[StageTally]
    audit: float
    """Share of the trajectories that are audited."""
    num_audited: int = 0
    """Trajectories that the last critic saw because of the audit, and labelled."""

    @classmethod
    def of(cls, panel: Panel) -> "CascadeTally":
        """Return a tally of nothing yet."""
        stages = [StageTally(config=member) for member in panel.members]
        return cls(stages=stages, audit=panel.config.audit or 0.0)

    def add(
        self,
        found: Trajectories,
        taken: Sequence[Stage],
        number: int,
        requests: Sequence[Sequence[Mapping[str, Any]]],
    ) -> None:
        """Count one trajectory: what every critic said of it, and the rows of its requests."""
        start, end = (0, *found.ends)[number : number + 2]
        row = found.rows[0][number]
        audited = is_audited(row.subject[0], self.audit)
        left = end - start
        last = label_numbers(taken[-1].said["label"][start:end])
        for place, (tally, stage) in enumerate(zip(self.stages, taken, strict=True)):
            needed = stage.needed[number]
            num_needed = end - start if needed is None else len(needed)
            num_settled = int(stage.settled[start:end].sum())
            left -= num_settled
            counts = tally.counts
            counts["trajectories"] += num_needed > 0
            counts["steps"] += num_needed
            counts["settled"] += num_settled
            counts["left"] += left if num_needed else 0
            failures = [each["failure"] for each in requests[place] if each["failure"] is not None]
            counts["requests"] += len(requests[place]) - len(failures)
            counts["failed"] += sum(not each.startswith("unasked") for each in failures)
            for name in USAGE:
                tally.usage[name] += sum(each[name] for each in requests[place])
            said = stage.said[start:end]
            tally.num_measured += said.height - said["p_harmful"].null_count()
            if place < len(taken) - 1:
                both = stage.settled[start:end] & (last >= 0)
                own = label_numbers(said["label"])
                tally.agreement[audited] += confusion(last[both], own[both])
        self.num_audited += audited and bool((last >= 0).all())

    def as_dict(self, foreseen: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return it as JSON values.

        Args:
            foreseen: what the last critic was expected to take for everything and for what it was
                asked (`foresight.Foresight.report`); None where it is no model.
        """
        stages = [stage.as_dict(last=stage is self.stages[-1]) for stage in self.stages]
        return _report(stages, self.num_audited, foreseen or {})


def summed_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report of one cascade from those of runs that shared its trajectories."""
    stages: list[dict[str, Any]] = []
    for of_stage in zip(*(report["stages"] for report in reports), strict=True):
        stage = _added(of_stage)
        for name in ("audit", "beside"):
            if name in of_stage[0]:
                found = [each[name]["last_by_settled"] for each in of_stage]
                stage[name] = _agreement(np.sum(found, axis=0))
        stages.append(stage)
    foreseen = {}
    for name in ("last_alone", "last_asked"):
        found = [report.get(name) for report in reports]
        foreseen[name] = None if None in found else _added(found)
    audited = sum(report["audited_trajectories"] for report in reports)
    return _report(stages, audited, foreseen)


def _added(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first row with the sums of all its numbers; None where one lacks it."""
    sums: dict[str, Any] = dict(rows[0])
    for name, value in sums.items():
        if isinstance(value, int | float):
            values = [row[name] for row in rows]
            sums[name] = None if None in values else sum(values)
    return sums


def _report(
    stages: list[dict[str, Any]], num_audited: int, foreseen: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report: estimates are held against estimates, and bills scale them.

    What everything would cost the last critic is its estimate times what was billed for one
    estimated dollar of what it was asked; the estimate itself where it was asked nothing.
    """
    usd = sum(stage["usd"] for stage in stages)
    alone, asked = foreseen.get("last_alone"), foreseen.get("last_asked")
    alone_usd: float | None = None
    saved: dict[str, float | None] = {"prompt_tokens": None, "usd": None}
    if alone is not None and asked is not None:
        saved["prompt_tokens"] = 1 - asked["prompt_tokens"] / max(alone["prompt_tokens"], 1)
        if alone["usd"] is not None:
            billed = stages[-1]["usd"] / asked["usd"] if asked["usd"] else 1.0
            alone_usd = alone["usd"] * billed
        if alone_usd:
            saved["usd"] = 1 - usd / alone_usd
    return {
        "stages": stages,
        "audited_trajectories": num_audited,
        "usd": usd,
        "last_alone": alone,
        "last_asked": asked,
        "last_alone_usd": alone_usd,
        "saved_share": saved,
    }


def cascade_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the report of a cascade (`CascadeTally.as_dict`) in words."""
    lines = []
    for number, stage in enumerate(found["stages"], start=1):
        is_last = number == len(found["stages"])
        lines.append(
            f"stage {number}, {stage['critic_id']}: {stage['steps']:,} steps of "
            f"{stage['trajectories']:,} trajectories, {stage['settled']:,} settled, "
            f"{stage['left']:,} {'without a label' if is_last else 'went on'}; "
            f"{stage['requests']:,} requests, {stage['prompt_tokens']:,.0f} tokens in, "
            f"{stage['completion_tokens']:,.0f} out, ${stage['usd']:,.2f}"
        )
        if stage["failed"]:
            after = "no label is from it" if is_last else "what it was asked went on"
            lines.append(f"  {stage['failed']:,} more of its requests failed: {after}")
        if not is_last and stage["settled"] and not stage["measured"]:
            why = "sure of what a rule flagged, alone"
            if not stage["critic_id"].startswith("rules@"):
                why = "taken to be sure of everything"
            lines.append(f"  it measured no probabilities: {why}")
        for name, what in (("audit", "audited"), ("beside", "other")):
            if (both := stage.get(name)) and both["steps"]:
                lines.append(
                    f"  the last critic agrees on {both['agreement']:.1%} of {both['steps']:,} "
                    f"{what} settled steps (kappa {_number(both['kappa'])}), on harmful or not on "
                    f"{both['harmful_agreement']:.1%} (kappa {_number(both['harmful_kappa'])})"
                )
    if not found["audited_trajectories"]:
        lines.append(
            "audited: no trajectory, so whether the last critic agrees is not known; a larger "
            "--audit draws some"
        )
    alone, saved, usd = found["last_alone"], found["saved_share"], found["last_alone_usd"]
    if saved["prompt_tokens"] is not None:
        money = "" if usd is None else f", ${usd:,.2f} at the rate of what it was asked"
        line = (
            f"the last critic alone: about {alone['requests']:,} requests, "
            f"{alone['prompt_tokens']:,} tokens in{money}; it was spared "
            f"{saved['prompt_tokens']:.1%} of the tokens"
        )
        if saved["usd"] is not None:
            than = "less" if saved["usd"] >= 0 else "more"
            line += f", and all together cost {abs(saved['usd']):.1%} {than}"
        lines.append(line)
    return lines


def _agreement(matrix: "NDArray[np.int64]") -> dict[str, Any]:
    """Return how far the labels of a matrix [last, settled] agree; ratios None without steps."""
    total = int(matrix.sum())
    harmful = binary(matrix)
    return {
        "steps": total,
        "agreement": float(accuracy(matrix)) if total else None,
        "kappa": _finite(cohen_kappa(matrix)),
        "harmful_agreement": float(accuracy(harmful)) if total else None,
        "harmful_kappa": _finite(cohen_kappa(harmful)),
        "labels": list(LABELS),
        "last_by_settled": matrix.tolist(),
    }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
