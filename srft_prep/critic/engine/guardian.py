"""Runs the rest of a worker in a child process that cannot outlive its parent, nor leave children.

The worker's first process stays behind as a guardian: small, and doing nothing but to look five
times a second whether the parent and the child live. When either is gone it kills the child's
process group, the children of the child included, and ends as the child did. If the guardian itself
is killed, the kernel kills the child. The kernel's signal alone would not do: it comes when the
parent's thread that started the process ends, and it does not reach grandchildren.
"""

import ctypes
import os
import signal
import time
from typing import Final

LOOK_SECONDS: Final = 0.2

_PR_SET_PDEATHSIG: Final = 1


def continue_under_guard(parent_id: int, *, channel_fd: int) -> None:
    """Return in a child process; this process becomes its guardian and never returns.

    Args:
        parent_id: the process that must be alive.
        channel_fd: what the child talks over; the guardian closes it.
    """
    guardian_id = os.getpid()
    child_id = os.fork()
    if child_id == 0:
        os.setpgid(0, 0)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian_id:  # it died before the kernel was told
            os._exit(1)
        return
    os.close(channel_fd)
    signal.signal(signal.SIGTERM, lambda *_: _kill_group(child_id))
    waited, status = 0, 0
    while not waited and os.getppid() == parent_id:
        time.sleep(LOOK_SECONDS)
        # The child stays a zombie until its group is dead, so that its id can be no other's.
        if os.waitid(os.P_PID, child_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            _kill_group(child_id)
            waited, status = os.waitpid(child_id, 0)
    if not waited:
        _kill_group(child_id)
        _, status = os.waitpid(child_id, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _kill_group(child_id: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have its group yet
        try:
            kill(child_id, signal.SIGKILL)
        except ProcessLookupError:
            continue
