"""What `label` keeps where a user interrupts it, and what a rerun asks again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from srft_prep.config import LabelConfig
from srft_prep.critic import CriticReply, CriticRequest
from srft_prep.labeling import label
from srft_prep.ledger import Ledger
from srft_prep.options import command_line
from tests.stages import ListedCritic, listed_label, srft_prep, trajectory, write_trajectories

RUNS = [trajectory(f"run-{number}", num_steps=2) for number in range(4)]
CONFIG = LabelConfig(critic="listed", critic_id="listed@1", prompt_hash="none", only="all")


def answered(request: CriticRequest) -> CriticReply:
    return CriticReply(request=request, labels=tuple(map(listed_label, request.steps)))


class HoldingCritic(ListedCritic):
    """Has two replies at a time, and hands the second one out where it is interrupted."""

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        source = iter(requests)
        for request in source:
            held = [answered(request), answered(next(source))]
            try:
                while held:
                    yield held.pop(0)
            except KeyboardInterrupt:
                yield from held
                raise


class InterruptingProgress:
    def advance(self, count: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt


def test_an_interrupt_keeps_what_had_come_back(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    output = tmp_path / "labels"
    with pytest.raises(KeyboardInterrupt):
        label(runs, output, HoldingCritic(), CONFIG, progress=InterruptingProgress())
    with Ledger(output) as ledger:
        kept = [
            run.trajectory_id
            for run in RUNS
            if ledger.has((run.content_hash, "listed@1", "none", "all"), failed=False)
        ]
    assert kept == ["run-0", "run-1"]
    critic = ListedCritic()
    label(runs, output, critic, CONFIG)
    assert critic.asked == ["run-2", "run-3"]


@dataclass
class FlakyCritic(ListedCritic):
    """Fails as it is told."""

    failures: dict[str, str] = field(default_factory=dict)

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        for request in requests:
            self.asked.append(request.trajectory_id)
            failure = self.failures.get(request.trajectory_id)
            yield CriticReply(request=request, failure=failure) if failure else answered(request)


def test_a_rerun_asks_again_what_a_server_that_was_gone_did_not_answer(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    failures = {"run-1": "unavailable: no connection", "run-2": "refused: no"}
    label(runs, tmp_path / "labels", FlakyCritic(failures=failures), CONFIG)
    again = FlakyCritic()
    manifest = label(runs, tmp_path / "labels", again, CONFIG)
    assert again.asked == ["run-1"]
    assert manifest.counts["failures"] == 1


def test_passwords_and_keys_never_stand_in_a_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://user:pass-word@host:8000/v1"
    words = ["label", "--base-url", url, "--engine-arg", "hf_token=hf_abc", "max_num_tokens=7"]
    monkeypatch.setattr("sys.argv", ["srft-prep", *words])
    assert command_line() == [
        *("srft-prep", "label", "--base-url", "http://[key]@host:8000/v1"),
        *("--engine-arg", "hf_token=[key]", "max_num_tokens=7"),
    ]


def test_a_budget_of_a_local_critic_needs_the_price_of_its_machine(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    words = ("--critic", "transformers", "--model", tmp_path, "--budget-usd", "1")
    done = srft_prep("label", runs, "-o", tmp_path / "labels", *words)
    assert done.status == 2
    assert "--gpu-usd-per-hour" in done.stderr
    assert not (tmp_path / "labels").exists()
