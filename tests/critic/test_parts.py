import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic.parts import Part, context_hash
from tests.strategies import texts

CONTEXTS = st.none() | st.text("0123456789abcdef", min_size=1, max_size=8)
OUTCOMES = (True, False, None)


@st.composite
def parts(draw):
    fields = {"context": draw(CONTEXTS), "vote": draw(st.integers(0, 999_999))}
    if draw(st.booleans()):
        return Part(**fields)
    first = draw(st.integers(0, 10**6))
    last = first + draw(st.integers(0, 10**6))
    return Part(first=first, last=last, limit=draw(st.integers(1, 10**12 - 1)), **fields)


@given(parts())
def test_a_part_is_read_back_from_its_text(part):
    assert Part.parse(str(part)) == part


@given(parts(), parts())
def test_two_parts_never_have_one_text(one, other):
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("all", Part()),
        ("steps:0-41@8192", Part(first=0, last=41, limit=8192)),
        ("all+context:3f2a", Part(context="3f2a")),
        ("all+vote:2", Part(vote=2)),
        (
            "steps:7-7@4096+context:00ff+vote:1",
            Part(first=7, last=7, limit=4096, context="00ff", vote=1),
        ),
    ],
)
def test_the_texts_in_ledgers_stay_as_they_are(text, part):
    assert (Part.parse(text), str(part)) == (part, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unasked",
        "ALL",
        "all ",
        "all\n",
        "all+vote:0",
        "all+vote:01",
        "all+vote:1+context:ab",
        "all+context:",
        "all+context:XY",
        "steps:0-1",
        "steps:-1-2@8",
        "steps:0-1@",
        "steps:0-1@8\n",
        "steps:0-12345678901@8",
    ],
)
def test_what_is_no_part_is_none(text):
    assert Part.parse(text) is None


def test_a_part_names_its_steps():
    assert Part().steps(4) == range(4)
    assert Part(first=2, last=3, limit=9).steps(4) == range(2, 4)


def test_context_none_has_no_hash():
    assert {context_hash("none", outcome, "diff") for outcome in OUTCOMES} == {None}


@given(texts(), texts())
def test_the_hash_tells_every_outcome_and_patch_apart_and_nothing_more(one, other):
    assert len({context_hash("outcome", outcome, one) for outcome in OUTCOMES}) == 3
    assert context_hash("outcome", True, one) == context_hash("outcome", True, other)
    same = context_hash("patch", False, one) == context_hash("patch", False, other)
    assert same == (one == other)
    assert context_hash("patch", False, None) == context_hash("outcome", False)
    assert Part.parse(f"all+context:{context_hash('patch', None, one)}") is not None
