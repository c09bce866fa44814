"""Trajectories -> token ids and step spans, part by part, with any number of processes.

One tokenisation of the whole rendering gives ids and spans together, so that they cannot drift
apart. A token belongs to a step when its first character does: a token that straddles the end of
the assistant header (the header's newline merged with a newline that the agent wrote first) was
forced in part by the header and is not trained.

Each trajectory part becomes the token part of the same name. Parts are independent, so that they
can be made by several processes in any order, and a rerun makes only the missing ones. Where the
fast engine is found to differ from the reference in the midst of a run, all parts that it made are
made again by the reference, which the journal remembers.

An array job makes the parts of its own trajectories alone; what is tried before is the same first
trajectories for all jobs, so that they find the same (`merging` makes one directory of theirs).
"""

import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from srft_prep.array_jobs import ArrayJob
from srft_prep.certificate import Certificate, Engine, MismatchError, prove
from srft_prep.chat import LoadedTokenizer, TokenizerSpec, load_spec
from srft_prep.config import History, TokenizeConfig
from srft_prep.engines import FAST, REFERENCE, load_fast
from srft_prep.errors import ConfigError, FormatError
from srft_prep.manifest import PROGRESS, Manifest, read_manifest
from srft_prep.part_pool import run_jobs
from srft_prep.progress import Progress, Silent
from srft_prep.schemas import REJECTED_FILE
from srft_prep.storage import StageWriter, flush, write_rejected
from srft_prep.token_parts import MadePart, tokenize_part
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Trajectory

if TYPE_CHECKING:
    from srft_prep.ray_cluster import RayCluster

CHECKED_TRAJECTORIES: Final = 64
"""Trajectories on which template and engine are tried before anything is written."""

CUTS: Final = 4
"""Steps of each at which the history is looked at."""

_Job = tuple[Path, Path, TokenizeConfig]
"""A trajectory part, the token part to write, and the settings."""

_ENGINE: Final = "engine"
"""Key of the journal's note that the fast engine was found to differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """What a template did to the first trajectories."""

    trajectories: list[Trajectory]
    texts: list[str]
    """Final renderings of those that it did not refuse."""
    rewritten: list[str]
    """Where it rewrites history, for each trajectory in which it does."""

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {
            "trajectories": len(self.trajectories),
            "refused": len(self.trajectories) - len(self.texts),
            "rewriting_history": len(self.rewritten),
            "first": self.rewritten[0] if self.rewritten else None,
        }


@dataclass(slots=True)
class _Run:
    """What a run needs, and what it has made so far."""

    writer: StageWriter
    tokenizer: LoadedTokenizer
    config: TokenizeConfig
    workers: int | None
    cluster: "RayCluster | None"
    progress: Progress
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Journal entries by the names of the parts."""
    times: list[tuple[float, float]] = field(default_factory=list)
    """When each part that this very run made was started and ended."""


def tokenize(
    trajectories: Path,
    output: Path,
    *,
    tokenizer: str,
    chat_template: Path | None = None,
    history: History = "auto",
    engine: Engine = "auto",
    axolotl: bool = False,
    array: ArrayJob | None = None,
    workers: int | None = 1,
    cluster: "RayCluster | None" = None,
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the tokens of a trajectory directory to a stage directory and return its manifest.

    With `array`, those of that job's share of the trajectories. With `cluster`, parts are made by
    as many processes there; None of `workers` then means one for each of its cores.

    `run` of the manifest holds `startup_seconds`, and `seconds` from the start of the first part
    to the end of the last one.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
        ConfigError: the tokenizer, template or engine cannot be used, the template rewrites history
            and `history` is `auto`, or the output cannot be written to.
        MismatchError: `engine` is `fastokens`, and it was found to differ from the reference.
    """
    began = time.monotonic()
    source = read_manifest(trajectories, stage="ingest")
    loaded, config = _load(tokenizer, chat_template, history, engine, axolotl=axolotl, array=array)
    source.checked()
    first = list(islice(read_trajectories(source.parts), CHECKED_TRAJECTORIES))
    tried = _check_template(loaded, first, history)
    with StageWriter.open(
        output,
        stage="tokenize",
        config=config.describe(),
        inputs=[source.as_input()],
        overwrite=overwrite,
    ) as writer:
        if writer.finished:
            return writer.finished
        run = _Run(
            writer=writer,
            tokenizer=loaded,
            config=config,
            workers=workers,
            cluster=cluster,
            progress=progress or Silent(),
        )
        certificate = _certify(run, tried.texts, engine)
        if history == "per-step":
            run.progress.say(_cost(run, tried, source.counts["trajectories"]))
        certificate = _make_all(run, source.parts, certificate, engine)
        names = [part.name for part in source.parts]
        counts: Counter[str] = Counter(sequences=0, tokens=0, step_tokens=0, rejected=0)
        compared: Counter[str] = Counter()
        for name in names:
            counts.update(run.entries[name]["counts"])
            compared.update(run.entries[name]["compared"])
        rejected = (row for name in names for row in run.entries[name]["rejected"])
        write_rejected(output, rejected)
        return writer.finish(
            counts=dict(counts),
            names=[*names, REJECTED_FILE],
            command=command or [],
            extra={
                "tokenizer": loaded.spec.describe(),
                "certificate": certificate.describe(compared),
                "tried": tried.describe(),
            },
            run=_timing(run, began),
        )


def _load(
    tokenizer: str,
    chat_template: Path | None,
    history: History,
    engine: Engine,
    *,
    axolotl: bool,
    array: ArrayJob | None,
) -> tuple[LoadedTokenizer, TokenizeConfig]:
    spec = load_spec(tokenizer, chat_template)
    try:
        loaded = spec.load(axolotl=axolotl)
    except ConfigError as error:
        raise ConfigError(f"{chat_template or tokenizer}: {error}") from None
    if engine == FAST:
        try:
            load_fast(spec.backend)
        except FormatError as error:
            raise ConfigError(
                f"--tokenizer-engine {FAST}: {error}; choose auto, which then takes {REFERENCE}"
            ) from None
    config = TokenizeConfig(
        tokenizer_hash=spec.tokenizer_hash,
        template_hash=spec.template_hash,
        history=history,
        axolotl=axolotl,
        array=array,
    )
    return loaded, config


def _certify(run: _Run, texts: list[str], engine: Engine) -> Certificate:
    """Find out whether the fast engine may be used, and choose the engine."""
    spec = run.tokenizer.spec
    if note := run.writer.entry(_ENGINE):
        certificate = Certificate(exact=False, reason=note["reason"])
    else:
        certificate = prove(
            spec.backend,
            run.tokenizer.backend,
            texts,
            control_tokens=spec.control_tokens,
            engine=engine,
        )
    run.tokenizer.use_engine(fast=certificate.exact)
    return certificate


def _cost(run: _Run, tried: _Tried, num_trajectories: int) -> str:
    """Return a sentence on what `per-step` costs, reckoned from what was tried."""
    cost = run.tokenizer.renderer.cost(tried.trajectories)
    encoded = run.tokenizer.encoder.encode(tried.texts)
    scale = num_trajectories / max(len(tried.trajectories), 1)
    full = sum(len(each.ids) for each in encoded) * scale
    return (
        f"--history per-step takes about {cost.per_step_sequences * scale:,.0f} sequences of "
        f"{full * cost.factor:,.0f} tokens in all, {cost.factor:.2f} times those of full "
        f"(reckoned from {len(tried.trajectories)} of {num_trajectories:,} trajectories)"
    )


def _make_all(
    run: _Run, parts: list[Path], certificate: Certificate, engine: Engine
) -> Certificate:
    """Make all parts, and return what was found out about the engine by the end."""
    try:
        _make_missing(run, parts)
    except MismatchError as error:
        if engine == FAST:
            raise
        run.progress.say(f"{error}. Starting over with {REFERENCE}")
        run.writer.record(_ENGINE, {"reason": str(error)})
        certificate = Certificate(exact=False, reason=str(error))
        run.tokenizer.use_engine(fast=False)
        run.times.clear()
        _make_missing(run, parts)
    return certificate


def _make_missing(run: _Run, parts: list[Path]) -> None:
    """Make the parts that are not in the journal, or were made by an engine that is no good."""
    usable = (REFERENCE,) if run.writer.entry(_ENGINE) else (FAST, REFERENCE)
    run.entries.clear()
    todo = []
    for part in parts:
        entry = run.writer.entry(part.stem)
        if entry is None or entry.get("engine") not in usable:
            todo.append(part)
        else:
            run.entries[part.name] = entry
            run.progress.advance(entry["counts"]["trajectories"])
    for part, made in _made(run, todo):
        run.writer.record(part.stem, made.entry, files=[run.writer.path / part.name])
        run.entries[part.name] = made.entry
        run.times.append((made.started, made.ended))
        run.progress.advance(made.entry["counts"]["trajectories"])


def _made(run: _Run, todo: list[Path]) -> Iterator[tuple[Path, MadePart]]:
    """Make parts, here or in processes, and yield them as they are done."""
    jobs = [(part, run.writer.path / part.name, run.config) for part in todo]
    arguments = (run.tokenizer.spec, run.tokenizer.encoder.is_fast, run.config.axolotl)
    if run.cluster is not None:
        yield from _made_on(run.cluster, run, jobs, arguments)
    elif (run.workers or 1) <= 1 or len(todo) <= 1:
        for job in jobs:
            yield job[0], _make(job, run.tokenizer)
    else:
        for (part, _, _), made in run_jobs(
            jobs, _work, workers=run.workers or 1, start=_start_worker, start_arguments=arguments
        ):
            yield part, made


def _made_on(
    cluster: "RayCluster", run: _Run, jobs: list[_Job], arguments: tuple[Any, ...]
) -> Iterator[tuple[Path, MadePart]]:
    """Make parts in a cluster, and yield them as they are done.

    A part gets its name here: a process that nobody can reach any more may still write one.
    """
    from srft_prep.ray_jobs import run_jobs as run_jobs_on_ray

    here = [(part.resolve(), output.resolve(), config) for part, output, config in jobs]
    parts = {job: part for job, (part, _, _) in zip(here, jobs, strict=True)}
    began = time.monotonic()
    for job, (apart, made) in run_jobs_on_ray(
        here,
        _work_apart,
        cluster=cluster,
        workers=run.workers,
        start=_start_worker,
        start_arguments=arguments,
    ):
        output = job[1]
        apart.replace(output)
        flush(output.parent)
        yield parts[job], replace(made, started=began, ended=time.monotonic())


_worker_tokenizer: LoadedTokenizer | None = None


def _start_worker(spec: TokenizerSpec, fast: bool, axolotl: bool) -> None:
    """Load the tokenizer once a process; each process has one core to itself."""
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker_tokenizer = spec.load(fast=fast, axolotl=axolotl)


def _work(job: _Job) -> MadePart:
    assert _worker_tokenizer is not None
    return _make(job, _worker_tokenizer)


def _work_apart(job: _Job) -> tuple[Path, MadePart]:
    """Make a part under a name of its own, in the folder of the journal; return the name, too."""
    part, output, config = job
    if not (part.exists() and output.parent.exists()):
        missing = part if not part.exists() else output.parent
        raise ConfigError(
            f"{missing}: is not to be seen on {socket.gethostname()}: with --engine ray all "
            "machines need the directories under one path (of addresses in a store: SRFT_CACHE)"
        )
    apart = output.parent / PROGRESS / f"{output.stem}.{uuid.uuid4().hex}.parquet"
    return apart, _work((part, apart, config))


def _make(job: _Job, tokenizer: LoadedTokenizer) -> MadePart:
    part, output, config = job
    return tokenize_part(part, output, tokenizer, config.history, array=config.array)


def _timing(run: _Run, began: float) -> dict[str, float]:
    """Return how long the parts took, and what came before; all 0 where none was made."""
    if not run.times:
        return {"startup_seconds": 0.0, "seconds": 0.0}
    first = min(started for started, _ in run.times)
    last = max(ended for _, ended in run.times)
    return {"startup_seconds": first - began, "seconds": last - first}


def _check_template(
    tokenizer: LoadedTokenizer, trajectories: list[Trajectory], history: History
) -> _Tried:
    """Try a template on the first trajectories, before anything is written.

    Raises:
        ConfigError: it rewrites history and `history` is `auto`, or it refuses all of them.
    """
    reasons: list[str] = []
    texts: list[str] = []
    found: list[str] = []
    for trajectory in trajectories:
        try:
            (whole,) = tokenizer.conversations(trajectory, history="full")
            texts.append(whole.rendering.text)
            rewritten = tokenizer.renderer.rewrites_history(trajectory, whole, num_cuts=CUTS)
        except FormatError as error:
            reasons.append(f"{trajectory.trajectory_id}: {error}")
            continue
        if rewritten:
            found.append(f"{trajectory.trajectory_id}: {rewritten}")
        if rewritten and history == "auto":
            raise ConfigError(
                f"the chat template rewrites history: with a later message, what "
                f"{trajectory.trajectory_id} showed {rewritten} is rendered differently. "
                "Choose --history per-step (each step in exactly the context that the model saw, "
                "one sequence a step) or --history full (the final rendering, which the model "
                "never saw in this form)"
            )
    if trajectories and len(reasons) == len(trajectories):
        raise ConfigError(f"the chat template fits none of the trajectories; {reasons[0]}")
    return _Tried(trajectories=trajectories, texts=texts, rewritten=found)
