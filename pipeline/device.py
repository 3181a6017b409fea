"""Where models run and in which numbers.

The numeric profile is part of every key whose bytes depend on it: the kind of device, the number format and
the minor version of torch. It is found without importing torch, so that a run in which everything is cached
never pays for that import.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from pipeline.settings import Settings

# One directory for everybody on the machine: what it guards is the machine's, not a user's.
_LOCKS = Path("/tmp/clozeline-devices")
_COMPUTE_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of cuda.h


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


@functools.cache
def cuda_multiplies_bf16() -> bool:
    """Whether the first CUDA device multiplies bf16 in hardware; taken for granted where this machine has none.

    From compute capability 8 on (Ampere). Older ones take bf16 and emulate it, slower than fp32.
    """
    if not cuda_devices():
        return True
    driver = ctypes.CDLL("libcuda.so.1")
    device, major = ctypes.c_int(0), ctypes.c_int(0)
    asked = driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetAttribute(
        ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device
    )
    return asked == 0 and major.value >= 8


def numeric_profile(dtype: str = "auto") -> dict[str, str]:
    """What the bytes of a model's output depend on besides its input.

    Args:
        dtype: ``auto``, ``float32`` or ``bfloat16``.

    A run may be planned on a machine without a GPU for workers that have one: `Settings.stage_device` tells.
    """
    device = Settings().stage_device
    if device == "auto":
        device = "cuda" if cuda_devices() else "cpu"
    if dtype == "auto":
        in_hardware = cuda_multiplies_bf16() if device == "cuda" else cpu_multiplies_bf16()
        dtype = "bfloat16" if in_hardware else "float32"
    return {"device": device, "dtype": dtype, "torch": ".".join(version("torch").split(".")[:2])}


def visible_cuda_devices() -> list[str]:
    """The CUDA devices that this process sees, by the names under which a child can be given one."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(cuda_devices())])[: cuda_devices()]


def device_name() -> str | None:
    """What this process's device is called on this machine, or None where processes share the CPU."""
    if Settings().device is not None:
        return Settings().device
    return f"cuda-{_first_cuda_uuid() or visible_cuda_devices()[0]}" if cuda_devices() else None


@functools.cache
def _first_cuda_uuid() -> str | None:
    """The UUID of the first visible device: an index, or CUDA_VISIBLE_DEVICES, may name one device in several ways."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, uuid = ctypes.c_int(0), (ctypes.c_ubyte * 16)()
    found = driver.cuDeviceGet(ctypes.byref(device), 0) == 0 and driver.cuDeviceGetUuid(uuid, device) == 0
    return bytes(uuid).hex() if found else None


@contextmanager
def hold_device() -> Iterator[None]:
    """Hold this process's device, waiting for whatever process of this machine holds it; freed by its death."""
    name = device_name()
    if name is None:
        yield
        return
    _LOCKS.mkdir(exist_ok=True)
    if _LOCKS.stat().st_uid == os.getuid():
        _LOCKS.chmod(0o1777)
    path = _LOCKS / re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    if not path.exists():
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        os.fchmod(descriptor, 0o666)  # another user's process must be able to wait for it too
        os.close(descriptor)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
