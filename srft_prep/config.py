"""The settings of every stage: what decides the bytes it writes, and nothing else.

A stage's configuration goes into its manifest and, with the hashes of its inputs, is its plan
(see `storage`). Paths of outputs, numbers of workers and the like are arguments, not settings.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from srft_prep.array_jobs import ArrayJob
from srft_prep.errors import ConfigError

Overlong = Literal["truncate", "windows", "drop", "error"]
History = Literal["auto", "full", "per-step"]
MissingLabel = Literal["drop", "mask", "error"]
Convention = Literal["srft", "trl", "axolotl"]
Only = Literal["unresolved", "resolved", "all"]
Context = Literal["none", "outcome", "patch"]
Together = Literal["any", "majority", "mean", "head", "cascade"]

OUTCOMES: Final = {True: "resolved", False: "unresolved", None: "unknown"}
"""The words for a trajectory's outcome, in code, on the command line and in counts."""

MAX_INTEGER: Final = 2**63 - 1
"""Largest number that a manifest and a Parquet column can hold."""

DEFAULT_SEQ_LEN: Final = 32_768
"""The paper's student is trained at its full context of 32k tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """Settings of `ingest`."""

    format: str = "auto"
    """A reader's name, or `auto` to recognise every record by its content."""
    sample: dict[str, int] | None = None
    """How many trajectories to draw of each outcome: keys resolved, unresolved, unknown."""
    seed: int = 0
    """Seed of the sample."""
    limit: int | None = None
    """At most this many trajectories."""
    max_per_instance: int | None = None
    """At most this many trajectories of one instance: the first ones read."""
    keep_duplicates: bool = False
    """Keep trajectories whose messages are exactly those of an earlier one."""
    system_prompt: str | None = None
    """Text that replaces every system prompt: the prompt that inference will use."""
    exclude: tuple[str, ...] = ()
    """Instance ids and repositories that must not get in (normalised, sorted)."""


_OF_ALL: Final = ("only", "array")
"""What the critics of a panel have in common: which trajectories they are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """Settings of `label`."""

    critic: str
    """The critic's short name."""
    critic_id: str
    """What the critic calls itself: model and revision, or rule set and version."""
    prompt_hash: str
    """Hash of the question asked."""
    only: Only = "unresolved"
    """Which trajectories are labelled; `unresolved` means: not known to be resolved."""
    votes: int = 1
    """Answers to every question."""
    context: Context = "none"
    """What the critic is told beside the trajectory."""
    max_input_tokens: int | None = None
    """Longest prompt; None for a critic that has none."""
    calibration: str | None = None
    """SHA-256 of the calibration that the labels went through; None where they are as given."""
    together: Together | None = None
    """What several critics make of a step together; None for a single critic."""
    members: "tuple[LabelConfig, ...]" = ()
    """The critics of an ensemble or a cascade, in order; of a single critic none."""
    sure: float | None = None
    """Of a cascade: the probability from which a critic settles a step."""
    audit: float | None = None
    """Of a cascade: share of the trajectories that the last critic sees whatever was settled."""
    array: ArrayJob | None = None
    """Which of several jobs this is; None for one job that does all."""

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry; of one critic as it is, without what several need."""
        described = asdict(self)
        for name in ("calibration", "together", "members", "sure", "audit", "array"):
            if not described[name] and described[name] != 0.0:
                del described[name]
        if self.members:
            described["members"] = [
                {key: value for key, value in member.describe().items() if key not in _OF_ALL}
                for member in self.members
            ]
        return described


def is_calibrated(described: Mapping[str, Any]) -> bool:
    """Return whether labels went through a calibration, by the settings in their manifest."""
    held = [described, *described.get("members", ())]
    return any(each.get("calibration") for each in held)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """Settings of `tokenize`."""

    tokenizer_hash: str
    """SHA-256 of the tokenizer's files."""
    template_hash: str
    """SHA-256 of the chat template."""
    history: History = "auto"
    """How templates that rewrite earlier messages are treated."""
    axolotl: bool = False
    """Note what axolotl would train, too."""
    array: ArrayJob | None = None
    """Which of several jobs this is; None for one job that does all."""

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry; without `array` where there is one job."""
        described = asdict(self)
        if self.array is None:
            del described["array"]
        return described


@dataclass(frozen=True, slots=True, kw_only=True)
class PackConfig:
    """Settings of `pack`."""

    recipe: str
    """Which trajectories, and which of them are weighted by their labels."""
    weights: dict[str, float]
    """Weight of a step by its label, each >= 0."""
    part_weights: dict[str, float] = field(default_factory=dict)
    """What multiplies the weight of a part of a step; a part that is not named has 1."""
    convention: Convention = "srft"
    """Whose rule says which tokens of a turn carry its weight."""
    soft: bool = False
    """Weight a step by the expected weight under its label probabilities."""
    calibration: str | None = None
    """SHA-256 of the calibration that the labels go through; None where they count as given."""
    seq_len: int = DEFAULT_SEQ_LEN
    """Tokens in a packed sequence, at most."""
    overlong: Overlong = "truncate"
    """What happens to a trajectory longer than `seq_len`."""
    missing_label: MissingLabel = "drop"
    """What happens to a trajectory that the recipe weights by labels and that lacks one."""
    drop_weightless: bool = False
    """Leave out documents without a weighted token: they cost compute and change no gradient."""
    trim_suffix: bool = False
    """Leave out what stands behind a document's last weighted token: it changes no gradient."""
    hold_out: float = 0.0
    """Fraction of the tasks that no packed sequence holds, at least 0 and below 1."""
    shuffle_seed: int = 0
    """Seed of the order of the packed sequences."""
    shard_tokens: int = 1 << 24
    """Tokens in a shard file, about."""

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry; without `calibration` where there is none."""
        described = asdict(self)
        if self.calibration is None:
            del described["calibration"]
        return described


def parse_sample(text: str) -> dict[str, int]:
    """Return the numbers of `resolved=5000,unresolved=5000`.

    Raises:
        ConfigError: another form, an unknown outcome, one that is named twice, or a number that is
            negative or beyond 64 bits.
    """
    sample: dict[str, int] = {}
    for item in text.split(","):
        word, _, number = item.strip().partition("=")
        if word not in OUTCOMES.values() or not number.isdecimal():
            raise ConfigError(
                f"--sample: expected resolved=N,unresolved=N[,unknown=N], got {item.strip()!r}"
            )
        if word in sample:
            raise ConfigError(f"--sample: expected one number for {word}, got two in {text!r}")
        if len(number) > 19 or int(number) > MAX_INTEGER:
            raise ConfigError(f"--sample: {word}: expected at most {MAX_INTEGER}, got {number:.40}")
        sample[word] = int(number)
    return sample
