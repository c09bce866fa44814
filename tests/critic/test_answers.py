import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic import CriticRequest, failure_of
from srft_prep.critic.answers import (
    THOUGHTS_END,
    AnswerError,
    Token,
    label_shares,
    parse_answer,
    reply_of,
    without_thoughts,
)
from srft_prep.critic.prompt import load_prompt
from srft_prep.types import LABELS
from tests.stages import trajectory
from tests.strategies import texts

PROMPT = load_prompt(Path(__file__).resolve().parents[2] / "prompts" / "step_critic.md")
RUN = trajectory("run-1", num_steps=3)
NAMES = st.sampled_from(LABELS)
QUOTES = ('"label": "good"', '{"0": "harmful"}', '"1": "good"', "</step>", '\\"', '"')
RATIONALES = st.lists(texts(12) | st.sampled_from(QUOTES), max_size=3).map("".join)
STEPS = st.tuples(st.integers(0, 12), st.integers(1, 6)).map(
    lambda span: tuple(range(span[0], span[0] + span[1]))
)


def request(steps=(0, 1, 2)):
    return CriticRequest.of(RUN, part="all", steps=tuple(steps))


@st.composite
def answers(draw, rationale=None):
    """Steps, their labels, and a JSON text that satisfies `schema_for` of the steps."""
    steps = draw(STEPS)
    given_labels = {step: draw(NAMES) for step in steps}
    entries = {str(step): name for step, name in given_labels.items()}
    if draw(st.booleans()) if rationale is None else rationale:
        entries = {
            step: {"rationale": draw(RATIONALES), "label": name} for step, name in entries.items()
        }
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n ", " :\n")]))
    text = json.dumps(
        {"labels": entries},
        ensure_ascii=draw(st.booleans()),
        separators=separators,
        indent=draw(st.none() | st.just(2)),
    )
    return steps, given_labels, text


def conforms(value, schema):
    """Check a value against the words of JSON Schema that `schema_for` uses."""
    if "$ref" in schema:
        return conforms(value, {"type": "string", **schema["defs"]})
    if schema["type"] == "string":
        return isinstance(value, str) and value in schema.get("enum", [value])
    properties = {
        name: {"defs": schema.get("defs"), **inner} for name, inner in schema["properties"].items()
    }
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= value.keys()
        and value.keys() <= properties.keys()
        and all(conforms(value[name], properties[name]) for name in value)
    )


@given(answers())
def test_an_answer_that_satisfies_the_schema_is_read_to_exactly_its_labels(answer):
    steps, expected, text = answer
    value = json.loads(text)
    rationale = isinstance(value["labels"][str(steps[0])], dict)
    schema = PROMPT.schema_for(steps, rationale=rationale)
    defs = schema["$defs"]["step"]
    assert conforms(value, {**schema, "defs": defs})
    labels = parse_answer(text, steps)
    assert {label.step_index: label.label for label in labels} == expected
    if rationale:
        said = [value["labels"][str(label.step_index)]["rationale"] for label in labels]
        assert [label.rationale for label in labels] == [text or None for text in said]


@given(
    answers(), st.sampled_from(["```json\n{}\n```", "```\n{}```", " \n{}\n\n", "```json {} ```"])
)
def test_a_fence_or_blanks_around_an_answer_change_nothing(answer, around):
    steps, expected, text = answer
    labels = parse_answer(around.replace("{}", text), steps)
    assert {label.step_index: label.label for label in labels} == expected


@given(answers(rationale=False), st.randoms())
def test_a_list_of_objects_says_the_same_and_order_does_not_matter(answer, random):
    steps, expected, _ = answer
    entries = [{"step": step, "label": name} for step, name in expected.items()]
    random.shuffle(entries)
    reply = reply_of(request(steps), json.dumps({"labels": entries}))
    assert [(label.step_index, label.label) for label in reply.labels] == list(expected.items())


def drop(value, step, other):
    del value["labels"][step]
    return f"no label for {step}"


def add(value, step, other):
    value["labels"]["99"] = value["labels"][step]
    return "a label for 99"


def rename(value, step, other):
    value["labels"]["98"] = value["labels"].pop(step)
    return f"no label for {step} and a label for 98"


def spell(value, step, other):
    value["labels"][f"0{step}"] = value["labels"][step]
    return f"two labels for {step}"


def misname(value, step, other):
    value["labels"][f"step {step}"] = value["labels"].pop(step)
    return f"expected the number of a step, got 'step {step}'"


def unknown(value, step, other):
    value["labels"][step] = other
    return f"step {step}: expected one of good, unnecessary, harmful, got "


def nothing(value, step, other):
    value["labels"][step] = None
    return f"step {step}: expected one of good, unnecessary, harmful, got None"


def number(value, step, other):
    value["labels"][step] = {"rationale": 7, "label": "good"}
    return f"step {step}: rationale: expected text, got 7"


def move(value, step, other):
    value["steps"] = value.pop("labels")
    return "expected an object with `labels`, got the keys steps"


MUTATIONS = [drop, add, rename, spell, misname, unknown, nothing, number, move]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@given(answers(), st.data())
def test_every_mutation_is_an_error_that_names_it(mutation, answer, data):
    steps, _, text = answer
    value = json.loads(text)
    step = data.draw(st.sampled_from(sorted(value["labels"])))
    other = data.draw(texts().filter(lambda name: name not in LABELS))
    expected = mutation(value, step, other)
    with pytest.raises(AnswerError) as raised:
        parse_answer(json.dumps(value), steps)
    assert expected in str(raised.value)
    assert len(str(raised.value)) < 400


@given(answers())
def test_a_repeated_property_is_an_error(answer):
    steps, _, text = answer
    doubled = text.replace(f'"{steps[-1]}"', f'"{steps[-1]}": "good", "{steps[-1]}"', 1)
    if '"labels"' in doubled.partition(f'"{steps[-1]}"')[0]:
        with pytest.raises(AnswerError, match=f"each property once, got two of {steps[-1]}"):
            parse_answer(doubled, steps)


@given(answers(), st.sampled_from(["so: {}", "{} done", "{}{}", "{},", "[{}]", "```json\n{}"]))
def test_text_around_an_answer_is_an_error_that_shows_it(answer, around):
    steps, _, text = answer
    with pytest.raises(
        AnswerError, match=r"expected (one JSON object and nothing around|an object)"
    ):
        parse_answer(around.replace("{}", text), steps)


@given(answers(), st.data())
def test_a_cut_answer_is_an_error(answer, data):
    steps, _, text = answer
    end = data.draw(st.integers(0, len(text.rstrip()) - 1))
    with pytest.raises(AnswerError, match="expected one JSON object"):
        parse_answer(text[:end], steps)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "```",
        "``````",
        "```\n" * 3000,
        "```json" + "\n" * 50_000,
        "[" * 100_000,
        '{"labels": ' * 50_000,
        '{"labels": {"0": ' + "1" * 5000 + "}}",
        '{"labels": {"0": "good"}, "more": ' + "7" * 5000 + "}",
        '{"labels": [' + "[" * 900 + "]" * 900 + "]}",
        "null",
        '"good"',
        '{"labels": "good"}',
        '{"labels": ["good"]}',
        '{"labels": [{"label": "good"}]}',
        '{"labels": [{"step": true, "label": "good"}]}',
        '{"labels": [{"step": 0.0, "label": "good"}]}',
        '{"labels": [{"step": -1, "label": "good"}]}',
        '{"labels": {"0": ["good"]}}',
        '{"labels": {"\u0660": "good"}}',
        '{"labels": {"9999999999": "good"}}',
        '{"labels": {"0": "Good"}}',
        '{"labels": {"0": {"rationale": "no label"}}}',
        '{"labels": {"0": "good"}, "labels": {"0": "good"}}',
        '{"labels": {"0": "go\nod"}}',
    ],
    ids=lambda text: text[:30].replace("\n", " "),
)
def test_what_no_schema_allows_and_models_write_nonetheless_is_an_error(text):
    with pytest.raises(AnswerError) as raised:
        parse_answer(text, (0,))
    assert len(str(raised.value)) < 400


def test_half_a_character_can_be_written_down():
    text = '{"labels": {"0": {"rationale": "a \\ud800 b", "label": "good"}}}'
    (label,) = parse_answer(text, (0,))
    assert label.rationale == "a ? b"
    with pytest.raises(AnswerError) as raised:
        parse_answer('{"labels": {"\\ud800": "good", "\\ud800": "good"}}', (0,))
    failure_of("unparseable", str(raised.value)).encode()


@pytest.mark.parametrize("mark", THOUGHTS_END)
@given(answer=answers(), thoughts=texts())
def test_thoughts_are_stripped_and_never_read(mark, answer, thoughts):
    steps, expected, text = answer
    wrong = json.dumps({"labels": dict.fromkeys(map(str, steps), "harmful")})
    reply = reply_of(request(steps), f"<think>{thoughts}{wrong}{mark}\n\n{text}")
    assert {label.step_index: label.label for label in reply.labels} == expected


@pytest.mark.parametrize("mark", THOUGHTS_END)
def test_an_answer_inside_thoughts_only_is_none(mark):
    text = '{"labels": {"0": "good", "1": "good", "2": "good"}}'
    for after in ("", "\n", "Done."):
        with pytest.raises(AnswerError, match="expected one JSON object"):
            reply_of(request(), f"<think>{text}{mark}{after}")


def test_the_last_mark_of_any_kind_ends_the_thoughts():
    assert without_thoughts("a</thinking>b</think>c") == ("c", 21)
    assert without_thoughts("a</think>b</thinking>c") == ("c", 21)
    assert without_thoughts("no thoughts") == ("no thoughts", 0)


def tokens_of(text, cuts, alternatives=None):
    """Cut a text into tokens; each has itself as its alternative, or what is given for its text."""
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    return [Token(piece, (alternatives or {}).get(piece, ((piece, -0.1),))) for piece in pieces]


LOGPROBS = st.one_of(st.floats(-30, 0), st.just(-math.inf), st.just(-9999.0))
ALTERNATIVES = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(['"', "good", ' "', '"good', '"harm', "un", "h", "", '"g', "\ufffd"]),
            texts(4),
        ),
        LOGPROBS,
    ),
    max_size=6,
)


@given(answers(), st.lists(st.integers(0, 10_000), max_size=60), st.data())
def test_probabilities_of_any_tokens_are_a_distribution_or_none(answer, cuts, data):
    steps, expected, text = answer
    thoughts = data.draw(st.sampled_from(["", "hm</think>", 'say "0": "good" </think>\n']))
    text = thoughts + text if "</think>" not in text else text
    tokens = [
        Token(token.text, ((token.text, data.draw(LOGPROBS)), *data.draw(ALTERNATIVES)))
        for token in tokens_of(text, cuts)
    ]
    reply = reply_of(request(steps), text, tokens)
    assert {label.step_index: label.label for label in reply.labels} == expected
    for label in reply.labels:
        chances = [label.p_good, label.p_unnecessary, label.p_harmful]
        if None in chances:
            assert chances == [None] * 3
        else:
            assert all(0 <= chance <= 1 for chance in chances)
            assert math.isclose(sum(chances), 1, abs_tol=1e-9)


@given(
    answers(),
    st.lists(st.integers(0, 10_000), max_size=60),
    st.sampled_from(["", "hm", "é🙂 " * 9]),
)
def test_a_token_that_is_sure_makes_its_own_label_certain(answer, cuts, thoughts):
    steps, expected, text = answer
    if thoughts and not any(mark in text for mark in THOUGHTS_END):
        text = f'<think>{thoughts}"0": "harmful"</think>{text}'
    tokens = tokens_of(text, cuts)
    for label in reply_of(request(steps), text, tokens).labels:
        assert getattr(label, f"p_{expected[label.step_index]}") == 1.0
        assert label.p_good + label.p_unnecessary + label.p_harmful == 1.0


def test_no_tokens_no_probabilities():
    reply = reply_of(request(), '{"labels":{"0":"good","1":"good","2":"harmful"}}')
    assert {label.p_good for label in reply.labels} == {None}


CUT = {
    "quote apart": (['{"labels":{"0":"', "good", '"}}'], 1, "{}"),
    "quote before": (['{"labels":{"0":', '"good', '"}}'], 1, '"{}'),
    "quote behind": (['{"labels":{"0":"', 'good"', "}}"], 1, '{}"'),
    "quote and comma": (['{"labels":{"0":"', 'good"}', "}"], 1, '{}"}'),
    "colon and quote": (['{"labels":{"0"', ':"good', '"}}'], 1, ':"{}'),
    "all in one": (['{"labels":{"0":"good"}}'], 0, '{"labels":{"0":"{}"}}'),
    "first letter": (['{"labels":{"0":"', "g", 'ood"}}'], 1, None),
}


@pytest.mark.parametrize("case", CUT)
def test_probabilities_are_the_mass_of_what_begins_each_label(case):
    pieces, place, form = CUT[case]
    names = [form.replace("{}", name) for name in LABELS] if form else ["g", "u", "h"]
    mass = dict(zip(names, (0.5, 0.2, 0.1), strict=True)) | {"else": 0.2}
    alternatives = tuple((text, math.log(share)) for text, share in mass.items())
    tokens = [
        Token(text, alternatives if index == place else ((text, 0.0),))
        for index, text in enumerate(pieces)
    ]
    (label,) = reply_of(request((0,)), "".join(pieces), tokens).labels
    assert label.p_good == pytest.approx(0.5 / 0.8)
    assert label.p_unnecessary == pytest.approx(0.2 / 0.8)
    assert label.p_harmful == pytest.approx(0.1 / 0.8)


def test_several_tokens_that_begin_one_label_count_together():
    token = Token("un", (("un", math.log(0.4)), ("u", math.log(0.2)), ("harmful", math.log(0.1))))
    assert label_shares(token, "") == pytest.approx(
        {"good": 0.0, "unnecessary": 0.6, "harmful": 0.1}
    )


@pytest.mark.parametrize("text", ["goodness", "goo!", "Good", " good", "bad", "", '"', "harmf "])
def test_what_begins_no_label_has_no_share(text):
    assert set(label_shares(Token("good", ((text, 0.0),)), "").values()) == {0.0}


def test_an_alternative_with_other_text_before_the_label_has_no_share():
    token = Token(':"good', ((':"good', math.log(0.3)), (': "harmful', math.log(0.7))))
    assert label_shares(token, ':"')["harmful"] == 0.0


def test_a_rationale_that_quotes_an_answer_does_not_shift_the_labels():
    rationale = 'said "label": "good", {"1": "good"} and \\ "2":"good'
    entries = {
        str(step): {"rationale": rationale, "label": name}
        for step, name in enumerate(("harmful", "unnecessary", "harmful"))
    }
    text = json.dumps({"labels": entries})
    labels = reply_of(request(), text, tokens_of(text, range(len(text)))).labels
    assert [label.label for label in labels] == ["harmful", "unnecessary", "harmful"]
    assert [label.p_harmful for label in labels] == [1.0, 0.0, 1.0]
    assert [label.p_unnecessary for label in labels] == [0.0, 1.0, 0.0]


def test_other_properties_with_labels_in_them_cost_the_probabilities_and_nothing_else():
    text = '{"draft": {"0": "harmful"}, "labels": {"0": "good"}}'
    (label,) = reply_of(request((0,)), text, tokens_of(text, range(len(text)))).labels
    assert (label.label, label.p_good) == ("good", None)


def test_tokens_that_end_before_a_label_give_no_probabilities():
    text = '{"labels":{"0":"good"}}'
    (label,) = reply_of(request((0,)), text, [Token(text[:10], ((text[:10], 0.0),))]).labels
    assert (label.label, label.p_good) == ("good", None)


def test_usage_goes_into_the_reply():
    reply = reply_of(request((0,)), '{"labels":{"0":"good"}}', prompt_tokens=5, seconds=0.5)
    assert (reply.prompt_tokens, reply.seconds, reply.failure) == (5, 0.5, None)
