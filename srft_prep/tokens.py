"""Trajectories -> token ids and step spans, part by part, with any number of processes.

One tokenisation of the whole rendering gives ids and spans together, so that they cannot drift
apart. A token belongs to a step when its first character does: a token that straddles the end of
the assistant header (the header's newline merged with a newline that the agent wrote first) was
forced in part by the header and is not trained.

Each trajectory part becomes the token part of the same name. Parts are independent, so that they
can be made by several processes in any order, and a rerun makes only the missing ones.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.chat import Conversation, LoadedTokenizer, TokenizerSpec, load_spec
from srft_prep.config import History, TokenizeConfig
from srft_prep.errors import BackendError, ConfigError, FormatError
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.progress import Progress, Silent
from srft_prep.schemas import REJECTED_FILE, SPAN, TOKENS
from srft_prep.storage import PARQUET_OPTIONS, StageWriter, atomic_path, write_rejected
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_ROWS: Final = 16
"""Trajectories rendered and encoded together."""

ROW_GROUP_ROWS: Final = 16
ROW_GROUP_TOKENS: Final = 1 << 20
"""A row group of a part holds as many rows or about as many tokens, whichever comes first."""

CHECKED_TRAJECTORIES: Final = 64
"""Trajectories on which a template is tried before anything is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row of a token part."""

    trajectory_id: str
    resolved: bool | None
    content_hash: str
    input_ids: "NDArray[np.int32]"
    """Token ids, [T]."""
    step_spans: tuple[tuple[int, int, int], ...]
    """(step, start, end) of every step, half-open token ranges, in order."""


@dataclass(slots=True)
class _Made:
    """What came of a part, beside its rows."""

    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=lambda: Counter(trajectories=0, sequences=0))


def tokenize(
    trajectories: Path,
    output: Path,
    *,
    tokenizer: str,
    chat_template: Path | None = None,
    history: History = "auto",
    workers: int = 1,
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the tokens of a trajectory directory to a stage directory and return its manifest.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
        ConfigError: the tokenizer or template cannot be used, the template rewrites history and
            `history` is `auto`, or the output cannot be written to.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    spec = load_spec(tokenizer, chat_template)
    config = TokenizeConfig(
        tokenizer_hash=spec.tokenizer_hash, template_hash=spec.template_hash, history=history
    )
    try:
        loaded = spec.load()
    except ConfigError as error:
        raise ConfigError(f"{chat_template or tokenizer}: {error}") from None
    _check_template(loaded, source.parts, history)
    with StageWriter.open(
        output,
        stage="tokenize",
        config=asdict(config),
        inputs=[source.as_input()],
        overwrite=overwrite,
    ) as writer:
        if writer.finished:
            return writer.finished
        entries = _run(source.parts, writer, loaded, history, workers, progress or Silent())
        names = [part.name for part in source.parts]
        counts: Counter[str] = Counter(sequences=0, tokens=0, step_tokens=0, rejected=0)
        for name in names:
            counts.update(entries[name]["counts"])
        write_rejected(output, (row for name in names for row in entries[name]["rejected"]))
        return writer.finish(
            counts=dict(counts),
            names=[*names, REJECTED_FILE],
            command=command or [],
            extra={"tokenizer": spec.describe()},
        )


def _run(
    parts: list[Path],
    writer: StageWriter,
    tokenizer: LoadedTokenizer,
    history: History,
    workers: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Make the parts that are missing and return all journal entries by part name."""
    entries: dict[str, dict[str, Any]] = {}
    todo = []
    for part in parts:
        entry = writer.entry(part.stem)
        if entry is None:
            todo.append(part)
        else:
            entries[part.name] = entry
            progress.advance(entry["counts"]["trajectories"])

    def done(part: Path, entry: dict[str, Any]) -> None:
        writer.record(part.stem, entry)
        entries[part.name] = entry
        progress.advance(entry["counts"]["trajectories"])

    if workers <= 1 or len(todo) <= 1:
        for part in todo:
            done(part, tokenize_part(part, writer.path / part.name, tokenizer, history))
        return entries
    with ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.spec,),
    ) as pool:
        try:
            with _interrupts_held():
                futures: dict[Future[dict[str, Any]], Path] = {
                    pool.submit(_work, part, writer.path / part.name, history): part
                    for part in todo
                }
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BrokenProcessPool:
            raise BackendError(
                "a tokenize worker died, most often for lack of memory; choose fewer --workers, "
                "the same command continues"
            ) from None
        except BaseException:
            for worker in active_children():
                worker.kill()  # or the pool would first work off all that was submitted
            raise
    return entries


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the block ends; the processes that it starts never see one."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


_worker_tokenizer: LoadedTokenizer | None = None


def _start_worker(spec: TokenizerSpec) -> None:
    """Load the tokenizer once a process, and die with the parent, even by kill -9."""
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = spec.load()
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _work(part: Path, output: Path, history: History) -> dict[str, Any]:
    assert _worker_tokenizer is not None
    return tokenize_part(part, output, _worker_tokenizer, history)


def tokenize_part(
    part: Path, output: Path, tokenizer: LoadedTokenizer, history: History
) -> dict[str, Any]:
    """Write the token part of one trajectory part and return its journal entry.

    Memory holds one batch of renderings and one row group, whatever the part's size: with
    `per-step` history a part's tokens can be fifty times those of its trajectories.
    """
    made = _Made()
    with (
        atomic_path(output) as temporary,
        pq.ParquetWriter(temporary, TOKENS, **PARQUET_OPTIONS) as writer,
    ):
        for group in _row_groups(_token_rows(part, made, tokenizer, history)):
            writer.write_table(_table(group))
    made.counts["rejected"] = len(made.rejected)
    return {"counts": dict(made.counts), "rejected": made.rejected}


def _token_rows(
    part: Path, made: _Made, tokenizer: LoadedTokenizer, history: History
) -> Iterator[TokenRow]:
    """Yield the rows of a part in order; what is refused goes into `made`."""
    batch: list[tuple[Trajectory, Conversation]] = []
    for trajectory in read_trajectories([part]):
        made.counts["trajectories"] += 1
        try:
            conversations = list(tokenizer.conversations(trajectory, history=history))
        except FormatError as error:
            made.rejected.append({"trajectory_id": trajectory.trajectory_id, "reason": str(error)})
            continue
        made.counts.update(tokenizer.dropped_fields(trajectory, conversations))
        for conversation in conversations:
            batch.append((trajectory, conversation))
            if len(batch) == BATCH_ROWS:
                yield from _encoded(batch, made, tokenizer)
                batch = []
    yield from _encoded(batch, made, tokenizer)


def _encoded(
    batch: Sequence[tuple[Trajectory, Conversation]], made: _Made, tokenizer: LoadedTokenizer
) -> Iterator[TokenRow]:
    encodings = tokenizer.encode([conversation for _, conversation in batch])
    for (trajectory, conversation), (ids, spans) in zip(batch, encodings, strict=True):
        made.counts["sequences"] += 1
        made.counts["tokens"] += len(ids)
        made.counts["step_tokens"] += sum(end - start for _, start, end in spans)
        made.counts["control_tokens_as_text"] += len(conversation.rendering.forged)
        yield TokenRow(
            trajectory_id=trajectory.trajectory_id,
            resolved=trajectory.resolved,
            content_hash=trajectory.content_hash,
            input_ids=ids,
            step_spans=spans,
        )


def _row_groups(rows: Iterable[TokenRow]) -> Iterator[list[TokenRow]]:
    group: list[TokenRow] = []
    num_tokens = 0
    for row in rows:
        group.append(row)
        num_tokens += len(row.input_ids)
        if len(group) == ROW_GROUP_ROWS or num_tokens >= ROW_GROUP_TOKENS:
            yield group
            group, num_tokens = [], 0
    if group:
        yield group


def _table(rows: list[TokenRow]) -> pa.Table:
    """Return rows of the `TOKENS` schema, built column by column without Python lists of ids."""
    lengths = np.array([len(row.input_ids) for row in rows], np.int32)
    ids = pa.array(np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)]))
    flat = [span for row in rows for span in row.step_spans]
    spans = np.array(flat, np.int32).reshape(-1, 3)
    span_counts = np.array([len(row.step_spans) for row in rows], np.int32)
    structs = pa.StructArray.from_arrays(
        [pa.array(spans[:, column]) for column in range(3)], fields=list(SPAN)
    )
    columns = [
        pa.array([row.trajectory_id for row in rows], pa.string()),
        pa.array([row.resolved for row in rows], pa.bool_()),
        pa.array([row.content_hash for row in rows], pa.string()),
        pa.ListArray.from_arrays(_offsets(lengths), ids),
        pa.ListArray.from_arrays(_offsets(span_counts), structs, type=TOKENS.field(4).type),
        pa.array(lengths),
    ]
    return pa.Table.from_arrays(columns, schema=TOKENS)


def _offsets(lengths: "NDArray[np.int32]") -> pa.Array:
    return pa.array(np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)]))


def _check_template(tokenizer: LoadedTokenizer, parts: list[Path], history: History) -> None:
    """Try a template on the first trajectories, before anything is written.

    Raises:
        ConfigError: it rewrites history and `history` is `auto`, or it refuses all of them.
    """
    reasons: list[str] = []
    checked = 0
    for trajectory in _first_trajectories(parts):
        checked += 1
        try:
            (whole,) = tokenizer.conversations(trajectory, history="full")
            rewritten = tokenizer.rewrites_history(trajectory, whole, num_cuts=4)
        except FormatError as error:
            reasons.append(f"{trajectory.trajectory_id}: {error}")
            continue
        if rewritten and history == "auto":
            raise ConfigError(
                f"the chat template rewrites history: with a later message, what "
                f"{trajectory.trajectory_id} showed {rewritten} is rendered differently. "
                "Choose --history per-step (each step in exactly the context that the model saw, "
                "one sequence a step) or --history full (the final rendering, which the model "
                "never saw in this form)"
            )
    if checked and len(reasons) == checked:
        raise ConfigError(f"the chat template fits none of the trajectories; {reasons[0]}")


def _first_trajectories(parts: list[Path]) -> Iterator[Trajectory]:
    return islice(read_trajectories(parts), CHECKED_TRAJECTORIES)
