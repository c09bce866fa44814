"""Where a URL lies on this machine, and the files of it that were fetched.

    CACHE/in/s3/BUCKET/KEY...     inputs, fetched when they are needed
    CACHE/out/s3/BUCKET/KEY...    outputs in the making (`object_outputs`)
    CACHE/fetched/, CACHE/locks/  what was fetched in which version; one process at a time fetches

Stages read local files only: a path of the command line that is a URL becomes its place here, and
`address_of` turns a place back into the URL that people know it by. Folders keep their names, since
readers and outcomes look at them. CACHE is SRFT_CACHE, or ~/.cache/srft-prep; it may be deleted
whenever nothing runs. A file appears by rename when it is whole and its hash is the manifest's.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.errors import ConfigError, StorageError
from srft_prep.hashes import sha256_of
from srft_prep.object_storage import (
    Object,
    download,
    each_of,
    endpoint_of,
    is_url,
    listed,
    parts_of,
    patiently,
    read_object,
)
from srft_prep.progress import plain

CACHE: Final = "SRFT_CACHE"
"""Environment variable: the folder of everything that is kept of stores."""
_MANIFEST: Final = "manifest.json"

_manifests: dict[Path, bytes | None] = {}
"""What the store's manifest is, by folder: a process looks once, and sees one state."""
_claimed: set[Path] = set()
"""Output folders that this process writes: what is here counts, not what the store has."""


def cache_root() -> Path:
    """Return the folder of everything that is kept of stores.

    Raises:
        ConfigError: the user has no home, and none is given.
    """
    root = _cache_root()
    if root is None:
        raise ConfigError(
            f"user {os.getuid()} has no home folder, and so no place for what is fetched of stores "
            f"and written to them: give a folder as {CACHE}"
        )
    return root


def _cache_root() -> Path | None:
    given = os.environ.get(CACHE)
    if given:
        return Path(given).absolute()
    try:
        return Path.home() / ".cache" / "srft-prep"
    except RuntimeError:  # a container's user without an entry in passwd: local paths still work
        return None


def input_place(url: str) -> Path:
    """Return where the file or folder of a URL is put to be read."""
    return _place("in", url)


def output_place(url: str) -> Path:
    """Return where the folder of a URL is written."""
    return _place("out", url)


def _place(tree: str, url: str) -> Path:
    scheme, parts = parts_of(url)
    endpoint = endpoint_of(scheme).replace("/", "_")
    server = f"{scheme},{endpoint}" if endpoint else scheme
    return cache_root().joinpath(tree, server, *parts)


def place_of(word: str) -> Path:
    """Return a local path, or the place of a URL: what a manifest says of an input."""
    return input_place(word) if is_url(word) else Path(word)


def address_of(path: Path | str) -> str:
    """Return the URL of a place in the cache; any other path as it is."""
    return with_addresses(str(path))


def is_mirrored(path: Path) -> bool:
    """Return whether a path is the place of a URL."""
    return address_of(path) != str(path)


def with_addresses(text: str) -> str:
    """Return a text with the URLs of all places in the cache that it names."""
    root = _cache_root()
    return text if root is None else _places(str(root), str(root.resolve())).sub(r"\1://", text)


@cache
def _places(*roots: str) -> re.Pattern[str]:
    names = "|".join(re.escape(root) for root in roots)
    return re.compile(rf"(?:{names})/(?:in|out)/(s3|gs|hf)(?:,[^/\s]+)?/")


def claim(folder: Path) -> None:
    """Say that this process writes a folder: its manifest is the one that lies there."""
    _claimed.add(folder)


def unclaim(folder: Path) -> None:
    """Say that this process no longer writes a folder, which the store has as it is now."""
    _claimed.discard(folder)
    _manifests.pop(folder, None)


def lies_in_store(folder: Path) -> bool:
    """Return whether what the store has of a folder counts: of a mirror, unless it is claimed."""
    return is_mirrored(folder) and folder not in _claimed


def manifest_of(folder: Path) -> bytes | None:
    """Return the manifest that the store has of a folder; None where it has none.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    if folder not in _manifests:
        url = f"{address_of(folder)}/{_MANIFEST}"
        _manifests[folder] = patiently(lambda: read_object(url))
    return _manifests[folder]


def names_below(folder: Path) -> list[str]:
    """Return the names of all objects below a mirrored folder."""
    return list(patiently(lambda: listed(address_of(folder))))


def fetch(
    folder: Path, files: Sequence[Mapping[str, Any]], *, anew: bool = False
) -> dict[str, str]:
    """Bring the files of a folder here, and return what is wrong, by name.

    A file that is here with the right bytes is not fetched again, unless `anew`.

    Args:
        folder: the place of a stage directory.
        files: `name` and `sha256` of each, as manifests describe them.
        anew: whether what is here does not count.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    with locked(folder):
        index = Index(folder)
        if not anew:
            files = [file for file in files if not _is_here(folder / file["name"], file, index)]

        def bring(file: Mapping[str, Any]) -> str | None:
            written_here = not anew and _link_output(folder, file)
            problem = None if written_here else _bring(folder, file)
            if problem is None:
                index.add(file["name"], file["sha256"])
            return problem

        title = f"fetch {address_of(folder)}"
        shown = plain(title, total=len(files), unit="files")
        problems = {}
        for file, problem in zip(files, each_of(bring, files), strict=True):
            shown.advance()
            if problem is not None:
                problems[file["name"]] = problem
    return problems


def fetched(folder: Path, files: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Bring what was never fetched here: `fetch`, but what once was right is not hashed again."""
    index = Index(folder)
    wanted = [
        file
        for file in files
        if index.token(file["name"]) != file["sha256"] or not (folder / file["name"]).is_file()
    ]
    return fetch(folder, wanted) if wanted else {}


def _is_here(path: Path, file: Mapping[str, Any], index: "Index") -> bool:
    if not path.is_file() or path.stat().st_size != file.get("bytes", path.stat().st_size):
        return False
    if sha256_of(path) != file["sha256"]:
        return False
    if index.token(file["name"]) != file["sha256"]:
        index.add(file["name"], file["sha256"])
    return True


def _link_output(folder: Path, file: Mapping[str, Any]) -> bool:
    """Take a file that this machine wrote and still has, if it is the one that is meant.

    Files of outputs are replaced, never changed; but for ledgers, which grow.
    """
    root = cache_root()
    if root / "in" not in folder.parents or file["name"].endswith(".jsonl"):
        return False
    written = root / "out" / folder.relative_to(root / "in") / file["name"]
    if not written.is_file() or sha256_of(written) != file["sha256"]:
        return False
    path = folder / file["name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(written, temporary)
    except OSError:  # a file system without links, or it was replaced just now
        return False
    temporary.replace(path)
    return True


def _bring(folder: Path, file: Mapping[str, Any]) -> str | None:
    """Fetch a file and return None, or what is wrong with the object."""
    path = folder / file["name"]
    try:
        with _downloaded(f"{address_of(folder)}/{file['name']}", path) as temporary:
            size = temporary.stat().st_size
            if sha256_of(temporary) == file["sha256"]:
                temporary.replace(path)
                return None
    except FileNotFoundError:
        return "missing"
    if size != file.get("bytes", size):
        return f"expected {file['bytes']:,} bytes, got {size:,}: it was cut short, or replaced"
    return "changed since it was written"


def fetch_objects(source: str, place: Path, objects: Mapping[str, Object]) -> None:
    """Bring objects below a URL here that no manifest describes; checked by size.

    What is here in the version (ETag, generation, hash) that the store lists is not fetched again.

    Args:
        source: the URL that all names are below.
        place: its place.
        objects: as listed, by name.

    Raises:
        StorageError: the store does not answer, or an object changes while it is read.
    """
    index = Index(place)
    wanted = [
        name
        for name, one in objects.items()
        if index.token(name) != version_of(one) or not _has_size(place / name, one.size)
    ]

    def bring(name: str) -> None:
        url = f"{source.rstrip('/')}/{name}"
        parts_of(url)
        fetch_object(url, place / name, objects[name])
        index.add(name, version_of(objects[name]))

    shown = plain(f"fetch {source}", total=len(wanted), unit="files")
    for _ in each_of(bring, wanted):
        shown.advance()


def fetch_object(url: str, path: Path, one: Object) -> None:
    """Write an object of a known size to a file, whole or not at all.

    Raises:
        StorageError: the store does not answer, or gives another number of bytes.
    """
    try:
        with _downloaded(url, path) as temporary:
            if not _has_size(temporary, one.size):
                raise StorageError(
                    f"{url}: expected {one.size:,} bytes, got {temporary.stat().st_size:,}: it was "
                    "replaced while it was read, or cut short; give the command again"
                )
            temporary.replace(path)
    except FileNotFoundError:
        raise StorageError(f"{url}: it is gone; give the command again") from None


@contextmanager
def _downloaded(url: str, path: Path) -> Iterator[Path]:
    """Give an object as a file beside its place, which is gone afterwards unless it was moved.

    Raises:
        FileNotFoundError: there is no such object.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        patiently(lambda: download(url, temporary))
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def version_of(one: Object) -> str:
    """Return an object's size and token as one word."""
    return f"{one.size}:{one.token}"


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


class Index:
    """In which version each file of a folder was fetched: append-only, a line a file."""

    def __init__(self, folder: Path) -> None:
        self._path = cache_root() / "fetched" / f"{_name_of(folder)}.jsonl"
        self._tokens: dict[str, str] = dict(self._read())

    def token(self, name: str) -> str | None:
        """Return the version of the file that was fetched last."""
        return self._tokens.get(name)

    def add(self, name: str, token: str) -> None:
        """Note that a file was fetched; it must be in place."""
        self._tokens[name] = token
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(orjson.dumps([name, token]) + b"\n")

    def _read(self) -> Iterator[tuple[str, str]]:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                name, token = orjson.loads(line)
            except (ValueError, TypeError):  # torn by a kill
                continue
            yield str(name), str(token)


@contextmanager
def locked(folder: Path, *, whole: bool = False) -> Iterator[None]:
    """Keep other processes of this machine from fetching into a folder; wait for one that does.

    Args:
        folder: the place.
        whole: whether folders in it are meant, too, at any depth: for who removes files there.
    """
    root = cache_root()
    (root / "locks").mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for each in (*(above for above in folder.parents[::-1] if root in above.parents), folder):
            kind = fcntl.LOCK_EX if whole and each == folder else fcntl.LOCK_SH
            held.enter_context(_lock(root / "locks" / f"{_name_of(each)}-whole", kind))
        held.enter_context(_lock(root / "locks" / _name_of(folder), fcntl.LOCK_EX))
        yield


@contextmanager
def _lock(path: Path, kind: int) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, kind)
        yield
    finally:
        os.close(file)


def _name_of(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]


def prune(place: Path, keep: Iterable[str]) -> None:
    """Remove the files below a place that the store no longer has, but what is being fetched.

    The place must be locked as a whole, and what to keep listed under that lock.
    """
    names = set(keep)
    for path in [*place.rglob("*")]:
        temporary = path.name.startswith(".") and path.name.endswith(".tmp")
        if path.is_file() and not temporary and str(path.relative_to(place)) not in names:
            path.unlink(missing_ok=True)
