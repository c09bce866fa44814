"""Where a run's model comes from, and whether its tokenizer is the one that shards were made with.

Token ids mean nothing without their tokenizer: a model that has another one is refused, since it
would train on other words, without a single error on the way.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from srft_prep.chat import load_backend, tokenizer_path
from srft_prep.errors import ConfigError, in_one_line
from srft_prep.hashes import hash_of, sha256_of
from srft_prep.hub import hub_problem
from srft_prep.manifest import Manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TINY: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
"""The model of `--tiny`: what `tiny_model` is given beside the vocabulary.

Heads have 32 values, the fewest that vLLM's attention takes on a CPU."""


def model_input(model: str | None) -> dict[str, Any]:
    """Return how a manifest names a model: by content, not by where it lies; None is `--tiny`.

    Of a folder, the configuration and every byte of the weights count: a core hashes 0.8 GB/s,
    files side by side. A model at the hub is its commit.

    Raises:
        ConfigError: there is no such model.
    """
    if model is None:
        return {"path": "--tiny", "model": hash_of(TINY)}
    folder = Path(model)
    if not folder.is_dir():
        return {"path": model, "model": hash_of(_hub_revision(model))}
    if (digest := sha256_of(folder / "config.json")) is None:
        raise ConfigError(
            f"--model {model}: expected a model's folder, but there is no config.json"
        )
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256_of, weights))
    names = [path.name for path in weights]
    return {"path": model, "model": hash_of([digest, names, digests])}


def choose_tokenizer(model: str | None, shards: Manifest) -> tuple[str | None, str | None]:
    """Return the tokenizer of a run, and what the user should know of it.

    It is the model's own where that is the shards', otherwise the shards' if that is here.

    Raises:
        ConfigError: the model's tokenizer gives tokens other ids than the shards' did.
    """
    named, wanted = str(shards.data["tokenizer"]), shards.data["tokenizer_hash"]
    own = _load(model) if model is not None else None
    if own and own[1] == wanted:
        return model, None
    theirs = _load(named)
    if theirs and theirs[1] != wanted:
        theirs = None
    if own and not (theirs and _ids(own[0]) == _ids(theirs[0])):
        raise ConfigError(
            f"--model {model}: its tokenizer is not the one that the shards were made with "
            f"({named}): ids would mean other tokens; choose the model that tokenize was run for, "
            f"or run it again with --tokenizer {model}"
        )
    if theirs is None:
        return None, f"{named}, the shards' tokenizer, is not here: the model is saved without one"
    if own:
        return named, f"the model is saved with the shards' tokenizer, {named} (the ids are equal)"
    return named, None


def num_ids(tokenizer: str | None) -> int:
    """Return how many rows of an embedding a tokenizer's ids need; 0 for None."""
    if tokenizer is None:
        return 0
    backend, _ = load_backend(tokenizer)
    return 1 + max(backend.get_vocab(with_added_tokens=True).values())


def saved_tokenizer(tokenizer: str | None) -> str | None:
    """Return a tokenizer's folder or hub id."""
    return None if tokenizer is None else tokenizer_path(tokenizer)


def _load(source: str) -> "tuple[Tokenizer, str] | None":
    try:
        return load_backend(source, option="--model")
    except ConfigError:
        return None


def _ids(tokenizer: "Tokenizer") -> dict[str, int]:
    return tokenizer.get_vocab(with_added_tokens=True)


def _hub_revision(model: str) -> str | dict[str, Any]:
    """Return the commit of a model at the hub; its configuration where none is known."""
    from transformers import AutoConfig

    problem = hub_problem()
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=problem is not None)
    except (OSError, ValueError) as error:
        found = "no model at the hub" if problem is None else f"nothing in its cache, and {problem}"
        raise ConfigError(
            f"--model {model}: expected a folder or a hub id, got no such folder, and {found}: "
            f"{in_one_line(error)}"
        ) from None
    if commit := getattr(config, "_commit_hash", None):
        return str(commit)
    values: dict[str, Any] = config.to_dict()
    return {name: value for name, value in values.items() if name != "transformers_version"}
