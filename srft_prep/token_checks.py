"""Checks of a token row beyond its ids and step spans: parts, fields, conventions, characters."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from srft_prep.weights import FIELDS, PARTS

CONVENTIONS: Final = ("trl", "axolotl")


def check_columns(row: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the columns that describe a row's steps, one line a problem."""
    spans = {span["step"]: (span["start"], span["end"]) for span in row["step_spans"]}
    yield from _check_parts(row["part_spans"], spans)
    num_step_tokens = sum(end - start for start, end in spans.values())
    chars = row["step_chars"]
    if len(chars) != num_step_tokens:
        yield f"step_chars counts {len(chars)} tokens, the steps have {num_step_tokens}"
        return
    if len(chars) and chars.min() < 0:
        yield "step_chars has a negative count"
    begun = np.concatenate([[0], np.cumsum(chars, dtype=np.int64)])
    bounds = np.cumsum([0, *(end - start for start, end in spans.values())])
    sizes = dict(zip(spans, np.diff(begun[bounds]).tolist(), strict=True))
    for span in row["field_spans"]:
        name = f"step {span['step']}: field {span['field']!r:.40}"
        if span["step"] not in sizes or span["field"] not in FIELDS:
            yield f"{name}: expected a field of {', '.join(FIELDS)} of a step of the row"
        elif not 0 <= span["start"] <= span["end"] <= sizes[span["step"]] or span["skipped"] < 0:
            yield (
                f"{name}: characters {span['start']}-{span['end']}, {span['skipped']} skipped, of "
                f"a text of {sizes[span['step']]}"
            )
    yield from _check_conventions(row["convention_spans"], spans, len(row["input_ids"]))


def _check_parts(parts: list[dict[str, Any]], spans: dict[int, tuple[int, int]]) -> Iterator[str]:
    reached = {step: start for step, (start, _) in spans.items()}
    last_step = -1
    for span in parts:
        step, part, start, end = span["step"], span["part"], span["start"], span["end"]
        if part not in PARTS or step not in spans:
            yield f"step {step}: part {part!r:.40}: expected one of {', '.join(PARTS)} of a step"
        elif step < last_step or start != reached[step] or not start < end:
            yield f"step {step}: part {part} {start}-{end} is empty, out of order or overlaps"
        else:
            reached[step] = end
        last_step = max(step, last_step)
    for step, (start, end) in spans.items():
        if reached[step] != end and start <= end:
            yield f"step {step}: its parts end at {reached[step]}, the step at {end}"


def _check_conventions(
    spans: list[dict[str, Any]], steps: dict[int, tuple[int, int]], num_tokens: int
) -> Iterator[str]:
    reached = dict.fromkeys(CONVENTIONS, 0)
    for span in spans:
        convention, step, start, end = (span[key] for key in ("convention", "step", "start", "end"))
        if convention not in reached or (step != -1 and step not in steps):
            yield (
                f"convention {convention!r:.40}, step {step}: expected one of "
                f"{', '.join(CONVENTIONS)} and a step of the row, or -1"
            )
        elif not reached[convention] <= start <= end <= num_tokens:
            yield f"convention {convention}: {start}-{end} is out of order or bounds"
        else:
            reached[convention] = end
