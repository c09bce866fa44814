"""merge: what is refused, and what is left alone."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import orjson
import polars as pl
import pytest

from srft_prep.hashes import sha256_of
from srft_prep.job_outputs import read_jobs
from srft_prep.manifest import (
    describe_file,
    read_manifest,
)
from srft_prep.merging import merge
from srft_prep.schemas import LABELS, TOKENS
from srft_prep.storage import write_table
from tests.stages import Run, srft_prep, trajectory, write_trajectories

NUM_JOBS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trajectories, and the outputs of label and tokenize jobs for them."""
    folder = tmp_path_factory.mktemp("made")
    rows = [trajectory(f"run-{number}", num_steps=number % 4) for number in range(24)]
    write_trajectories(folder / "trajectories", rows)
    for index in range(NUM_JOBS):
        array = ("--shard-index", index, "--num-shards", NUM_JOBS)
        for stage, options in (("label", ("--only", "all")), ("tokenize", TOKENIZE)):
            run = srft_prep(
                stage, folder / "trajectories", "-o", folder / f"{stage}-{index}", *options, *array
            )
            assert run.status == 0, run.stderr
    return folder


TOKENIZE = ("--tokenizer", "example", "--tokenizer-engine", "tokenizers", "--workers", 1)


@pytest.fixture
def jobs(made: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may spoil."""
    shutil.copytree(made, tmp_path / "jobs")
    return tmp_path / "jobs"


def directories(jobs: Path, stage: str) -> list[Path]:
    return [jobs / f"{stage}-{index}" for index in range(NUM_JOBS)]


def merged(jobs: Path, stage: str, *options: object) -> Run:
    return srft_prep("merge", *directories(jobs, stage), "-o", jobs / "merged", *options)


def says(run: Run, text: str, jobs: Path) -> None:
    """Assert that a merge was refused, for this reason, and wrote nothing that looks finished."""
    assert run.status == 2, run
    assert text in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
    assert not (jobs / "merged" / "manifest.json").exists()


@pytest.mark.parametrize("stage", ["label", "tokenize"])
def test_the_directories_of_all_jobs_make_one_that_verifies(jobs: Path, stage: str) -> None:
    run = merged(jobs, stage, "--json")
    assert run.status == 0, run.stderr
    assert orjson.loads(run.stdout.splitlines()[-1])["stage"] == stage
    assert srft_prep("verify", jobs / "merged").status == 0
    manifest = read_manifest(jobs / "merged")
    assert "array" not in manifest.data["config"]
    assert merged(jobs, stage).status == 0, "merging again does nothing or the same"
    assert read_manifest(jobs / "merged").files == manifest.files


def test_a_missing_job_is_named(jobs: Path) -> None:
    run = srft_prep("merge", jobs / "label-0", jobs / "label-2", "-o", jobs / "merged")
    says(run, "expected the directories of 3 jobs, got 2; missing: --shard-index 1;", jobs)


def test_a_job_that_is_given_twice_is_named(jobs: Path) -> None:
    shutil.copytree(jobs / "label-1", jobs / "copy")
    run = srft_prep("merge", *directories(jobs, "label"), jobs / "copy", "-o", jobs / "merged")
    says(run, f"--shard-index 1 comes twice: {jobs / 'label-1'} and {jobs / 'copy'}", jobs)


def test_jobs_of_two_arrays_are_refused(jobs: Path) -> None:
    words = ("label", jobs / "trajectories", "-o", jobs / "label-1", "--only", "all", "--overwrite")
    assert srft_prep(*words, "--shard-index", 1, "--num-shards", 4).status == 0
    says(merged(jobs, "label"), f"{jobs / 'label-1'}: one of 4 jobs", jobs)


def test_a_run_for_all_trajectories_is_no_job(jobs: Path) -> None:
    output = jobs / "alone"
    assert srft_prep("label", jobs / "trajectories", "-o", output, "--only", "all").status == 0
    run = srft_prep("merge", output, "-o", jobs / "merged")
    says(run, f"{output}: expected the output of an array job", jobs)
    run = srft_prep("merge", jobs / "trajectories", "-o", jobs / "merged")
    says(run, "expected the output of label or tokenize, this is one of ingest", jobs)


def test_jobs_of_two_stages_are_refused(jobs: Path) -> None:
    given = (jobs / "label-0", jobs / "tokenize-1", jobs / "label-2")
    run = srft_prep("merge", *given, "-o", jobs / "merged")
    says(run, f"{jobs / 'tokenize-1'}: expected the output of label", jobs)


def test_jobs_with_other_settings_are_refused(jobs: Path) -> None:
    array = ("--shard-index", 1, "--num-shards", NUM_JOBS)
    words = ("label", jobs / "trajectories", "-o", jobs / "label-1", *array)
    assert srft_prep(*words, "--only", "resolved", "--overwrite").status == 0
    says(merged(jobs, "label"), "made with other config", jobs)
    says(merged(jobs, "label"), "only is resolved, not all", jobs)


def test_jobs_of_another_source_are_refused(jobs: Path) -> None:
    write_trajectories(jobs / "others", [trajectory("other")])
    words = ("label", jobs / "others", "-o", jobs / "label-1", "--only", "all", "--overwrite")
    assert srft_prep(*words, "--shard-index", 1, "--num-shards", NUM_JOBS).status == 0
    says(merged(jobs, "label"), "made with other inputs", jobs)


def test_jobs_by_two_tokenizer_engines_are_refused(jobs: Path) -> None:
    shutil.rmtree(jobs / "tokenize-2")
    array = ("--shard-index", 2, "--num-shards", NUM_JOBS)
    words = ("tokenize", jobs / "trajectories", "-o", jobs / "tokenize-2", *array)
    assert srft_prep(*words, "--tokenizer", "example", "--workers", 1).status == 0
    says(merged(jobs, "tokenize"), "encoded by fastokens", jobs)
    says(merged(jobs, "tokenize"), "again with --tokenizer-engine tokenizers", jobs)


@pytest.mark.parametrize("name", ["labels.parquet", "requests.parquet", "ledger-00000.jsonl"])
def test_a_flipped_byte_is_found(jobs: Path, name: str) -> None:
    path = jobs / "label-1" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    says(merged(jobs, "label"), f"{path}: changed since it was written", jobs)


def test_every_file_of_every_job_is_hashed_once(
    jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: Counter[Path] = Counter()

    def counted(path: Path) -> str | None:
        hashed[path] += 1
        return sha256_of(path)

    monkeypatch.setattr("srft_prep.manifest.sha256_of", counted)
    for stage in ("label", "tokenize"):
        for job in read_jobs(directories(jobs, stage)):
            for file in job.manifest.files:
                assert hashed[job.path / file["name"]] == 1, file["name"]


def test_a_missing_file_is_found(jobs: Path) -> None:
    (jobs / "tokenize-0" / "rejected.jsonl").unlink()
    says(merged(jobs, "tokenize"), "rejected.jsonl: missing", jobs)


def test_an_unfinished_job_is_refused(jobs: Path) -> None:
    (jobs / "label-0" / "manifest.json").unlink()
    (jobs / "label-0" / ".progress").mkdir()
    says(merged(jobs, "label"), f"{jobs / 'label-0'}: unfinished", jobs)


def test_a_job_whose_later_run_was_interrupted_is_refused(jobs: Path) -> None:
    (jobs / "label-0" / "ledger-00001.jsonl").write_bytes(b"")
    says(merged(jobs, "label"), "a later run there was interrupted", jobs)


def rewritten(folder: Path, name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Write a table anew, and the manifest as if that were what the job wrote."""
    schema = {"labels.parquet": LABELS}.get(name, TOKENS)
    table = change(pl.read_parquet(folder / name)).to_arrow().cast(schema)
    write_table(table, folder / name, row_group_rows=16)
    file = folder / "manifest.json"
    data = orjson.loads(file.read_bytes())
    described = {"name": name, **describe_file(folder / name)}
    data["files"] = [described if each["name"] == name else each for each in data["files"]]
    file.write_bytes(orjson.dumps(data))


def test_a_trajectory_that_is_nowhere_is_found(jobs: Path) -> None:
    path = jobs / "tokenize-1" / "part-00000.parquet"
    ids = pl.read_parquet(path)["trajectory_id"]
    gone = ids[2]
    rewritten(path.parent, path.name, lambda rows: rows.filter(pl.col("trajectory_id") != gone))
    says(merged(jobs, "tokenize"), f"{path}: expected the rows of {gone}, got those of", jobs)


def test_a_trajectory_that_is_there_twice_is_found(jobs: Path) -> None:
    path = jobs / "tokenize-1" / "part-00000.parquet"
    rewritten(path.parent, path.name, lambda rows: pl.concat([rows, rows.head(1)]))
    name = pl.read_parquet(path)["trajectory_id"][0]
    says(merged(jobs, "tokenize"), f"{path}: {name} is there twice", jobs)


def test_labels_of_a_trajectory_of_another_job_are_found(jobs: Path) -> None:
    alien = pl.read_parquet(jobs / "label-0" / "labels.parquet").tail(1)
    path = jobs / "label-2" / "labels.parquet"
    rewritten(path.parent, path.name, lambda rows: pl.concat([rows, alien]))
    says(merged(jobs, "label"), f"{alien['trajectory_id'][0]} is there twice, or is no", jobs)


def test_trajectories_that_were_moved_are_found_where_the_user_says(jobs: Path) -> None:
    (jobs / "trajectories").rename(jobs / "moved")
    for stage in ("label", "tokenize"):
        for index in range(NUM_JOBS):
            file = jobs / f"{stage}-{index}" / "manifest.json"
            data = orjson.loads(file.read_bytes())
            data["inputs"][0]["path"] = str(jobs / "trajectories")
            file.write_bytes(orjson.dumps(data))
    says(merged(jobs, "label"), "give the place where it is now as --trajectories", jobs)
    write_trajectories(jobs / "others", [trajectory("other")])
    run = merged(jobs, "label", "--trajectories", jobs / "others")
    says(run, f"{jobs / 'others'}: expected the trajectories that", jobs)
    assert merged(jobs, "label", "--trajectories", jobs / "moved").status == 0


def test_a_ledger_that_a_merge_would_replace_is_never_touched(jobs: Path) -> None:
    write_trajectories(jobs / "others", [trajectory("other")])
    output = jobs / "merged"
    assert srft_prep("label", jobs / "others", "-o", output, "--only", "all").status == 0
    before = {path.name: path.read_bytes() for path in output.glob("ledger-*")}
    run = merged(jobs, "label")
    assert run.status == 2
    assert "holds answers of a critic" in run.stderr
    assert {path.name: path.read_bytes() for path in output.glob("ledger-*")} == before
    assert srft_prep("verify", output).status == 0, "and the tables are still those of the ledger"


def test_copies_of_an_earlier_ledger_in_all_jobs_count_once(made: Path, tmp_path: Path) -> None:
    source, alone = made / "trajectories", tmp_path / "alone"
    assert srft_prep("label", source, "-o", alone, "--only", "all").status == 0
    (ledger,) = alone.glob("ledger-*.jsonl")
    outputs = [tmp_path / str(index) for index in range(2)]
    for index, output in enumerate(outputs):
        output.mkdir()
        shutil.copy(ledger, output)
        words = ("label", source, "-o", output, "--only", "all", "--json")
        run = srft_prep(*words, "--shard-index", index, "--num-shards", 2)
        assert "asked" not in orjson.loads(run.stdout.splitlines()[-1])
    assert srft_prep("merge", *outputs, "-o", tmp_path / "merged").status == 0
    lines = (tmp_path / "merged" / "ledger-00000.jsonl").read_bytes().splitlines()
    assert sorted(lines) == sorted(ledger.read_bytes().splitlines())


def test_a_merge_that_is_killed_between_its_files_goes_on(jobs: Path) -> None:
    """It is stopped where the ledger is in place and the manifest is not."""
    assert merged(jobs, "label").status == 0
    expected = {path.name: path.read_bytes() for path in (jobs / "merged").iterdir()}
    (jobs / "merged" / "manifest.json").unlink()
    (jobs / "merged" / "labels.parquet").unlink()
    (jobs / "merged" / ".progress").mkdir()
    assert merged(jobs, "label").status == 0
    assert {path.name: path.read_bytes() for path in (jobs / "merged").iterdir()} == expected


class Stopping:
    """A progress that stops the run at the first step that it is told of."""

    def advance(self, count: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt

    def say(self, text: str) -> None:
        pass


def test_a_part_that_was_damaged_before_the_merge_goes_on_is_made_again(jobs: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge(directories(jobs, "tokenize"), jobs / "merged", progress=Stopping())
    (part,) = (jobs / "merged").glob("part-*.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert merged(jobs, "tokenize").status == 0
    verified = srft_prep("verify", jobs / "merged")
    assert verified.status == 0, verified.stdout


@pytest.mark.parametrize("stage", ["label", "tokenize"])
def test_the_output_is_none_of_the_directories_to_merge(jobs: Path, stage: str) -> None:
    before = {path: path.read_bytes() for path in (jobs / f"{stage}-0").iterdir()}
    elsewhere = jobs / "link"
    elsewhere.symlink_to(jobs / f"{stage}-0")
    for output in (jobs / f"{stage}-0", elsewhere):
        run = srft_prep("merge", *directories(jobs, stage), "-o", output, "--overwrite")
        assert run.status == 2
        assert f"{output}: is one of the directories to merge" in run.stderr
    assert {path: path.read_bytes() for path in (jobs / f"{stage}-0").iterdir()} == before


def test_more_jobs_than_a_process_may_have_files_open_are_merged_or_told(tmp_path: Path) -> None:
    source = write_trajectories(
        tmp_path / "trajectories",
        [trajectory(f"run-{number}", num_steps=1) for number in range(90)],
    )
    outputs = [tmp_path / f"job-{index}" for index in range(15)]
    for index, output in enumerate(outputs):
        array = ("--shard-index", index, "--num-shards", len(outputs))
        assert srft_prep("label", source, "-o", output, "--only", "all", *array).status == 0
    merging = [sys.executable, "-m", "srft_prep", "merge", *outputs, "-o", tmp_path / "merged"]
    for limit, status in (("-n", 2), ("-Sn", 0)):
        command = f'ulimit {limit} 24 && exec "$@"'
        done = subprocess.run(
            ["bash", "-c", command, "bash", *map(str, merging)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        if status:
            assert "ulimit -n" in done.stderr
            assert "Traceback" not in done.stderr
            assert not (tmp_path / "merged").exists()
    assert read_manifest(tmp_path / "merged").counts["trajectories"] == 90
