"""Everything that this package raises on purpose.

    SrftError
    |-- ConfigError    a setting, a path or a combination of options is wrong: nothing was written
    |-- FormatError    a raw record is not what its format promises
    |-- BackendError   a critic cannot work at all (no model, no key, engine gone)
    |-- LabelError     labels that do not fit the trajectories, or cannot be parsed
    |-- ShardError     a stage directory is damaged, unfinished, or of another version
    `-- TrainError     training cannot go on: documents leak, a loss is no number, ...

A message says where, what was expected, what came, and what to do. Failures of single records are
data (a line in `rejected.jsonl`, a row with `failure`), never an exception that ends a run.
"""


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


class TrainError(SrftError):
    """Training cannot go on, or would train something else than it says."""
