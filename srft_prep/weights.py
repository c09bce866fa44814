"""The recipes of the paper's six training sets, and the weights that a user names.

    recipe             resolved   unresolved   unknown     in the paper (Tables 2, 4 and 5)
    naive              1          1            1           naive distillation
    rft                1          -            -           RFT
    unresolved         -          1            -           5k Unresolved
    unresolved-masked  -          by label     -           5k Unresolved masked
    srft               1          by label     by label    SRFT
    srft-all           by label   by label     by label    both masked (Table 5)

`1` takes every step whole, `by label` weights each step by its label (0 for harmful, 1 for the
others unless said otherwise), `-` leaves the trajectory out. A step's weight is w_{i,t} of the
paper's section 3.2; a step of weight 0 stays in the context. Where nobody knows the outcome, a
trajectory counts as one that may hold mistakes: it is masked where unresolved ones are, and is
in no set that is defined by its outcome.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

from srft_prep.errors import ConfigError
from srft_prep.types import LABELS, Label

Treatment = Literal["whole", "by label", "left out"]

MAX_WEIGHT: Final = 3.4028234663852886e38
"""The largest float32: weights are stored in that type."""

DEFAULT_WEIGHTS: Final[dict[Label, float]] = {"good": 1.0, "unnecessary": 1.0, "harmful": 0.0}
"""The paper's: good and unnecessary steps are productive, harmful ones are not trained."""

PARTS: Final = ("thought", "tool_call", "end_of_turn")
"""Parts of a step, in their order; each has weight 1 unless said otherwise."""

FIELDS: Final = ("content", "reasoning_content")
"""Fields of a message whose characters can be weighted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Which trajectories make a training set, and which of them are weighted by labels."""

    resolved: Treatment
    unresolved: Treatment
    unknown: Treatment

    def treatment(self, resolved: bool | None) -> Treatment:
        """Return what happens to a trajectory of an outcome."""
        if resolved is None:
            return self.unknown
        return self.resolved if resolved else self.unresolved

    @property
    def needs_labels(self) -> bool:
        """Whether any trajectory is weighted by labels."""
        return "by label" in (self.resolved, self.unresolved, self.unknown)


RECIPES: Final = {
    "naive": Recipe(resolved="whole", unresolved="whole", unknown="whole"),
    "rft": Recipe(resolved="whole", unresolved="left out", unknown="left out"),
    "unresolved": Recipe(resolved="left out", unresolved="whole", unknown="left out"),
    "unresolved-masked": Recipe(resolved="left out", unresolved="by label", unknown="left out"),
    "srft": Recipe(resolved="whole", unresolved="by label", unknown="by label"),
    "srft-all": Recipe(resolved="by label", unresolved="by label", unknown="by label"),
}


def parse_weights(*texts: str) -> dict[str, float]:
    """Return the weights of `good=1,unnecessary=1,harmful=0`; labels left out keep the default.

    Parts of a step may be named beside labels (`thought=0.5`); one that is not has no entry.

    Raises:
        ConfigError: an unknown name, one given twice, or a weight that is no finite float32 >= 0.
    """
    given: dict[str, float] = {}
    for item in (item for text in texts for item in text.split(",")):
        name, _, number = (part.strip() for part in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if name not in (*LABELS, *PARTS) or not 0 <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"--weights: expected label=number with a label of {', '.join(LABELS)} (or a part "
                f"of {', '.join(PARTS)}) and a finite number >= 0, or a file that ends in .jsonl "
                f"or .parquet, got {item.strip()!r}"
            )
        if name in given:
            kind = "label" if name in LABELS else "part"
            raise ConfigError(f"--weights: expected each {kind} once, got {name} again")
        given[name] = weight + 0.0  # -0 becomes 0
    defaults = {str(label): weight for label, weight in DEFAULT_WEIGHTS.items()}
    return defaults | {name: given[name] for name in (*LABELS, *PARTS) if name in given}
