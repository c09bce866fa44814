"""Inputs in a store that no manifest describes: raw runs, reports, single files.

They are listed where they lie, and what is wanted of them is fetched, several at once; what is here
in the version that the store lists is not fetched again. Folders and globs mean what they mean on a
disk. Stage directories among raw runs are known by their manifest or plan, which is all that is
fetched of them.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import Final

from srft_prep.errors import ConfigError
from srft_prep.object_mirror import fetch_objects, input_place, locked, manifest_of, prune
from srft_prep.object_storage import Object, found_object, listed, parts_of, patiently

_MARKS: Final = ("manifest.json", ".progress/plan.json")
"""What tells of a folder which stage wrote it."""
_MARK_ENDINGS: Final = tuple(f"/{name}" for name in _MARKS)

_brought: dict[tuple[str, tuple[str, ...]], list[Path]] = {}
"""What was fetched by this process, which sees one state of a store."""


def input_path(url: str, *, folder: bool = True, file: bool = True, whole: bool = False) -> Path:
    """Return the place of a file, fetched, or of a folder, of which the manifest was looked at.

    Args:
        url: the file or folder.
        folder: whether it may be a folder.
        file: whether it may be a file.
        whole: whether all of a folder is fetched; else a stage fetches what it needs.

    Raises:
        ConfigError: it is not there, or is the other of the two.
        StorageError: the store does not answer, or refuses.
    """
    place = input_place(url)
    if folder and not whole and manifest_of(place) is not None:
        place.mkdir(parents=True, exist_ok=True)
        return place
    one = _found(url)
    if one is not None and file:
        with locked(place.parent):
            fetch_objects(_parent(url), place.parent, {place.name: one})
        return place
    with locked(place, whole=True) if whole else nullcontext():
        objects = patiently(lambda: listed(url))
        if whole and folder and objects:
            fetch_objects(url, place, objects)
            prune(place, objects)
    if not objects or not folder:
        is_other = one is not None or (objects and not folder)
        wanted = "a folder" if not file else "a file" if not folder else "a file or folder"
        state = (
            f"expected {wanted}, got the other" if is_other else f"there is no such {wanted[2:]}"
        )
        raise ConfigError(f"{url}: {state}")
    place.mkdir(parents=True, exist_ok=True)
    return place


def bring_raw(
    url: str, endings: Sequence[str], stage_of: Callable[[Path], str | None]
) -> list[Path]:
    """Return the places of a file or folder, or of what a glob matches, with their files.

    Args:
        url: a file, a folder or a glob.
        endings: of the names of the files that are fetched of a folder.
        stage_of: says which stage wrote a folder, by what `_MARKS` names in it.

    Raises:
        ConfigError: nothing is there.
        StorageError: the store does not answer, or refuses.
    """
    key = (url, tuple(endings))
    if key not in _brought:
        _brought[key] = _bring_raw(url, endings, stage_of)
    return _brought[key]


def _bring_raw(
    url: str, endings: Sequence[str], stage_of: Callable[[Path], str | None]
) -> list[Path]:
    place = input_place(url)
    one = _found(url)
    if one is not None:
        with locked(place.parent):
            beside = {name: _found(f"{_parent(url)}/{name}") for name in _MARKS}
            marks = {name: mark for name, mark in beside.items() if mark is not None}
            fetch_objects(_parent(url), place.parent, {**marks, place.name: one})
            for name in beside.keys() - marks.keys():
                (place.parent / name).unlink(missing_ok=True)
        return [place]
    names = _bring_below(url, None, endings, stage_of)
    if names is None and has_magic(url):
        base, patterns = _split_glob(url)
        place = input_place(base)
        names = _bring_below(base, patterns, endings, stage_of)
    if not names:
        raise ConfigError(f"{url}: no such file or folder")
    return [place / name for name in names]


def _bring_below(
    base: str,
    patterns: Sequence[str] | None,
    endings: Sequence[str],
    stage_of: Callable[[Path], str | None],
) -> list[str] | None:
    """Fetch what is wanted below a URL, and return the names that match; None of an empty one."""
    place = input_place(base)
    with locked(place, whole=True):
        objects = patiently(lambda: listed(base))
        if not objects:
            return None
        matched = [""] if patterns is None else _matched(objects, patterns)
        if not matched:
            return []
        marks = {name: one for name, one in objects.items() if f"/{name}".endswith(_MARK_ENDINGS)}
        fetch_objects(base, place, marks)
        folders = {_folder_of(name) for name in marks}
        stages = {folder for folder in folders if stage_of(place / folder) is not None}
        roots = set(matched)
        wanted = {
            name: one
            for name, one in objects.items()
            if (name in roots or (_has_ending(name, endings) and _is_under(name, roots)))
            and not _is_under(name, stages)
        }
        fetch_objects(base, place, wanted)
        prune(place, objects)
        place.mkdir(parents=True, exist_ok=True)
    return matched


def _found(url: str) -> Object | None:
    return patiently(lambda: found_object(url))


def _folder_of(mark: str) -> str:
    """Return the folder that a mark tells of; empty for the one that was listed."""
    name = next(name for name in _MARKS if f"/{mark}".endswith(f"/{name}"))
    return mark.removesuffix(name).rstrip("/")


def _has_ending(name: str, endings: Sequence[str]) -> bool:
    return name.removesuffix(".gz").removesuffix(".zst").endswith(tuple(endings))


def _is_under(name: str, folders: set[str]) -> bool:
    """Return whether a file is in one of the folders, at any depth, no part on the way hidden."""
    parts = name.split("/")
    for number in range(len(parts) - 1, -1, -1):
        if parts[number].startswith("."):
            return False
        if "/".join(parts[:number]) in folders:
            return True
    return False


def _split_glob(url: str) -> tuple[str, list[str]]:
    """Return the URL before the first part that is a pattern, and the parts from it on."""
    scheme, parts = parts_of(url)
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    if not first:
        raise ConfigError(f"{url}: expected the name of a bucket, got a pattern")
    return f"{scheme}://{'/'.join(parts[:first])}", parts[first:]


def _matched(objects: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names of files and folders that match a pattern for each part, in order."""
    names = set(objects)
    for name in objects:
        parts = name.split("/")
        names.update("/".join(parts[:number]) for number in range(1, len(parts)))
    return sorted(name for name in names if _matches(name.split("/"), patterns))


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    pattern, rest = patterns[0], patterns[1:]
    if pattern == "**":
        here = _matches(parts, rest) if rest else not parts
        deeper = bool(parts) and not parts[0].startswith(".") and _matches(parts[1:], patterns)
        return here or deeper
    return (
        bool(parts)
        and fnmatchcase(parts[0], pattern)
        and (pattern.startswith(".") or not parts[0].startswith("."))
        and _matches(parts[1:], rest)
    )


def _parent(url: str) -> str:
    return url.rstrip("/").rpartition("/")[0]
