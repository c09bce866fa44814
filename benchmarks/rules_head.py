"""Does a head over the rules' evidence beat no critic on human labels? If so, it would ship.

    python benchmarks/rules_head.py [--seeds 8] [--data ../shared/data/human_labels]

For each gold set, and for all together: nested cross-validation by task, repeated with several
deals of tasks into folds, of the no-critic regression (position and known outcome) and of the same
with which rules fired on and beside a step. Differences are means over the repeats, with 95%
bootstrap intervals clustered by trajectory. Then the question that a default would face: fitted on
two sets, applied to the third, where neither threshold nor prevalence was ever seen. The last line
of stdout is one JSON document.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import polars as pl
from numpy.typing import NDArray
from rules_quality import DATA, SETS, read_set

from srft_prep.calibration import rules_fired
from srft_prep.evaluate.regression import fit, predict_out_of_fold
from srft_prep.evaluate.resampling import Resampling, estimate
from srft_prep.gold import read_gold
from srft_prep.label_metrics import average_precision, confusion, scores
from srft_prep.step_features import OUTCOME, POSITION, feature_matrix, rule_names

KNOWN: Final = (*POSITION, *OUTCOME)
FORMS: Final = {"no critic": KNOWN, "with rules": (*rule_names(), *KNOWN)}
SAMPLES: Final = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Gold sets as rows of steps."""

    steps: pl.DataFrame
    harmful: NDArray[np.bool_]
    groups: list[str]
    clusters: NDArray[np.int64]

    def features(self, form: str) -> NDArray[np.float64]:
        """Return what a form looks at."""
        return feature_matrix(FORMS[form], self.steps, ())


def read_study(folders: list[Path]) -> Study:
    """Return gold sets together."""
    gold = read_gold([folder / "gold.jsonl" for folder in folders]).labels
    trajectories = [each for folder in folders for each in read_set(folder)]
    facts = pl.DataFrame(
        [
            (each.trajectory_id, each.instance_id, each.resolved, each.num_steps)
            for each in trajectories
        ],
        schema={
            "trajectory_id": pl.String,
            "instance_id": pl.String,
            "resolved": pl.Boolean,
            "num_steps": pl.Int32,
        },
        orient="row",
    )
    steps = rules_fired(trajectories).join(facts, on="trajectory_id", maintain_order="left")
    keys = steps.select("trajectory_id", "step_index").iter_rows()
    return Study(
        steps=steps,
        harmful=np.array([gold[key] == "harmful" for key in keys]),
        groups=steps["instance_id"].to_list(),
        clusters=np.unique(steps["trajectory_id"].to_numpy(), return_inverse=True)[1],
    )


def cross_validated(study: Study, *, seeds: int) -> dict[str, Any]:
    """Return F1 and average precision of both forms, and their differences."""
    draws = Resampling(clusters=study.clusters, samples=SAMPLES, seed=0)
    own: dict[str, Any] = {}
    drawn: dict[str, NDArray[np.float64]] = {}
    for form in FORMS:
        values, samples = [], []
        for seed in range(seeds):
            features = study.features(form)
            found = predict_out_of_fold(features, study.harmful, study.groups, seed=seed)
            whole, each = draws.matrices(
                study.harmful.astype(np.int8), found.flagged.astype(np.int8), num_labels=2
            )
            area, areas = draws.average_precisions(study.harmful, found.probabilities)
            values.append((float(scores(whole).f1[1]), area))
            samples.append(np.stack([scores(each).f1[:, 1], areas]))
        own[form] = np.array(values)
        drawn[form] = np.mean(samples, axis=0)
    gains = own["with rules"] - own["no critic"]
    differences = drawn["with rules"] - drawn["no critic"]
    result: dict[str, Any] = {"better_repeats": int((gains[:, 0] > 0).sum()), "repeats": seeds}
    for place, name in enumerate(("f1", "average_precision")):
        gain = estimate(float(gains[:, place].mean()), differences[place])
        result[name] = {form: float(own[form][:, place].mean()) for form in FORMS}
        result[name] |= {"difference": gain.value, "low": gain.low, "high": gain.high}
    return result


def transferred(study: Study, held: NDArray[np.bool_]) -> dict[str, Any]:
    """Return F1 and average precision on the held set, fitted on the others."""
    result: dict[str, Any] = {"flag all": {"f1": _f1(study.harmful[held], np.ones(held.sum()))}}
    groups = np.array(study.groups)
    for form in FORMS:
        features = study.features(form)
        model = fit(features[~held], study.harmful[~held], groups[~held].tolist())
        chances = model.probabilities(features[held])
        result[form] = {
            "f1": _f1(study.harmful[held], chances >= model.threshold),
            "average_precision": float(average_precision(study.harmful[held], chances)),
        }
    return result


def _f1(harmful: NDArray[np.bool_], flags: NDArray[Any]) -> float:
    matrix = confusion(harmful.astype(np.int8), flags.astype(np.int8), num_labels=2)
    return float(scores(matrix).f1[1])


def main() -> None:
    """Print both tables, then the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the gold sets")
    parser.add_argument("--seeds", type=int, default=8, help="deals of tasks into folds")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.stdout.write(f"not run: no label sets at {options.data} (give --data)\n")
        return
    folders = {name: [options.data / name] for name in SETS}
    folders["all"] = [options.data / name for name in SETS]
    document: dict[str, Any] = {"benchmark": "rules_head", "cross_validated": {}, "transferred": {}}
    for name, given in folders.items():
        study = read_study(given)
        found = cross_validated(study, seeds=options.seeds)
        document["cross_validated"][name] = found
        for measure in ("f1", "average_precision"):
            numbers = found[measure]
            sys.stdout.write(
                f"{name:14}{measure:18} no critic {numbers['no critic']:.3f}  with rules "
                f"{numbers['with rules']:.3f}  {numbers['difference']:+.3f} "
                f"[{numbers['low']:+.3f}, {numbers['high']:+.3f}]\n"
            )
        sys.stdout.write(f"{'':14}better in {found['better_repeats']} of {options.seeds}\n")
        sys.stdout.flush()
    sets = study.steps["trajectory_id"].str.split("/").list.first().to_numpy()
    sys.stdout.write("fitted on the two other sets\n")
    for name in SETS:
        moved = document["transferred"][name] = transferred(study, sets == name)
        cells = "  ".join(
            f"{form}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())
            for form, numbers in moved.items()
        )
        sys.stdout.write(f"{name:14}{cells}\n")
    sys.stdout.write(orjson.dumps(document).decode() + "\n")


if __name__ == "__main__":
    main()
