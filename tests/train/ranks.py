"""Runs a function in several real processes of a gloo group, as torchrun would start them."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

PRELOAD = ["torch", "transformers.models.qwen2.modeling_qwen2", "srft_prep.train.parallel"]
"""Imported once by the server that processes are forked from: a rank starts in a moment."""
TIMEOUT_SECONDS = 300


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(*args)` returned on each of `size` ranks.

    `started()` within the function joins them. A rank that raises fails the caller with its
    traceback; ranks that hang are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, processes = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=_main, args=(rank, size, port, there, function, args), daemon=True
        )
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    try:
        results = [_receive(end, rank) for rank, end in enumerate(ends)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return results


def _receive(end: Connection, rank: int) -> Any:
    assert end.poll(TIMEOUT_SECONDS), f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s"
    try:
        failure, value = pickle.loads(end.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died without an answer") from None
    assert failure is None, f"rank {rank} failed:\n{failure}"
    return value


def _main(
    rank: int, size: int, port: int, end: Connection, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",  # ranks of gloo compute on CPUs, whatever is here
    )
    torch.set_num_threads(1)
    try:
        answer = None, function(*args)
    except BaseException:  # noqa: BLE001  # the caller fails with it
        answer = traceback.format_exc(), None
    end.send_bytes(pickle.dumps(answer))  # by value: torch would send handles of this process
