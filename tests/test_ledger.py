import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.ledger import USAGE, Key, Ledger, key_of, labels_of, ledger_files
from tests import strategies
from tests.stages import trajectory

RUNS = [trajectory(f"run-{number}", num_steps=2) for number in range(4)]


def request(number: int = 0) -> CriticRequest:
    run = RUNS[number]
    return CriticRequest.of(run, part="all", steps=tuple(range(run.num_steps)))


def key(number: int = 0, *, critic_id: str = "critic@1") -> Key:
    return key_of(request(number), critic_id=critic_id, prompt_hash="prompt")


def reply(number: int = 0, *, note: str = "because", failure: str | None = None) -> CriticReply:
    labels = (
        StepLabel(step_index=0, label="good", p_good=0.9, p_unnecessary=0.1, p_harmful=0.0),
        StepLabel(step_index=1, label="harmful", rationale=note),
    )
    return CriticReply(
        request=request(number),
        labels=() if failure else labels,
        prompt_tokens=7,
        usd=0.5,
        failure=failure,
    )


def write_lines(folder: Path, *lines: bytes, name: str = "ledger-00000.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join(lines))
    return path


def line_of(folder: Path) -> bytes:
    """One sound line, as the ledger writes it."""
    with Ledger(folder) as ledger:
        ledger.append(key(), reply())
    [path] = ledger_files(folder)
    line = path.read_bytes()
    path.unlink()
    return line


def test_what_was_appended_is_found_at_once_and_after_reopening(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        assert not ledger.has(key(), failed=True)
        assert ledger.get(key()) is None
        ledger.append(key(), reply())
        found = ledger.get(key())
    with Ledger(tmp_path) as ledger:
        assert ledger.get(key()) == found
        assert found is not None
        assert tuple(labels_of(found)) == reply().labels
        assert {name: found[name] for name in USAGE} == {
            name: getattr(reply().request if name == "clipped_tokens" else reply(), name)
            for name in USAGE
        }
        assert found["trajectory_id"] == "run-0"
        assert not ledger.has(key(1), failed=True)
        assert ledger.num_damaged == 0


def test_a_ledger_goes_on_in_another_file_once_one_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srft_prep.ledger.ROLL_BYTES", 1000)
    with Ledger(tmp_path) as ledger:
        for number in range(4):
            ledger.append(key(number), reply(number, note="x" * 600))
        assert ledger.get(key(0))["trajectory_id"] == "run-0"
    names = ["ledger-00000.jsonl", "ledger-00001.jsonl"]
    assert [path.name for path in ledger_files(tmp_path)] == names
    with Ledger(tmp_path) as ledger:
        found = [ledger.get(key(number))["trajectory_id"] for number in range(4)]
    assert found == [f"run-{number}" for number in range(4)]


@contextmanager
def files_to_open(number: int) -> Iterator[None]:
    """Let this process open no more than some further files at a time."""
    held = [os.dup(0) for _ in range(number)]  # what other tests left open lies in between
    for each in held:
        os.close(each)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_ledger_of_more_files_than_a_process_may_have_open_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srft_prep.ledger.ROLL_BYTES", 1)
    critics = [f"critic@{number}" for number in range(60)]
    with files_to_open(40):
        with Ledger(tmp_path) as ledger:
            for critic in critics:
                ledger.append(key(critic_id=critic), reply(note=critic))
        assert len(ledger_files(tmp_path)) == len(critics)
        with Ledger(tmp_path) as ledger:
            ledger.append(key(1), reply(1))
            for critic in [*critics, *critics[::-1]]:
                found = ledger.get(key(critic_id=critic))
                assert found is not None
                assert found["labels"][1]["rationale"] == critic


def test_a_ledger_that_could_not_open_its_next_file_goes_on_in_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away = tmp_path / "ledger", tmp_path / "away"
    folder.mkdir()
    with Ledger(folder) as ledger:
        ledger.append(key(), reply())
        monkeypatch.setattr("srft_prep.ledger.ROLL_BYTES", 1)
        folder.rename(away)
        with pytest.raises(FileNotFoundError):
            ledger.append(key(1), reply(1))
        away.rename(folder)
        monkeypatch.undo()
        for number in (1, 2):
            ledger.append(key(number), reply(number))
        assert ledger.get(key(1)) is not None
    with Ledger(folder) as ledger:
        assert [ledger.has(key(number), failed=False) for number in range(4)] == [1, 1, 1, 0]


def test_a_key_is_content_critic_prompt_and_part() -> None:
    assert key() == (RUNS[0].content_hash, "critic@1", "prompt", "all")


def test_another_critic_has_keys_of_its_own(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(key(), reply())
        assert not ledger.has(key(critic_id="critic@2"), failed=True)


def test_a_line_is_in_the_file_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for count in (1, 2, 3):
            ledger.append(key(count), reply(count))
            [path] = ledger_files(tmp_path)
            assert path.read_bytes().count(b"\n") == count


def test_a_ledger_that_is_only_read_makes_no_file(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        assert ledger.get(key()) is None
    assert list(tmp_path.iterdir()) == []


def test_every_run_that_asks_writes_a_file_of_its_own(tmp_path: Path) -> None:
    for number in range(3):
        with Ledger(tmp_path) as ledger:
            ledger.append(key(number), reply(number))
    names = [path.name for path in ledger_files(tmp_path)]
    assert names == [f"ledger-0000{number}.jsonl" for number in range(3)]


def test_the_last_line_of_a_key_wins_within_a_file_and_across_files(tmp_path: Path) -> None:
    for note in ("second", "third"):
        with Ledger(tmp_path) as ledger:
            ledger.append(key(), reply(note="first"))
            ledger.append(key(), reply(note=note))
            assert ledger.get(key())["labels"][1]["rationale"] == note  # type: ignore[index]
    with Ledger(tmp_path) as ledger:
        assert ledger.get(key())["labels"][1]["rationale"] == "third"  # type: ignore[index]


def test_a_failure_is_an_answer_only_where_it_is_taken_for_one(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(key(), reply(failure="no list"))
        assert (ledger.has(key(), failed=True), ledger.has(key(), failed=False)) == (True, False)
        ledger.append(key(), reply())
        assert ledger.has(key(), failed=False)
        ledger.append(key(), reply(failure="asked in vain"))
        assert not ledger.has(key(), failed=False)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_passed_over(tmp_path: Path, cut: int) -> None:
    line = line_of(tmp_path)
    other = line.replace(RUNS[0].content_hash.encode(), RUNS[1].content_hash.encode())
    write_lines(tmp_path, line, other[:-cut])
    with Ledger(tmp_path) as ledger:
        assert ledger.has(key(0), failed=False)
        assert not ledger.has(key(1), failed=True)
        assert ledger.num_damaged == 0
        ledger.append(key(1), reply(1))
    with Ledger(tmp_path) as ledger:
        assert ledger.has(key(1), failed=False)


def changed(line: bytes, **values: Any) -> bytes:
    return orjson.dumps(orjson.loads(line) | values) + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:40] + b"\n",
        lambda line: b"\xff\xfe" + line,
        lambda line: b"[1, 2]\n",
        lambda line: b"7\n",
        lambda line: b"\n",
        lambda line: changed(line, content_hash=None),
        lambda line: changed(line, labels=None),
        lambda line: changed(line, labels=[{"step_index": 0}]),
        lambda line: changed(line, labels=[{"step_index": 0, "label": "great"}]),
        lambda line: changed(line, labels=[{"step_index": "0", "label": "good"}]),
        lambda line: changed(line, labels=[{"step_index": 0, "label": "good", "score": 1}]),
        lambda line: changed(line, labels=["good"]),
        lambda line: changed(line, labels={}),
        lambda line: changed(line, labels=""),
        lambda line: changed(line, labels=[{"step_index": -1, "label": "good"}]),
        lambda line: changed(line, labels=[{"step_index": 1 << 31, "label": "good"}]),
        lambda line: changed(line, labels=[{"step_index": 0, "label": "good", "p_good": "0.5"}]),
        lambda line: changed(line, labels=[{"step_index": 0, "label": "good", "p_harmful": 1.5}]),
        lambda line: changed(line, labels=[{"step_index": 0, "label": "good", "p_good": True}]),
        lambda line: changed(line, labels=[{"step_index": 0, "label": "good", "rationale": 7}]),
        lambda line: changed(line, usd="much"),
        lambda line: changed(line, failure=3),
    ],
)
def test_a_damaged_line_is_counted_and_its_neighbours_stay(tmp_path: Path, damage: Any) -> None:
    line = line_of(tmp_path)
    other = line.replace(RUNS[0].content_hash.encode(), RUNS[1].content_hash.encode())
    third = line.replace(RUNS[0].content_hash.encode(), RUNS[2].content_hash.encode())
    write_lines(tmp_path, line, damage(other), third)
    with Ledger(tmp_path) as ledger:
        assert [ledger.has(key(number), failed=True) for number in range(3)] == [True, False, True]
        assert ledger.num_damaged == 1
        found = ledger.get(key(2))
        assert found is not None
        assert len(list(labels_of(found))) == 2


@pytest.mark.parametrize("steps", [[], [0], [0, 0], [0, 2], [0, 1, 2], [0, 1, 1]])
def test_a_line_that_does_not_label_each_step_once_is_dropped_but_stays_on_the_bill(
    tmp_path: Path, steps: list[int]
) -> None:
    sound = line_of(tmp_path)
    labels = [{"step_index": step, "label": "good"} for step in steps]
    write_lines(tmp_path, changed(sound, labels=labels))
    with Ledger(tmp_path) as ledger:
        ledger.drop_unless_complete(key(), steps=range(2))
        assert ledger.get(key()) is None
        assert not ledger.has(key(), failed=True)
        assert ledger.num_damaged == 1
        assert ledger.spent(key())["usd"] == 0.5
        ledger.append(key(), reply())
        ledger.drop_unless_complete(key(), steps=range(2))
        assert ledger.has(key(), failed=False)
        assert ledger.spent(key())["usd"] == 1.0
        assert ledger.num_damaged == 1


def test_a_sound_line_and_a_failure_are_not_dropped(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        sound = reply()
        ledger.append(key(0), replace(sound, labels=sound.labels[::-1]))
        ledger.append(key(1), reply(1, failure="no list"))
        for number in range(3):
            ledger.drop_unless_complete(key(number), steps=range(2))
        assert [ledger.has(key(number), failed=True) for number in range(3)] == [True, True, False]
        assert ledger.num_damaged == 0


def test_ledgers_copied_in_under_other_names_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path, line_of(tmp_path), name="ledger-job3-00000.jsonl")
    with Ledger(tmp_path) as ledger:
        assert ledger.has(key(), failed=False)
        ledger.append(key(1), reply(1))
    names = {path.name for path in ledger_files(tmp_path)}
    assert names == {"ledger-job3-00000.jsonl", "ledger-00000.jsonl"}


operations = st.lists(
    st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), strategies.texts()), max_size=12
)


@settings(deadline=None)  # writes files
@given(operations)
def test_reopening_anywhere_changes_no_lookup(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[int, bool, bool, str]]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    newest: dict[int, CriticReply] = {}
    ledger = Ledger(folder)
    for number, failing, reopen, note in operations:
        newest[number] = reply(number, note=note, failure=note or "failed" if failing else None)
        ledger.append(key(number), newest[number])
        if reopen:
            ledger.close()
            ledger = Ledger(folder)
        for other in range(4):
            expected = newest.get(other)
            found = ledger.get(key(other))
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert tuple(labels_of(found)) == expected.labels
                assert found["failure"] == expected.failure
                assert ledger.has(key(other), failed=False) == (expected.failure is None)
    ledger.close()


@settings(deadline=None)  # writes files
@given(st.integers(0, 3), st.data())
def test_any_label_reads_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, number: int, data: st.DataObject
) -> None:
    labels = tuple(data.draw(strategies.step_labels(step)) for step in range(2))
    folder = tmp_path_factory.mktemp("ledger")
    with Ledger(folder) as ledger:
        ledger.append(key(number), CriticReply(request=request(number), labels=labels))
    with Ledger(folder) as ledger:
        found = ledger.get(key(number))
        assert found is not None
        assert tuple(labels_of(found)) == labels
