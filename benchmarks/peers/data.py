"""Trajectories for a benchmark: the real ones, as often as wished, under new ids."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import pyarrow as pa

from srft_prep.config import IngestConfig
from srft_prep.ingest import ingest
from srft_prep.manifest import read_manifest
from srft_prep.render import ChatTemplate
from srft_prep.storage import StageWriter, write_table
from srft_prep.template_messages import template_messages, template_tools
from srft_prep.trajectories import read_trajectories, trajectories_table
from srft_prep.types import Trajectory

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SHARED: Final = REPOSITORY.parent / "shared" / "data"
EXAMPLES: Final = REPOSITORY / "srft_prep" / "examples" / "runs"

PART_ROWS: Final = 42
"""Trajectories in a part, so that two processes always have enough to share."""


def real_trajectories(scratch: Path, source: Path | None) -> list[Trajectory]:
    """Return the trajectories of an `ingest` directory, or of the shared data, or the examples."""
    if source is None:
        source = scratch / "ingested"
        ingest(
            [str(SHARED / "trajectories" if SHARED.is_dir() else EXAMPLES)], source, IngestConfig()
        )
    return list(read_trajectories(read_manifest(source, stage="ingest").parts))


def comparable(trajectories: Sequence[Trajectory], template: ChatTemplate) -> list[Trajectory]:
    """Return the trajectories that all tools can be asked about.

    TRL stops at one without an assistant's turn, and other tools let text in a message become a
    control token.
    """
    return [
        trajectory
        for trajectory in trajectories
        if any(message.role == "assistant" for message in trajectory.messages)
        and not template.render(template_messages(trajectory)[0], template_tools(trajectory)).forged
    ]


def write_repeated(
    path: Path, trajectories: Sequence[Trajectory], *, number: int, part_rows: int = PART_ROWS
) -> Path:
    """Write `number` trajectories as `ingest` does: the given ones in turn, under new ids."""
    table = trajectories_table(trajectories)
    with StageWriter.open(path, stage="ingest", config={}, inputs=[], overwrite=True) as writer:
        names = []
        for part in range(-(-number // part_rows)):
            rows = range(part * part_rows, min((part + 1) * part_rows, number))
            taken = table.take(pa.array([row % len(table) for row in rows]))
            ids = [f"{taken['trajectory_id'][i]}#{row // len(table)}" for i, row in enumerate(rows)]
            names.append(f"part-{part:05d}.parquet")
            column = pa.array(ids, pa.string())
            index = table.schema.get_field_index("trajectory_id")
            renamed = taken.set_column(index, table.schema.field(index), column)
            write_table(renamed, path / names[-1], row_group_rows=16)
        counts = {"trajectories": number, "steps": 0, "rejected": 0}
        writer.finish(counts=counts, names=names, command=[])
    return path


def spread_out(trajectories: Sequence[Trajectory], number: int) -> list[Trajectory]:
    """Return `number` trajectories, evenly spaced in the order given."""
    step = max(1, len(trajectories) // number)
    return list(islice(trajectories, 0, None, step))[:number]


def write_chats(path: Path, trajectories: Sequence[Trajectory]) -> Path:
    """Write what `prepare.py` reads, under the ids of a first copy."""
    with path.open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            messages, _ = template_messages(trajectory)
            tools = template_tools(trajectory)
            chat = {"id": f"{trajectory.trajectory_id}#0", "messages": messages, "tools": tools}
            file.write(json.dumps(chat) + "\n")
    return path
