"""The rules critic: labels from evidence that anybody can check, without a model.

Rules are a floor under a model and the default of last resort, not its replacement: they see an
edit bounce, an action repeat and a patch that cannot apply, and they do not see a wrong idea. A
step is harmful where a harmful rule fires, else unnecessary where an unnecessary one does, else
good; the rationale is `rule-id: evidence`. Rules measure no probabilities, so those stay null.
Measured precision of each rule: `benchmarks/rules_quality.py`. Cost: linear in the text, 0.15 ms a
step on 5,148 real ones (2 cores, Python 3.11).
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.critic.pricing import Rates
from srft_prep.critic.rules.edits import EDIT_RULES
from srft_prep.critic.rules.evidence import run_of
from srft_prep.critic.rules.redundant import REDUNDANT_RULES
from srft_prep.critic.rules.refused import REFUSED_RULES
from srft_prep.critic.rules.rule import Rule
from srft_prep.critic.rules.submit import OUTCOME_RULES, SUBMIT_RULES
from srft_prep.types import Label, Trajectory

RULES: Final[tuple[Rule, ...]] = (*REFUSED_RULES, *SUBMIT_RULES, *EDIT_RULES, *REDUNDANT_RULES)
"""All rules that know nothing of the outcome, in order of precedence: harmful ones first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule that fired on one step."""

    step_index: int
    rule_id: str
    label: Label
    evidence: str

    @property
    def rationale(self) -> str:
        """The finding in a line."""
        return f"{self.rule_id}: {self.evidence}"


class RulesCritic:
    """A critic of fixed rules over observable evidence."""

    critic_id = "rules@1"
    rates = Rates()
    max_input_tokens = None

    def __init__(self, *, use_outcome: bool = False) -> None:
        """Choose the rules.

        Args:
            use_outcome: also flag the last submission of a run that is known to be unresolved. Off
                by default: a critic is not told the outcome, as in the paper.
        """
        self.use_outcome = use_outcome
        self.rules = (*OUTCOME_RULES, *RULES) if use_outcome else RULES
        self.prompt_hash = _hash_of(self.rules)

    def findings(self, trajectory: Trajectory) -> tuple[Finding, ...]:
        """Return every rule that fires on every step, by step and then by precedence."""
        run = run_of(trajectory, use_outcome=self.use_outcome)
        found: dict[tuple[int, str], Finding] = {}
        for rule in self.rules:
            for index, evidence in rule.find(run):
                finding = Finding(
                    step_index=index, rule_id=rule.rule_id, label=rule.label, evidence=evidence
                )
                found.setdefault((index, rule.rule_id), finding)
        return tuple(sorted(found.values(), key=lambda finding: finding.step_index))

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> tuple[CriticRequest, ...]:
        """Return one request for all steps."""
        return (CriticRequest.of(trajectory),) if trajectory.num_steps else ()

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield one reply for each request, in order."""
        for request in requests:
            started = time.perf_counter()
            trajectory = request.trajectory
            assert trajectory is not None
            count = trajectory.num_steps
            missing = [step for step in request.steps if not 0 <= step < count]
            if missing:
                yield CriticReply(
                    request=request,
                    failure=f"no steps {missing[:10]}: the trajectory has {count}",
                )
                continue
            labels = self._labels(trajectory, request.steps)
            yield CriticReply(request=request, labels=labels, seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Do nothing: rules hold nothing."""

    def _labels(self, trajectory: Trajectory, steps: Sequence[int]) -> tuple[StepLabel, ...]:
        first: dict[int, Finding] = {}
        for finding in self.findings(trajectory):
            first.setdefault(finding.step_index, finding)
        return tuple(
            StepLabel(
                step_index=index,
                label=first[index].label if index in first else "good",
                rationale=first[index].rationale if index in first else None,
            )
            for index in steps
        )


def _hash_of(rules: Sequence[Rule]) -> str:
    names = "\n".join(f"{rule.rule_id}@{rule.version}" for rule in rules)
    return hashlib.blake2b(names.encode(), digest_size=8).hexdigest()
