"""How good is each rule? Its precision against human labels, beside all rules and the constants.

    python benchmarks/rules_quality.py [--set trail_swe]... [--data ../shared/data/human_labels]

What `critic-eval` does not tell: each rule alone, before precedence, with the 95% Wilson interval
of its precision; and `within 1`: a flag counts as right where the step or the one after it is
marked, since annotators often mark the step that sees an error instead of the one that made it (on
trail_swe, 13 of 16 steps after a crash are marked, and 7 of 16 crashes). The gold sets mark harmful
steps only: a step that the rules call unnecessary counts as not harmful. The last line of stdout is
one JSON document. Without the label sets there is nothing to measure.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from srft_prep.config import IngestConfig
from srft_prep.critic.rules import RULES, RulesCritic
from srft_prep.gold import StepKey, read_gold
from srft_prep.ingest import ingest
from srft_prep.label_metrics import accuracy, confusion, scores
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Trajectory

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "human_labels"
SETS = ("trail_swe", "trail_gaia", "who_and_when")


def measure(folder: Path) -> dict[str, Any]:
    """Return all numbers of one gold set."""
    gold = read_gold([folder / "gold.jsonl"]).labels
    trajectories = read_set(folder)
    critic = RulesCritic()
    started = time.perf_counter()
    findings = [(each.trajectory_id, critic.findings(each)) for each in trajectories]
    seconds = time.perf_counter() - started
    labels: dict[StepKey, str] = {}
    fired: dict[str, set[StepKey]] = {rule.rule_id: set() for rule in RULES}
    for name, found in findings:
        for finding in found:
            labels.setdefault((name, finding.step_index), finding.label)
            fired[finding.rule_id].add((name, finding.step_index))
    harmful = {key for key, label in gold.items() if label == "harmful"}
    near = harmful | {(name, index - 1) for name, index in harmful if (name, index - 1) in gold}
    truth = np.array([key in harmful for key in gold])
    flags = np.array([labels.get(key) == "harmful" for key in gold])
    chars = sum(len(message.content or "") for each in trajectories for message in each.messages)
    return {
        "set": folder.name,
        "steps": len(gold),
        "harmful": len(harmful),
        "unnecessary_flags": sum(label == "unnecessary" for label in labels.values()),
        "rows": {
            "rules": row(flags, truth),
            "rules, within 1": row(flags, np.array([key in near for key in gold])),
            "flag everything": row(np.ones_like(truth), truth),
            "flag nothing": row(np.zeros_like(truth), truth),
        },
        "rules": {
            rule.rule_id: {
                "label": rule.label,
                "fired": len(keys := fired[rule.rule_id]),
                "harmful": len(keys & harmful),
                "within_1": len(keys & near),
                "interval": wilson(len(keys & harmful), len(keys)),
            }
            for rule in RULES
        },
        "prompt_hash": critic.prompt_hash,
        "seconds": round(seconds, 3),
        "mb_per_second": round(chars / 1e6 / seconds, 1) if seconds else None,
    }


def read_set(folder: Path) -> list[Trajectory]:
    """Return the trajectories of a gold set, as `ingest` takes them."""
    with TemporaryDirectory() as scratch:
        taken = ingest(
            [str(folder / "trajectories.jsonl")],
            Path(scratch) / "trajectories",
            IngestConfig(keep_duplicates=True),
        )
        return list(read_trajectories(taken.parts))


def row(flags: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, float]:
    """Return precision, recall and F1 of the harmful label, and accuracy on two classes."""
    matrix = confusion(truth.astype(np.int8), flags.astype(np.int8), num_labels=2)
    precision, recall, f1 = (float(each[1]) for each in scores(matrix))
    return {
        "flagged": int(flags.sum()),
        "hits": int(matrix[1, 1]),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "accuracy": float(accuracy(matrix)),
    }


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95% Wilson interval of a proportion (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def table(result: dict[str, Any]) -> str:
    """Return the numbers for reading."""
    lines = [
        f"{result['set']}: {result['steps']} steps, {result['harmful']} harmful, "
        f"{result['unnecessary_flags']} called unnecessary; {result['mb_per_second']} MB/s",
        f"{'':24}{'flagged':>8}{'hits':>6}{'P':>7}{'R':>7}{'F1':>7}{'acc':>7}",
    ]
    for name, values in result["rows"].items():
        numbers = "".join(
            f"{values[key]:7.3f}" for key in ("precision", "recall", "f1", "accuracy")
        )
        lines.append(f"{name:24}{values['flagged']:8}{values['hits']:6}{numbers}")
    lines.append(
        f"{'rule':24}{'fired':>8}{'hits':>6}{'P':>7}   95% interval  {'within 1':>9}  label"
    )
    for name, values in result["rules"].items():
        if values["fired"]:
            low, high = values["interval"]
            share = f"{values['harmful'] / values['fired']:7.3f}   [{low:.2f}, {high:.2f}]  "
            lines.append(
                f"{name:24}{values['fired']:8}{values['harmful']:6}{share}"
                f"{values['within_1']:9}  {values['label']}"
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
    results = [measure(options.data / name) for name in options.sets or SETS]
    for result in results:
        sys.stdout.write(table(result) + "\n\n")
    sys.stdout.write(orjson.dumps({"benchmark": "rules_quality", "sets": results}).decode() + "\n")


if __name__ == "__main__":
    main()
