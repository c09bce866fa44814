"""What holds for the rules critic on every trajectory, and what it is worth on human labels."""

import sys
import time
from importlib import util
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.critic import CRITICS, CriticRequest, open_critic
from srft_prep.critic.rules import RULES, RulesCritic
from srft_prep.errors import ConfigError
from srft_prep.types import KINDS, Message, Trajectory

REPOSITORY = Path(__file__).resolve().parents[2]
FLOORS = {"trail_swe": (0.70, 0.15), "trail_gaia": (0.40, 0.02)}
"""Least harmful precision and recall; measured .737/.167 (n=207) and .429/.025 (n=330)."""

FRAGMENTS = st.sampled_from(
    [
        "```bash\nsed -i 's/a/b/' f.py\n```", "```", "```py\nfinal_answer('@@ -1 +1 @@')\n```",
        "<function=bash>\n<parameter=command>ls", "</function>", "git stash", "cat <<'EOF' > f.py",
        "OBSERVATION:\n", "ERROR:\n", "<returncode>1", "\n[Error occurred in processing",
        "bash: line 1: x: command not found", "rm f.py", "edit 1:2\nx\nend_of_edit", "'", '"', "\\",
        "@@ -1,2 +3 @@\n-x", "No replacement was performed", "git checkout -- .", "\r\n",
    ]
)  # fmt: skip
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=20)), max_size=6).map("".join)
CALLS = st.one_of(
    TEXTS,
    st.builds(
        lambda name, arguments: orjson.dumps(
            [{"function": {"name": name, "arguments": arguments}}]
        ).decode(),
        st.sampled_from(["bash", "str_replace_editor", "submit", "edit", ""]),
        st.one_of(
            TEXTS,
            st.none(),
            st.dictionaries(st.sampled_from(["command", "path", "old_str"]), TEXTS),
        ),
    ),
)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["user", "assistant", "tool", "exit"]),
    kind=st.sampled_from(KINDS),
    content=st.none() | TEXTS,
    tool_calls=st.none() | CALLS,
)
TRAJECTORIES = st.builds(
    Trajectory,
    trajectory_id=st.just("t"),
    instance_id=st.just("i"),
    format=st.just("messages"),
    messages=st.lists(MESSAGES, max_size=12).map(tuple),
    resolved=st.sampled_from([None, True, False]),
)


@settings(deadline=None)
@given(trajectory=TRAJECTORIES, use_outcome=st.booleans())
def test_any_trajectory_gets_one_label_a_step_and_the_same_ones_again(trajectory, use_outcome):
    steps = tuple(range(trajectory.num_steps))
    request = CriticRequest.of(trajectory, part="all", steps=steps)
    critic = RulesCritic(use_outcome=use_outcome)
    (first,) = critic.label([request])
    (second,) = RulesCritic(use_outcome=use_outcome).label([request])
    assert first.failure is None
    assert tuple(label.step_index for label in first.labels) == steps
    assert first.labels == second.labels
    for label in first.labels:
        assert (label.rationale is None) == (label.label == "good")
        assert label.p_good is label.p_unnecessary is label.p_harmful is None


@settings(deadline=None)
@given(trajectory=TRAJECTORIES)
def test_asking_for_some_steps_gives_the_labels_that_asking_for_all_gives(trajectory):
    steps = tuple(range(trajectory.num_steps))
    (everything,) = RulesCritic().label([CriticRequest.of(trajectory, part="all", steps=steps)])
    some = steps[::2]
    (part,) = RulesCritic().label([CriticRequest.of(trajectory, part="steps:0-9", steps=some)])
    assert part.labels == everything.labels[::2]


def test_harmful_goes_before_unnecessary():
    text = "```bash\npytest\n```"
    error = "bash: pytest: command not found"
    turns = [
        Message(role="assistant", kind="action", content=text),
        Message(role="user", kind="observation", content=error),
    ] * 2
    trajectory = Trajectory(
        trajectory_id="t", instance_id="i", format="messages", messages=tuple(turns)
    )
    (reply,) = RulesCritic().label([CriticRequest.of(trajectory, part="all", steps=(1,))])
    assert reply.labels[0].label == "harmful"
    assert reply.labels[0].rationale == f"shell-error: {error}"
    rules = {finding.rule_id for finding in RulesCritic().findings(trajectory)}
    assert rules == {"shell-error", "repeated-action"}


def test_a_step_that_the_trajectory_lacks_is_a_failure_of_that_request():
    trajectory = Trajectory(trajectory_id="t", instance_id="i", format="messages", messages=())
    asked = CriticRequest.of(trajectory, part="steps:0-1", steps=(0, 1))
    (reply,) = RulesCritic().label([asked])
    assert reply.labels == ()
    assert reply.failure == "no steps [0, 1]: the trajectory has 0"


def test_every_rule_has_its_own_id_and_harmful_rules_come_first():
    assert len({rule.rule_id for rule in RULES}) == len(RULES)
    assert [rule.label for rule in RULES] == sorted(rule.label for rule in RULES)
    assert all(rule.summary and rule.version >= 1 for rule in RULES)


@pytest.mark.parametrize(
    "piece",
    ["```", '"', "'", "\\", "bash: ", "x" * 7, "<function=", "<code>", "1.", "0x", "a/", "<<E\n",
     "OBSERVATION:", "Hunk #1 FAILED", "-old line of text\n", "@@ -1,1 +1,1 @@\n", "<parameter="],
)  # fmt: skip
def test_no_text_takes_quadratic_time(piece):
    """Linear work takes well under 2 s here; a quadratic pattern took 12 s on these actions."""
    text = piece * (200_000 // len(piece))
    actions = [f"```bash\npatch {text}\n```", text, f"<function=bash><parameter=command>{text}"]
    actions.append(f"```py\nfinal_answer('''{text}''')\n```")
    messages = []
    for action in actions:
        messages.append(Message(role="assistant", kind="action", content=action))
        messages.append(Message(role="user", kind="observation", content=text * 10))
    trajectory = Trajectory(
        trajectory_id="t", instance_id="i", format="messages", messages=tuple(messages)
    )
    started = time.process_time()
    RulesCritic().findings(trajectory)
    assert time.process_time() - started < 8


@pytest.mark.parametrize("name", FLOORS)
def test_the_rules_keep_their_measured_quality_on_human_labels(shared_data, name):
    spec = util.spec_from_file_location(
        "rules_quality", REPOSITORY / "benchmarks" / "rules_quality.py"
    )
    benchmark = util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = benchmark.measure(shared_data / "human_labels" / name)["rows"]
    precision, recall = FLOORS[name]
    assert rows["rules"]["precision"] >= precision
    assert rows["rules"]["recall"] >= recall
    assert rows["rules"]["accuracy"] > rows["flag everything"]["accuracy"]
    assert rows["rules"]["precision"] > rows["flag everything"]["precision"]


def test_a_critic_is_opened_by_name_and_a_wrong_name_or_option_is_explained():
    assert open_critic("rules", use_outcome=True).critic_id == "rules@1"
    with pytest.raises(ConfigError, match="critic 'oracle': expected one of anthropic, "):
        open_critic("oracle")
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'model'; it takes use_out"):
        open_critic("rules", model="x")
    with pytest.raises(ConfigError, match=r"missing a required .*argument: 'model'"):
        open_critic("scripted")
    assert set(CRITICS) >= {"rules", "scripted"}
    assert "srft_prep.critic.oracle" not in sys.modules
