"""A Ray cluster: one that runs somewhere, or one of this machine's cores for the time of a run.

Ray places units of work on machines, starts processes and tells which of them died. What is done,
what is kept and what is asked again is decided here, by the journal and the ledger, so that nothing
is lost with a cluster.

Ray's processes talk to each other with pickle, on ports of every interface of the machine. A local
cluster therefore demands a token that only its own processes have, has no dashboard, and reports
nothing to Ray's makers. Who may talk to a cluster at an address is its operator's affair.
"""

import os
import secrets
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Final, Self

from srft_prep.errors import BackendError, ConfigError

LOCAL: Final = "local"
"""In place of an address: a cluster of this machine, which ends with the run."""
INSTALL: Final = "pip install 'srft-prep[ray]'"
STARTS: Final = 3
"""Tries to start a local one: Ray gives its processes 30 seconds, too few on a loaded machine."""
OBJECT_STORE_BYTES: Final = 1 << 28
"""Of a local cluster: what is under way between processes."""
_ENVIRONMENT: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}


class RayCluster:
    """A connection to a cluster; use as a context manager, which ends a local one."""

    def __init__(self, address: str = LOCAL, *, num_cpus: int | None = None) -> None:
        """Note where the cluster is; nothing is started yet.

        Args:
            address: of a running cluster, or `local`.
            num_cpus: cores of a local one; by default all that this process may use.

        Raises:
            ConfigError: Ray is not installed.
        """
        if find_spec("ray") is None:
            raise ConfigError(f"--engine ray: expected the package ray, got none ({INSTALL})")
        self.address = address
        self._num_cpus = num_cpus or len(os.sched_getaffinity(0))
        self.ray: Any = None
        """The package, once the cluster is there."""

    def __enter__(self) -> Self:
        is_local = self.address == LOCAL
        if is_local:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray = import_module("ray")
        local = {
            "num_cpus": self._num_cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        for left in reversed(range(STARTS if is_local else 1)):
            try:
                ray.init(
                    address=self.address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    **(local if is_local else {}),
                )
                break
            except Exception as error:  # noqa: BLE001 - what it raises is of many classes
                ray.shutdown()  # what of it was started already
                if not left:
                    raise BackendError(
                        f"--ray-address {self.address}: the cluster cannot be used: {_line(error)}"
                    ) from None
        self.ray = ray
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.ray is not None:
            self.ray.shutdown()
            self.ray = None

    def number_of(self, resource: str) -> int:
        """Return how many of a resource (`CPU`, `GPU`) the cluster has."""
        return int(self.ray.cluster_resources().get(resource, 0))

    def workers_for(self, resource: str, *, each: int = 1, wanted: int | None = None) -> int:
        """Return how many workers that take so much of a resource each are to be started.

        Raises:
            ConfigError: the cluster has not enough for those wanted, or for one.
        """
        has = self.number_of(resource)
        count = has // each if wanted is None else wanted
        if not 1 <= count * each <= has:
            raise ConfigError(
                f"--ray-address {self.address}: expected a cluster with {max(count, 1) * each} "
                f"{resource}, got one with {has}; choose fewer --workers, or add nodes"
            )
        return count

    def start_actor(
        self,
        kind: type,
        *arguments: Any,
        num_cpus: float = 1,
        num_gpus: float = 0,
        threads: int = 1,
    ) -> Any:
        """Return the handle of an object of a class in a process of its own.

        Ray starts no second one where it dies: that is for those to decide who know what is lost.
        """
        remote = self.ray.remote(kind).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_concurrency=threads
        )
        return remote.remote(*arguments)

    def result_of(self, reference: Any) -> Any:
        """Return what a call returned, which has ended.

        Raises:
            LostError: its process is gone, or cannot be reached.
        """
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            raise LostError(_line(error)) from None

    def end_actor(self, actor: Any) -> None:
        """Kill an actor, if it lives."""
        self.ray.kill(actor)


class LostError(BackendError):
    """An actor's process died, its node did, or nobody can reach it."""


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
