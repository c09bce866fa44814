"""One critic's labels of a trajectory: which answers of the ledger they come from."""

from pathlib import Path

from srft_prep.config import LabelConfig
from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.ledger import Ledger
from srft_prep.ledger_labels import Row, labels_in
from srft_prep.types import Label

CONFIG = LabelConfig(
    critic="openai", critic_id="m@openai", prompt_hash="q", only="all", max_input_tokens=8192
)
ROW = Row(
    trajectory_id="run",
    subject=("content", "m@openai", "q"),
    num_steps=6,
    context=None,
    resolved=False,
    selected=True,
)


def answer(ledger: Ledger, part: str, steps: range, label: Label) -> None:
    request = CriticRequest(
        trajectory_id="run", content_hash="content", part=part, steps=tuple(steps)
    )
    labels = tuple(StepLabel(step_index=step, label=label) for step in steps)
    ledger.append((*ROW.subject, part), CriticReply(request=request, labels=labels))


def test_of_windows_that_overlap_the_first_answer_counts_and_none_is_a_vote(tmp_path: Path) -> None:
    """Tokens counted by another tokenizer make other windows of the same limit."""
    with Ledger(tmp_path) as ledger:
        answer(ledger, "steps:0-3@8192", range(4), "good")
        answer(ledger, "steps:2-5@8192", range(2, 6), "harmful")
        found = labels_in(ledger, ROW, CONFIG)
    assert [label.label for label in found] == ["good"] * 4 + ["harmful"] * 2
    assert all(label.p_harmful is None for label in found), "nobody measured any"


def test_answers_of_several_votes_are_shares(tmp_path: Path) -> None:
    voting = LabelConfig(
        critic="openai", critic_id="m@openai", prompt_hash="q", only="all", votes=3
    )
    with Ledger(tmp_path) as ledger:
        for part, label in (("all", "good"), ("all+vote:1", "harmful"), ("all+vote:2", "good")):
            answer(ledger, part, range(6), label)
        found = labels_in(ledger, ROW, voting)
    assert [round(label.p_harmful or 0, 3) for label in found] == [0.333] * 6
    assert {label.label for label in found} == {"good"}
