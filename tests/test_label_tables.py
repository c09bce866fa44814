from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.config import LabelConfig
from srft_prep.critic import CriticReply, CriticRequest, StepLabel, failure_of
from srft_prep.critic.parts import Part, context_hash
from srft_prep.critic.pricing import Rates
from srft_prep.labeling import label
from srft_prep.ledger import Ledger, key_of
from srft_prep.ledger_labels import SCALES, is_labelled, limits_of, merged, rows_of, wanted
from srft_prep.manifest import read_manifest
from srft_prep.types import LABELS
from srft_prep.verification import verify
from tests.stages import ListedCritic, run_critic, trajectory, write_trajectories
from tests.strategies import step_labels

LIMIT = 8000
RUN = trajectory("run", num_steps=6)
CONFIG = LabelConfig(
    critic="listed",
    critic_id="listed@1",
    prompt_hash="none",
    only="all",
    max_input_tokens=LIMIT,
)


@dataclass
class SilentCritic:
    """Takes every request and answers none."""

    critic_id: str = "listed@1"
    prompt_hash: str = "none"
    rates: Rates = field(default_factory=Rates)
    max_input_tokens: int | None = LIMIT

    def plan(self, trajectory, *, scale=1.0):
        return [CriticRequest.of(trajectory)] if trajectory.num_steps else []

    def label(self, requests):
        for _ in requests:
            pass
        return iter(())

    def close(self):
        pass


def reply(part, given_label="good", *, run=RUN, failure=None, usd=0.0, **chances):
    """Return an answer to a part, every step with the same label."""
    steps = tuple(Part.parse(part).steps(run.num_steps))
    labels = tuple(StepLabel(step_index=step, label=given_label, **chances) for step in steps)
    return CriticReply(
        request=CriticRequest.of(run, part=part, steps=steps, clipped_tokens=3 * ("@" in part)),
        labels=() if failure else labels,
        prompt_tokens=10,
        usd=usd,
        failure=failure,
    )


def write_ledger(folder, replies):
    folder.mkdir(exist_ok=True)
    with Ledger(folder) as ledger:
        for each in replies:
            key = key_of(each.request, critic_id="listed@1", prompt_hash="none")
            ledger.append(key, each)


def tables(folder, replies, *, config=CONFIG, runs=(RUN,), critic=None):
    """Return the manifest and the two tables that a ledger of these replies gives."""
    source = write_trajectories(folder / "runs", runs)
    write_ledger(folder / "labels", replies)
    manifest = label(source, folder / "labels", critic or SilentCritic(), config)
    found = [
        pl.read_parquet(folder / "labels" / f"{name}.parquet").to_dicts()
        for name in ("labels", "requests")
    ]
    report = verify(folder / "labels")
    assert report.problems == ()
    return manifest, *found


def labels_in(rows):
    return {row["step_index"]: row["label"] for row in rows}


OVER_LONG = failure_of("over-long", "8001 tokens")
UNPARSEABLE = failure_of("unparseable", "no JSON")


def test_a_request_about_all_is_preferred_to_windows(tmp_path):
    replies = [
        reply(f"steps:0-2@{LIMIT}", "harmful"),
        reply(f"steps:3-5@{LIMIT}", "harmful"),
        reply("all", "good"),
    ]
    manifest, labels, requests = tables(tmp_path, replies)
    assert labels_in(labels) == dict.fromkeys(range(6), "good")
    assert [row["part"] for row in requests] == [
        f"steps:0-2@{LIMIT}",
        f"steps:3-5@{LIMIT}",
        "all",
    ]
    assert manifest.counts["failures"] == 0


def test_the_windows_of_one_limit_are_used_together_and_never_mixed(tmp_path):
    replies = [
        reply("steps:0-2@6000", "harmful"),
        reply(f"steps:0-1@{LIMIT}", "good"),
        reply("steps:3-5@6000", "unnecessary"),
    ]
    _, labels, _ = tables(tmp_path, replies)
    assert labels_in(labels) == {
        **dict.fromkeys(range(3), "harmful"),
        **dict.fromkeys(range(3, 6), "unnecessary"),
    }


@pytest.mark.parametrize(
    ("less", "more"), [(6000, 4000), (7777, 5555), (LIMIT, 6000), (LIMIT, 32_768), (4000, 32_768)]
)
def test_of_two_whole_sets_of_windows_this_runs_limit_counts_or_the_less_clipped(
    tmp_path, less, more
):
    replies = [reply(f"steps:0-5@{more}", "harmful"), reply(f"steps:0-5@{less}", "good")]
    _, labels, _ = tables(tmp_path, replies)
    assert set(labels_in(labels).values()) == {"good"}


def test_an_incomplete_set_of_windows_gives_the_labels_there_are_and_its_failure(tmp_path):
    replies = [
        reply(f"steps:0-1@{LIMIT}"),
        reply(f"steps:2-3@{LIMIT}", failure=UNPARSEABLE),
        reply(f"steps:4-5@{LIMIT}", "harmful"),
    ]
    manifest, labels, requests = tables(tmp_path, replies)
    assert labels_in(labels) == {0: "good", 1: "good", 4: "harmful", 5: "harmful"}
    assert [row["failure"] for row in requests] == [None, UNPARSEABLE, None]
    assert (manifest.counts["trajectories"], manifest.counts["failures"]) == (1, 1)
    assert manifest.data["first_failures"] == [f"run: {UNPARSEABLE}"]


def test_a_window_that_nobody_was_asked_about_is_a_recorded_failure(tmp_path):
    manifest, labels, requests = tables(tmp_path, [reply(f"steps:0-3@{LIMIT}")])
    assert sorted(labels_in(labels)) == [0, 1, 2, 3]
    assert requests[-1]["part"] == "unasked"
    assert requests[-1]["failure"] == "unasked: 2 of 6 steps: the critic gave no reply"
    assert manifest.counts["trajectories"] == 1


def test_a_gap_that_no_failure_explains_is_damage(tmp_path):
    tables(tmp_path, [reply("all")])
    path = tmp_path / "labels" / "labels.parquet"
    kept = pq.read_table(path).filter(pc.field("step_index") != 1)
    pq.write_table(kept, path)
    problems = verify(tmp_path / "labels").problems
    assert f"{path}: run: step 2: out of order, expected step 1" in problems


def test_failures_that_cost_nothing_make_way_for_the_smaller_requests_that_replaced_them(tmp_path):
    replies = [reply("all", failure=OVER_LONG), reply("steps:0-5@6000")]
    manifest, _, requests = tables(tmp_path, replies)
    assert [row["part"] for row in requests] == ["steps:0-5@6000"]
    assert manifest.counts["failures"] == 0


def test_failures_that_were_paid_stay_on_the_bill(tmp_path):
    replies = [reply("all", failure=UNPARSEABLE, usd=0.5), reply("steps:0-5@6000", usd=0.25)]
    _, labels, requests = tables(tmp_path, replies)
    assert len(labels) == 6
    assert [(row["usd"], row["failure"]) for row in requests] == [(0.75, None)]


def test_a_failed_vote_is_told_though_the_others_label_every_step(tmp_path):
    replies = [reply("all"), reply("all+vote:1", failure=UNPARSEABLE), reply("all+vote:2")]
    manifest, labels, requests = tables(tmp_path, replies, config=replace(CONFIG, votes=3))
    assert len(labels) == 6
    assert [row["failure"] for row in requests] == [None, UNPARSEABLE, None]
    assert manifest.counts["failures"] == 1


def test_an_unasked_vote_is_told_though_the_others_label_every_step(tmp_path):
    manifest, labels, requests = tables(
        tmp_path, [reply("all"), reply("all+vote:1")], config=replace(CONFIG, votes=4)
    )
    assert len(labels) == 6
    assert requests[-1]["failure"] == "unasked: 2 of 4 answers: the critic gave no reply"
    assert manifest.counts["failures"] == 1


def test_answers_that_were_told_another_outcome_do_not_count(tmp_path):
    told = {outcome: f"all+context:{context_hash('outcome', outcome)}" for outcome in (True, False)}
    config = replace(CONFIG, context="outcome")
    (tmp_path / "same").mkdir()
    _, labels, requests = tables(tmp_path / "same", [reply(told[False])], config=config)
    assert len(labels) == 6
    assert len(requests) == 1
    (tmp_path / "other").mkdir()
    _, labels, requests = tables(tmp_path / "other", [reply(told[True])], config=config)
    assert labels == []
    assert requests[-1]["failure"].startswith("unasked: 6 of 6 steps")
    (tmp_path / "skipped").mkdir()
    config = replace(config, only="resolved")
    _, labels, requests = tables(tmp_path / "skipped", [reply(told[True])], config=config)
    assert (labels, [row["failure"] for row in requests]) == ([], [None])


def test_windows_of_two_contexts_may_overlap_and_cover_nothing_by_number_alone(tmp_path):
    """4 + 2 steps are asked of 6, but two of them twice."""
    replies = [reply(f"steps:0-3@{LIMIT}"), reply(f"steps:2-3@{LIMIT}")]
    _, labels, requests = tables(tmp_path, replies)
    assert sorted(labels_in(labels)) == [0, 1, 2, 3]
    assert requests[-1]["failure"].startswith("unasked: 2 of 6 steps")


def test_copies_have_the_labels_and_only_the_first_has_the_cost(tmp_path):
    runs = [trajectory(name, num_steps=6, text="same") for name in ("one", "two")]
    _, labels, requests = tables(tmp_path, [reply("all", run=runs[0], usd=0.5)], runs=runs)
    assert Counter(row["trajectory_id"] for row in labels) == {"one": 6, "two": 6}
    assert [(row["trajectory_id"], row["usd"]) for row in requests] == [("one", 0.5), ("two", 0)]


def row_of(run=RUN, config=CONFIG):
    with TemporaryDirectory() as folder:
        source = write_trajectories(Path(folder) / "runs", [run])
        (row,) = rows_of(read_manifest(source).parts, config)
        return row


ROW = row_of()


@pytest.mark.parametrize(
    ("parts", "settled"),
    [
        ([], False),
        (["all"], True),
        ([f"steps:0-5@{LIMIT}"], True),
        ([f"steps:0-2@{LIMIT}", f"steps:3-5@{LIMIT}"], True),
        ([f"steps:0-2@{LIMIT}", "steps:3-5@6000"], False),
        (["steps:0-5@6000"], False),
        (["steps:0-5@2400"], False),
        (["steps:0-5@7999"], False),
        (["steps:0-5@32768"], False),
        (["all+vote:1"], False),
        (["all+context:ab"], False),
    ],
)
def test_what_settles_a_trajectory_is_asked_no_more(tmp_path, parts, settled):
    write_ledger(tmp_path / "labels", [reply(part) for part in parts])
    with Ledger(tmp_path / "labels") as ledger:
        assert is_labelled(ledger, ROW, CONFIG) is settled
        assert not is_labelled(ledger, ROW, replace(CONFIG, votes=2))


@pytest.mark.parametrize(
    ("over_long", "part", "settled"),
    [
        (["all"], "steps:0-5@6000", True),
        (["all"], "steps:0-5@2400", True),
        ([f"steps:0-3@{LIMIT}"], "steps:0-5@6000", True),
        ([f"steps:0-3@{LIMIT}"], "steps:0-5@2400", False),
        ([f"steps:0-3@{LIMIT}", "steps:0-2@6000"], "steps:0-5@4000", True),
        (["steps:0-3@6000"], "steps:0-5@4000", False),
        (["all+context:ab"], "steps:0-5@6000", False),
    ],
)
def test_smaller_requests_settle_a_trajectory_only_where_larger_ones_were_over_long(
    tmp_path, over_long, part, settled
):
    """Otherwise a rerun with twice the limit would ask nothing."""
    replies = [reply(each, failure=OVER_LONG) for each in over_long]
    write_ledger(tmp_path / "labels", [*replies, reply(part)])
    with Ledger(tmp_path / "labels") as ledger:
        assert is_labelled(ledger, ROW, CONFIG) is settled


def test_a_failure_settles_nothing(tmp_path):
    write_ledger(tmp_path / "labels", [reply("all", failure=UNPARSEABLE)])
    with Ledger(tmp_path / "labels") as ledger:
        assert not is_labelled(ledger, ROW, CONFIG)


def test_limits_begin_with_what_leaves_nothing_out():
    assert limits_of(CONFIG) == [None, *(int(LIMIT * scale) for scale in SCALES)]
    assert limits_of(replace(CONFIG, max_input_tokens=None)) == [None]


def test_an_unknown_outcome_counts_as_unresolved():
    table = {
        only: [wanted(each, only) for each in (True, False, None)]
        for only in ("all", "resolved", "unresolved")
    }
    assert table == {
        "all": [True, True, True],
        "resolved": [True, False, False],
        "unresolved": [False, True, True],
    }


@given(step_labels(0))
def test_one_answer_stays_as_it_is(answer):
    assert merged([answer]) is answer


def shares(answer):
    chances = [answer.p_good, answer.p_unnecessary, answer.p_harmful]
    return [float(answer.label == name) for name in LABELS] if None in chances else chances


@given(st.lists(step_labels(3), min_size=2, max_size=6))
def test_votes_are_the_mean_and_the_label_the_likeliest(answers):
    found = merged(answers)
    means = [sum(shares(answer)[place] for answer in answers) / len(answers) for place in range(3)]
    assert shares(found) == pytest.approx(means, abs=1e-6)
    assert found.step_index == 3
    chance = dict(zip(LABELS, means, strict=True))
    assert chance[found.label] >= max(means) - 1e-6
    said = [answer.rationale for answer in answers if answer.label == found.label]
    assert found.rationale == (said[0] if said else None)
    assert merged(answers[::-1]).label == found.label


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (("good", "harmful"), "harmful"),
        (("harmful", "good"), "harmful"),
        (("good", "unnecessary"), "unnecessary"),
        (("unnecessary", "harmful"), "harmful"),
        (("good", "unnecessary", "harmful"), "harmful"),
        (("good", "good", "harmful"), "good"),
    ],
)
def test_of_equals_the_more_severe_label_is_taken(votes, expected):
    answers = [StepLabel(step_index=0, label=vote) for vote in votes]
    assert merged(answers).label == expected


@st.composite
def ledgers(draw):
    """Replies to some of the requests of some plans: limits, windows, votes, failures, costs."""
    replies = []
    for limit in draw(st.lists(st.sampled_from([None, LIMIT, 6000, 999]), unique=True)):
        for vote in range(draw(st.integers(1, 3))):
            cuts = draw(st.sets(st.integers(1, 5), max_size=3))
            edges = [0, *sorted(cuts), 6] if limit else [0, 6]
            for first, end in pairwise(edges):
                part = Part(vote=vote)
                if limit:
                    part = Part(first=first, last=end - 1, limit=limit, vote=vote)
                failure = draw(st.sampled_from([None, None, OVER_LONG, UNPARSEABLE, "lost"]))
                if failure != "lost":
                    usd = draw(st.sampled_from([0.0, 0.25]))
                    name = draw(st.sampled_from(LABELS))
                    replies.append(reply(str(part), name, failure=failure, usd=usd))
    return draw(st.permutations(replies))


@settings(max_examples=60)
@given(ledgers(), st.integers(1, 3))
def test_the_tables_of_any_ledger_are_sound_and_hold_all_of_its_money(replies, votes):
    with TemporaryDirectory() as folder:
        config = replace(CONFIG, votes=votes)
        manifest, labels, requests = tables(Path(folder), replies, config=config)
    assert [row["step_index"] for row in labels] == sorted({row["step_index"] for row in labels})
    answered = {
        step
        for each in replies
        if each.failure is None and Part.parse(each.request.part).vote < votes
        for step in each.request.steps
    }
    assert {row["step_index"] for row in labels} <= answered
    whole = [each for each in replies if each.request.part == "all" and each.failure is None]
    assert len(labels) == 6 or not whole
    assert sum(row["usd"] for row in requests) == sum(each.usd for each in replies)
    assert manifest.counts["failures"] == sum(row["failure"] is not None for row in requests)
    assert manifest.counts["trajectories"] == 1
    assert len(labels) == 6 or manifest.counts["failures"] > 0


def test_ids_that_differ_by_a_nul_at_the_end_keep_their_own_labels(tmp_path: Path) -> None:
    runs = [trajectory("run"), trajectory("run\x00", num_steps=5)]
    source = write_trajectories(tmp_path / "runs", runs)
    run_critic(source, tmp_path / "labels", ListedCritic())
    labels = pl.read_parquet(tmp_path / "labels" / "labels.parquet")
    counts = dict(labels["trajectory_id"].value_counts().iter_rows())
    assert counts == {"run": 3, "run\x00": 5}
    assert verify(tmp_path / "labels").problems == ()
