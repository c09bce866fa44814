"""How good are the rules? Measures them against human labels, beside the trivial critics.

    python benchmarks/rules_quality.py [--set trail_swe]... [--data ../shared/data/human_labels]

Rows: the rules, everything harmful, nothing harmful. The gold sets mark harmful steps only, so a
step that the rules call unnecessary counts as not harmful. `within 1` counts a flag as right where
the step or the one after it is marked: annotators often mark the step that sees an error instead of
the one that made it (on trail_swe, 13 of 16 steps after a crash are marked, and 7 of 16 crashes).
Each rule's row counts it alone, before precedence. The last line of stdout is one JSON document.
Without the label sets there is nothing to measure.
"""

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from srft_prep.critic.rules import RULES, RulesCritic
from srft_prep.types import Kind, Message, Trajectory

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "human_labels"


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """Yield the trajectories of a gold set: assistant messages are the actions."""
    with path.open("rb") as lines:
        for line in lines:
            record = orjson.loads(line)
            yield Trajectory(
                trajectory_id=record["trajectory_id"],
                instance_id=record["instance_id"],
                format="messages",
                messages=tuple(_messages(record["messages"])),
                resolved=record["resolved"],
            )


def read_gold(path: Path) -> dict[tuple[str, int], str]:
    """Return the human label of each (trajectory_id, step_index)."""
    with path.open("rb") as lines:
        rows = [orjson.loads(line) for line in lines]
    return {(row["trajectory_id"], row["step_index"]): row["label"] for row in rows}


def scores(flagged: Sequence[bool], harmful: Sequence[bool]) -> dict[str, float]:
    """Return precision, recall and F1 of the harmful label, and accuracy on two classes."""
    hits = sum(f and h for f, h in zip(flagged, harmful, strict=True))
    right = sum(f == h for f, h in zip(flagged, harmful, strict=True))
    precision = hits / sum(flagged) if any(flagged) else 0.0
    recall = hits / sum(harmful) if any(harmful) else 0.0
    return {
        "flagged": sum(flagged),
        "hits": hits,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "accuracy": right / len(harmful) if harmful else 0.0,
    }


def interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95% Wilson interval of a proportion (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def measure(folder: Path) -> dict[str, Any]:
    """Return all numbers of one gold set."""
    gold = read_gold(folder / "gold.jsonl")
    critic = RulesCritic()
    labels: dict[tuple[str, int], str] = {}
    fired: dict[str, set[tuple[str, int]]] = defaultdict(set)
    chars = 0
    started = time.perf_counter()
    for trajectory in read_trajectories(folder / "trajectories.jsonl"):
        chars += sum(len(message.content or "") for message in trajectory.messages)
        for finding in critic.findings(trajectory):
            key = (trajectory.trajectory_id, finding.step_index)
            labels.setdefault(key, finding.label)
            fired[finding.rule_id].add(key)
    seconds = time.perf_counter() - started
    harmful = {key for key, label in gold.items() if label == "harmful"}
    near = harmful | {(name, index - 1) for name, index in harmful if (name, index - 1) in gold}
    truth = [key in harmful for key in gold]
    flags = [labels.get(key) == "harmful" for key in gold]
    rules = {}
    for rule in RULES:
        keys = fired[rule.rule_id]
        hits = len(keys & harmful)
        rules[rule.rule_id] = {
            "label": rule.label,
            "fired": len(keys),
            "harmful": hits,
            "within_1": len(keys & near),
            "interval": interval(hits, len(keys)),
        }
    return {
        "set": folder.name,
        "steps": len(gold),
        "harmful": len(harmful),
        "unnecessary_flags": sum(label == "unnecessary" for label in labels.values()),
        "rows": {
            "rules": scores(flags, truth),
            "rules, within 1": scores(flags, [key in near for key in gold]),
            "flag everything": scores([True] * len(gold), truth),
            "flag nothing": scores([False] * len(gold), truth),
        },
        "rules": rules,
        "prompt_hash": critic.prompt_hash,
        "seconds": round(seconds, 3),
        "mb_per_second": round(chars / 1e6 / seconds, 1) if seconds else None,
    }


def table(result: dict[str, Any]) -> str:
    """Return the numbers for reading."""
    lines = [
        f"{result['set']}: {result['steps']} steps, {result['harmful']} harmful, "
        f"{result['unnecessary_flags']} called unnecessary; {result['mb_per_second']} MB/s",
        f"{'':24}{'flagged':>8}{'hits':>6}{'P':>7}{'R':>7}{'F1':>7}{'acc':>7}",
    ]
    for name, row in result["rows"].items():
        numbers = "".join(f"{row[key]:7.3f}" for key in ("precision", "recall", "f1", "accuracy"))
        lines.append(f"{name:24}{row['flagged']:8}{row['hits']:6}{numbers}")
    lines.append(
        f"{'rule':24}{'fired':>8}{'hits':>6}{'P':>7}   95% interval  {'within 1':>9}  label"
    )
    for name, row in result["rules"].items():
        if row["fired"]:
            low, high = row["interval"]
            share = f"{row['harmful'] / row['fired']:7.3f}   [{low:.2f}, {high:.2f}]  "
            lines.append(
                f"{name:24}{row['fired']:8}{row['harmful']:6}{share}{row['within_1']:9}"
                f"  {row['label']}"
            )
    return "\n".join(lines)


def main() -> None:
    """Print the table of the sets asked for, then the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the gold sets")
    parser.add_argument("--set", action="append", dest="sets", help="repeatable; default: all")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.stdout.write(f"not run: no label sets at {options.data} (give --data)\n")
        return
    names = options.sets or ["trail_swe", "trail_gaia", "who_and_when"]
    results = [measure(options.data / name) for name in names]
    for result in results:
        sys.stdout.write(table(result) + "\n\n")
    sys.stdout.write(orjson.dumps({"benchmark": "rules_quality", "sets": results}).decode() + "\n")


def _messages(rows: Sequence[dict[str, Any]]) -> Iterator[Message]:
    acted = False
    for row in rows:
        acted = acted or row["role"] == "assistant"
        kind: Kind = "observation" if acted else "prompt"
        if row["role"] == "assistant":
            kind = "action"
        yield Message(role=row["role"], kind=kind, content=row["content"])


if __name__ == "__main__":
    main()
