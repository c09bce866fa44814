"""SHA-256 of files and of values: by what things are known wherever they lie."""

import hashlib
from pathlib import Path
from typing import Any

import orjson


def sha256_of(path: Path) -> str | None:
    """Return the SHA-256 of a file's bytes, in hex; None where there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """Return the SHA-256, in hex, of a value's canonical JSON."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()
