"""Objects of a store (s3://, gs://, hf://): read, written, listed, and what their errors mean.

What stands here knows URLs and objects and no stage. The stores are spoken to by fsspec's file
systems (s3fs, gcsfs, huggingface_hub's), which find credentials and endpoints where their own
tools do: in the environment and its files. Nothing of them is read or kept here.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from srft_prep.errors import ConfigError, StorageError

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE: Final = 8
"""Objects under way at a time; large ones go in several pieces besides."""
PATIENCE: Final = "SRFT_STORAGE_PATIENCE_SECONDS"
"""Environment variable: how long a store that does not answer is asked again."""
PATIENCE_SECONDS: Final = 60.0

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_PACKAGES: Final = {"s3": ("fsspec", "s3fs"), "gs": ("fsspec", "gcsfs"), "hf": ("huggingface_hub",)}
_ENDPOINTS: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "hf": ("HF_ENDPOINT",),
}
"""Environment variables by which the libraries find another server than the provider's."""
_TOKENS: Final = ("ETag", "generation", "lfs", "blob_id", "xet_hash", "etag", "mtime")
"""Entries of a listing that change with an object's content; the first that is there counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """What a store says of an object."""

    size: int
    """Bytes."""
    token: str
    """Changes with the content: an ETag, a generation, a hash; empty where the store tells none."""


def is_url(word: object) -> bool:
    """Return whether a word of the command line names a place in a store, and no local path.

    Raises:
        ConfigError: a URL of a kind that nothing here reads, or one with a key in it.
    """
    found = _URL.fullmatch(word) if isinstance(word, str) else None
    if found is None:
        return False
    scheme, place = found.groups()
    if scheme not in _PACKAGES:
        raise ConfigError(
            f"{scheme}://...: expected a path, or an address that begins with "
            f"{', '.join(f'{each}://' for each in _PACKAGES)}"
        )
    if scheme != "hf" and "@" in place.split("/")[0]:
        raise ConfigError(
            f"{scheme}://...@: keys are no part of an address; give them by the environment "
            "(docs/object-storage.md)"
        )
    if not place.split("/")[0]:
        raise ConfigError(f"{word}: expected {scheme}://BUCKET/..., got no bucket")
    return True


def parts_of(url: str) -> tuple[str, list[str]]:
    """Return a URL's scheme and the parts of its path, which all have a place on a disk.

    Raises:
        ConfigError: a part is empty, `.` or `..`, or too long for a file's name.
    """
    scheme, _, place = url.partition("://")
    parts = place.rstrip("/").split("/")
    for part in parts:
        if part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > 255:
            raise ConfigError(
                f"{url[:200]}: a part of the key is empty, '.', '..' or longer than 255 bytes, and "
                "has no place on a disk; copy the object to another key"
            )
    return scheme, parts


def endpoint_of(scheme: str) -> str:
    """Return host and port of the server that the environment names; empty for the provider's."""
    named = next(filter(None, map(os.environ.get, _ENDPOINTS[scheme])), "")
    split = urlsplit(named if "://" in named else f"//{named}")
    return split.netloc.rpartition("@")[2]


def found_object(url: str) -> Object | None:
    """Return what the store says of an object; None where there is none of this very name."""
    system, path = _opened(url)
    with _explained(url):
        system.invalidate_cache()
        try:
            info = system.info(path)
        except FileNotFoundError:
            return None
        return _object(info) if info["type"] == "file" else None


def listed(url: str) -> dict[str, Object]:
    """Return all objects below a URL, by what their names have more than it; in order.

    Raises:
        StorageError: there is no such bucket or repository, or it cannot be read.
    """
    system, path = _opened(url.rstrip("/"))
    with _explained(url):
        system.invalidate_cache()
        try:
            found = system.find(path, detail=True)
        except FileNotFoundError:
            found = {}
        if not found and not url.startswith("hf://"):
            _refuse_missing_bucket(system, url)
    prefix = f"{path}/"
    names = ((name.removeprefix(prefix), info) for name, info in found.items())
    return {
        name: _object(info)
        for name, info in sorted(names)
        if name and not name.endswith("/") and name != path and info["type"] == "file"
    }


def read_object(url: str) -> bytes | None:
    """Return an object's bytes; None where there is none.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    system, path = _opened(url)
    with _explained(url):
        try:
            content: bytes = system.cat_file(path)
        except (FileNotFoundError, IsADirectoryError):
            return None
    return content


def download(url: str, path: Path) -> None:
    """Write an object to a file.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the store does not answer, or refuses.
    """
    system, place = _opened(url)
    path.unlink(missing_ok=True)
    with _explained(url):
        system.get_file(place, str(path))
    if not path.exists():  # what the file system takes for a folder
        raise FileNotFoundError(url)


def upload(path: Path, url: str) -> None:
    """Write a file to an object.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    system, place = _opened(url)
    with _explained(url, missing=True):
        system.put_file(str(path), place)


def write_object(url: str, content: bytes) -> None:
    """Write bytes to an object.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    system, place = _opened(url)
    with _explained(url, missing=True):
        system.pipe_file(place, content)


def create_object(url: str, content: bytes) -> bool:
    """Write bytes to an object that is not there yet; return False where one is.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    system, place = _opened(url)
    with _explained(url, missing=True):
        try:
            system.pipe_file(place, content, mode="create")
        except OSError as error:
            if _is_unmet(error):
                return False
            if not _is_unknown(error):
                raise
            if system.exists(place):
                return False
            system.pipe_file(place, content)
    return True


def replace_object(url: str, content: bytes, *, old: Object) -> bool:
    """Write bytes over an object; return False where S3 finds it to be another one than `old`.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    system, place = _opened(url)
    condition = {"IfMatch": f'"{old.token}"'} if url.startswith("s3://") else {}
    with _explained(url, missing=True):
        try:
            system.pipe_file(place, content, **condition)
        except OSError as error:
            if _is_unmet(error) or (condition and isinstance(error, FileNotFoundError)):
                return False
            if not (condition and _is_unknown(error)):
                raise
            system.pipe_file(place, content)
    return True


def remove_object(url: str) -> None:
    """Delete an object, if it is there.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    system, place = _opened(url)
    with _explained(url):
        try:
            system.rm_file(place)
        except FileNotFoundError:
            return


def written_at(url: str) -> float | None:
    """Return when an object was written, in seconds by the store's clock; None where it is not."""
    system, path = _opened(url)
    with _explained(url):
        system.invalidate_cache()
        try:
            return float(system.modified(path).timestamp())
        except FileNotFoundError:
            return None


def each_of(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield what comes of the items, in their order, several at once; an error stops the rest."""
    if len(items) < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(min(AT_ONCE, len(items)), thread_name_prefix="objects")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def patiently(
    work: Callable[[], Result],
    *,
    patience: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Result:
    """Return what comes of something; while a store does not answer it is tried again for a time.

    The time counts from the first failure, and anew from one after a change of `progress`.

    Raises:
        StorageError: the store refuses, or did not answer for `patience` seconds.
    """
    limit = patience_seconds() if patience is None else patience
    begun, pause, reached = None, 0.25, progress()
    while True:
        try:
            return work()
        except StorageError as error:
            now, before, reached = time.monotonic(), reached, progress()
            if begun is None or reached != before:
                begun, pause = now, 0.25
            if error.is_final or now - begun + pause > limit:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def patience_seconds() -> float:
    """Return how long a store that does not answer is asked again.

    Raises:
        ConfigError: the environment says something else than a number.
    """
    word = os.environ.get(PATIENCE, "")
    try:
        return max(0.0, float(word)) if word else PATIENCE_SECONDS
    except ValueError:
        raise ConfigError(f"{PATIENCE}: expected seconds, got {word[:40]!r}") from None


def _opened(url: str) -> tuple[Any, str]:
    scheme, _, path = url.partition("://")
    return _file_system(scheme), path


@cache
def _file_system(scheme: str) -> Any:
    missing = [package for package in _PACKAGES[scheme] if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{scheme}:// needs {', '.join(missing)}: pip install 'srft-prep[cloud]'")
    import fsspec

    settings = {} if scheme == "hf" else {"use_listings_cache": False}
    if scheme == "gs" and endpoint_of(scheme):
        from gcsfs.core import GCSFileSystem  # the newer class asks Google's own servers besides

        return GCSFileSystem(skip_instance_cache=True, **settings)
    return fsspec.filesystem(scheme, skip_instance_cache=True, **settings)


def _object(info: dict[str, Any]) -> Object:
    token = next((info[name] for name in _TOKENS if info.get(name)), "")
    token = token if isinstance(token, str | int) else getattr(token, "sha256", None) or token
    return Object(size=int(info.get("size") or 0), token=str(token).strip('"'))


def _refuse_missing_bucket(system: Any, url: str) -> None:
    try:
        system.ls(url.split("/")[2], refresh=True)
    except FileNotFoundError:
        raise _no_bucket(url) from None


def _no_bucket(url: str) -> StorageError:
    bucket = "/".join(url.split("/")[:3])
    return StorageError(
        f"{url}: there is no bucket {bucket}, or it is not to be seen with these credentials",
        is_final=True,
    )


def _is_unmet(error: OSError) -> bool:
    """Return whether a condition of a write was not met."""
    text = f"{error} {error.__cause__}"
    return isinstance(error, FileExistsError) or bool(
        re.search(r"PreconditionFailed|ConditionalRequestConflict|\b412\b|pre-?condition", text)
    )


def _is_unknown(error: OSError) -> bool:
    """Return whether a store does not know conditions of writes."""
    return bool(re.search(r"NotImplemented|not implemented", f"{error} {error.__cause__}"))


_SECRET: Final = re.compile(r"(?i)(AKIA|ASIA|hf_|Bearer )[\w.+/=-]+")


@contextmanager
def _explained(url: str, *, missing: bool = False) -> Iterator[None]:
    """Raise a store's errors as ours, which name the URL; with `missing`, a missing bucket's."""
    try:
        yield
    except (ConfigError, StorageError, NotADirectoryError):
        raise
    except FileNotFoundError as error:
        if not missing and not _says_bucket(error):
            raise
        raise _no_bucket(url) from None
    except PermissionError as error:
        raise StorageError(
            f"{url}: the store refuses: {_reason(error)}; check the credentials in the environment "
            "and what they may do",
            is_final=True,
        ) from None
    except Exception as error:  # every store's library has exceptions of its own
        name = type(error).__name__
        final = bool(re.search(r"Credential|Unauthorized|Forbidden|TokenRetrieval|NotFound", name))
        final = final or isinstance(error, TypeError | ValueError | NotImplementedError)
        if getattr(error, "errno", None) == 28:  # our own disk is full
            raise
        raise StorageError(f"{url}: {name}: {_reason(error)}", is_final=final) from None


def _says_bucket(error: BaseException) -> bool:
    text = f"{error} {error.__cause__}"
    return bool(re.search(r"(?i)NoSuchBucket|bucket does not exist|no such bucket", text))


def _reason(error: BaseException) -> str:
    lines = _SECRET.sub("[key]", str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
