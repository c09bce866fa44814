from pathlib import Path

import pytest

from srft_prep.critic.prompt import PLACEHOLDERS, load_prompt
from srft_prep.errors import ConfigError
from srft_prep.types import LABELS

SHIPPED = Path(__file__).resolve().parents[2] / "prompts" / "step_critic.md"


def changed(folder, old, new):
    text = SHIPPED.read_text(encoding="utf-8")
    assert old in text
    path = folder / "prompt.md"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_the_shipped_prompt_loads_whole():
    prompt = load_prompt(SHIPPED)
    assert (prompt.name, prompt.version) == ("step_critic", 1)
    assert set(prompt.labels) == set(LABELS)
    item = prompt.output_schema["properties"]["labels"]["items"]
    assert item["properties"]["label"]["enum"] == list(LABELS)
    assert item["additionalProperties"] is prompt.output_schema["additionalProperties"] is False
    assert all(f"{{{name}}}" in prompt.user for name in PLACEHOLDERS)
    assert all(f"`{label}`" in prompt.system for label in LABELS)
    assert "## " not in prompt.system + prompt.user


def test_the_shipped_prompt_borrows_no_sentence_of_the_paper(shared_data):
    paper = (shared_data.parent / "paper" / "srft.txt").read_text(encoding="utf-8")
    appendix = " ".join(paper[paper.index("A. Critic Prompt") :].lower().split())
    words = SHIPPED.read_text(encoding="utf-8").lower().split()
    runs = [" ".join(words[at : at + 7]) for at in range(len(words) - 6)]
    assert [run for run in runs if run in appendix] == []


def test_filling_is_one_pass_so_that_braces_in_the_task_stay():
    filled = load_prompt(SHIPPED).fill(task="say {steps} {x}", steps="S", first_step=0, last_step=7)
    assert "say {steps} {x}" in filled
    assert "Label the steps 0 to 7" in filled


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
        ("version: 1", "version: one", "version: expected a number, got 'one'"),
        ("  harmful: leads", "  bad: leads", "labels: expected a meaning .* got good"),
        ("output_schema:", "schema:", "output_schema: expected a JSON schema .* got none"),
        ("\n    labels:", "\n    steps:", "output_schema: expected the property `labels`, got s"),
        ("## System", "## Sistem", "expected the headings .* got ## User"),
        ("{first_step}", "{first}", r"user part: expected the placeholders \{first_step\}"),
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
