"""Stages on Dask workers: one at a time on each GPU where workers offer the resource GPU, else one a worker."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pipeline.engines import Request
from pipeline.engines.remote import imported, results_of, run_here
from pipeline.errors import RunStopped, StageLost
from pipeline.progress import Progress
from pipeline.settings import Settings
from pipeline.worker import LANES, StageProcess


def _run(requests: Sequence[Request], topic: str, stop: str) -> dict[str, Any]:
    from distributed import Event, get_client, get_worker

    worker, client = get_worker(), get_client()
    over = threading.Event()

    def watch(process: StageProcess) -> None:
        # A task that has begun can't be cancelled from outside: it asks whether it should go on.
        asked = Event(stop, client=client)
        while not over.is_set():
            if asked.wait(timeout=1):
                process.stop()
                return

    def began(process: StageProcess) -> None:
        threading.Thread(target=watch, args=(process,), daemon=True).start()

    try:
        return run_here(requests, lambda done, total: worker.log_event(topic, [done, total]), began)
    finally:
        over.set()


class DaskEngine:
    """Connects to `Settings.dask_address`, or starts workers on this machine; either when a stage first needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: Any = None
        self._cluster: Any = None
        self._waiting: set[queue.SimpleQueue[Any]] = set()
        self._stop = f"clozeline-stop-{uuid.uuid4().hex}"
        self._closed = False

    def _start(self) -> Any:
        with self._lock:
            if self._closed:
                raise RunStopped("the run was stopped")
            if self._client is None:
                distributed = imported("distributed", "dask")
                address = Settings().dask_address
                if address is None:
                    self._cluster = distributed.LocalCluster(
                        n_workers=LANES, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
                    )
                self._client = distributed.Client(address or self._cluster, set_as_default=False)
                workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
                self._resources = {"GPU": 1} if any("GPU" in found["resources"] for found in workers) else None
            return self._client

    def run(self, title: str, requests: Sequence[Request], progress: Progress) -> list[dict[str, Any]]:
        """See `pipeline.engines.Engine.run`."""
        client = self._start()
        from distributed import CancelledError, KilledWorker

        topic = f"clozeline-{uuid.uuid4().hex}"
        # Events come on the client's event loop, which must not wait for whoever watches the progress.
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client.subscribe_topic(topic, lambda event: events.put(event[1]))
        try:
            future = client.submit(
                _run,
                list(requests),
                topic,
                self._stop,
                key=f"{title}-{topic}",
                resources=self._resources,
                retries=0,
                pure=False,
            )
            future.add_done_callback(lambda _: events.put(None))
            self._waiting.add(events)
            while (event := events.get()) is not None:
                progress(*event)
            if self._closed:
                raise RunStopped(f"the run was stopped during {title}")
            return results_of(future.result())
        except (CancelledError, KilledWorker, OSError) as error:
            if self._closed:
                raise RunStopped(f"the run was stopped during {title}") from None
            raise StageLost(f"Dask lost {title}: {error}") from error
        finally:
            self._waiting.discard(events)
            if not self._closed:
                client.unsubscribe_topic(topic)

    def close(self) -> None:
        """Stop what runs; workers that were started here end."""
        with self._lock:
            self._closed = True
        with suppress(Exception):  # the scheduler may be what is gone
            if self._client is not None:
                from distributed import Event

                Event(self._stop, client=self._client).set()
                self._client.close()
        for events in list(self._waiting):
            events.put(None)
        if self._cluster is not None:
            self._cluster.close()
