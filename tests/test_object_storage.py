"""Stages whose paths are URLs of a store: what comes of them is what comes of local folders.

Real commands, and moto's S3 server as a process of its own. Kills, outages and two runs at once are
in test_object_outputs.py.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import orjson
import pytest

from srft_prep.config import TokenizeConfig
from srft_prep.errors import ConfigError, StorageError
from srft_prep.examples.record import RUNS_DIR
from srft_prep.manifest import read_manifest
from srft_prep.object_inputs import bring_raw
from srft_prep.object_mirror import input_place, output_place
from srft_prep.object_storage import patiently
from srft_prep.records import stage_of
from srft_prep.storage import StageWriter
from srft_prep.tokens import _work_apart
from tests.faults.commands import finish
from tests.faults.runs import portable
from tests.object_stores import (
    KEY_CANARY,
    SECRET_CANARY,
    Bucket,
    Machine,
    Way,
    made_once,
    reaching,
    write_raw,
)

pytestmark = pytest.mark.slow
MANY = ("--seq-len", 4096, "--hold-out", "0.2")
WAIT_SECONDS = 3.0
"""For what waits for the other where they take turns, and does not where they do not."""
STAGES = ("trajectories", "labels", "tokens", "shards", "trl")


def commands(base: str | Path) -> dict[str, tuple[object, ...]]:
    """Return the commands that make all directories below a folder, or a bucket."""
    at = {name: f"{base}/{name}" for name in ("runs", *STAGES)}
    return {
        "trajectories": (
            *("ingest", at["runs"], "--outcomes", at["runs"], "-o", at["trajectories"]),
        ),
        "labels": (
            *("label", at["trajectories"], "--critic", "rules", "--only", "all"),
            *("-o", at["labels"]),
        ),
        "tokens": ("tokenize", at["trajectories"], "--tokenizer", "example", "-o", at["tokens"]),
        "shards": ("pack", at["tokens"], "--labels", at["labels"], "-o", at["shards"], *MANY),
        "trl": ("export", at["shards"], "--to", "trl", "-o", at["trl"]),
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pipeline makes on local folders; to be read only."""

    def make(base: Path) -> None:
        shutil.copytree(RUNS_DIR, base / "runs")
        for words in commands(base).values():
            finish(words, base / "log")

    return made_once(tmp_path_factory, "pipeline", make)


@pytest.fixture(scope="module")
def stored(s3_port: int, expected: Path, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """A bucket with what the pipeline makes on local folders; to be read only."""
    bucket = Bucket(s3_port, f"stored-{os.urandom(6).hex()}")
    for name in STAGES:
        bucket.put_folder(expected / name, name)
    return bucket


def assert_stored(bucket: Bucket, prefix: str, expected: Path) -> None:
    """Compare what lies in the store with a local directory, byte for byte; but for times."""
    names = {name.removeprefix(f"{prefix}/") for name in bucket.names(f"{prefix}/")}
    assert names == {str(path.relative_to(expected)) for path in expected.rglob("*")}
    for name in names - {"manifest.json", "requests.parquet"}:
        if not name.startswith("ledger-"):  # which tells how long each question took
            assert bucket.get(f"{prefix}/{name}") == (expected / name).read_bytes(), name
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(bucket.get(f"{prefix}/manifest.json"))
        copy.flush()
        assert portable(Path(copy.name)) == portable(expected / "manifest.json")


@pytest.mark.parametrize("forgets", [False, True], ids=["one machine", "an empty cache each time"])
def test_the_pipeline_over_a_store_makes_the_bytes_of_local_folders(
    bucket: Bucket, machine: Machine, expected: Path, *, forgets: bool
) -> None:
    bucket.put_folder(expected / "runs", "runs")
    for name, words in commands(bucket.url).items():
        said = machine.run(*words)
        assert str(machine.cache) not in said
        assert_stored(bucket, name, expected / name)
        if forgets:
            shutil.rmtree(machine.cache)
    places = [*machine.cache.rglob("tokens/part-00000.parquet")]
    if not forgets:
        assert len(places) == 2
        assert places[0].samefile(places[1]), "what was written here is not fetched"
    said = machine.run("verify", f"{bucket.url}/shards")
    assert "ok: pack" in said
    inputs = orjson.loads(bucket.get("tokens/manifest.json"))["inputs"]
    assert inputs[0]["path"] == f"{bucket.url}/trajectories"
    assert str(machine.cache).encode() not in bucket.get("shards/manifest.json")


def test_a_finished_output_is_left_alone_by_a_machine_that_has_nothing(
    bucket: Bucket, machine: Machine, expected: Path
) -> None:
    for name in ("tokens", "labels"):
        bucket.put_folder(expected / name, name)
    words = commands(bucket.url)["shards"]
    machine.run(*words)
    before = {name: bucket.get(name) for name in bucket.names()}
    other = machine.again("other")
    other.run(*words)
    assert {name: bucket.get(name) for name in bucket.names()} == before
    assert not [*other.cache.rglob("shard-*")], "nothing of it was needed here"
    said = other.run(*words, "--recipe", "naive", status=2)
    assert f"{bucket.url}/shards: holds a finished pack with other settings" in said
    other.run(*words, "--recipe", "naive", "--overwrite")
    assert orjson.loads(bucket.get("shards/manifest.json"))["recipe"] == "naive"
    assert "shards/.progress" not in " ".join(bucket.names())


def test_commands_that_read_a_directory_read_it_from_a_store(
    stored: Bucket, machine: Machine, expected: Path, tmp_path: Path
) -> None:
    at = {name: f"{stored.url}/{name}" for name in STAGES}
    words = ("stats", at["trajectories"], "--labels", at["labels"], "--tokens", at["tokens"])
    said = machine.run(*words)
    finish(("stats", expected / "trajectories", "--labels", expected / "labels"), tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines()[0] in said
    name = "attempt-2/example__vercmp-40"
    with machine.start("inspect", at["shards"], "--id", name, "--tokens", at["tokens"]) as run:
        assert run.wait() == 0, run.said  # the agent itself saw a traceback
        assert "step 5 | weight 1" in run.said
    gold = tmp_path / "gold.jsonl"
    rows = [{"trajectory_id": name, "step_index": step, "label": "good"} for step in range(3)]
    gold.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    stored.put("gold.jsonl", gold.read_bytes())
    words = ("critic-eval", "--labels", at["labels"], "--gold", f"{stored.url}/gold.jsonl")
    assert "3" in machine.run(*words, "--samples", 100)
    words = ("train", at["shards"], "--tiny", "--max-steps", 1, "--held-out", at["tokens"])
    machine.run(*words, "--labels", at["labels"], "-o", tmp_path / "trained")
    inputs = orjson.loads((tmp_path / "trained" / "manifest.json").read_bytes())["inputs"]
    assert inputs[0]["path"] == at["shards"]


def test_single_files_and_folders_of_others_are_read_from_a_store(
    stored: Bucket, bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    name = "attempt-2/example__vercmp-40"
    row = {"trajectory_id": name, "step_index": 0, "weight": 0.5}
    bucket.put("weights.jsonl", orjson.dumps(row) + b"\n")
    words = ("pack", f"{stored.url}/tokens", "--labels", f"{stored.url}/labels", *MANY[:2])
    machine.run(*words, "--weights", f"{bucket.url}/weights.jsonl", "-o", tmp_path / "shards")
    inputs = orjson.loads((tmp_path / "shards" / "manifest.json").read_bytes())["inputs"]
    assert inputs[-1]["path"] == f"{bucket.url}/weights.jsonl"
    for run in range(2):
        for rollout in range(2):
            summary = {"resolved_ids": ["a"] * (run + rollout > 0), "unresolved_ids": ["b"]}
            key = f"arms/run-{run}/{rollout}.json"
            bucket.put(key, orjson.dumps({**summary, "submitted_ids": ["a", "b"]}))
    said = machine.run("compare", "--arm", f"arm={bucket.url}/arms", "--samples", 100)
    assert "arm" in said


def test_review_shows_what_lies_in_a_store(stored: Bucket, machine: Machine) -> None:
    words = ("review", f"{stored.url}/trajectories", "--labels", f"{stored.url}/labels")
    assert "give --gold FILE" in machine.run(*words, "--no-browser", status=2)
    with machine.start(*words, "--no-browser", "--read-only") as run:
        assert run.wait_until(lambda: "review: http://127.0.0.1" in run.said), run.said
        assert "24 trajectories, 161 steps" in run.said


def test_array_jobs_are_merged_in_a_store(
    stored: Bucket, bucket: Bucket, machine: Machine, expected: Path
) -> None:
    for index in range(2):
        job = f"{bucket.url}/job-{index}"
        machine.run(
            *("label", f"{stored.url}/trajectories", "--critic", "rules", "--only", "all"),
            *("--shard-index", index, "--num-shards", 2, "-o", job),
        )
    other = machine.again("other")
    jobs = [f"{bucket.url}/job-{index}" for index in range(2)]
    other.run("merge", *jobs, "-o", f"{bucket.url}/labels")
    assert bucket.get("labels/labels.parquet") == (expected / "labels/labels.parquet").read_bytes()
    said = other.run("merge", jobs[0], "-o", f"{bucket.url}/labels", status=2)
    assert "missing: --shard-index 1" in said


def test_raw_runs_are_found_as_in_a_local_folder(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    raw = write_raw(tmp_path / "raw", num_runs=20)
    (raw / ".hidden").mkdir()
    shutil.copy(raw / "a.jsonl", raw / ".hidden" / "c.jsonl")
    (raw / "more" / "d.jsonl.gz").write_bytes(gzip.compress((raw / "a.jsonl").read_bytes()))
    finish(("ingest", raw / "more", "-o", raw / "stage"), tmp_path / "log", status=1)
    bucket.put_folder(raw, "raw")
    for number, source in enumerate(("raw", "raw/**/*.gz", "raw/more/b.jsonl")):
        local, output = tmp_path / f"local-{number}", f"{bucket.url}/out-{number}"
        words = ("ingest", tmp_path / source, "--keep-duplicates", "-o", local)
        status = 0 if source.endswith("b.jsonl") else 1
        finish(words, tmp_path / "log", status=status)
        words = ("ingest", f"{bucket.url}/{source}", "--keep-duplicates", "-o", output)
        said = machine.run(*words, status=status)
        for path in local.glob("part-*"):
            assert bucket.get(f"out-{number}/{path.name}") == path.read_bytes()
        rejected = bucket.get(f"out-{number}/rejected.jsonl").decode()
        assert rejected == (local / "rejected.jsonl").read_text().replace(str(tmp_path), bucket.url)
        if rejected:
            assert f"{output}/rejected.jsonl" in said
    assert not [*machine.cache.rglob("in/**/part-*")], "a stage among the runs was fetched"
    assert not [*machine.cache.rglob("in/**/notes.txt")]
    bucket.put("odd/a//b.jsonl", b"{}")
    said = machine.run("ingest", f"{bucket.url}/odd", "-o", tmp_path / "x", status=2)
    assert f"{bucket.url}/odd/a//b.jsonl: a part of the key is empty" in said
    for source in ("raw/stage", "nothing", "raw/*.none"):
        said = machine.run("ingest", f"{bucket.url}/{source}", "-o", tmp_path / "x", status=2)
        assert f"Error: {bucket.url}/{source}: " in said


def test_a_raw_file_is_fetched_once_and_again_when_it_changed(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    raw = write_raw(tmp_path / "raw", num_runs=20)
    bucket.put_folder(raw, "raw")
    words = ("ingest", f"{bucket.url}/raw", "-o")
    machine.run(*words, tmp_path / "one", status=1)
    (copy,) = machine.cache.rglob("a.jsonl")
    first = copy.stat().st_ino
    machine.run(*words, tmp_path / "two", status=1)
    assert copy.stat().st_ino == first
    changed = (raw / "a.jsonl").read_bytes().replace(b"Ticket 7", b"Ticket 8")
    bucket.put("raw/a.jsonl", changed)
    bucket.delete("raw/more/b.jsonl")
    machine.run(*words, tmp_path / "three", status=1)
    assert copy.read_bytes() == changed
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "a.jsonl").write_bytes(changed)
    finish(("ingest", tmp_path / "local", "-o", tmp_path / "four"), tmp_path / "log", status=1)
    parts = [sorted((tmp_path / name).glob("part-*")) for name in ("three", "four")]
    assert [path.read_bytes() for path in parts[0]] == [path.read_bytes() for path in parts[1]]


@pytest.mark.parametrize("other", ["raw", "raw/more"])
def test_what_another_run_fetches_meanwhile_is_not_removed(
    bucket: Bucket, s3_port: int, tmp_path: Path, other: str
) -> None:
    bucket.put("raw/more/a.jsonl", b"{}")
    way, found = Way(s3_port), []
    others = threading.Thread(
        target=lambda: found.extend(bring_raw(f"{bucket.url}/{other}", (".jsonl",), stage_of))
    )

    def happens(request: str) -> bool:
        if request == f"LIST {bucket.name}" and others.ident is None:
            bucket.put("raw/more/b.jsonl", b"{}")
            others.start()
            others.join(WAIT_SECONDS)
        return True

    way.happens = happens
    with reaching(Machine(tmp_path / "machine", way.port)):
        bring_raw(f"{bucket.url}/raw", (".jsonl.gz", ".jsonl"), stage_of)
        others.join()
        (folder,) = found
        assert {path.name for path in folder.rglob("*.jsonl")} == {"a.jsonl", "b.jsonl"}
    way.close()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[: len(content) // 2], "it was cut short, or replaced"),
        (lambda content: content[:-9] + b"x" + content[-8:], "changed since it was written"),
        (None, "missing"),
    ],
    ids=["truncated", "changed", "missing"],
)
def test_a_damaged_object_is_named_and_never_read(
    stored: Bucket, machine: Machine, tmp_path: Path, damage: object, says: str
) -> None:
    key = "tokens/part-00000.parquet"
    whole = stored.get(key)
    if damage is None:
        stored.delete(key)
    else:
        stored.put(key, damage(whole))
    try:
        pack = ("pack", f"{stored.url}/tokens", "--recipe", "naive", "-o", tmp_path / "out")
        said = machine.run(*pack, status=2)
        assert f"{stored.url}/{key}: " in said
        assert says in said
        assert not [*machine.cache.rglob("part-*")]
        assert f"{stored.url}/{key}: " in machine.run("verify", f"{stored.url}/tokens", status=1)
    finally:
        stored.put(key, whole)
    machine.run(*pack)
    stored.put(key, whole[:-1])
    try:
        machine.run("verify", f"{stored.url}/tokens", status=1)  # what is here does not count
    finally:
        stored.put(key, whole)


def test_a_newer_directory_of_the_same_name_is_seen(
    bucket: Bucket, machine: Machine, expected: Path, tmp_path: Path
) -> None:
    bucket.put_folder(expected / "tokens", "tokens")
    words = ("pack", f"{bucket.url}/tokens", "--recipe", "naive", "-o")
    machine.run(*words, tmp_path / "one")
    finish(("ingest", RUNS_DIR, "--limit", 9, "-o", tmp_path / "few"), tmp_path / "log")
    tokenize = ("tokenize", tmp_path / "few", "--tokenizer", "example", "-o", tmp_path / "tokens")
    finish(tokenize, tmp_path / "log")
    bucket.put_folder(tmp_path / "tokens", "tokens")
    machine.run(*words, tmp_path / "two")
    last = ("pack", tmp_path / "tokens", "--recipe", "naive", "-o", tmp_path / "three")
    finish(last, tmp_path / "log")
    shards = [(tmp_path / n / "shard-00000.parquet").read_bytes() for n in ("one", "two", "three")]
    assert shards[0] != shards[1] == shards[2]


def test_what_cannot_be_reached_is_said_and_nothing_is_written(
    bucket: Bucket, machine: Machine, expected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for words, says in (
        (("verify", "s3://no-such-bucket-here/x"), "there is no bucket s3://no-such-bucket-here"),
        (("verify", f"{bucket.url}/none"), f"{bucket.url}/none: there is no such folder"),
        (("verify", "ftp://host/x"), "expected a path, or an address that begins with s3://"),
        (("verify", "s3://key:secret@bucket/x"), "keys are no part of an address"),
        (("tokenize", f"{bucket.url}/none", "--tokenizer", "example", "-o", out), "no such folder"),
        (
            ("ingest", RUNS_DIR, "-o", "s3://no-such-bucket-here/x"),
            "there is no bucket s3://no-such-bucket-here",
        ),
        (("ingest", RUNS_DIR, "-o", "hf://datasets/o/n/x"), "hf:// is read, not written"),
        (
            ("stats", expected / "trajectories", "--html", f"{bucket.url}/page.html"),
            "only directories go to a store",
        ),
        (
            ("train", expected / "shards", "--tiny", "-o", "hf://datasets/o/n/x"),
            "hf:// is read, not written",
        ),
    ):
        assert says in machine.run(*words, status=2)
    assert not out.exists()
    assert bucket.names() == []
    nobody = machine.again("nobody")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        nobody.environment[name] = ""
    nobody.environment["HOME"] = str(nobody.folder)
    assert "NoCredentials" in nobody.run("verify", f"{bucket.url}/x", status=2)
    nobody.environment |= machine.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    nobody.environment["SRFT_STORAGE_PATIENCE_SECONDS"] = "0"
    assert "EndpointConnectionError" in nobody.run("verify", f"{bucket.url}/x", status=2)


def test_a_directory_of_other_files_is_not_taken(bucket: Bucket, machine: Machine) -> None:
    bucket.put("mine/letter.txt", b"dear")
    said = machine.run("ingest", RUNS_DIR, "-o", f"{bucket.url}/mine", status=2)
    assert f"{bucket.url}/mine: is not empty and no srft-prep directory (it holds letter" in said
    assert bucket.names() == ["mine/letter.txt"]


def test_no_key_gets_into_any_file(
    bucket: Bucket, machine: Machine, expected: Path, tmp_path: Path
) -> None:
    bucket.put_folder(expected / "tokens", "tokens")
    machine.run("pack", f"{bucket.url}/tokens", "--recipe", "naive", "-o", f"{bucket.url}/shards")
    stopped = {**machine.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    machine.environment, before = stopped | {"SRFT_STORAGE_PATIENCE_SECONDS": "0"}, machine
    before.run("verify", f"{bucket.url}/tokens", status=2)
    files = [path for path in machine.folder.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files] + [bucket.get(n) for n in bucket.names()]
    assert len(contents) > 10
    for canary in (KEY_CANARY, SECRET_CANARY):
        assert not [content for content in contents if canary.encode() in content]


def test_a_machine_of_a_cluster_that_does_not_see_the_cache_says_so(tmp_path: Path) -> None:
    config = TokenizeConfig(tokenizer_hash="", template_hash="", history="full")
    job = (tmp_path / "none" / "part-00000.parquet", tmp_path / "part-00000.parquet", config)
    with pytest.raises(ConfigError, match=r"is not to be seen on .* SRFT_CACHE"):
        _work_apart(job)


def test_patience_begins_with_the_first_failure() -> None:
    tries: list[int] = []

    def work() -> str:
        time.sleep(0.6)
        tries.append(0)
        if len(tries) == 1:
            raise StorageError("no answer")
        return "done"

    assert patiently(work, patience=0.5) == "done"


@pytest.mark.parametrize("goes_on", [True, False])
def test_patience_begins_anew_where_something_succeeded_since(goes_on: bool) -> None:
    tries: list[int] = []

    def work() -> None:
        time.sleep(0.3)
        tries.append(0)
        if len(tries) < 5:
            raise StorageError("no answer")

    def progress() -> int:
        return len(tries) if goes_on else 0

    if goes_on:
        patiently(work, patience=0.5, progress=progress)
    else:
        with pytest.raises(StorageError, match="no answer"):
            patiently(work, patience=0.5, progress=progress)
    assert len(tries) == (5 if goes_on else 2)


def test_a_user_without_a_home_works_on_local_folders_and_is_told_what_a_store_needs(
    expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "SRFT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert read_manifest(expected / "tokens").checked().files
    with StageWriter.open(tmp_path / "out", stage="ingest", config={}, inputs=[]) as writer:
        assert writer.finished is None
    with pytest.raises(ConfigError, match="SRFT_CACHE"):
        input_place("s3://bucket/x")
    with pytest.raises(ConfigError, match="SRFT_CACHE"):
        output_place("s3://bucket/x")


def test_help_loads_no_library_of_a_store_and_its_lack_is_said(tmp_path: Path) -> None:
    code = (
        "import atexit, importlib.util, sys\n"
        "atexit.register(lambda: print('loaded:', *({'fsspec', 's3fs'} & {*sys.modules})))\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 's3fs' else find(name)\n"
        "from srft_prep.cli import main\n"
        "sys.argv = ['srft-prep', *sys.argv[1:]]\n"
        "main()\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        for words in (("ingest", "--help"), ("verify", "s3://bucket/x"))
    ]
    assert [run.stdout.splitlines()[-1] for run in runs] == ["loaded:", "loaded:"]
    assert "s3:// needs s3fs: pip install 'srft-prep[cloud]'" in runs[1].stderr
