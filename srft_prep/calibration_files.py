"""Which calibration a word of the command line means, and whether it is for these labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from srft_prep.calibration import Calibration, read_calibration
from srft_prep.errors import ConfigError
from srft_prep.hashes import sha256_of
from srft_prep.object_inputs import input_path
from srft_prep.object_storage import is_url

DEFAULT: Final = "default"


def read_calibration_of(
    word: str | None, critics: Sequence[tuple[str, str]]
) -> tuple[Calibration | None, str | None]:
    """Return the calibration that a word names and its SHA-256; twice None without a word.

    Args:
        word: a file, or `default`.
        critics: critic_id and prompt_hash of those whose labels it is for, in their order.

    Raises:
        ConfigError: there is no such calibration, or it was fitted on other critics' labels.
    """
    if word is None:
        return None, None
    path = calibration_file(word)
    calibration = read_calibration(path)
    fitted = [(member.critic_id, member.prompt_hash) for member in calibration.members]
    if fitted != list(critics):
        expected, got = (
            ", ".join(f"{critic_id} (prompt {prompt})" for critic_id, prompt in pairs)
            for pairs in (fitted, critics)
        )
        raise ConfigError(
            f"{path}: was fitted on the labels of {expected}; these are of {got}; fit one: "
            "critic-eval --calibrate"
        )
    return calibration, sha256_of(path)


def calibration_file(word: str) -> Path:
    """Return the path that a value of `--calibration` names.

    Raises:
        ConfigError: `default`, and none comes with this version.
    """
    if is_url(word):
        return input_path(word, folder=False)
    if word != DEFAULT:
        return Path(word)
    path = Path(__file__).parent / "critic" / "rules" / "calibration.json"
    if not path.exists():
        raise ConfigError(
            "--calibration default: no calibration comes with this version (docs/critic-eval.md "
            "says why); fit one: critic-eval --calibrate -o FILE"
        )
    return path
