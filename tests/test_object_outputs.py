"""Outputs in a store: kills, lost machines, outages, two runs at once.

A killed run goes on from what lies in the store, on a machine with an empty cache, and ends in the
bytes of a run that nothing happened to.
"""

import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import orjson
import pytest

from srft_prep.object_lease import LEASE
from tests.critic.api_server import MODEL, ApiServer, late
from tests.faults.commands import finish
from tests.faults.runs import ledger_keys
from tests.object_stores import NUM_RUNS, Bucket, Machine, made_once, write_raw
from tests.test_object_storage import assert_stored

pytestmark = pytest.mark.slow
STATUS = {"ingest": 1}
KEY = {"OPENAI_API_KEY": "sk-of-a-test"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all stages make on local folders, of several parts; to be read only."""

    def make(base: Path) -> None:
        write_raw(base / "runs")
        for stage in ("ingest", "tokenize", "label", "pack"):
            words = words_of(stage, base, base / stage)
            finish(words, base / "log", status=STATUS.get(stage, 0))

    return made_once(tmp_path_factory, "stages", make)


def words_of(stage: str, base: Path, output: str | Path) -> tuple[object, ...]:
    return {
        "ingest": ("ingest", base / "runs", "-o", output),
        "tokenize": ("tokenize", base / "ingest", "--tokenizer", "example", "-o", output),
        "label": ("label", base / "ingest", "--critic", "rules", "--only", "all", "-o", output),
        "pack": (
            *("pack", base / "tokenize", "--labels", base / "label", "--seq-len", 4096),
            *("-o", output),
        ),
    }[stage]


def has_more(bucket: Bucket, prefix: str, number: int) -> Callable[[], bool]:
    """Return what tells whether the store has so many of a run's units of work."""

    def ready() -> bool:
        time.sleep(0.02)
        names = bucket.names(prefix)
        units = [name for name in names if "/.progress/" in name and name.endswith("0.json")]
        return len(units) >= number

    return ready


def killed_before_any_part_came_there(machine: Machine, *words: object) -> None:
    """Leave an output of three parts that are all here, of which the store has the plan only."""
    machine.gate.hold(is_part)
    with machine.start(*words) as run:
        assert run.wait_until(lambda: has_made_all(machine)), run.said
        run.process.kill()
        run.wait()
    machine.gate.lose()


def has_made_all(machine: Machine) -> bool:
    """Whether the last of an ingest's three units of work is done, whatever the store has."""
    return any(machine.cache.rglob("out/**/.progress/ingest-00002.json"))


def is_part(key: str) -> bool:
    return "/part-" in key


def is_first_entry(key: str) -> bool:
    """Whether an object is the journal's entry of the first unit of work."""
    return "/.progress/" in key and key.endswith("-00000.json")


def test_an_earlier_plans_parts_do_not_follow_when_it_is_overwritten(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    output, plan, gate = f"{bucket.url}/out", "out/.progress/plan.json", machine.gate
    earlier = ("ingest", local / "runs", "--keep-duplicates", "-o", output)
    killed_before_any_part_came_there(machine, *earlier)
    assert [name for name in bucket.names("out/") if LEASE not in name] == [plan]
    written = bucket.get(plan)
    gate.put.clear()
    gate.hold(is_part)
    words = (*words_of("ingest", local, output), "--overwrite")

    def begun() -> bool:
        with suppress(bucket.client.exceptions.NoSuchKey):  # it is taken away, and put anew
            return bucket.get(plan) != written
        return False

    with machine.start(*words) as run:
        assert run.wait_until(begun), run.said
        assert not [*filter(is_part, gate.put[: gate.put.index(plan)])]
        run.process.kill()
        run.wait()
    gate.lose()
    other = machine.again("other")
    other.run(*words, status=1)
    assert_stored(bucket, "out", local / "ingest")


@pytest.mark.parametrize("forgets", [False, True], ids=["the same machine", "another"])
def test_a_damaged_object_of_an_unfinished_output_is_written_again(
    bucket: Bucket, machine: Machine, local: Path, *, forgets: bool
) -> None:
    words = words_of("ingest", local, f"{bucket.url}/out")
    machine.kill_when(has_more(bucket, "out/", 1), *words)
    part = bucket.names("out/part-")[0]
    good = bucket.get(part)
    bucket.put(part, bytes(len(good)))
    again = machine.again("other") if forgets else machine
    again.run(*words, status=1)
    assert bucket.get(part) == good
    assert_stored(bucket, "out", local / "ingest")


def test_a_rerun_of_a_finished_output_puts_a_missing_object_back(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    words = words_of("ingest", local, f"{bucket.url}/out")
    machine.run(*words, status=1)
    (place,) = machine.cache.rglob("out/**/part-00001.parquet")
    made = place.stat().st_ino
    bucket.delete("out/part-00001.parquet")
    bucket.put("out/part-00000.parquet", b"cut short")
    machine.run(*words, status=1)
    assert_stored(bucket, "out", local / "ingest")
    assert place.stat().st_ino == made, "it was made again"
    bucket.delete("out/part-00001.parquet")
    machine.again("other").run(*words, status=1)
    assert_stored(bucket, "out", local / "ingest")


def test_whoever_interrupts_twice_keeps_the_lease_while_files_are_under_way(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    words, gate = words_of("ingest", local, f"{bucket.url}/out"), machine.gate
    killed_before_any_part_came_there(machine, *words)
    gate.hold(is_part)
    with machine.start(*words) as run:
        assert run.wait_until(lambda: len(gate.held) == 3), run.said
        while "interrupted" not in run.said:
            run.send(signal.SIGINT)
            run.wait(1)
        assert f"out/.progress/{LEASE}" in bucket.names("out/")
        assert run.is_alive, "files are under way"
        gate.let_go()
        assert run.wait() == 130, run.said
    left = bucket.names("out/")
    assert not [name for name in left if "/.progress/ingest-" in name], "nothing more was begun"
    machine.run(*words, status=1)
    assert_stored(bucket, "out", local / "ingest")


def test_an_interrupted_run_brings_away_what_is_done(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    words, gate = words_of("ingest", local, f"{bucket.url}/out"), machine.gate
    with machine.held(is_first_entry, *words) as run:
        run.send(signal.SIGINT)
        gate.let_go()
        assert run.wait() == 130, run.said
        assert "Traceback" not in run.said
    names = bucket.names("out/")
    entries = machine.cache.rglob("out/**/.progress/ingest-*.json")
    here = {f"out/.progress/{path.name}" for path in entries}
    assert here
    assert here <= set(names)
    assert f"out/.progress/{LEASE}" not in names


def test_a_run_that_begins_leaves_the_question_of_another_alone(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    machine.environment |= KEY
    asked = "labels/.progress/clock-0"
    bucket.put(asked, b"")
    with ApiServer(lambda turn: late(turn, 0.3)) as server:
        words = (
            *("label", local / "ingest", "--critic", "openai", "--model", MODEL, "--only"),
            *("resolved", "--base-url", server.openai_url, "--concurrency", 1),
            *("-o", f"{bucket.url}/labels"),
        )
        with machine.start(*words) as run:
            begun = lambda: "labels/.progress/plan.json" in bucket.names("labels/")  # noqa: E731
            assert run.wait_until(begun), run.said
            assert asked in bucket.names("labels/")


@pytest.mark.parametrize("stage", ["ingest", "tokenize", "pack"])
def test_a_killed_stage_goes_on_on_another_machine_to_the_same_bytes(
    stage: str, bucket: Bucket, machine: Machine, local: Path
) -> None:
    output = f"{bucket.url}/out"
    words = words_of(stage, local, output)
    ready = has_more(bucket, "out/", 1)
    if stage == "pack":  # a unit of its own: it is killed once its plan is in the store
        ready = lambda: "out/.progress/plan.json" in bucket.names("out/")  # noqa: E731
    machine.kill_when(ready, *words)
    if stage != "pack":
        assert bucket.names("out/part-"), "files come before their entry"
    assert "out/manifest.json" not in bucket.names("out/")
    other = machine.again("other")
    assert "unfinished" in other.run("verify", output, status=2)
    done = {name: bucket.get(name) for name in bucket.names("out/part-")}
    other.run(*words, status=STATUS.get(stage, 0))
    assert_stored(bucket, "out", local / stage)
    assert {name: bucket.get(name) for name in done} == done
    if stage == "ingest":  # of the first machine nothing counts any more
        machine.run(*words, status=1)
        assert_stored(bucket, "out", local / stage)


def test_what_was_paid_for_outlives_the_machine(
    bucket: Bucket, machine: Machine, local: Path, tmp_path: Path
) -> None:
    machine.environment |= KEY
    with ApiServer(lambda turn: late(turn, 0.1)) as server:
        words = (
            *("label", local / "ingest", "--critic", "openai", "--model", MODEL, "--only"),
            *("resolved", "--base-url", server.openai_url, "--concurrency", 8),
            *("-o", f"{bucket.url}/labels"),
        )

        def some() -> bool:
            time.sleep(0.05)
            names = bucket.names("labels/ledger-")
            return bool(names) and bucket.get(names[0]).count(b"\n") >= 20

        machine.kill_when(some, *words)
        kept = set(ledger_keys(bucket.get_folder("labels", tmp_path / "kept")))
        billed = Counter(server.billed())
        other = machine.again("other")
        other.run(*words, "--dry-run")
        other.run(*words)
        asked = Counter(server.billed()) - billed
    keys = ledger_keys(bucket.get_folder("labels", tmp_path / "all"))
    assert set(Counter(keys).values()) == {1}
    assert len(kept) >= 20
    assert asked.total() == len(keys) - len(kept), "what the store had was not asked again"
    assert len(bucket.names("labels/ledger-")) == 2


def test_lines_of_two_machines_are_all_kept(
    bucket: Bucket, machine: Machine, local: Path, tmp_path: Path
) -> None:
    words = words_of("label", local, f"{bucket.url}/labels")
    machine.run(*words)
    (place,) = machine.cache.rglob("out/**/ledger-00000.jsonl")
    whole = place.read_bytes()
    lines = whole.splitlines(keepends=True)
    # this machine wrote all lines and brought half away; another one wrote others into its own
    bucket.put("labels/ledger-00000.jsonl", b"".join(lines[:10]))
    bucket.put("labels/ledger-00001.jsonl", b"".join(lines[10:15]))
    place.with_name("ledger-00001.jsonl").write_bytes(b"".join(lines[20:40]))
    machine.run(*words)
    assert bucket.get("labels/ledger-00000.jsonl") == whole
    assert bucket.get("labels/ledger-00001.jsonl") == b"".join(lines[10:15])
    assert bucket.get("labels/ledger-00001-2.jsonl") == b"".join(lines[20:40])
    words = (*words, "--overwrite")
    other = machine.again("other")
    other.run(*words)
    assert len(bucket.names("labels/ledger-")) == 3
    kept = {name: bucket.get(name) for name in bucket.names("labels/ledger-")}
    machine.run(*words)
    for name in bucket.names("labels/"):  # whoever did it: it was paid for
        bucket.delete(name)
    assert "600 reused" in machine.run(*words)
    assert {name: bucket.get(name) for name in bucket.names("labels/ledger-")} == kept


def test_a_store_that_goes_away_and_comes_back_costs_nothing(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    words, gate = words_of("ingest", local, f"{bucket.url}/out"), machine.gate
    with machine.held(is_first_entry, *words) as run:
        gate.close()
        gate.lose()
        assert run.wait_until(lambda: has_made_all(machine)), run.said
        gate.open()
        assert run.wait() == 1, run.said
    assert_stored(bucket, "out", local / "ingest")


def test_a_store_that_stays_away_ends_the_run_and_the_same_command_uploads_the_rest(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    """However often it does: nothing is made again."""
    machine.environment["SRFT_STORAGE_PATIENCE_SECONDS"] = "1"
    words, gate = words_of("tokenize", local, f"{bucket.url}/out"), machine.gate
    made = set()
    for _ in range(2):
        with machine.held(lambda key: key.endswith("/part-00002.parquet"), *words) as run:
            gate.close()
            gate.lose()
            assert run.wait() == 2, run.said
            assert "give the same command again here, and it uploads the rest" in run.said
            assert "Traceback" not in run.said
        (last,) = machine.cache.rglob("out/**/part-00002.parquet")
        made.add(last.stat().st_ino)
        assert "out/manifest.json" not in bucket.names("out/")
        gate.open()
    machine.run(*words)
    assert_stored(bucket, "out", local / "tokenize")
    assert made == {last.stat().st_ino}, "it was made again"


def test_of_two_runs_at_once_one_is_refused(bucket: Bucket, machine: Machine, local: Path) -> None:
    machine.environment |= KEY
    with ApiServer(lambda turn: late(turn, 0.3)) as server:
        words = (
            *("label", local / "ingest", "--critic", "openai", "--model", MODEL, "--only"),
            *("resolved", "--base-url", server.openai_url, "--concurrency", 1),
            *("-o", f"{bucket.url}/labels"),
        )
        with machine.start(*words) as first:
            held = lambda: bool(bucket.names("labels/.progress/plan.json"))  # noqa: E731
            assert first.wait_until(held)
            said = machine.again("other").run(*words, status=2)
            assert f"{bucket.url}/labels: another srft-prep run is writing here: process" in said
            assert "which is alive on this machine" in said
            said = machine.run(*words, status=2)  # the same machine: a lock of the kernel
            assert f"{bucket.url}/labels: another srft-prep run is writing here; wait" in said
            assert first.is_alive, first.said


def lease(bucket: Bucket, **changes: object) -> None:
    """Put the lease of a run on a machine that nobody here knows."""
    owner = {"run": "x", "host": "far", "pid": 7, "machine": "another", "started": "1"} | changes
    bucket.put(f"out/.progress/{LEASE}", orjson.dumps(owner))


def test_a_lease_of_another_machine_is_taken_over_once_it_is_old(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    machine.environment["SRFT_LEASE_SECONDS"] = "600"
    words = words_of("ingest", local, f"{bucket.url}/out")
    lease(bucket)
    said = machine.run(*words, status=2)
    assert "process 7 of far, which was heard of" in said
    assert "counts as dead after 600; wait for it, or choose another -o" in said
    assert bucket.names("out/") == [f"out/.progress/{LEASE}"]
    machine.environment["SRFT_LEASE_SECONDS"] = "2"
    time.sleep(3)
    machine.run(*words, status=1)
    assert_stored(bucket, "out", local / "ingest")


def test_a_run_whose_lease_was_taken_writes_nothing_more(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    machine.environment |= KEY | {"SRFT_LEASE_SECONDS": "2"}
    with ApiServer(lambda turn: late(turn, 0.05)) as server:
        words = (
            *("label", local / "ingest", "--critic", "openai", "--model", MODEL, "--only"),
            *("resolved", "--base-url", server.openai_url, "--concurrency", 2),
            *("-o", f"{bucket.url}/out"),
        )
        with machine.start(*words) as run:
            assert run.wait_until(lambda: bool(bucket.names("out/ledger-"))), run.said
            lease(bucket)
            time.sleep(3)  # it looks after its lease four times in 2 seconds
            left = {name: bucket.get(name) for name in bucket.names("out/")}
            assert run.wait() == 2, run.said
            assert "another run took over while this one could not reach the store" in run.said
        assert server.billed().total() < NUM_RUNS / 4, "it went on paying"
    assert {name: bucket.get(name) for name in bucket.names("out/")} == left


def test_a_kill_while_an_earlier_plan_is_cleared_leaves_no_lie(
    bucket: Bucket, machine: Machine, local: Path
) -> None:
    output = f"{bucket.url}/out"
    machine.run("ingest", local / "runs", "--keep-duplicates", "-o", output, status=1)
    words = (*words_of("ingest", local, output), "--overwrite")

    def cleared() -> bool:
        names = bucket.names("out/")
        return "out/manifest.json" not in names

    machine.kill_when(cleared, *words)
    names = bucket.names("out/")
    other = machine.again("other")
    assert [name for name in names if "/.progress/" in name]
    other.run(*words, status=1)
    assert_stored(bucket, "out", local / "ingest")
