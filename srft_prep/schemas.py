"""The columns of every Parquet file that a stage writes: the file contracts, in one place.

Parts and shards are written with zstd, small row groups and page checksums (a flipped byte is then
found on reading), from explicit Arrow schemas: nothing is ever inferred from the data.
"""

from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1
"""Version of all file contracts; a reader refuses a newer one."""

LABELS_FILE: Final = "labels.parquet"
REQUESTS_FILE: Final = "requests.parquet"
REJECTED_FILE: Final = "rejected.jsonl"

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
    ]
)

SPAN: Final = pa.struct(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
    ]
)

TOKENS: Final = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("resolved", pa.bool_()),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("step_spans", pa.list_(SPAN), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)

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
    ]
)
