import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic.rules.effects import (
    effect_of,
    read_files,
    restored_files,
    strongest,
    written_files,
)
from srft_prep.critic.rules.shell import parse


def effect(text):
    return strongest(effect_of(command) for command in parse(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cd /x && cat a.py | head -n 20", [("cd", "/x"), ("cat", "a.py"), ("head", "-n", "20")]),
        ("FOO=1 sudo rm -rf 'a b'", [("rm", "-rf", "a b")]),
        ("timeout 60 pytest -x", [("pytest", "-x")]),
        ('echo "it\'s" # no comment;\nls', [("echo", "it's"), ("ls",)]),
        ("x=$(git stash) ; ls", [("git", "stash"), ("ls",)]),
        ('echo "open', [("echo", "open")]),
    ],
)
def test_a_text_is_split_into_its_commands(text, words):
    assert [command.words for command in parse(text)] == words


def test_a_heredoc_belongs_to_its_command_and_its_text_is_no_command():
    first, second = parse("cat <<'EOF' > a.py && python a.py\nit's; rm -rf /\nEOF\n")
    assert (first.words, first.targets, first.body) == (("cat",), ("a.py",), "it's; rm -rf /\n")
    assert second.words == ("python", "a.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grep -rn 'a > b' . 2>/dev/null", "reads"),
        ("python -m pytest -q 2>&1 | tail -5", "reads"),
        ("./tests/runtests.py forms", "reads"),
        ("python manage.py test", "reads"),
        ("git log --oneline && git diff", "reads"),
        ("git stash list", "reads"),
        ("pip list", "reads"),
        ("sed -n '1,5p' a.py", "reads"),
        ("python -c 'print(1)'", "reads"),
        ("python fix.py", "may write"),
        ("./configure", "may write"),
        ("make", "may write"),
        ("sed -i.bak 's/a/b/' a.py", "writes"),
        ("sed --in-place s/a/b/ a.py", "writes"),
        ("perl -pi -e 's/a/b/' a.py", "writes"),
        ("ls >> log.txt", "writes"),
        ("ls &> log.txt", "writes"),
        ("cat a | tee b", "writes"),
        ("git -C /r checkout a.py", "writes"),
        ("git stash pop", "writes"),
        ("pip install -e .", "writes"),
        ("find . -name x | xargs rm", "writes"),
        ("find . -delete", "writes"),
        ("python - <<'E'\nopen('a', 'w')\nE", "writes"),
    ],
)
def test_commands_that_write_are_known(text, expected):
    assert effect(text) == expected


def test_files_are_named():
    def written(text):
        return [path for command in parse(text) for path in written_files(command)]

    assert written("sed -i -e 's/a/b/' x.py y.py") == ["x.py", "y.py"]
    assert written("sed -i 's/a/b/' x.py > log") == ["log", "x.py"]
    assert written("python - <<'E'\nopen('pkg/a.py', 'w').write('')\nE") == ["pkg/a.py"]
    assert read_files(parse("cd /r && nl -ba a.py | sed -n '1,5p'")) == ("a.py",)
    assert read_files(parse("cat a.py && rm a.py")) is None
    (checkout,) = parse("git checkout HEAD~1 -- a.py b.py")
    assert restored_files(checkout) == ("a.py", "b.py")
    (branch,) = parse("git checkout main")
    assert restored_files(branch) == ()


@given(st.text())
def test_any_text_parses(text):
    effect(text)
