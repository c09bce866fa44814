"""Small stage directories made by the real writers, and the program as a user runs it."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from srft_prep.chat import load_spec
from srft_prep.cli import main
from srft_prep.config import IngestConfig, LabelConfig, Only
from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.critic.pricing import Rates
from srft_prep.examples.record import RUNS_DIR
from srft_prep.ingest import ingest
from srft_prep.labeling import label
from srft_prep.manifest import Manifest
from srft_prep.schemas import LABELS, REQUESTS
from srft_prep.storage import StageWriter, write_table
from srft_prep.token_rows import TokenRow, token_table
from srft_prep.tokens import tokenize
from srft_prep.trajectories import trajectories_table
from srft_prep.types import LABELS as NAMES
from srft_prep.types import Label, Message, Trajectory


def short_runs(number: int, *, messages: int) -> list[dict[str, Any]]:
    """Return raw runs, no two the same: the first messages of the recorded ones, the task cut."""
    examples = [orjson.loads(path.read_bytes()) for path in sorted(RUNS_DIR.rglob("*.traj.json"))]
    rows = []
    for place in range(number):
        run = examples[place % len(examples)]
        first, second, *rest = run["messages"][:messages]
        second = {**second, "content": f"Ticket {place}\n{second['content'][-400:]}"}
        rows.append(
            {
                "traj_id": f"run-{place:05d}",
                "instance_id": run["instance_id"],
                "resolved": place % 3 == 0,
                "messages": [first, second, *rest],
            }
        )
    return rows


@dataclass(frozen=True)
class Run:
    """What a command did."""

    status: int
    stdout: str
    stderr: str


def srft_prep(*args: object) -> Run:
    """Run the program's own entry point in this process."""
    stdout, stderr = TextIOWrapper(BytesIO(), "utf-8"), TextIOWrapper(BytesIO(), "utf-8")
    argv, sys.argv = sys.argv, ["srft-prep", *map(str, args)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            main()
    except SystemExit as exit_:
        status = exit_.code
    finally:
        sys.argv = argv
    texts = []
    for stream in (stdout, stderr):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    assert isinstance(status, int)
    return Run(status, *texts)


def trajectory(
    name: str, *, num_steps: int = 3, resolved: bool | None = False, text: str = ""
) -> Trajectory:
    """Return a trajectory whose messages depend on its name, or on `text` where it is given."""
    said = text or name
    steps = [
        message
        for step in range(num_steps)
        for message in (
            Message(role="assistant", kind="action", content=f"{said}: action {step}"),
            Message(role="user", kind="observation", content=f"{said}: output {step}"),
        )
    ]
    return Trajectory(
        trajectory_id=name,
        instance_id=name,
        format="messages",
        messages=(Message(role="user", kind="prompt", content=f"{said}: task"), *steps),
        resolved=resolved,
    )


def write_trajectories(path: Path, trajectories: Sequence[Trajectory]) -> Path:
    """Write trajectories as `ingest` does, one part."""
    with StageWriter.open(path, stage="ingest", config={}, inputs=[], overwrite=True) as writer:
        table = trajectories_table(trajectories)
        write_table(table, path / "part-00000.parquet", row_group_rows=2)
        counts = {
            "trajectories": len(trajectories),
            "steps": sum(each.num_steps for each in trajectories),
            "rejected": 0,
        }
        writer.finish(counts=counts, names=["part-00000.parquet"], command=[])
    return path


def token_row(owner: Trajectory, *, gap: int = 4, step_tokens: int = 6) -> TokenRow:
    """Return tokens of a trajectory: `gap` of context before each step of `step_tokens`, and one
    after the last; the ids are those of no other trajectory, as far as possible. A token begins 3
    characters; the first half of a step is its thought, all of which, but for 2 characters that
    the template stripped and one before it, is the message's content."""
    spans = tuple(
        (step, step * (gap + step_tokens) + gap, (step + 1) * (gap + step_tokens))
        for step in range(owner.num_steps)
    )
    thought = step_tokens // 2
    cuts = [
        (step, part, start, end)
        for step, first, last in spans
        for part, start, end in (
            ("thought", first, first + thought),
            ("tool_call", first + thought, last - 1),
            ("end_of_turn", max(first, last - 1), last),
        )
        if start < end
    ]
    length = owner.num_steps * (gap + step_tokens) + 1
    first = int(owner.content_hash[:5], 16)
    ids = np.arange(first, first + length, dtype=np.int32)
    return TokenRow(
        trajectory_id=owner.trajectory_id,
        resolved=owner.resolved,
        content_hash=owner.content_hash,
        input_ids=ids,
        step_spans=spans,
        part_spans=tuple(cuts),
        field_spans=tuple((step, "content", 1, 3 * thought, 2) for step in range(len(spans))),
        convention_spans=tuple(
            ("axolotl", step, max(start - 1, 0), end) for step, start, end in spans
        ),
        step_chars=np.full(step_tokens * owner.num_steps, 3, np.int16),
        instance_id=owner.instance_id,
    )


def write_tokens(path: Path, *parts: Sequence[TokenRow]) -> Path:
    """Write token rows as `tokenize` does."""
    spec = load_spec("example")
    rows = [row for part in parts for row in part]
    with StageWriter.open(path, stage="tokenize", config={}, inputs=[], overwrite=True) as writer:
        names = [f"part-{number:05d}.parquet" for number in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            write_table(token_table(list(part)), path / name, row_group_rows=2)
        counts = {
            "sequences": len(rows),
            "tokens": sum(len(row.input_ids) for row in rows),
            "step_tokens": sum(end - start for row in rows for _, start, end in row.step_spans),
        }
        tokenizer = {"tokenizer": spec.describe()}
        writer.finish(counts=counts, names=names, command=[], extra=tokenizer)
    return path


def label_row(owner: Trajectory, step: int, given: Label, **values: Any) -> dict[str, Any]:
    """Return a row of `labels.parquet`."""
    row = dict.fromkeys(LABELS.names) | {
        "trajectory_id": owner.trajectory_id,
        "content_hash": owner.content_hash,
        "step_index": step,
        "label": given,
        "critic_id": "hand@1",
        "prompt_hash": "none",
    }
    return row | values


def write_labels(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write a label directory with exactly these rows, whether they make sense or not."""
    rows = list(rows)
    settings = {"critic_id": "hand@1", "prompt_hash": "none"}
    counts = Counter(trajectories=0, steps=len(rows), failures=0, **dict.fromkeys(NAMES, 0))
    counts.update(row["label"] for row in rows)
    with StageWriter.open(
        path, stage="label", config=settings, inputs=[], accumulates=True
    ) as writer:
        table = pa.Table.from_pylist(rows, schema=LABELS)
        write_table(table, path / "labels.parquet", row_group_rows=8)
        write_table(REQUESTS.empty_table(), path / "requests.parquet", row_group_rows=8)
        names = ["labels.parquet", "requests.parquet"]
        writer.finish(counts=dict(counts), names=names, command=[])
    return path


def labels_by(
    owners: Iterable[Trajectory], given: Mapping[str, Sequence[Label]]
) -> list[dict[str, Any]]:
    """Return label rows from the labels of each trajectory's steps."""
    return [
        label_row(owner, step, label)
        for owner in owners
        for step, label in enumerate(given.get(owner.trajectory_id, ()))
    ]


@dataclass
class ListedCritic:
    """Labels by a fixed pattern of the step's number; fails where it is told to."""

    critic_id: str = "listed@1"
    prompt_hash: str = "none"
    failing: set[str] = field(default_factory=set)
    """Trajectories that it gives no labels for."""
    asked: list[str] = field(default_factory=list)
    """Trajectories that it was asked about, in order."""

    rates: Rates = field(default_factory=Rates)
    max_input_tokens: int | None = None

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> list[CriticRequest]:
        return [CriticRequest.of(trajectory)]

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        for request in requests:
            name = request.trajectory_id
            self.asked.append(name)
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "usd": 0.25}
            if name in self.failing:
                yield CriticReply(request=request, failure="the reply is no list", **usage)
            else:
                labels = tuple(map(listed_label, request.steps))
                yield CriticReply(request=request, labels=labels, **usage)

    def close(self) -> None:
        pass


def listed_label(step: int) -> StepLabel:
    """Return the pattern's label of a step: 3, 10, ... are harmful; 4, 9, ... unnecessary."""
    if step % 7 == 3:
        return StepLabel(step_index=step, label="harmful", rationale="every-seventh: by the list")
    if step % 5 == 4:
        return StepLabel(step_index=step, label="unnecessary", rationale="every-fifth: by the list")
    return StepLabel(step_index=step, label="good")


def run_critic(
    trajectories: Path, output: Path, critic: Any, *, only: Only = "all", retry_failed: bool = False
) -> Manifest:
    """Label a directory with a critic object."""
    config = LabelConfig(
        critic="listed", critic_id=critic.critic_id, prompt_hash=critic.prompt_hash, only=only
    )
    return label(trajectories, output, critic, config, retry_failed=retry_failed)


@dataclass(frozen=True)
class Examples:
    """The example runs through all stages before `pack`."""

    trajectories: Path
    labels: Path
    tokens: Path


def make_examples(root: Path) -> Examples:
    """Ingest, label (with `ListedCritic`) and tokenize the example runs."""
    examples = Examples(root / "trajectories", root / "labels", root / "tokens")
    ingest([str(RUNS_DIR)], examples.trajectories, IngestConfig(), outcomes=[str(RUNS_DIR)])
    run_critic(examples.trajectories, examples.labels, ListedCritic())
    tokenize(examples.trajectories, examples.tokens, tokenizer="example")
    return examples
