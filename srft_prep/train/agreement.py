"""What one rank finds wrong, all ranks raise: none waits for another that is gone.

Ranks meet in collectives, and a rank that raises between two of them leaves the others waiting for
it until a timeout. So whatever can fail in one rank alone (files, settings, models) runs in here.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from srft_prep.errors import SrftError, TrainError

TOLD: Final = "the first rank says it"
"""Note on an error that all ranks raise and one should show."""

BEAT_SECONDS: Final = 60.0
"""How often ranks that wait are told that the first one is still at work."""

Result = TypeVar("Result")


def agreed(call: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Return, in all ranks, what a call returns in the first; what it raises there, all raise."""
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = call()
        except Exception as error:  # noqa: BLE001  # raised again when the others know
            failure = error
            box[1] = _telling(error)
    dist.broadcast_object_list(box, src=0, group=group)
    if failure is not None:
        raise failure
    if box[1] is not None:
        box[1].add_note(TOLD)
        raise box[1]
    result: Result = box[0]
    return result


def agreed_at_length(call: Callable[[], Result], *, beat: float = BEAT_SECONDS) -> Result:
    """Do as `agreed`, for what may take longer than a collective waits: what comes from a store.

    Args:
        call: it may meet no other rank.
        beat: seconds between two signs of life.
    """
    if dist.get_world_size() == 1:
        return agreed(call)
    if dist.get_rank():
        while _is_at_work():
            pass
        return agreed(call)
    over = threading.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # a rank is gone: what follows meets it, and raises
            while not over.wait(beat):
                _is_at_work(True)
            _is_at_work(False)

    def call_told() -> Result:
        teller = threading.Thread(target=tell, name="at work")
        teller.start()
        try:
            return call()
        finally:
            over.set()
            teller.join()

    return agreed(call_told)


def _is_at_work(is_so: bool = False) -> bool:
    """Return in all ranks what the first one says."""
    said = torch.tensor([is_so])
    dist.broadcast(said, src=0)
    return bool(said.item())


def together(call: Callable[[], Result]) -> Result:
    """Return what a call returns in this rank; if it fails in one, all raise: none waits for it."""
    box: list[Result] = []
    failure: Exception | None = None
    try:
        box.append(call())
    except Exception as error:  # noqa: BLE001  # raised again when the others know
        failure = error
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, failure and _telling(failure))
    failure = failure or next(filter(None, told), None)
    if failure is not None:
        if dist.get_rank():
            failure.add_note(TOLD)
        raise failure
    return box[0]


def _telling(error: Exception) -> SrftError:
    """Return an error that says in other ranks what went wrong in this one."""
    if isinstance(error, SrftError):
        return error
    return TrainError(f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}")
