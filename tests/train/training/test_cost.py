"""What a machine can do, by its name, and what it has used, on every platform."""

import sys
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch

from prefixvlm.train.training import cost


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A800-SXM4-80GB", "A800"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A4500", None),
        ("NVIDIA A100X", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA A40-48Q", None),
        ("NVIDIA GB200", None),
        ("NVIDIA", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert cost.peak_rate(torch.device("cuda"), torch.bfloat16) == (cost.PEAK_RATES[known] if known else None)


@pytest.mark.parametrize(("platform", "expected"), [("linux", 7 * 1024), ("darwin", 7)])
def test_peak_memory_without_proc_is_in_the_platforms_unit(monkeypatch, platform, expected):
    monkeypatch.setattr(cost.Path, "is_file", lambda self: False)
    monkeypatch.setattr(sys, "platform", platform)
    resource = ModuleType("resource")
    resource.RUSAGE_SELF, resource.getrusage = 0, lambda who: SimpleNamespace(ru_maxrss=7)
    monkeypatch.setitem(sys.modules, "resource", resource)
    assert cost.peak_memory(torch.device("cpu")) == expected


def test_peak_memory_on_windows(monkeypatch):
    monkeypatch.setattr(cost.Path, "is_file", lambda self: False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=9))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert cost.peak_memory(torch.device("cpu")) == 9
