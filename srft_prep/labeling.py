"""Trajectories -> labels: put every step to a critic, or several, and keep every answer.

What is missing is asked (`asking`) and kept in the ledger; the tables are rebuilt from it at the
end (`label_tables`), with all that it holds of these critics and these trajectories, whichever of
them this run asked about. Several critics take their turns: those of an ensemble see everything,
those of a cascade what the critics before them left (`panel`). All answers are in one ledger, raw:
another calibration, another rule for the ensemble or another threshold of the cascade costs no
question twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from srft_prep.asking import RUN_TOTALS, Asking, NeededOf
from srft_prep.calibration import Calibration
from srft_prep.config import LabelConfig
from srft_prep.critic import Critic, CriticRequest
from srft_prep.critic.budget import Budget
from srft_prep.errors import ConfigError
from srft_prep.foresight import Foresight
from srft_prep.label_tables import write_tables
from srft_prep.ledger import USAGE, Ledger, ledger_files
from srft_prep.ledger_labels import Needed, Row, rows_of
from srft_prep.manifest import MANIFEST, Manifest, manifest_bytes, portable, read_manifest
from srft_prep.object_mirror import is_mirrored
from srft_prep.object_outputs import bring_ledgers
from srft_prep.panel import Panel, needed_of, stages, trajectories_of
from srft_prep.progress import Progress, Silent
from srft_prep.schemas import LABELS_FILE, REQUESTS_FILE
from srft_prep.storage import StageWriter

Flops = Callable[[int, int, int], float]
"""Operations of a request by its prompt, cached and completion tokens."""


def label(
    trajectories: Path,
    output: Path,
    critic: Critic,
    config: LabelConfig,
    *,
    calibration: Calibration | None = None,
    retry_failed: bool = False,
    overwrite: bool = False,
    budget: Budget | None = None,
    flops: Flops | None = None,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Label the steps of a trajectory directory by one critic: `label_together` of one."""
    return label_together(
        trajectories,
        output,
        [critic],
        Panel.of(config, calibration),
        retry_failed=retry_failed,
        overwrite=overwrite,
        budget=budget,
        flops=[flops],
        command=command,
        progress=progress,
    )


def label_together(
    trajectories: Path,
    output: Path,
    critics: Sequence[Critic],
    panel: Panel,
    *,
    retry_failed: bool = False,
    overwrite: bool = False,
    budget: Budget | None = None,
    flops: Sequence[Flops | None] = (),
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Label the steps of a trajectory directory and return the label directory's manifest.

    A directory accumulates: another run with more trajectories adds to its ledger and its tables.
    So does one of other critics, questions or calibrations with `overwrite`: the tables are then
    its own, and the ledger keeps all. The manifest describes what the directory holds; its `run`
    tells of this run: the requests `asked`, the trajectories `reused`, `damaged_ledger_lines`, and
    in `usage` what was asked took, in `members` by critic where there are several.

    Critics take turns, and each but the last is closed after its own, so that local models need
    not fit together. The budget is that of all of them.

    Args:
        trajectories: output of `ingest`.
        output: directory to write.
        critics: as many as the panel has members, in their order.
        panel: what becomes of their labels.
        retry_failed: whether what failed in an earlier run is asked again.
        overwrite: whether tables of other critics, questions or calibrations may go.
        budget: what may be spent.
        flops: of each critic, for its `usage`.
        command: the command line, for the manifest.
        progress: what shows how far it is.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
        ConfigError: the output cannot be written to, or its tables hold the labels of others and
            `overwrite` is not set.
        BackendError: a critic cannot work at all.
    """
    source = read_manifest(trajectories, stage="ingest")
    config = panel.config
    if not overwrite:
        _refuse_others(output, config)
    source.checked()
    with (
        StageWriter.open(
            output,
            stage="label",
            config=config.describe(),
            inputs=[source.as_input()],
            accumulates=True,
        ) as writer,
        Ledger(output) as ledger,
    ):
        if writer.finished is not None:
            return _as_it_is(
                writer.finished, source, critics, panel, ledger, retry_failed=retry_failed
            )
        budget = budget or Budget(None)
        for member in panel.members:
            budget.spent_usd += ledger.spent_usd(member.critic_id, member.prompt_hash)
        counts: Counter[str] = Counter()
        usages: list[dict[str, float]] = []
        known = _foreseen(output, writer.plan)
        foresight: Foresight | None = None
        for place, critic in enumerate(critics):
            is_last = place == len(critics) - 1
            if panel.is_cascade and is_last and critic.max_input_tokens is not None:
                eager = known is None or counts["asked"] > 0
                foresight = Foresight(critic, panel.members[place], ledger, eager=eager)
            run = Asking(
                source,
                critic,
                panel.members[place],
                ledger,
                budget,
                progress or Silent(),
                retry_failed=retry_failed,
                needed=_needed(panel, ledger, place),
                foresight=foresight,
                assure=writer.assure,
            )
            run.flops = flops[place] if flops else None
            run.ask()
            counts += run.counts
            usages.append(run.usage)
            if not is_last:
                critic.close()
            if run.stopped:
                counts["stopped_by_budget"] = 1
                break
        (output / MANIFEST).unlink(missing_ok=True)
        unasked = "the critic gave no reply"
        if counts["stopped_by_budget"]:
            unasked = f"the budget of ${budget.limit_usd:,.2f} would be exceeded; raise it"
        tables = write_tables(source, output, panel, ledger, unasked=unasked)
        extra: dict[str, Any] = {"first_failures": tables.failures}
        if tables.cascade is not None:
            foreseen = None
            if foresight is not None and not counts["stopped_by_budget"]:
                is_known = known is not None and not counts["asked"]
                foreseen = known if is_known else foresight.report(source)
            extra["cascade"] = tables.cascade.as_dict(foreseen)
        if ledger.num_damaged:
            counts["damaged_ledger_lines"] = ledger.num_damaged
        return writer.finish(
            counts=dict(tables.counts),
            names=[LABELS_FILE, REQUESTS_FILE, *(path.name for path in ledger_files(output))],
            command=command or [],
            extra=extra,
            run={**counts, "usage": _summed(usages), **_by_member(panel, usages)},
        )


def _as_it_is(
    held: Manifest,
    source: Manifest,
    critics: Sequence[Critic],
    panel: Panel,
    ledger: Ledger,
    *,
    retry_failed: bool,
) -> Manifest:
    """Return the manifest of labels that cannot be written to, where nothing is left to ask."""
    counts: Counter[str] = Counter()
    usages = []
    for place, critic in enumerate(critics):
        run = _asking(source, critic, panel, place, ledger, retry_failed=retry_failed)
        run.drop_damaged()
        if next(run.requests(None), None) is not None:
            raise ConfigError(
                f"{held.path}: cannot be written to, and there is something to ask "
                f"{critic.critic_id}; make it writable, or choose another -o"
            )
        counts += run.counts
        usages.append(run.usage)
    told = {**counts, "usage": _summed(usages), **_by_member(panel, usages)}
    return Manifest(path=held.path, stage=held.stage, data=held.data, run=told)


def missing_requests(
    trajectories: Path,
    output: Path,
    critic: Critic,
    config: LabelConfig,
    *,
    retry_failed: bool = False,
) -> Iterator[CriticRequest]:
    """Yield what `label` would ask, without asking or writing anything.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
    """
    panel = Panel.of(config)
    for _, requests in missing_together(
        trajectories, output, [critic], panel, retry_failed=retry_failed
    ):
        yield from requests


def missing_together(
    trajectories: Path,
    output: Path,
    critics: Sequence[Critic],
    panel: Panel,
    *,
    retry_failed: bool = False,
) -> Iterator[tuple[int, Iterator[CriticRequest]]]:
    """Yield each critic's place and what `label_together` would ask it; take it before the next.

    Nothing is sent and nothing is written to the output. A critic of a cascade that costs nothing,
    as the rules, is asked nonetheless, since the next one's requests depend on it. A model's
    answers are not known before; what depends on them counts as left by it, so that later critics'
    requests are the most that they can be.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    with TemporaryDirectory(prefix="srft-prep-") as folder:
        if is_mirrored(output):
            bring_ledgers(output, Path(folder))
        else:
            for file in ledger_files(output):
                (Path(folder) / file.name).symlink_to(file.resolve())
        with Ledger(Path(folder)) as ledger:
            for place, critic in enumerate(critics):
                new = partial(
                    _asking, source, critic, panel, place, ledger, retry_failed=retry_failed
                )
                counted = new()
                counted.drop_damaged()
                yield place, counted.requests(None)
                if panel.is_cascade and critic.max_input_tokens is None:
                    new().ask()


def _asking(
    source: Manifest,
    critic: Critic,
    panel: Panel,
    place: int,
    ledger: Ledger,
    *,
    retry_failed: bool,
) -> Asking:
    """Return what a critic would be asked, without a budget and unseen."""
    return Asking(
        source,
        critic,
        panel.members[place],
        ledger,
        Budget(None),
        Silent(),
        retry_failed=retry_failed,
        needed=_needed(panel, ledger, place),
    )


def count_trajectories(trajectories: Path, config: LabelConfig) -> int:
    """Return how many trajectories a run would look at, for a progress bar's total.

    The parts are not hashed for it: `label` does that.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output, or a part cannot be read.
    """
    source = read_manifest(trajectories, stage="ingest")
    try:
        return sum(row.selected for row in rows_of(source.parts, config))
    except (OSError, pl.exceptions.PolarsError):
        source.checked()
        raise


def _needed(panel: Panel, ledger: Ledger, place: int) -> NeededOf | None:
    """Return what tells which steps a critic is to label; None where it is all of them."""
    if not panel.is_cascade or not place:
        return None

    def needed(part: Path, rows: Sequence[Row]) -> list[Needed]:
        found = trajectories_of(part, panel, selected=True)
        taken = stages(panel, ledger, found, number=place)
        names = (row.trajectory_id for row in found.rows[place])
        by_name = dict(zip(names, needed_of(panel, found, taken, place), strict=True))
        return [by_name[row.trajectory_id] for row in rows]

    return needed


def _foreseen(output: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier run of the same plan told of the last critic of a cascade.

    It stands where nothing was asked since.
    """
    if not (output / MANIFEST).exists():
        return None
    data = read_manifest(output).data
    if any(portable(data[key]) != portable(plan[key]) for key in ("config", "inputs")):
        return None
    told = data.get("cascade") or {}
    found = {name: told.get(name) for name in ("last_alone", "last_asked")}
    return None if None in found.values() else found


def _summed(usages: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(usage[name] for usage in usages) for name in (*USAGE, *RUN_TOTALS)}


def _by_member(panel: Panel, usages: Sequence[dict[str, float]]) -> dict[str, Any]:
    if len(panel.members) == 1:
        return {}
    members = [
        {"critic_id": member.critic_id, "prompt_hash": member.prompt_hash, "usage": usage}
        for member, usage in zip(panel.members, usages, strict=False)
    ]
    return {"members": members}


def _refuse_others(output: Path, config: LabelConfig) -> None:
    if manifest_bytes(output) is None:
        return
    held = read_manifest(output).data["config"]
    array = config.describe().get("array")
    if held.get("array") != array:
        raise ConfigError(
            f"{output}: holds labels of {_job_in_words(held.get('array'))}, expected those of "
            f"{_job_in_words(array)}; choose another -o, or say --overwrite to write the tables "
            "anew; the ledger keeps all answers"
        )
    old = held.get("critic_id"), held.get("prompt_hash"), held.get("calibration")
    new = config.critic_id, config.prompt_hash, config.calibration
    if None in old[:2] or old == new:
        return
    old_name, new_name = (
        critic
        + f" (prompt {prompt})" * (old[0] == new[0] and old[1] != new[1])
        + (f" (calibration {(calibration or 'none')[:12]})" if old[2] != new[2] else "")
        for critic, prompt, calibration in (old, new)
    )
    for name, value in (("sure", config.sure), ("audit", config.audit)):
        if held.get(name) not in (None, value) and value is not None:
            old_name, new_name = (
                f"{old_name} --{name} {held[name]:g}",
                f"{new_name} --{name} {value:g}",
            )
    raise ConfigError(
        f"{output}: holds labels of {old_name}; choose another -o, or say --overwrite to write "
        f"the tables of {new_name} anew; the ledger keeps both"
    )


def _job_in_words(array: dict[str, int] | None) -> str:
    if array is None:
        return "all trajectories"
    return f"the array job {array['shard_index']} of {array['num_shards']}"
