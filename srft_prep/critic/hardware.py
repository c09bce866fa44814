"""Which GPUs and packages are here, found out without importing torch.

The GPUs are those that the driver's own `nvidia-smi` lists and `CUDA_VISIBLE_DEVICES` leaves.
No driver, no GPU, or a driver that does not answer: no GPUs.
"""

import csv
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

PEAK_FLOPS: Final[dict[str, float]] = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.5e12,
    "A100": 311.9e12,
    "A40": 149.7e12,
    "A10": 125.0e12,
    "L40S": 362.0e12,
    "L40": 181.0e12,
    "L4": 121.0e12,
    "GeForce RTX 5090": 209.5e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 4080": 97.5e12,
    "GeForce RTX 3090": 71.2e12,
}
"""GPU -> floating-point operations a second in bf16, dense, as NVIDIA's data sheets have them (half
of what they print \"with sparsity\"). A name stands for a GPU whose own name, without the maker's,
begins with it and has no letter or digit after it; the longest such name counts. Consumer cards:
with 32-bit accumulation."""

_QUERY: Final = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU."""

    index: int
    """As the driver counts, in the order of the PCI bus."""
    name: str
    memory_bytes: int
    """All of it, used or not; 0 where the driver does not say."""
    peak_flops: float | None
    """Dense bf16 floating-point operations a second; None for a GPU that PEAK_FLOPS has not."""


def gpus(*, timeout_seconds: float = 20.0) -> tuple[Gpu, ...]:
    """Return the GPUs that a CUDA program started here would see, in its order.

    Args:
        timeout_seconds: how long the driver may take; the first question after a boot takes
            seconds.
    """
    try:
        answer = subprocess.run(
            ("nvidia-smi", *_QUERY),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_seconds,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    listed: list[tuple[str, Gpu]] = []
    for row in csv.reader(answer.stdout.splitlines(), skipinitialspace=True):
        if len(row) == 4 and row[0].isdecimal():
            index, uuid, name, mib = row
            memory_bytes = int(mib) * _MIB if mib.isdecimal() else 0
            gpu = Gpu(
                index=int(index),
                name=name,
                memory_bytes=memory_bytes,
                peak_flops=peak_flops(name),
            )
            listed.append((uuid, gpu))
    return _visible(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))


def peak_flops(name: str) -> float | None:
    """Return a GPU's dense bf16 floating-point operations a second; None for an unknown GPU."""
    model = re.sub(r"^(?:NVIDIA|Tesla|\s)+", "", name)
    found = [
        known
        for known in PEAK_FLOPS
        if re.match(rf"{re.escape(known)}(?![A-Za-z0-9])", model) and "MIG" not in model
    ]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def has_module(name: str) -> bool:
    """Return whether a top-level package is installed, without importing it."""
    return find_spec(name) is not None


def _visible(listed: Sequence[tuple[str, Gpu]], setting: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves.

    As CUDA does, it ends at the first entry that names no GPU or one named before. A slice of a GPU
    (`MIG-...`) has less memory than its GPU, and how much is not said, so it counts with 0.
    """
    if setting is None:
        return tuple(gpu for _, gpu in listed)
    visible: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("MIG-") and listed:
            visible.append(Gpu(index=len(visible), name=entry, memory_bytes=0, peak_flops=None))
            continue
        found = [
            gpu
            for uuid, gpu in listed
            if entry == str(gpu.index) or (entry.startswith("GPU-") and uuid.startswith(entry))
        ]
        if len(found) != 1 or found[0] in visible:
            break
        visible += found
    return tuple(visible)
