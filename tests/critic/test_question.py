import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srft_prep.config import IngestConfig
from srft_prep.critic.encoding import ChatEncoder, TextEncoder
from srft_prep.critic.parts import Part, context_hash
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import REASONING_TOKENS, Planner, QuestionSettings
from srft_prep.errors import ConfigError
from srft_prep.ingest import ingest
from srft_prep.manifest import read_manifest
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Message, Trajectory
from tests.strategies import texts, trajectories

PROMPT = load_prompt(Path(__file__).resolve().parents[2] / "prompts" / "step_critic.md")
EXAMPLE = ChatEncoder("example")
BYTES = TextEncoder()
LEFT_OUT = re.compile(r"\n\[\.\.\. \d+ tokens left out \.\.\.\]\n")

SETTINGS = st.builds(
    QuestionSettings,
    prompt=st.just(PROMPT),
    rationale=st.booleans(),
    context=st.sampled_from(["none", "outcome", "patch"]),
    votes=st.integers(1, 3),
    reasoning=st.sampled_from(["none", "low"]),
)
SHAPING = ("prompt", "rationale", "context", "reasoning")


def least_of(given_settings, encoder):
    """Return the smallest limit that a planner accepts."""
    with pytest.raises(ConfigError) as raised:
        Planner(given_settings, encoder, max_input_tokens=1)
    return int(re.search(r"with one step needs (\d+)", str(raised.value))[1])


def run_of(steps, *, task="Fix the bug.", patch=None, demos=0):
    """Return a trajectory of (action, observations) with a task."""
    messages = [Message(role="user", kind="prompt", content=task)]
    messages += [Message(role="user", kind="demo", content="demo")] * demos
    for action, observations in steps:
        messages.append(Message(role="assistant", kind="action", content=action))
        messages += [
            Message(role="user", kind="observation", content=text) for text in observations
        ]
    return Trajectory(
        trajectory_id="run-1",
        instance_id="",
        format="messages",
        messages=tuple(messages),
        resolved=False,
        patch=patch,
    )


def check(planner, run):
    """Check every law that holds for the requests of any trajectory."""
    requests = planner.plan(run)
    assert planner.plan(run) == requests, "not a pure function"
    votes, context = planner.settings.votes, planner.settings.context
    told = context_hash(context, run.resolved, run.patch)
    assert len({request.part for request in requests}) == len(requests)
    for vote in range(votes):
        asked = [request.steps for request in requests if Part.parse(request.part).vote == vote]
        assert list(chain.from_iterable(asked)) == list(range(run.num_steps))
    own_notes = sum(
        len(LEFT_OUT.findall(text or ""))
        for message in run.messages
        for text in (message.content, message.reasoning_content, message.tool_calls, run.patch)
    )
    for request in requests:
        check_request(request, planner, run, told)
        if not own_notes:
            told_so = bool(LEFT_OUT.search(request.question.user))
            assert told_so == (request.clipped_tokens > 0)
    if not own_notes:
        shared = {LEFT_OUT.split(request.question.shared)[0] for request in requests}
        assert len(shared) <= 1
    assert len({request.question.shared for request in requests}) <= 1
    return requests


def check_request(request, planner, run, told):
    part, question = Part.parse(request.part), request.question
    assert str(part) == request.part
    assert tuple(part.steps(run.num_steps)) == request.steps
    assert part.context == told
    if part.last is None:
        assert (request.clipped_tokens, request.steps) == (0, tuple(range(run.num_steps)))
    else:
        assert part.limit == planner.max_input_tokens
    assert request.clipped_tokens > 0 or part.last is None or len(request.steps) < run.num_steps
    assert question.prompt_tokens <= planner.max_input_tokens
    if planner.context_tokens is not None:
        assert question.prompt_tokens + question.max_output_tokens <= planner.context_tokens
    if question.prompt_ids is not None:
        assert len(question.prompt_ids) == question.prompt_tokens
    assert 0 < question.output_tokens <= question.max_output_tokens
    first, last = request.steps[0], request.steps[-1]
    assert f"Label the steps {first} to {last}, every one of them" in question.rest
    asked = question.schema["properties"]["labels"]["required"]
    assert asked == [str(step) for step in request.steps]
    assert all(f"<step {step}>\n" in question.rest for step in request.steps)
    assert question.user == question.shared + question.rest
    assert question.system == PROMPT.system


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(trajectories(max_steps=8), SETTINGS, st.integers(0, 3000), st.booleans(), st.data())
def test_the_requests_of_any_trajectory_keep_every_law(run, given_settings, more, bounded, data):
    encoder = data.draw(st.sampled_from([EXAMPLE, BYTES]))
    patch = data.draw(st.none() | texts(400))
    times = data.draw(st.sampled_from([1, 1, 30, 200]))
    run = replace(run, patch=patch and patch * times)
    messages = [
        message._replace(content=message.content and message.content * times)
        for message in run.messages
    ]
    run = replace(run, messages=tuple(messages))
    limit = least_of(given_settings, encoder) + more
    context = None
    if bounded:
        context = limit + REASONING_TOKENS[given_settings.reasoning] + 600
    planner = Planner(given_settings, encoder, max_input_tokens=limit, context_tokens=context)
    check(planner, run)


DENSE = "🙂é漢" * 800 + " " * 20_000
PATHOLOGICAL = {
    "no text at all": run_of([("", [""])] * 5, task=""),
    "one step of 100k characters": run_of([("x" * 100_000, ["y z " * 25_000])]),
    "300 steps": run_of([(f"do {number}", ["out " * 40]) for number in range(300)]),
    "200 observations in a step": run_of([("act", ["some output " * 40] * 200)] * 2),
    "2,000 empty observations": run_of([("act", [""] * 2000)]),
    "dense at its ends": run_of([(DENSE, [DENSE])] * 2, task=DENSE, patch=DENSE),
    "forged control tokens": run_of([("ls", ["<|im_end|>" * 120])] * 60, task="<|im_end|>" * 900),
    "braces": run_of([("{steps}", ["{task} {answer} {0} {}"])] * 3, task="{steps} {context}"),
    "forged tags": run_of([("</action></step>\n<step 1>", ["</steps>"])] * 4, task="</task>"),
    "lone control characters": run_of([("\x00\x1b[31m\x7f\u202e", ["\x00" * 4000])] * 8),
    "a long task": run_of([("ls", ["a"])], task="Words of the task. " * 4000),
    "a long patch": run_of([("ls", ["a"])], patch="+line of the patch\n" * 4000),
    "demonstrations": run_of([("ls", ["a"])], demos=40),
}


@pytest.mark.parametrize("encoder", [EXAMPLE, BYTES], ids=["example", "bytes"])
@pytest.mark.parametrize("limit", ["least", 6000])
@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_pathological_trajectories_keep_every_law(name, limit, encoder):
    chosen = QuestionSettings(prompt=PROMPT, context="patch", rationale=name == "300 steps")
    tokens = least_of(chosen, encoder) + 1 if limit == "least" else limit
    check(Planner(chosen, encoder, max_input_tokens=tokens), PATHOLOGICAL[name])


def test_a_trajectory_without_steps_has_no_request():
    planner = Planner(QuestionSettings(prompt=PROMPT), BYTES, max_input_tokens=8192)
    assert planner.plan(run_of([])) == []
    assert planner.plan(run_of([], demos=5)) == []


def test_much_room_to_think_leaves_windows_that_fit():
    """The thoughts take most of the context, so that the limits must follow what they leave."""
    chosen = QuestionSettings(prompt=PROMPT, reasoning="high")
    planner = Planner(chosen, BYTES, max_input_tokens=32_768, context_tokens=32_768)
    requests = check(planner, run_of([(f"do {n}", ["out " * 300]) for n in range(60)]))
    assert len(requests) == 4


@pytest.mark.parametrize("name", ["forged control tokens", "200 observations in a step"])
@pytest.mark.parametrize("limit", [4096, 8192])
def test_pathological_trajectories_keep_every_law_with_a_real_tokenizer(name, limit, qwen):
    chosen = QuestionSettings(prompt=PROMPT)
    check(Planner(chosen, qwen, max_input_tokens=limit, context_tokens=limit), PATHOLOGICAL[name])


@pytest.fixture(scope="module")
def qwen(shared_data):
    return ChatEncoder(str(shared_data / "tokenizers" / "qwen2.5-coder-instruct"))


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    ingest([str(shared_data / "trajectories")], folder, IngestConfig())
    return [run for run in read_trajectories(read_manifest(folder).parts) if run.num_steps]


@pytest.mark.parametrize(("limit", "every"), [(4096, 45), (8192, 35), (32_768, 29)])
def test_real_trajectories_keep_every_law_with_a_real_tokenizer(limit, every, qwen, real):
    chosen = QuestionSettings(prompt=PROMPT)
    planner = Planner(chosen, qwen, max_input_tokens=limit, context_tokens=limit)
    for run in real[::every]:
        check(planner, run)


@pytest.mark.parametrize("limit", [4096, 8192, 32_768])
def test_all_real_trajectories_keep_every_law_by_their_bytes(limit, real):
    chosen = QuestionSettings(prompt=PROMPT, context="patch", rationale=True)
    planner = Planner(chosen, BYTES, max_input_tokens=limit)
    num_whole = sum(check(planner, run)[0].part.startswith("all") for run in real)
    assert 0 < num_whole < len(real) or limit == 4096


def test_a_longer_limit_asks_the_same_about_what_was_shown_whole():
    runs = [run_of([(f"do {n}", ["out " * 200]) for n in range(count)]) for count in (1, 4, 40)]
    plans = {}
    for limit in (8192, 32_768):
        planner = Planner(QuestionSettings(prompt=PROMPT), BYTES, max_input_tokens=limit)
        plans[limit] = [planner.plan(run) for run in runs]
    assert plans[8192][0] == plans[32_768][0]
    assert plans[8192][1] == plans[32_768][1]
    assert [request.part for request in plans[32_768][2]] == ["all"]
    assert all("@8192" in request.part for request in plans[8192][2])


def test_the_middle_of_long_observations_goes_first_and_no_action():
    run = run_of([(f"do the thing {n}", ["start " + "line\n" * 4000 + "end"]) for n in range(6)])
    planner = Planner(QuestionSettings(prompt=PROMPT), BYTES, max_input_tokens=8192)
    (request,) = planner.plan(run)
    assert request.part == "steps:0-5@8192"
    text = request.question.rest
    assert len(LEFT_OUT.findall(text)) == 6
    assert text.count("start line") == text.count("line\nend") == 6
    assert all(f"do the thing {n}\n" in text for n in range(6))


def test_a_window_has_the_steps_around_it_in_a_line_each():
    run = run_of([(f"do {n}", ["out " * 1200]) for n in range(40)])
    planner = Planner(QuestionSettings(prompt=PROMPT), BYTES, max_input_tokens=4096)
    requests = planner.plan(run)
    assert len(requests) > 3
    middle = requests[len(requests) // 2]
    first, last = middle.steps[0], middle.steps[-1]
    before, _, rest = middle.question.rest.partition("</earlier steps>")
    after = rest.partition("<later steps>")[2]
    assert f"\nstep {first - 1}: do {first - 1} => out" in before
    assert f"\nstep {last + 1}: do {last + 1} => out" in after
    assert "<earlier steps>" not in requests[0].question.rest
    assert "<later steps>" not in requests[-1].question.rest
    told = [int(number) for number in re.findall(r"^step (\d+):", before, re.MULTILINE)]
    assert told == list(range(told[0], first))
    left_out = re.search(r"\[\.\.\. (\d+) steps left out", before)
    assert (int(left_out[1]) if left_out else 0) == told[0]


def test_a_cut_patch_is_counted_and_not_taken_for_the_whole():
    run = run_of([("ls", ["a"])], patch="+line of the patch\n" * 4000)
    chosen = QuestionSettings(prompt=PROMPT, context="patch")
    (request,) = Planner(chosen, BYTES, max_input_tokens=8192).plan(run)
    assert request.part.startswith("steps:0-0@8192+context:")
    assert request.clipped_tokens > 10_000
    (request,) = Planner(chosen, BYTES, max_input_tokens=10**6).plan(run)
    assert request.part.startswith("all+context:")


@pytest.mark.parametrize("context", ["outcome", "patch"])
def test_what_is_told_beside_the_trajectory_stands_before_the_steps(context):
    run = run_of([("ls", ["a"])], patch="+fix")
    planner = Planner(
        QuestionSettings(prompt=PROMPT, context=context), BYTES, max_input_tokens=8192
    )
    (request,) = planner.plan(run)
    assert "What came of the run: unresolved." in request.question.shared
    assert ("<patch>\n+fix\n</patch>" in request.question.shared) == (context == "patch")
    other = planner.plan(replace(run, resolved=True))[0]
    assert other.part != request.part
    assert other.content_hash == request.content_hash


def test_nothing_of_the_outcome_is_told_unless_it_is_asked_for():
    planner = Planner(QuestionSettings(prompt=PROMPT), BYTES, max_input_tokens=8192)
    plans = [
        planner.plan(run_of([("ls", ["a"])], patch=patch)) for patch in (None, "+secret change")
    ]
    assert plans[0][0].question == plans[1][0].question


def test_votes_ask_the_same_question_again_under_other_parts():
    chosen = QuestionSettings(prompt=PROMPT, votes=3)
    requests = Planner(chosen, BYTES, max_input_tokens=8192).plan(run_of([("ls", ["a"])]))
    assert [request.part for request in requests] == ["all", "all+vote:1", "all+vote:2"]
    assert len({id(request.question) for request in requests}) == 1
    assert chosen.temperature == 1.0
    assert QuestionSettings(prompt=PROMPT).temperature == 0.0


def test_a_smaller_scale_fits_that_part_of_the_limit():
    run = run_of([(f"do {n}", ["out " * 1200]) for n in range(30)])
    planner = Planner(
        QuestionSettings(prompt=PROMPT), BYTES, max_input_tokens=9999, context_tokens=12_345
    )
    for scale in (0.75, 0.5, 0.3):
        requests = planner.plan(run, scale=scale)
        assert sorted(chain(*(request.steps for request in requests))) == list(range(30))
        for request in requests:
            assert request.question.prompt_tokens <= 9999 * scale
            assert f"@{int(9999 * scale)}" in request.part
    with pytest.raises(ConfigError, match="with one step needs"):
        planner.plan(run, scale=0.01)


def test_a_prompt_without_a_place_for_context_cannot_be_told_any():
    prompt = replace(PROMPT, user=PROMPT.user.replace("{context}", ""))
    with pytest.raises(ConfigError, match=r"--context patch: expected \{context\} in the user"):
        Planner(QuestionSettings(prompt=prompt, context="patch"), BYTES, max_input_tokens=9999)


def test_a_context_in_which_not_even_one_step_fits_is_refused():
    chosen = QuestionSettings(prompt=PROMPT)
    least = least_of(chosen, BYTES)
    Planner(chosen, BYTES, max_input_tokens=least)
    with pytest.raises(ConfigError, match=rf"leaves {least - 1} tokens .* needs {least} \(raise"):
        Planner(chosen, BYTES, max_input_tokens=least - 1)
    with pytest.raises(ConfigError, match=r"model's context less the answer, leaves \d+ tokens"):
        Planner(chosen, BYTES, max_input_tokens=900, context_tokens=900)


def test_the_hash_follows_all_that_shapes_labels_and_no_limit():
    base = QuestionSettings(prompt=PROMPT)
    others = [
        replace(base, prompt=replace(PROMPT, prompt_hash="x")),
        replace(base, rationale=True),
        replace(base, context="outcome"),
        replace(base, reasoning="low"),
        replace(base, votes=2),
    ]
    assert len({each.prompt_hash for each in (base, *others)}) == 6
    assert replace(base, votes=3).prompt_hash == replace(base, votes=2).prompt_hash
    assert replace(base, max_input_tokens=99).prompt_hash == base.prompt_hash


def test_a_longer_answer_has_a_longer_bound():
    run = run_of([("ls", ["a"])] * 20)
    bounds = []
    for chosen in (
        QuestionSettings(prompt=PROMPT),
        QuestionSettings(prompt=PROMPT, rationale=True),
        QuestionSettings(prompt=PROMPT, rationale=True, reasoning="high"),
    ):
        (request,) = Planner(chosen, BYTES, max_input_tokens=99_999).plan(run)
        bounds.append(request.question.max_output_tokens)
    assert bounds == sorted(set(bounds))


@pytest.mark.parametrize("rationale", [False, True])
def test_the_longest_sound_answer_fits_its_bound(rationale):
    """Every step unnecessary, every rationale as long as the schema allows, in plain English."""
    import json

    run = run_of([("ls", ["a"])] * 120)
    chosen = QuestionSettings(prompt=PROMPT, rationale=rationale)
    (request,) = Planner(chosen, EXAMPLE, max_input_tokens=99_999).plan(run)
    said = ("The step repeats what was done before and changes nothing. " * 6)[:300]
    entry = {"rationale": said, "label": "unnecessary"} if rationale else "unnecessary"
    answer = json.dumps({"labels": {str(step): entry for step in range(120)}})
    assert len(BYTES.count([answer])) == 1
    assert BYTES.count([answer])[0] <= request.question.max_output_tokens
