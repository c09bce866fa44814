"""A worker for tests of the pool: doubles numbers, and dies of those that it is told to.

    python toy_worker.py SOCKET_FD PARENT_PID

Greeting: {"window": N, "poison": [...], "seconds": S, "refuse": TEXT, "grandchild": bool}.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time

from srft_prep.critic.engine.frames import Channel, frame_of
from srft_prep.critic.engine.guardian import continue_under_guard


def main() -> None:
    channel_fd, parent_id = int(sys.argv[1]), int(sys.argv[2])
    continue_under_guard(parent_id, channel_fd=channel_fd)
    channel = Channel(socket.socket(fileno=channel_fd))
    select.select([channel], [], [])
    greeting, *_ = channel.receive()
    os.write(1, b"the toy worker's own words\n")
    if "refuse" in greeting:
        os.write(2, f"before the end: {greeting['refuse']}\n".encode())
        channel.send(
            frame_of({"ends": greeting["refuse"], "config": greeting.get("config", False)})
        )
        sys.exit(1)
    if greeting.get("grandchild"):
        subprocess.Popen(["sleep", "600"])
    channel.send(frame_of({"ready": [greeting.get("window", 8), 1 << 30]}))
    guardian = os.getppid()
    waiting: list[dict[str, int]] = []
    while channel.is_open:
        select.select([channel], [], [], 0 if waiting else None)
        for message in channel.receive():
            waiting = [] if "abort" in message else [*waiting, message]
        if any(message["number"] in greeting.get("poison", []) for message in waiting):
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(greeting.get("seconds", 0.0))
        for message in waiting[-1:]:  # last come, first served
            waiting.pop()
            answer = {"double": 2 * message["number"], "guardian": guardian}
            channel.send(frame_of({"id": message["id"], **answer}))


if __name__ == "__main__":
    main()
