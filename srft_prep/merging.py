"""The directories of N array jobs -> the one that a single run would have written.

The source says which trajectory is due, its content hash which job has it, and that job's tables
which rows come next: one pass over all tables, in the order of the source. So each trajectory is
found where it must be, once, or the merge stops. Rows are grouped and written as by the stages
themselves, which makes the same bytes. Memory holds a row group and a batch of each job's rows.
"""

import hashlib
import resource
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.array_jobs import shard_of
from srft_prep.cascade_report import summed_reports
from srft_prep.errors import ConfigError, ShardError, in_one_line
from srft_prep.hashes import sha256_of
from srft_prep.job_outputs import JobOutput, read_jobs, source_of, summed
from srft_prep.label_tables import SHOWN_FAILURES, opened_files
from srft_prep.ledger import ledger_files
from srft_prep.ledger_labels import wanted
from srft_prep.manifest import BATCHES, LEDGERS, MANIFEST, Manifest, names_in
from srft_prep.object_mirror import is_mirrored
from srft_prep.object_outputs import bring_ledgers
from srft_prep.progress import Progress, Silent
from srft_prep.row_runs import RowRuns, table_of
from srft_prep.schemas import LABELS, LABELS_FILE, REJECTED_FILE, REQUESTS, REQUESTS_FILE, TOKENS
from srft_prep.storage import (
    StageWriter,
    atomic_path,
    write_rejected,
)
from srft_prep.token_parts import TOKEN_OPTIONS
from srft_prep.token_rows import is_full

LEDGER: Final = "ledger-00000.jsonl"
_PAID: Final = (LEDGERS, BATCHES)
TOKEN_BATCH_ROWS: Final = 16
_OTHER_OPEN_FILES: Final = 64
"""What a process has open beside the tables of the jobs, and some."""
_OF_EVERY_STAGE: Final = frozenset(
    {"schema_version", "stage", "package_version", "command", "config", "inputs", "counts", "files"}
)


class _Due(NamedTuple):
    """What the source says of a trajectory."""

    trajectory_id: str
    content_hash: str
    resolved: bool | None
    num_steps: int


def merge(
    directories: Sequence[Path],
    output: Path,
    *,
    trajectories: Path | None = None,
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Merge the outputs of all jobs of an array and return the manifest of what they make.

    Args:
        directories: those of `label`, or of `tokenize`, in any order.
        output: the directory to write.
        trajectories: where the trajectories are now; by default where the jobs read them.
        overwrite: replace the tokens that another run left in `output`.
        command: the words of the command, for the manifest.
        progress: is told of every trajectory.

    Raises:
        ShardError: a directory is unfinished or damaged, or a trajectory is nowhere or twice.
        ConfigError: the directories are not those of one array, or the output cannot be written.
    """
    for each in directories:
        if output.exists() and output.samefile(each):
            raise ConfigError(f"{output}: is one of the directories to merge; choose another -o")
    jobs = read_jobs(directories)
    source = source_of(jobs, trajectories)
    is_label = jobs[0].manifest.stage == "label"
    _allow_open_files(len(jobs) * (2 if is_label else 1))
    if is_label:
        _refuse_other_answers(jobs, output)
    with StageWriter.open(
        output,
        stage=jobs[0].manifest.stage,
        config=jobs[0].settings,
        inputs=_inputs(jobs[0], source if trajectories else None),
        overwrite=overwrite,
        accumulates=is_label,
    ) as writer:
        if writer.finished:
            return writer.finished
        merged = _merge_labels if is_label else _merge_tokens
        names, extra = merged(jobs, source, writer, progress or Silent())
        of_first = {key: jobs[0].manifest.data[key] for key in jobs[0].manifest.data}
        of_first = {key: of_first[key] for key in of_first if key not in _OF_EVERY_STAGE}
        return writer.finish(
            counts=summed(jobs), names=names, command=command or [], extra={**of_first, **extra}
        )


def _allow_open_files(number: int) -> None:
    """Let this process have the tables of all jobs open at a time, if it may.

    Raises:
        ConfigError: it may not.
    """
    needed = number + _OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"a merge of so many jobs has {number} files open at a time, and a process here may "
            f"have {hard}: ask for more (ulimit -n {needed})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _inputs(job: JobOutput, source: Manifest | None) -> list[dict[str, Any]]:
    inputs: list[dict[str, Any]] = job.manifest.data["inputs"]
    return [source.as_input() if source and each["stage"] == "ingest" else each for each in inputs]


def _due(part: Path) -> Iterator[_Due]:
    """Yield what is due of a part of the source, in order."""
    try:
        table = pq.read_table(part, columns=list(_Due._fields), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{part}: cannot be read: {in_one_line(error, limit=300)}") from None
    columns = (table[name].to_pylist() for name in _Due._fields)
    yield from map(_Due._make, zip(*columns, strict=True))


def _merge_tokens(
    jobs: Sequence[JobOutput], source: Manifest, writer: StageWriter, progress: Progress
) -> tuple[list[str], dict[str, Any]]:
    """Write the token parts; return the names of all files and what the manifest adds.

    A killed merge goes on after the last part in the journal, as `tokenize` would.
    """
    names = [part.name for part in source.parts]
    for job in jobs:
        if job.manifest.parts != [job.path / name for name in names]:
            raise ShardError(
                f"{job.path}: expected a token part for each of the {len(names)} trajectory parts, "
                f"got {len(job.manifest.parts)}; run that job again"
            )
    refused = [job.rejected(REJECTED_FILE) for job in jobs]
    rejected: list[dict[str, Any]] = []
    for part in source.parts:
        key = f"merged-{part.stem}"
        entry = writer.entry(key)
        due = list(_due(part))
        if entry is None:
            entry = {"rejected": _merge_part(part.name, due, jobs, refused, writer.path)}
            writer.record(key, entry, files=[writer.path / part.name])
        left_out = set(entry["rejected"])
        rejected += [
            refused[shard_of(each.content_hash, len(jobs))].pop(each.trajectory_id)
            for each in due
            if each.trajectory_id in left_out
        ]
        progress.advance(len(due))
    for job, left in zip(jobs, refused, strict=True):
        if left:
            raise _stranger(job.path / REJECTED_FILE, next(iter(left)))
    write_rejected(writer.path, rejected)
    certificate = jobs[0].manifest.data["certificate"]
    during: Counter[str] = Counter()
    for job in jobs:
        during.update(job.manifest.data["certificate"]["during_run"])
    return [*names, REJECTED_FILE], {"certificate": {**certificate, "during_run": dict(during)}}


def _merge_part(
    name: str,
    due: Sequence[_Due],
    jobs: Sequence[JobOutput],
    refused: Sequence[dict[str, dict[str, Any]]],
    output: Path,
) -> list[str]:
    """Write the token part of a name; return the trajectories that it does not hold."""
    runs = [RowRuns(job.path / name, TOKENS, batch_rows=TOKEN_BATCH_ROWS) for job in jobs]
    is_per_step = jobs[0].settings["history"] == "per-step"
    rejected: list[str] = []
    with (
        atomic_path(output / name) as temporary,
        pq.ParquetWriter(temporary, TOKENS, **TOKEN_OPTIONS) as writer,
    ):
        group: list[pa.RecordBatch] = []
        num_tokens = 0
        for each in due:
            job = shard_of(each.content_hash, len(jobs))
            taken = runs[job].take(each.trajectory_id)
            is_refused = each.trajectory_id in refused[job]
            if is_refused and taken:
                raise ShardError(
                    f"{runs[job].path}: {each.trajectory_id} has rows, and is in {REJECTED_FILE}, "
                    f"too; delete {jobs[job].path} and run that job again"
                )
            if is_refused:
                rejected.append(each.trajectory_id)
            elif not taken and not (is_per_step and not each.num_steps):
                raise _missing(runs[job], jobs[job], each.trajectory_id)
            for row in (batch.slice(i, 1) for batch in taken for i in range(len(batch))):
                group.append(row)
                num_tokens += row["num_tokens"][0].as_py()
                if is_full(len(group), num_tokens):
                    writer.write_table(table_of(group, TOKENS))
                    group, num_tokens = [], 0
        if group:
            writer.write_table(table_of(group, TOKENS))
        _refuse_rest(runs)
    return rejected


def _merge_labels(
    jobs: Sequence[JobOutput], source: Manifest, writer: StageWriter, progress: Progress
) -> tuple[list[str], dict[str, Any]]:
    """Write the tables and the ledger; return their names and what the manifest adds."""
    (writer.path / MANIFEST).unlink(missing_ok=True)
    labels = [RowRuns(job.path / LABELS_FILE, LABELS) for job in jobs]
    requests = [RowRuns(job.path / REQUESTS_FILE, REQUESTS) for job in jobs]
    only = jobs[0].settings["only"]
    failures: list[str] = []
    with opened_files(writer.path) as files:
        for part in source.parts:
            for each in _due(part):
                job = shard_of(each.content_hash, len(jobs))
                asked = requests[job].take(each.trajectory_id)
                if each.num_steps and wanted(each.resolved, only) and not asked:
                    raise _missing(requests[job], jobs[job], each.trajectory_id)
                files.labels += labels[job].take(each.trajectory_id)
                files.requests += asked
                for batch in asked:
                    reasons = filter(None, batch["failure"].to_pylist())
                    failures += [f"{each.trajectory_id}: {reason}" for reason in reasons]
                del failures[SHOWN_FAILURES:]
                progress.advance()
            files.end_part()
        _refuse_rest([*labels, *requests])
    with atomic_path(writer.path / LEDGER) as temporary, temporary.open("wb") as file:
        file.writelines(_ledger_lines(jobs))
    if not (writer.path / LEDGER).stat().st_size:  # nobody was asked: a run would write none
        (writer.path / LEDGER).unlink()
    ledgers = [path.name for path in ledger_files(writer.path)]
    extra: dict[str, Any] = {"first_failures": failures}
    if all("cascade" in job.manifest.data for job in jobs):
        extra["cascade"] = summed_reports([job.manifest.data["cascade"] for job in jobs])
    return [LABELS_FILE, REQUESTS_FILE, *ledgers], extra


def _ledger_lines(jobs: Sequence[JobOutput]) -> Iterator[bytes]:
    """Yield what the jobs were answered, each line from the job whose content it is.

    So copies of an earlier ledger, given to all jobs to start with, count once. What was torn or
    damaged answers nothing, and stays behind.
    """
    for job in jobs:
        for path in ledger_files(job.path):
            with path.open("rb") as lines:
                yield from (line for line in lines if _is_of(line, job))


def _is_of(line: bytes, job: JobOutput) -> bool:
    try:
        return line.endswith(b"\n") and job.array.has(orjson.loads(line)["content_hash"])
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return False


def _refuse_other_answers(jobs: Sequence[JobOutput], output: Path) -> None:
    """Refuse to write where answers lie that are not those of the jobs: they were paid for."""
    held = {name for name in names_in(output) if any(fnmatch(name, each) for each in _PAID)}
    if not held:
        return
    merged = hashlib.sha256()
    for line in _ledger_lines(jobs):
        merged.update(line)
    with TemporaryDirectory(prefix="srft-prep-") as folder:
        if is_mirrored(output):
            bring_ledgers(output, Path(folder))
        found = sha256_of((Path(folder) if is_mirrored(output) else output) / LEDGER)
    if held != {LEDGER} or found != merged.hexdigest():
        raise ConfigError(
            f"{output}: holds answers of a critic that are not those of the directories to merge; "
            "choose another -o"
        )


def _missing(runs: RowRuns, job: JobOutput, trajectory_id: str) -> ShardError:
    found = runs.next_id()
    got = "no more rows" if found is None else f"those of {found}"
    return ShardError(
        f"{runs.path}: expected the rows of {trajectory_id}, got {got}: a trajectory is missing or "
        f"there twice; delete {job.path} and run that job again"
    )


def _stranger(path: Path, trajectory_id: str) -> ShardError:
    return ShardError(
        f"{path}: {trajectory_id} is there twice, or is no trajectory of this job; delete the "
        "directory and run that job again"
    )


def _refuse_rest(all_runs: Sequence[RowRuns]) -> None:
    for runs in all_runs:
        if (left := runs.next_id()) is not None:
            raise _stranger(runs.path, left)
