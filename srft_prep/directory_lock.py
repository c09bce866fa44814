"""One writer of a directory: locks that the kernel drops when the process dies.

One is on the directory, one on a file of its journal, since the other hosts of a network file
system see no lock of a directory.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from srft_prep.errors import ConfigError
from srft_prep.object_mirror import address_of

LOCK: Final = "lock"


def is_writable(path: Path) -> bool:
    """Return whether a directory's rights and its file system let a file be made in it."""
    return os.access(path, os.W_OK | os.X_OK)


class DirectoryLock:
    """The lock of a directory, held from its making to `release`."""

    def __init__(self, path: Path, progress: Path) -> None:
        """Lock a directory, and its journal where there is one.

        Args:
            path: the directory; it is there.
            progress: the folder of its journal, which may not be there yet.

        Raises:
            ConfigError: another process has the lock, the journal is a link, or the file system
                cannot lock.
        """
        self._path = path
        self._progress = progress
        self._journal: int | None = None
        self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._take(self._directory)
            if progress.is_symlink():
                raise ConfigError(
                    f"{progress}: expected a folder of this run's, got a link; remove it, or "
                    "choose another -o"
                )
            if progress.is_dir() and is_writable(path):
                self.lock_journal()
        except BaseException:
            self.release()
            raise

    def lock_journal(self) -> None:
        """Lock the journal, whose folder is there.

        Raises:
            ConfigError: another process has the lock.
        """
        if self._journal is None:
            self._journal = os.open(self._progress / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._take(self._journal)

    def make_journal(self) -> None:
        """Make the journal's folder if it is not there, and lock it.

        Raises:
            ConfigError: another process has the lock, or nothing can be written here.
        """
        try:
            self._progress.mkdir(exist_ok=True)
            self.lock_journal()
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            raise ConfigError(
                f"{address_of(self._path)}: cannot be written to ({error.strerror}); choose "
                "another -o"
            ) from None

    def unlock_journal(self) -> None:
        """Close the journal's lock before the journal goes: an open file keeps an NFS folder."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def release(self) -> None:
        """Let go of both."""
        self.unlock_journal()
        os.close(self._directory)

    def _take(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{address_of(self._path)}: another srft-prep run is writing here; wait for it, or "
                "choose another -o"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise ConfigError(
                f"{self._path}: its file system cannot lock files ({error.strerror}), so that "
                "another run could write here unseen; choose an -o on one that can (Lustre: "
                "mounted with -o flock)"
            ) from None
