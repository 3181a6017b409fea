"""Where models run and in which numbers.

The numeric profile is part of every key whose bytes depend on it: the kind of device, the number format and
the minor version of torch. It is found without importing torch, so that a run in which everything is cached
never pays for that import.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.metadata import version
from pathlib import Path


@functools.cache
def cuda_devices() -> int:
    """How many CUDA devices the driver shows to this process."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AMX or AVX-512 BF16).

    On AVX-512 BF16 a forward pass measured 3.1 times as fast as in fp32 (docs/benchmarks.md); AMX is made for more.
    Without either bf16 is emulated.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def numeric_profile(dtype: str = "auto") -> dict[str, str]:
    """What the bytes of a model's output depend on besides its input.

    Args:
        dtype: ``auto``, ``float32`` or ``bfloat16``.
    """
    device = "cuda" if cuda_devices() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or cpu_multiplies_bf16() else "float32"
    return {"device": device, "dtype": dtype, "torch": ".".join(version("torch").split(".")[:2])}
