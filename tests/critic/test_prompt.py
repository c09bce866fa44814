from pathlib import Path

import pytest

from srft_prep.critic.answers import parse_answer
from srft_prep.critic.prompt import PLACEHOLDERS, answer_form, load_prompt
from srft_prep.errors import ConfigError
from srft_prep.types import LABELS

SHIPPED = Path(__file__).resolve().parents[2] / "prompts" / "step_critic.md"


def changed(folder, old, new):
    text = SHIPPED.read_text(encoding="utf-8")
    assert old in text
    path = folder / "prompt.md"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def filled(prompt, **values):
    usual = {"task": "T", "context": "C", "steps": "S", "first_step": 0, "last_step": 7}
    return prompt.fill(**{**usual, "answer": "A", **values})


def test_the_shipped_prompt_loads_whole():
    prompt = load_prompt(SHIPPED)
    assert (prompt.name, prompt.version) == ("step_critic", 2)
    assert set(prompt.labels) == set(LABELS)
    assert prompt.output_schema["required"] == ["labels"]
    assert prompt.output_schema["additionalProperties"] is False
    assert all(f"{{{name}}}" in prompt.user for name in PLACEHOLDERS)
    assert prompt.takes_context
    assert all(f"`{label}`" in prompt.system for label in LABELS)
    assert "## " not in prompt.system + prompt.user


def test_the_shipped_prompt_borrows_no_sentence_of_the_paper(shared_data):
    paper = (shared_data.parent / "paper" / "srft.txt").read_text(encoding="utf-8")
    appendix = " ".join(paper[paper.index("A. Critic Prompt") :].lower().split())
    words = SHIPPED.read_text(encoding="utf-8").lower().split()
    runs = [" ".join(words[at : at + 7]) for at in range(len(words) - 6)]
    assert [run for run in runs if run in appendix] == []


def test_filling_is_one_pass_so_that_braces_in_the_texts_stay():
    texts = {name: f"say {{steps}} {{task}} {name}" for name in ("task", "context", "steps")}
    shared, rest = filled(load_prompt(SHIPPED), **texts)
    assert texts["task"] in shared
    assert texts["context"] in shared
    assert texts["steps"] in rest
    assert "Label the steps 0 to 7" in rest


def test_other_braces_of_a_prompt_stay(tmp_path):
    prompt = load_prompt(changed(tmp_path, "What the agent was told:", 'Told: {"a": {x}} {}'))
    shared, _ = filled(prompt)
    assert 'Told: {"a": {x}} {}' in shared


def test_what_is_shared_ends_where_the_steps_begin():
    prompt = load_prompt(SHIPPED)
    shared, rest = filled(prompt)
    assert rest.startswith("S")
    same, other = filled(prompt, steps="X", first_step=3, last_step=4, answer="B")
    assert same == shared
    assert other != rest


def test_a_prompt_without_a_place_for_context_says_so(tmp_path):
    assert not load_prompt(changed(tmp_path, "{context}\n", "")).takes_context


@pytest.mark.parametrize("rationale", [False, True])
def test_the_schema_asks_for_exactly_the_steps_in_their_order(rationale):
    schema = load_prompt(SHIPPED).schema_for((3, 4, 11), rationale=rationale)
    labels = schema["properties"]["labels"]
    assert list(labels["properties"]) == labels["required"] == ["3", "4", "11"]
    assert labels["additionalProperties"] is False
    step = schema["$defs"]["step"]
    assert {name["$ref"] for name in labels["properties"].values()} == {"#/$defs/step"}
    if rationale:
        assert list(step["properties"]) == step["required"] == ["rationale", "label"]
        step = step["properties"]["label"]
    assert step == {"type": "string", "enum": list(LABELS)}


def test_other_properties_of_the_schema_are_asked_for_as_they_are(tmp_path):
    more = "labels: {type: object}\n    summary: {type: string}"
    prompt = load_prompt(changed(tmp_path, "labels: {type: object}", more))
    schema = prompt.schema_for((0,), rationale=False)
    assert schema["properties"]["summary"] == {"type": "string"}
    assert prompt.output_schema["properties"]["labels"] == {"type": "object"}, "it was changed"


@pytest.mark.parametrize("rationale", [False, True])
@pytest.mark.parametrize("steps", [(0,), (4, 5), tuple(range(2, 30))])
def test_the_form_of_the_answer_is_one_that_the_schema_takes(steps, rationale):
    form = answer_form(steps, rationale=rationale)
    text, _, words = form.partition(", with ")
    assert words == "good or unnecessary or harmful for <label>"
    example = text.replace("<label>", "good").replace(", ...", "")
    labels = parse_answer(example, sorted({steps[0], steps[-1]}))
    assert {label.rationale for label in labels} == {"<one sentence>" if rationale else None}
    assert ("..." in form) == (len(steps) > 1)


def test_the_hash_follows_the_bytes(tmp_path):
    same = tmp_path / "copy.md"
    same.write_bytes(SHIPPED.read_bytes())
    assert load_prompt(same).prompt_hash == load_prompt(SHIPPED).prompt_hash
    other = changed(tmp_path, "hard cases", "difficult cases")
    assert load_prompt(other).prompt_hash != load_prompt(SHIPPED).prompt_hash


def test_windows_line_ends_load_the_same_text(tmp_path):
    path = tmp_path / "crlf.md"
    path.write_bytes(SHIPPED.read_bytes().replace(b"\n", b"\r\n"))
    assert load_prompt(path).user == load_prompt(SHIPPED).user


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nname", "name", "expected YAML front matter between two lines `---`"),
        ("name: step_critic", "name: [", "expected YAML in the front matter"),
        ("name: step_critic", "title: x", "name: expected text, got None"),
        ("version: 2", "version: one", "version: expected a number, got 'one'"),
        ("  harmful: leads", "  bad: leads", "labels: expected a meaning .* got good"),
        ("output_schema:", "schema:", "output_schema: expected a JSON schema .* got none"),
        ("\n    labels:", "\n    steps:", "output_schema: expected the property `labels`, got s"),
        ("{type: object}", "{type: array}", "labels: expected `type: object` .* got .*array"),
        ("{type: object}", "[]", r"output_schema: labels: expected `type: object`"),
        ("## System", "## Sistem", "expected the headings .* got ## User"),
        ("{first_step}", "{first}", r"user part: expected the placeholders \{first_step\}"),
        ("{answer}", "as JSON", r"user part: expected the placeholders \{answer\}"),
        ("{answer}", "{answer} {context}", r"expected \{context\} before \{steps\}, got it aft"),
    ],
)  # fmt: skip
def test_a_broken_prompt_is_named_with_what_was_expected(tmp_path, old, new, message):
    path = changed(tmp_path, old, new)
    with pytest.raises(ConfigError, match=message) as raised:
        load_prompt(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_prompt_that_cannot_be_read_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="expected a prompt file: No such file"):
        load_prompt(tmp_path / "none.md")
    (tmp_path / "raw.md").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="expected UTF-8 text"):
        load_prompt(tmp_path / "raw.md")
