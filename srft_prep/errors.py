"""Everything that this package raises on purpose.

    SrftError
    |-- ConfigError    a setting, a path or a combination of options is wrong: nothing was written
    |-- FormatError    a raw record is not what its format promises
    |-- BackendError   a critic cannot work at all (no model, no key, engine gone)
    |-- LabelError     labels that do not fit the trajectories, or cannot be parsed
    |-- ShardError     a stage directory is damaged, unfinished, or of another version
    |-- StorageError   a store of objects does not answer, or refuses
    `-- TrainError     training cannot go on: documents leak, a loss is no number, ...

A message says where, what was expected, what came, and what to do. Failures of single records are
data (a line in `rejected.jsonl`, a row with `failure`), never an exception that ends a run.
"""


def in_one_line(error: object, *, limit: int | None = None) -> str:
    """Return what an error or a text says, in one line of at most `limit` characters.

    An error that says nothing is named by its type.
    """
    line = " ".join(str(error).split())
    if not line and isinstance(error, BaseException):
        line = type(error).__name__
    return line[:limit]


class SrftError(Exception):
    """Base of all errors that are the user's to mend; the command line exits with status 2."""


class ConfigError(SrftError):
    """A setting, a path or a combination of options is wrong; raised before anything is written."""


class FormatError(SrftError):
    """A raw record is not what its format promises; `ingest` turns it into a rejected record."""


class BackendError(SrftError):
    """A critic's backend cannot work at all."""


class LabelError(SrftError):
    """Labels do not fit the trajectories, or a label file cannot be parsed."""


class ShardError(SrftError):
    """A stage directory is damaged, unfinished, or was written by an unknown version."""


class StorageError(SrftError):
    """A store of objects (s3://, gs://, hf://) does not answer, or refuses."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        """Say what is wrong.

        Args:
            message: what, and where.
            is_final: whether asking again is of no use (no permission, no such bucket).
        """
        super().__init__(message)
        self.is_final = is_final


class TrainError(SrftError):
    """Training cannot go on, or would train something else than it says."""
