"""Stages as Ray tasks: one GPU each where the cluster has some, else a share of the cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from pipeline.engines import Request
from pipeline.engines.remote import imported, results_of, run_here
from pipeline.errors import RunStopped, StageFailed, StageLost
from pipeline.progress import Progress
from pipeline.settings import Settings
from pipeline.worker import CORES, LANES


def _run(requests: Sequence[Request]) -> Iterator[Any]:
    """A streaming task: yields progress as pairs and the outcome last."""
    import queue

    events: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        events.put(run_here(requests, lambda done, total: events.put((done, total))))

    threading.Thread(target=work, daemon=True).start()
    while True:
        event = events.get()
        yield event
        if isinstance(event, dict):
            return


class RayEngine:
    """Connects to `Settings.ray_address`, or starts Ray on this machine; either when a stage first needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._task: Any = None
        self._running: set[Any] = set()
        self._closed = False

    def _start(self) -> Any:
        with self._lock:
            if self._closed:
                raise RunStopped("the run was stopped")
            if self._task is None:
                # A call that comes after the end must fail, not start another cluster by itself.
                os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
                ray = imported("ray", "ray")
                address = Settings().ray_address
                ray.init(
                    address=address or "local",
                    namespace="clozeline",
                    log_to_driver=False,
                    configure_logging=False,
                    include_dashboard=False if address is None else None,
                    num_cpus=CORES if address is None else None,
                )
                on_gpu = ray.cluster_resources().get("GPU", 0) > 0
                # A fresh process each time on a GPU, so that its memory is free again whatever happened.
                options = {"num_gpus": 1, "max_calls": 1} if on_gpu else {"num_cpus": max(CORES // LANES, 1)}
                self._task = ray.remote(num_returns="streaming", max_retries=0, **options)(_run)
            return self._task

    def run(self, title: str, requests: Sequence[Request], progress: Progress) -> list[dict[str, Any]]:
        """See `pipeline.engines.Engine.run`."""
        task = self._start()
        import ray

        events = task.options(name=title).remote(list(requests))
        self._running.add(events)
        try:
            for reference in events:
                event = ray.get(reference)
                if isinstance(event, dict):
                    return results_of(event)
                progress(*event)
        except ray.exceptions.RayTaskError as error:  # the task could not even begin there
            raise StageFailed(f"{title} failed on Ray: {error}") from error
        except ray.exceptions.RayError as error:
            if self._closed:
                raise RunStopped(f"the run was stopped during {title}") from None
            raise StageLost(f"Ray lost {title}: {error}") from error
        finally:
            self._running.discard(events)
        raise StageLost(f"Ray ended {title} without a result")

    def close(self) -> None:
        """Cancel what runs; a cluster that was started here ends."""
        with self._lock:
            self._closed = True
            if self._task is None:
                return
        import ray

        with suppress(Exception):  # the cluster may be what is gone
            for events in list(self._running):
                ray.cancel(events, force=True)
        ray.shutdown()
