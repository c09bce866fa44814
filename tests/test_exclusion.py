"""Instances of the evaluation stay out, and no others."""

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.errors import ConfigError
from srft_prep.exclusion import Exclusion, read_exclusions

words = st.from_regex(r"[a-z][a-z0-9]{0,5}(?:[-_.][a-z0-9]{1,4})?", fullmatch=True)


def excludes(tmp_path: Path, text: str) -> Exclusion:
    path = tmp_path / "exclude.txt"
    path.write_text(text)
    return Exclusion(read_exclusions(path))


@pytest.mark.parametrize(
    ("name", "covered", "free"),
    [
        ("django__django-11999", ["django__django-11999", "Django__Django-11999"], []),
        ("django__django-11999", ["django__django-11999_3"], ["django__django-1199"]),
        ("django__django-11999", [], ["django__django-119990", "django__django", ""]),
        ("django/django", ["django__django-1", "django__django-11999_2"], ["django__channels-1"]),
        ("DJANGO__django", ["django__django-1"], ["mydjango__django-1"]),
        ("pallets/flask", ["pallets__flask-12"], ["pallets__flask-cors-12"]),
        ("pallets__flask-cors", ["pallets__flask-cors-12"], ["pallets__flask-12"]),
        (
            "pydantic/pydantic",
            ["pydantic__pydantic.acb0f10f.pr_8316"],
            ["pydantic__core.acb0f10f.x"],
        ),
        ("pydantic__pydantic.acb0f10f.pr_8316", ["pydantic__pydantic.acb0f10f.pr_8316"], []),
        ("pydantic__pydantic.acb0f10f.pr_8316", [], ["pydantic__pydantic.acb0f10f.pr_831"]),
        ("owner/repo.js", ["owner__repo.js-7"], ["owner__repo-7"]),
        ("owner/my_repo", ["owner__my_repo-7", "owner__my_repo.0123abc.bug__x"], ["owner__my-7"]),
    ],
)
def test_an_id_covers_its_copies_and_a_repository_its_instances(
    name: str, covered: list[str], free: list[str], tmp_path: Path
) -> None:
    exclusion = excludes(tmp_path, name)
    assert all(exclusion.covers(instance) for instance in covered)
    assert not any(exclusion.covers(instance) for instance in free)


@given(words, words, words, st.integers(1, 99999))
def test_a_repository_covers_exactly_the_instances_that_bear_its_name(
    owner: str, repo: str, other: str, number: int
) -> None:
    exclusion = Exclusion([f"{owner}__{repo}"])
    assert exclusion.covers(f"{owner}__{repo}-{number}")
    assert exclusion.covers(f"{owner}__{repo}.0123abcd.lm_rewrite__x")
    assert exclusion.covers(f"{owner}__{other}-{number}") == (other == repo)


@pytest.mark.parametrize(
    "text",
    [
        "a__b-1\nc/d\n",
        "\ufeff# evaluation\r\na__b-1  # twice\r\n\r\n  c/d\r\na__b-1\r\n",
        '["a__b-1", "c/d"]',
        ' [{"instance_id": "a__b-1", "repo": "a/b"}, "c__d"]',
        '{"instance_id": "a__b-1"}\n\n{"instance_id": "c/d"}\n',
    ],
)
def test_text_json_and_jsonl_say_the_same(text: str, tmp_path: Path) -> None:
    path = tmp_path / "exclude"
    path.write_text(text, encoding="utf-8")
    assert read_exclusions(path) == ("a__b-1", "c__d")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected instance ids or repositories, one a line; found none"),
        (b"# nothing\n\n", "found none"),
        (b"[]", "found none"),
        (b"[1, 2]", "expected strings or objects with instance_id"),
        (b"[null]", "expected strings or objects with instance_id"),
        (b'[["a"]]', "expected strings or objects with instance_id"),
        (b'{"id": "x"}', "expected strings or objects with instance_id"),
        (b'{"instance_id": 5}', "expected strings or objects with instance_id"),
        (b'{"instance_id": "x"', "expected a JSON list or JSONL: unexpected end of data"),
        (b"\xff\xfea", "cannot be read as a list of exclusions"),
    ],
)
def test_a_file_without_names_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as error:
        read_exclusions(path)
    assert str(error.value).startswith(str(path))


def test_the_instances_of_a_real_data_set_are_excluded_by_its_own_rows(
    shared_data: Path, tmp_path: Path
) -> None:
    index = (shared_data / "trajectories" / "INDEX.jsonl").read_bytes().splitlines()
    ids = {orjson.loads(line)["instance_id"] for line in index} - {None}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps({"instance_id": each}) for each in sorted(ids)))
    exclusion = Exclusion(read_exclusions(path))
    assert all(exclusion.covers(instance) for instance in ids)
    assert not exclusion.covers("example__slots-12")
