import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import orjson
import pytest

from srft_prep.errors import ConfigError, LabelError
from srft_prep.gold import UNNAMED, GoldFile, GoldLabel, read_gold
from srft_prep.types import LABELS


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def row(step: int, label: str | None, annotator: str | None = None, **more: object) -> dict:
    named = {} if annotator is None else {"annotator": annotator}
    return {"trajectory_id": "run", "step_index": step, "label": label, **named, **more}


def test_a_later_line_of_an_annotator_wins_and_null_takes_a_label_back(tmp_path: Path) -> None:
    first = write(
        tmp_path / "1.jsonl", row(0, "good", "ada"), row(0, "harmful", "ada"), row(1, "good", "ada")
    )
    second = write(
        tmp_path / "2.jsonl",
        row(1, "unnecessary", "ada"),
        row(2, "good", "ada"),
        row(2, None, "ada"),
    )
    gold = read_gold([first, second])
    assert gold.labels == {("run", 0): "harmful", ("run", 1): "unnecessary"}
    assert gold.by_annotator == {"ada": gold.labels}


def test_lines_without_a_name_are_one_annotators_within_a_file_and_anothers_in_the_next(
    tmp_path: Path,
) -> None:
    first = write(tmp_path / "1.jsonl", row(0, "harmful"), row(0, "good"), row(1, "good"))
    second = write(tmp_path / "2.jsonl", row(0, "harmful"), row(1, None), row(2, "good"))
    assert read_gold([first]).by_annotator == {UNNAMED: {("run", 0): "good", ("run", 1): "good"}}
    gold = read_gold([first, second])
    assert gold.labels == {("run", 1): "good", ("run", 2): "good"}
    assert gold.disagreements == {("run", 0)}
    assert {name: len(labels) for name, labels in gold.by_annotator.items()} == {
        f"(unnamed in {first})": 2,
        f"(unnamed in {second})": 2,
    }
    alone = read_gold([first, second], annotator=f"(unnamed in {second})")
    assert alone.labels == {("run", 0): "harmful", ("run", 2): "good"}
    assert read_gold([first, first]).labels == read_gold([first]).labels


def test_steps_that_annotators_label_differently_are_left_out_unless_adjudicated(
    tmp_path: Path,
) -> None:
    rows = [row(step, "good", "ada") for step in range(4)]
    rows += [row(0, "good", "bob"), row(1, "harmful", "bob"), row(2, "harmful", "bob")]
    path = write(tmp_path / "gold.jsonl", *rows, row(2, "unnecessary", "eve", adjudicates=True))
    gold = read_gold([path])
    assert gold.labels == {("run", 0): "good", ("run", 2): "unnecessary", ("run", 3): "good"}
    assert gold.disagreements == {("run", 1)}
    assert read_gold([path], annotator="bob").labels == {
        ("run", 0): "good",
        ("run", 1): "harmful",
        ("run", 2): "harmful",
    }
    with pytest.raises(ConfigError, match=r"labels by 'amy', there are some by ada, bob, eve"):
        read_gold([path], annotator="amy")


def test_the_shared_human_labels_are_gold_files(shared_data: Path) -> None:
    gold = read_gold(sorted((shared_data / "human_labels").glob("*/gold.jsonl")))
    assert len(gold.labels) == 207 + 330 + 1876
    assert sum(label == "harmful" for label in gold.labels.values()) == 84 + 118 + 90
    assert not gold.disagreements


def test_a_torn_last_line_is_passed_over_and_the_next_label_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "gold.jsonl", row(0, "good"), row(1, "good"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert read_gold([path]).labels == {("run", 0): "good"}
    GoldFile(path).append(GoldLabel(trajectory_id="run", step_index=2, label="harmful"))
    assert read_gold([path]).labels == {("run", 0): "good", ("run", 2): "harmful"}
    path.write_bytes(whole[:-1])  # written by hand, without the last newline
    GoldFile(path).append(GoldLabel(trajectory_id="run", step_index=2, label="harmful"))
    assert len(read_gold([path]).labels) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "expected one JSON object, got no JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"trajectory_id": "a", "label": "good"}', "expected step_index, there is none"),
        ('{"trajectory_id": 1, "step_index": 0, "label": "good"}', "trajectory_id: expected a str"),
        (
            '{"trajectory_id": "a", "step_index": -1, "label": "good"}',
            "whole number from 0, got -1",
        ),
        ('{"trajectory_id": "a", "step_index": true, "label": "good"}', "from 0, got True"),
        (
            '{"trajectory_id": "a", "step_index": 0, "label": "bad"}',
            "good, unnecessary, harmful or",
        ),
        (
            '{"trajectory_id": "a", "step_index": 0, "label": "good", "annotator": 3}',
            "annotator: expected str, got 3",
        ),
    ],
)
def test_a_line_that_is_no_gold_label_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text('{"trajectory_id": "a", "step_index": 0, "label": "good"}\n' + line + "\n")
    with pytest.raises(LabelError, match=r"gold\.jsonl:2: ") as error:
        read_gold([path])
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a gold file, but it is not there"):
        read_gold([tmp_path / "none.jsonl"])


def test_a_refresh_gives_what_others_appended_and_starts_again_when_the_file_was_replaced(
    tmp_path: Path,
) -> None:
    path = tmp_path / "gold.jsonl"
    reader, writer = GoldFile(path), GoldFile(path)
    assert reader.refresh() == []
    writer.append(GoldLabel(trajectory_id="run", step_index=0, label="good", annotator="ada"))
    assert [line.step_index for line in reader.refresh()] == [0]
    with path.open("ab") as file:
        file.write(b'{"trajectory_id": "run", "step_in')
    assert reader.refresh() == []
    with path.open("ab") as file:
        file.write(b'dex": 1, "label": "good"}\n')
    assert [line.step_index for line in reader.refresh()] == [1]
    with path.open("ab") as file:  # by hand, without a newline
        file.write(b'{"trajectory_id": "run", "step_index": 2, "label": "good"}')
    assert [line.step_index for line in reader.refresh()] == [2]
    writer.append(GoldLabel(trajectory_id="run", step_index=3, label="good", annotator="ada"))
    assert [line.step_index for line in reader.refresh()] == [3]
    with path.open("ab") as file:
        file.write(b"no json\n")
    with pytest.raises(LabelError, match=r"gold\.jsonl:5: "):
        reader.refresh()
    resets = reader.num_resets
    path.unlink()
    write(path, row(5, "good"))
    assert [line.step_index for line in reader.refresh()] == [5]
    assert reader.num_resets > resets


@pytest.mark.parametrize(
    "edited",
    [row(0, "unnecessary"), row(9, "good"), row(0, None)],
    ids=["longer", "as long", "cut"],
)
def test_a_refresh_starts_again_when_a_line_was_edited_in_place(
    tmp_path: Path, edited: dict[str, object]
) -> None:
    others = [row(1, "good"), row(2, "good")]
    path = write(tmp_path / "gold.jsonl", row(0, "good"), *others)
    reader = GoldFile(path)
    assert len(reader.refresh()) == 3
    before = path.stat()
    write(path, edited, *others)
    os.utime(path, ns=(0, before.st_mtime_ns + 10_000_000))  # a file's clock ticks slowly
    assert path.stat().st_ino == before.st_ino
    resets = reader.num_resets
    found = [(line.step_index, line.label) for line in reader.refresh()]
    assert found == [(each["step_index"], each["label"]) for each in (edited, *others)]
    assert reader.num_resets == resets + 1
    assert reader.refresh() == []


def _append_many(path: Path, annotator: str, count: int) -> None:
    gold = GoldFile(path)
    for step in range(count):
        label = LABELS[step % 3]
        line = GoldLabel(trajectory_id="run", step_index=step, label=label, annotator=annotator)
        gold.append(line)


def test_processes_that_append_at_once_lose_and_tear_no_line(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=_append_many, args=(path, name, 100)) for name in ("ada", "bob")
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    gold = read_gold([path])
    assert {name: len(labels) for name, labels in gold.by_annotator.items()} == {
        "ada": 100,
        "bob": 100,
    }


def test_a_full_disk_is_an_error_and_leaves_nothing_of_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "gold.jsonl", row(0, "good"))
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, len(before) + 20))
        try:
            GoldFile(path).append(GoldLabel(trajectory_id="run", step_index=1, label="good"))
        except OSError:
            os._exit(7)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert path.read_bytes() == before


def test_a_label_goes_into_the_file_that_took_the_place_of_the_one_being_waited_for(
    tmp_path: Path,
) -> None:
    """An editor writes a new file and renames it, while somebody else holds the lock."""
    path = write(tmp_path / "gold.jsonl", row(0, "good", "ada"))
    mine = GoldLabel(trajectory_id="run", step_index=1, label="harmful", annotator="ada")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writing = threading.Thread(target=GoldFile(path).append, args=(mine,))
        writing.start()
        for _ in range(500):  # some file systems show the kernel another number than us
            if waits_for_a_lock(held.fileno()):
                break
            time.sleep(0.01)
        write(tmp_path / "edited.jsonl", row(0, "unnecessary", "ada")).rename(path)
    writing.join()
    assert read_gold([path]).labels == {("run", 0): "unnecessary", ("run", 1): "harmful"}


def waits_for_a_lock(file: int) -> bool:
    """Whether anybody waits for the lock of a file (`->` in the kernel's list of locks)."""
    number = os.fstat(file).st_ino
    return any(
        "->" in line and line.split()[-3].endswith(f":{number}")
        for line in Path("/proc/locks").read_text().splitlines()
    )
