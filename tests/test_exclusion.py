"""Instances of the evaluation stay out, and no others."""

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.errors import ConfigError
from srft_prep.exclusion import Exclusion, names_instance, read_exclusions
from srft_prep.types import Trajectory

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
        "instance_id\na__b-1\nc/d\n",
        'repo,problem,instance_id\r\na/b,"one,\r\ntwo",a__b-1\r\n\r\nc/d,x y,c__d\r\n',
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
        (b"# ids\na__b-1, c__d-2\n", ":2: expected one instance id or repository a line, got 'a__"),
        (b"a__b-1\n\nthe flask runs\n", ":3: expected one instance id .*, got 'the flask runs'"),
        (b"id,repo\na__b-1,a/b\n", ":1: expected one instance id .*, got 'id,repo'"),
        (b"instance_id,repo\na__b-1,a/b\n,c/d\n", ":3: expected an instance_id, got none"),
        (b"\xff\xfea", "cannot be read as a list of exclusions"),
    ],
)
def test_a_file_without_names_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as error:
        read_exclusions(path)
    assert str(error.value).startswith(str(path))


def unnamed(trajectory_id: str) -> Trajectory:
    return Trajectory(trajectory_id=trajectory_id, instance_id="", format="messages", messages=())


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("django__django-11999", "django__django-11999"),
        ("django__django-11999", "django__django-11999.3fa9"),
        ("django__django-11999", "run-7/django__django-11999"),
        ("django__django-11999", "2025/run.1/Django__django-11999_2.3fa9"),
        ("django__django-11999", "django__django-11999.traj.0123abcd"),
        ("django/django", "run/django__django-11999.3fa9"),
        ("a__b.0123abcd.pr_8", "a__b.0123abcd.pr_8.xyz"),
        ("a/b", "a__b.0123abcd.pr_8.xyz"),
        ("task-5", "task-5.3fa9"),
    ],
)
def test_a_run_without_an_instance_is_known_by_its_own_id(name: str, run: str) -> None:
    exclusion = Exclusion([name.replace("/", "__")])
    assert exclusion.matches_run(unnamed(run)) == {name.replace("/", "__")}
    assert not Exclusion(["x__y", "django__django-1", "a__b-1"]).matches_run(unnamed(run))


def test_an_instance_is_named_by_a_field_or_by_an_id_of_its_form() -> None:
    assert names_instance(unnamed("run/a__b-1.x"))
    assert names_instance(unnamed("a__b.0123abcd.pr_8.xyz"))
    assert not names_instance(unnamed("run-17"))
    assert not names_instance(unnamed("runs.0123abcd"))


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
