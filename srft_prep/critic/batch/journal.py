"""What a run has put into a provider's batches, on disk: how a killed run finds its jobs again.

An append-only file of JSON lines, each but `taken` on disk before the next thing happens:

    {"event": "intent", "name": ..., "ids": [...], ...}   before a job is submitted
    {"event": "submitted", "name": ..., "job_id": ...}    once the provider has named it
    {"event": "taken", "name": ..., "ids": [...]}         these results are in the ledger
    {"event": "done", "name": ...}                        so are all that were left
    {"event": "dropped", "name": ..., "reason": ...}      nothing of it was or will be answered

An *open* job holds its ids but those taken. No id is held by two open jobs: what a job holds is
waited for, never submitted again. `taken` is written for each result and left to the system to
put on disk: a killed process loses none of it, and at most one result is in the ledger without it.
A job without `submitted` may or may not have been accepted: only
the provider knows. A torn last line (the process died in the middle of it) is cut off: nothing that
comes after it had happened.

Where two machines went on from one journal in a store, the other's is `batches-NAME-2.jsonl` beside
it (`object_outputs`). Its jobs were paid for: those that the journal knows nothing of are written
into it, each at once, with all that is said of them. What both hold is waited for in one job.
"""

import os
import re
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.critic import CriticRequest
from srft_prep.errors import ConfigError
from srft_prep.storage import flush

ID_BYTES: Final = 20
"""40 hexadecimal digits; both providers take 64 characters."""


def custom_id_of(request: CriticRequest, *, critic_id: str, prompt_hash: str) -> str:
    """Return the name of a request at the provider: a hash of its key in the ledger."""
    key = (request.content_hash, critic_id, prompt_hash, request.part)
    return blake2b(orjson.dumps(key), digest_size=ID_BYTES).hexdigest()


@dataclass(slots=True, kw_only=True)
class JobEntry:
    """What the journal says of one job."""

    name: str
    """Ours; the provider is told it where it takes metadata."""
    intended: float
    """Unix time before it was submitted."""
    ids: set[str]
    """The custom ids whose results are not in the ledger yet."""
    num_requests: int
    """Of the whole job."""
    reserve_usd: dict[str, float] = field(default_factory=dict)
    """The most that each request can cost, by its custom id, in US dollars."""
    job_id: str | None = None
    """The provider's; None where nobody knows whether it was accepted."""
    age_when_met: float = 0.0
    """Seconds since it was intended, when this run wrote it or found it in the journal."""
    met: float = field(default_factory=time.monotonic)

    @property
    def age_seconds(self) -> float:
        """How old the job is; a clock that jumps during the run makes it no older."""
        return self.age_when_met + time.monotonic() - self.met


@dataclass(slots=True)
class BatchJournal:
    """The journal of one critic's jobs at one provider; the file may hold those of others.

    One process at a time: `label` holds the lock of the directory that the file is in.
    """

    path: Path
    provider: str
    critic_id: str
    prompt_hash: str
    jobs: dict[str, JobEntry] = field(default_factory=dict)
    """The open jobs by their names."""
    known_job_ids: set[str] = field(default_factory=set)
    """The provider's ids of all jobs that ever were in the file."""
    _names: set[str] = field(default_factory=set)
    """Of all jobs that ever were in the file."""
    _fd: int | None = None

    @classmethod
    def open(cls, path: Path, *, provider: str, critic_id: str, prompt_hash: str) -> "BatchJournal":
        """Read a journal, or begin one, and cut a torn last line off.

        Raises:
            ConfigError: the file cannot be read or written, or a whole line of it is damaged.
        """
        journal = cls(path, provider, critic_id, prompt_hash)
        try:
            is_new = not path.exists()
            journal._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if is_new:
                flush(path.parent)
            journal._read()
            for other in journal._others():
                journal._take_in(other)
        except OSError as error:
            journal.close()
            raise ConfigError(f"{path}: expected a journal of batches: {error.strerror}") from None
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def intend(self, reserve_usd: Mapping[str, float]) -> JobEntry:
        """Write down that a job of these ids is about to be submitted, and what each may cost."""
        entry = JobEntry(
            name=uuid.uuid4().hex, intended=time.time(), ids=set(reserve_usd), num_requests=0
        )
        entry.reserve_usd = dict(reserve_usd)
        entry.num_requests = len(entry.ids)
        held = [id_ for job in self.jobs.values() for id_ in job.ids & entry.ids]
        assert not held, f"{self.path}: {held[:3]} are in an open job already"
        self._append(
            "intent",
            entry,
            provider=self.provider,
            critic_id=self.critic_id,
            prompt_hash=self.prompt_hash,
            intended=entry.intended,
            ids=sorted(entry.ids),
            reserve_usd=[reserve_usd[id_] for id_ in sorted(entry.ids)],
        )
        self.jobs[entry.name] = entry
        return entry

    def submitted(self, entry: JobEntry, job_id: str) -> None:
        """Write down what the provider calls a job."""
        entry.job_id = job_id
        self._append("submitted", entry, job_id=job_id)
        self.known_job_ids.add(job_id)

    def taken(self, entry: JobEntry, ids: Collection[str]) -> None:
        """Write down which results are in the ledger; the job is done when no others are left."""
        entry.ids.difference_update(ids)
        if not entry.ids:
            self._append("done", entry)
            del self.jobs[entry.name]
        elif ids:
            self._write("taken", entry, ids=sorted(ids))

    def dropped(self, entry: JobEntry, reason: str) -> None:
        """Write down that no request of a job was or will be answered: they can be sent again."""
        self._append("dropped", entry, reason=reason)
        del self.jobs[entry.name]

    def _append(self, event: str, entry: JobEntry, **fields: Any) -> None:
        self._write(event, entry, **fields)
        assert self._fd is not None
        os.fsync(self._fd)

    def _write(self, event: str, entry: JobEntry, **fields: Any) -> None:
        self._put(orjson.dumps({"event": event, "name": entry.name, **fields}) + b"\n")

    def _put(self, line: bytes) -> None:
        assert self._fd is not None, "the journal is closed"
        written = 0
        while written < len(line):
            written += os.write(self._fd, line[written:])

    def _others(self) -> list[Path]:
        """Return the journals of this name that other machines left, in order."""
        named = re.compile(rf"{re.escape(self.path.stem)}(-\d+)+{re.escape(self.path.suffix)}")
        return sorted(path for path in self.path.parent.iterdir() if named.fullmatch(path.name))

    def _take_in(self, path: Path) -> None:
        """Write the jobs of another journal into this one, but those that it has."""
        assert self._fd is not None
        other = type(self)(path, self.provider, self.critic_id, self.prompt_hash)
        other._fd = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            other._read()
        finally:
            other.close()
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]
        said = [(orjson.loads(line)["name"], line) for line in lines]
        held = {id_ for job in self.jobs.values() for id_ in job.ids}
        for name, entry in other.jobs.items():
            if name in self._names:
                continue
            block = [line for of, line in said if of == name]
            if twice := sorted(entry.ids & held):
                event = "taken" if entry.ids - held else "done"
                ids = {"ids": twice} if event == "taken" else {}
                block.append(orjson.dumps({"event": event, "name": name, **ids}) + b"\n")
                entry.ids.difference_update(held)
            self._put(b"".join(block))
            os.fsync(self._fd)
            self._names.add(name)
            if entry.ids:
                self.jobs[name] = entry
                held |= entry.ids
        self.known_job_ids |= other.known_job_ids

    def _read(self) -> None:
        assert self._fd is not None
        others: set[str] = set()
        size = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._fd, size)
                    os.fsync(self._fd)
                    break
                size += len(line)
                try:
                    self._replay(orjson.loads(line), others)
                except (KeyError, TypeError, ValueError) as error:
                    raise ConfigError(
                        f"{self.path}:{number}: expected a line of the journal of batches, got "
                        f"{line[:60]!r} ({error!r}); without it paid batches may be paid again: "
                        "restore the file, or delete this line if you know its batches are done"
                    ) from None

    def _replay(self, line: dict[str, Any], others: set[str]) -> None:
        event, name = line["event"], line["name"]
        owner = (self.provider, self.critic_id, self.prompt_hash)
        self._names.add(name)
        if event == "intent":
            if (line["provider"], line["critic_id"], line["prompt_hash"]) != owner:
                others.add(name)
                return
            ids = set(line["ids"])
            # Journals of old have no sums; their jobs count for nothing against a budget.
            sums = line.get("reserve_usd") or [0.0] * len(ids)
            self.jobs[name] = JobEntry(
                name=name,
                intended=line["intended"],
                ids=ids,
                num_requests=len(ids),
                reserve_usd=dict(zip(line["ids"], sums, strict=True)),
                age_when_met=max(0.0, time.time() - line["intended"]),
            )
        elif event == "submitted":
            self.known_job_ids.add(line["job_id"])
            if name not in others:
                self.jobs[name].job_id = line["job_id"]
        elif event not in ("taken", "done", "dropped"):
            raise KeyError(event)
        elif name not in others:
            if event == "taken":
                self.jobs[name].ids.difference_update(line["ids"])
            else:
                del self.jobs[name]
