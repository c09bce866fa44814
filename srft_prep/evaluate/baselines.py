"""What a critic must beat: constants, the last step, and a guess that never reads a step.

The no-critic row is a logistic regression on where a step stands and on the known outcome, every
step predicted by a model that saw nothing of its task (`regression`). On published step labels it
is hard to beat (reference: AgentProcessBench, harmful F1 .683 against .621 of GPT-5.2), so that a
critic that does not is not worth its cost.
"""

from typing import Final

import numpy as np
import polars as pl

from srft_prep.evaluate.gold_steps import GoldSteps
from srft_prep.evaluate.regression import Flags, Predictions, predict_out_of_fold
from srft_prep.step_features import OUTCOME, POSITION, feature_matrix

NO_CRITIC: Final = "no critic"


def trivial_flags(gold: GoldSteps) -> dict[str, Flags]:
    """Return what each trivial critic calls harmful, [J]: everything, nothing, the last step."""
    judged = gold.steps.filter(pl.Series(gold.judged))
    last = judged["step_index"] == judged["num_steps"] - 1
    return {
        "flag all": np.ones(judged.height, np.bool_),
        "flag nothing": np.zeros(judged.height, np.bool_),
        "flag last": last.to_numpy(),
    }


def without_critic(gold: GoldSteps, *, seed: int) -> Predictions:
    """Return the no-critic row's out-of-fold predictions, [J]."""
    features = feature_matrix(known_names(gold), gold.steps, ())
    return predict_out_of_fold(features[gold.judged], gold.harmful, gold.groups, seed=seed)


def known_names(gold: GoldSteps) -> tuple[str, ...]:
    """Return the features that are known without a critic."""
    known = gold.has_facts and gold.steps["resolved"].null_count() < gold.steps.height
    return (*POSITION, *OUTCOME) if known else POSITION
