"""The columns of every Parquet file that a stage writes: the file contracts, in one place.

Parts and shards are written with zstd, small row groups and page checksums (a flipped byte is then
found on reading), from explicit Arrow schemas: nothing is ever inferred from the data.
"""

from typing import Final

import pyarrow as pa

from srft_prep.types import LABELS as LABEL_NAMES

SCHEMA_VERSION: Final = 1
"""Version of all file contracts; a reader refuses a newer one."""

LABELS_FILE: Final = "labels.parquet"
REQUESTS_FILE: Final = "requests.parquet"
REJECTED_FILE: Final = "rejected.jsonl"
HELD_OUT_FILE: Final = "held_out.jsonl"

PROBABILITIES: Final = tuple(f"p_{label}" for label in LABEL_NAMES)
"""Columns of a step's label probabilities, in the order of the labels."""

MESSAGE: Final = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string()),
        pa.field("reasoning_content", pa.string()),
        pa.field("tool_calls", pa.string()),
        pa.field("tool_call_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("kind", pa.string(), nullable=False),
    ]
)

TRAJECTORIES: Final = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("instance_id", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("resolved", pa.bool_()),
        pa.field("model", pa.string()),
        pa.field("exit_status", pa.string()),
        pa.field("patch", pa.string()),
        pa.field("tools", pa.string()),
        pa.field("messages", pa.list_(MESSAGE), nullable=False),
        pa.field("num_steps", pa.int32(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
    ]
)

LABELS: Final = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("step_index", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("p_good", pa.float32()),
        pa.field("p_unnecessary", pa.float32()),
        pa.field("p_harmful", pa.float32()),
        pa.field("rationale", pa.string()),
        pa.field("critic_id", pa.string(), nullable=False),
        pa.field("prompt_hash", pa.string(), nullable=False),
    ]
)

REQUESTS: Final = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("cached_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("usd", pa.float64(), nullable=False),
        pa.field("clipped_tokens", pa.int64(), nullable=False),
        pa.field("failure", pa.string()),
        pa.field("critic_id", pa.string(), nullable=False),
        pa.field("prompt_hash", pa.string(), nullable=False),
    ]
)

SPAN: Final = pa.struct(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
    ]
)

PART_SPAN: Final = pa.struct(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
    ]
)
"""Half-open token range of a part of a step; a step's parts are disjoint and cover its span."""

FIELD_SPAN: Final = pa.struct(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("field", pa.string(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("skipped", pa.int32(), nullable=False),
    ]
)
"""Where a message's field stands in its step's text: a half-open range of characters counted from
the text's start, and how many of the field's first characters the template left out (it strips)."""

CONVENTION_SPAN: Final = pa.struct(
    [
        pa.field("convention", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
    ]
)
"""Half-open token range that another tool would train; step -1 where the turn is no step."""

TOKENS: Final = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("resolved", pa.bool_()),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("step_spans", pa.list_(SPAN), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("part_spans", pa.list_(PART_SPAN), nullable=False),
        pa.field("field_spans", pa.list_(FIELD_SPAN), nullable=False),
        pa.field("convention_spans", pa.list_(CONVENTION_SPAN), nullable=False),
        pa.field("step_chars", pa.list_(pa.int16()), nullable=False),
        pa.field("instance_id", pa.string(), nullable=False),
    ]
)
"""`step_chars`: how many characters each token of the steps begins, step after step in order."""

WEIGHT_RUN: Final = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)

SHARDS: Final = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
        pa.field("seq_lengths", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_weights", pa.list_(WEIGHT_RUN), nullable=False),
        pa.field("trajectory_ids", pa.list_(pa.string()), nullable=False),
        pa.field("sum_weights", pa.float64(), nullable=False),
        pa.field("document_sum_weights", pa.list_(pa.float64()), nullable=False),
        pa.field("trajectory_sum_weights", pa.list_(pa.float64()), nullable=False),
    ]
)
"""`sum_weights`: of the packed sequence; `document_sum_weights`: of each of its documents;
`trajectory_sum_weights`: of each document's whole trajectory, over all its documents."""
