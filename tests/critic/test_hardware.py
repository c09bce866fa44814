import os
import sys

import pytest

from srft_prep.critic.hardware import PEAK_FLOPS, Gpu, gpus, has_module, peak_flops

H200 = "NVIDIA H200, 143771"
A100 = "NVIDIA A100-SXM4-80GB, 81920"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put a program called nvidia-smi on the path, which prints what it is given."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(*lines, script=None):
        program = tmp_path / "nvidia-smi"
        answer = "\n".join(lines)
        program.write_text(script or f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture
def four(driver):
    driver(*(f"{index}, GPU-{letter * 8}-0, {H200}" for index, letter in enumerate("abcd")))


def seen(monkeypatch, setting):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    return [gpu.index for gpu in gpus()]


def test_the_drivers_list_is_read(driver):
    driver(f"0, GPU-aaaa, {H200}", f"1, GPU-bbbb, {A100}")
    assert gpus() == (
        Gpu(index=0, name="NVIDIA H200", memory_bytes=143771 << 20, peak_flops=989.4e12),
        Gpu(index=1, name="NVIDIA A100-SXM4-80GB", memory_bytes=81920 << 20, peak_flops=311.9e12),
    )


def test_memory_that_the_driver_does_not_say_is_0_and_an_unknown_gpu_has_no_peak(driver):
    driver("0, GPU-aaaa, NVIDIA GB10, [N/A]")
    assert gpus() == (Gpu(index=0, name="NVIDIA GB10", memory_bytes=0, peak_flops=None),)


def test_a_machine_without_a_driver_has_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == ()


def test_a_driver_that_fails_means_no_gpus(driver):
    driver(script=f"#!/bin/sh\necho '0, GPU-aaaa, {H200}'\nexit 9\n")
    assert gpus() == ()


def test_a_driver_that_hangs_is_not_waited_for(driver):
    driver(script="#!/bin/sh\nexec sleep 600\n")
    assert gpus(timeout_seconds=0.5) == ()


def test_what_a_driver_says_beside_its_table_is_no_gpu(driver):
    driver("No devices were found", "", "warning: infoROM is corrupted")
    assert gpus() == ()


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        ("0,1,2,3", [0, 1, 2, 3]),
        ("2", [2]),
        (" 3 , 1 ", [3, 1]),
        ("", []),
        ("-1", []),
        ("1,-1,2", [1]),
        ("0,9,1", [0]),
        ("NoDevFiles", []),
        ("GPU-cccc", [2]),
        ("GPU-cccccccc-0,GPU-aaaa", [2, 0]),
        ("GPU-", []),
        ("1,1", [1]),
    ],
)
def test_cuda_visible_devices_is_honoured_as_cuda_does(four, monkeypatch, setting, indices):
    assert seen(monkeypatch, setting) == indices


def test_a_slice_of_a_gpu_is_seen_but_its_memory_is_not_its_gpus(four, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    (gpu,) = gpus()
    assert (gpu.name, gpu.memory_bytes, gpu.peak_flops) == ("MIG-1234", 0, None)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_own_name(name, known):
    assert peak_flops(name) == PEAK_FLOPS[known]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A10G", "NVIDIA H20", "NVIDIA H100", "Tesla T4", "NVIDIA L400",
     "NVIDIA H200 MIG 1g", ""],
)  # fmt: skip
def test_a_gpu_with_a_name_alike_has_no_peak(name):
    assert peak_flops(name) is None


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "a_heavy_package.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert has_module("a_heavy_package")
    assert "a_heavy_package" not in sys.modules
    assert not has_module("a_package_that_nobody_has")
