"""What the last critic of a cascade was asked, and would be asked alone, as its planner sees both.

A bill and an estimate cannot be compared: providers count other tokens than an estimate by bytes,
give discounts for caches, and answers are shorter or longer than usual. So what was asked is held
against everything by the same estimate, request by request, and money is scaled by how the bill of
what was asked compares with its estimate (`cascade_report`).

Plans are noted as the critic's turn makes them, and those of trajectories that it is not asked
about are made in between, while the model is at work; at the end only those are made that are
still missing. Memory holds a few numbers a planned request.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final

from srft_prep.config import LabelConfig
from srft_prep.critic import Critic, CriticRequest
from srft_prep.critic.parts import Part
from srft_prep.errors import ConfigError
from srft_prep.estimates import Estimate, estimate
from srft_prep.ledger import Key, Ledger, Subject
from srft_prep.ledger_labels import SCALES, Row, focus_limit, focus_scale, rows_of
from srft_prep.manifest import Manifest
from srft_prep.trajectories import named, read_trajectories
from srft_prep.types import Trajectory

_SUMMED: Final = (
    "requests",
    "steps",
    "prompt_tokens",
    "completion_tokens",
    "clipped_tokens",
    "windows",
)


class Foresight:
    """Plans of one critic for all trajectories that a run labels, as numbers."""

    def __init__(self, critic: Critic, config: LabelConfig, ledger: Ledger, *, eager: bool) -> None:
        """Note nothing yet.

        Args:
            critic: the last one of a cascade, a model.
            config: its settings.
            ledger: tells what was asked.
            eager: whether `report` is sure to be wanted, so that plans are made as early as can be.
        """
        self.critic, self.config, self.ledger, self.eager = critic, config, ledger, eager
        self._sizes: dict[str, dict[str, Estimate]] = {}
        """What requests are expected to take, by content and part."""
        self._whole: dict[str, frozenset[str]] = {}
        """The parts that ask about everything, by content."""

    def lacks(self, row: Row) -> bool:
        """Return whether a trajectory has no plan yet."""
        return row.subject[0] not in self._whole

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> list[CriticRequest]:
        """Return the critic's plan for a trajectory, noted."""
        planned = list(self.critic.plan(trajectory, scale=scale))
        sizes = self._sizes.setdefault(trajectory.content_hash, {})
        for request in planned:
            if request.part not in sizes:
                sizes[request.part] = estimate([request], self.critic.rates)
        if scale == 1.0:
            self._whole[trajectory.content_hash] = frozenset(each.part for each in planned)
        return planned

    def add(self, trajectory: Trajectory) -> None:
        """Plan a trajectory that nothing is asked about now; as it was asked earlier, too."""
        self.plan(trajectory)
        asked = set(self.ledger.parts(self._subject(trajectory.content_hash)))
        for scale in (focus_scale(self.config), *SCALES[1:]):
            if asked <= self._sizes[trajectory.content_hash].keys():
                break
            if scale is not None:
                try:
                    self.plan(trajectory, scale=scale)
                except ConfigError:  # not even one step fits so little
                    continue

    def report(self, source: Manifest) -> dict[str, Any]:
        """Return estimates of everything (`last_alone`) and of what was asked (`last_asked`)."""
        contents: dict[str, None] = {}
        for part in source.parts:
            rows = [row for row in rows_of([part], self.config) if row.selected]
            due = {row.trajectory_id for row in rows if self.lacks(row)}
            for trajectory in read_trajectories([part], where=named(due)) if due else ():
                self.add(trajectory)
            contents.update(dict.fromkeys(row.subject[0] for row in rows))
        alone: dict[str, list[Estimate]] = {}
        asked: dict[str, list[Estimate]] = {}
        for content in contents:
            sizes, (sent, free) = self._sizes[content], self._sent(content)
            asked[content] = [size for part, size in sizes.items() if part in sent]
            everything = (self._whole[content] | set(self._smaller(sizes, sent))) - free
            alone[content] = [size for part, size in sizes.items() if part in everything]
        return {"last_alone": asdict(_sum(alone)), "last_asked": asdict(_sum(asked))}

    def _smaller(self, sizes: Iterable[str], sent: set[str]) -> Iterator[str]:
        """Yield the smaller requests that a model wanted which found the larger ones over-long."""
        limits: dict[int | None, list[str]] = defaultdict(list)
        for text in sizes:
            if (part := Part.parse(text)) is not None:
                limits[part.limit].append(text)
        for limit, parts in limits.items():
            if limit != focus_limit(self.config) and not sent.isdisjoint(parts):
                yield from parts

    def _sent(self, content: str) -> tuple[set[str], set[str]]:
        """Return the parts that the critic was asked, and others that failed and took nothing.

        The latter, as those found over-long, count on neither side.
        """
        subject = self._subject(content)
        sent: set[str] = set()
        free: set[str] = set()
        for text in self.ledger.parts(subject):
            key: Key = (*subject, text)
            taken = self.ledger.failure(key) is None or self.ledger.spent(key)["prompt_tokens"]
            (sent if taken else free).add(text)
        return sent, free

    def _subject(self, content: str) -> Subject:
        return content, self.config.critic_id, self.config.prompt_hash


def _sum(by_content: dict[str, list[Estimate]]) -> Estimate:
    total = Estimate(trajectories=sum(map(bool, by_content.values())))
    for each in (size for sizes in by_content.values() for size in sizes):
        for name in _SUMMED:
            setattr(total, name, getattr(total, name) + getattr(each, name))
        total.usd = None if total.usd is None or each.usd is None else total.usd + each.usd
    return total
