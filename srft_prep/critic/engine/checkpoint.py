"""A model that runs here: its folder or hub id -> a name, a revision and a context length.

The revision of a hub id is the commit of its snapshot. That of a folder is a hash over its
config.json, the names and sizes of its weight files, and samples of their bytes: the head of each
(where safetensors keeps its index) and some places spread evenly. A changed byte elsewhere goes
unseen, which retraining never leaves it at; reading 60 GB to be sure would take minutes. Cost: a
few milliseconds a weight file.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from srft_prep.critic.encoding import ChatEncoder
from srft_prep.critic.question import Planner, QuestionSettings
from srft_prep.errors import ConfigError, in_one_line
from srft_prep.hub import hub_problem

LONGEST_CONTEXT_TOKENS: Final = 131_072
"""A context that no trajectory needs more than; memory for a longer one would be wasted."""

_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_HEAD_BYTES: Final = 1 << 16
_SAMPLE_BYTES: Final = 1 << 12
_SAMPLES: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's weights."""

    model: str
    """The folder or the hub id, as it was given."""
    name: str
    """The folder's name, or the hub id."""
    revision: str
    commit: str | None
    """The hub's commit; None for a folder."""
    config: Mapping[str, Any]
    """Its config.json; of a model that also sees pictures the part about text."""

    @property
    def critic_id(self) -> str:
        """What the ledger calls it."""
        return f"{self.name}@{self.revision}"

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together: what the model was trained for, to a limit.

        Raises:
            ConfigError: its config.json does not say.
        """
        length = self.config.get("max_position_embeddings")
        if not isinstance(length, int) or length < 1:
            raise ConfigError(
                f"--model {self.model}: config.json: max_position_embeddings: expected a number of "
                f"tokens, got {length!r} (give --engine-arg max_model_len=N)"
            )
        return min(length, LONGEST_CONTEXT_TOKENS)


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Return what a model's folder or hub id leads to, without loading its weights.

    Args:
        model: the folder or hub id.
        revision: the branch, tag or commit of a hub id; by default its main branch.

    Raises:
        ConfigError: there is no such model here or on the hub, or it is none.
    """
    folder = Path(model)
    if folder.is_dir():
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ConfigError(
                f"--model {model}: expected a model's folder, with config.json and its weights, "
                "got a folder without config.json"
            )
        name = folder.resolve().name
        commit = None
        hashed = _hash_of(folder, config_path)
    elif folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"--model {model}: expected a model's folder or a hub id, got no folder")
    else:
        config_path, commit = _hub_config(model, revision)
        name, hashed = model, commit[:12]
    return Checkpoint(
        model=model, name=name, revision=hashed, commit=commit, config=_text_config(config_path)
    )


def _hash_of(folder: Path, config_path: Path) -> str:
    digest = hashlib.blake2b(config_path.read_bytes(), digest_size=6)
    weights = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    if not weights:
        raise ConfigError(
            f"--model {folder}: expected weights beside config.json, got no file that ends in "
            f"{', '.join(_WEIGHTS)}"
        )
    for path in weights:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"\n{path.name} {size}\n".encode())
            file.seek(0)
            digest.update(file.read(_HEAD_BYTES))
            for place in range(1, _SAMPLES + 1):
                file.seek(max(size * place // _SAMPLES - _SAMPLE_BYTES, 0))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _hub_config(model: str, revision: str | None) -> tuple[Path, str]:
    """Return a hub model's config.json on this machine, and its commit."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    wanted = f"--model {model}: expected a model's folder or a hub id, got no"
    try:
        found = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(found, str):
            if problem := hub_problem():
                raise ConfigError(
                    f"{wanted} such folder, nothing in the hub's cache, and {problem}"
                )
            found = huggingface_hub.hf_hub_download(model, "config.json", revision=revision)
    except ConfigError:
        raise
    except HFValidationError:
        raise ConfigError(f"{wanted} folder") from None
    except Exception as error:  # noqa: BLE001 - whatever the transport of the hub's client raises
        reason = in_one_line(error, limit=200)
        raise ConfigError(
            f"{wanted} such folder, nothing in the hub's cache, and from the hub: {reason}"
        ) from None
    return Path(found), Path(found).parent.name


def _text_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a model's configuration in JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(config).__name__}")
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def planner_of(model: str, settings: QuestionSettings, *, context_tokens: int) -> Planner:
    """Return what plans the questions to a model that runs here.

    Args:
        model: its folder or hub id.
        settings: how to ask.
        context_tokens: longest prompt and answer together.

    Raises:
        ConfigError: there is no tokenizer with a chat template, or the prompt does not fit.
    """
    return Planner(
        settings,
        ChatEncoder(model, reasoning=settings.reasoning),
        max_input_tokens=settings.max_input_tokens or context_tokens,
        context_tokens=context_tokens,
    )
