"""Small disks and disks that cannot be written to, by mounts of our own."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, num_bytes: int) -> Iterator[Path]:
    """Give an empty disk with room for so many bytes (in whole pages)."""
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={num_bytes}", "none", place)
    try:
        yield place
    finally:
        _unmount(place)


def resize(disk: Path, num_bytes: int) -> None:
    """Give a small disk another size; what is on it stays."""
    _mount("-o", f"remount,size={num_bytes}", disk)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Let nobody write below a folder, not even root."""
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield folder
    finally:
        _unmount(folder)


def _mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode and os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(f"CI runs as root and must be able to mount: {done.stderr}")
    if done.returncode:
        pytest.skip(f"needs the right to mount a disk: {done.stderr.strip()}")


def _unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=True)
