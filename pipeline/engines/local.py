"""Stages in warm processes on this machine: one for each GPU, or `LANES` without one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.device import visible_cuda_devices
from pipeline.engines import Request, in_turn
from pipeline.errors import RunStopped
from pipeline.progress import Progress
from pipeline.settings import Settings
from pipeline.worker import LANES, StageProcess

_NO_DEVICE = ""  # as CUDA_VISIBLE_DEVICES: a stage without a model must not occupy a GPU's memory


class LocalEngine:
    """The processes of one run; started when first wanted, replaced when they died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._processes: set[StageProcess] = set()
        devices = visible_cuda_devices()
        self._lanes: queue.Queue[tuple[str | None, StageProcess | None]] = queue.Queue()
        for _ in range(LANES if Settings().device is None else 1):  # a named device is one, whatever it stands for
            self._lanes.put((_NO_DEVICE if devices else None, None))
        self._devices = self._lanes
        if devices:
            self._devices = queue.Queue()
            for device in devices:
                self._devices.put((device, None))

    def run(self, title: str, requests: Sequence[Request], progress: Progress) -> list[dict[str, Any]]:
        """See `pipeline.engines.Engine.run`."""
        on_device = any(request["on_device"] for request in requests)
        return in_turn(lambda request, part: self._run_one(request, part, on_device), requests, progress)

    def _run_one(self, request: Request, progress: Progress, on_device: bool) -> dict[str, Any]:
        with self._lease(self._devices if on_device else self._lanes) as process:
            return process.run(request, progress)

    @contextmanager
    def _lease(self, free: queue.Queue[tuple[str | None, StageProcess | None]]) -> Iterator[StageProcess]:
        device, process = free.get()
        try:
            with self._lock:
                if self._closed:
                    raise RunStopped("the run was stopped")
                if process is None or not process.alive:
                    if process is not None:
                        process.stop()
                        self._processes.discard(process)
                    process = StageProcess(device)
                    self._processes.add(process)
            yield process
        finally:
            free.put((device, process))

    def close(self) -> None:
        """Stop all processes, whatever they are doing."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.stop()
