"""A process that runs stages, and the handle by which another process holds it.

Stages run in a process of their own: its memory, or its device, is freed by its exit, an out-of-memory kill
costs one retry, and it can be stopped at any moment. It stays warm between stages, since importing torch and
transformers takes as long as most stages of a small task.

The protocol is one JSON object a line: requests on standard input, events on standard output. The process ends
with its standard input, hence with its parent, however that one ends.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.errors import ClozelineError, InputError, StageFailed, StageLost

Progress = Callable[[int, int], None]
_PROGRESS_SECONDS = 0.2
CORES = len(os.sched_getaffinity(0))
# Without a GPU two stages run side by side, and a fit gets half of the cores: its batches are too small to keep
# two cores busy (measured on two cores, steps a second: one fit on two threads 4.6, two fits on one thread each
# 6.3). The number of threads is fixed for each stage, since it may change the last bits of a result.
LANES = min(CORES, 2)


class StageProcess:
    """A warm process that runs one stage at a time.

    Args:
        device: which CUDA device it may see; None without a GPU.
    """

    def __init__(self, device: int | None = None) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        # Threads that spin while they wait starve whatever else runs on the machine, another worker above all:
        # two fits side by side on two cores took five times as long as with threads that sleep.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        self._stopped = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C goes to the parent alone, which then stops this one
        )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def run(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Run a stage to its end.

        Returns:
            ``path``, ``meta``, ``seconds`` and ``built`` (false where the store had it already).

        Raises:
            InputError: the user's data is at fault.
            StageFailed: the stage failed.
            StageLost: the process went away.
        """
        try:
            return self._talk(request, progress)
        except (InputError, StageFailed):
            raise
        except BaseException:
            # Whatever came between, the rest of this stage's events must not be read as the next one's.
            self._process.kill()
            raise

    def _talk(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        for line in stdout:
            event = json.loads(line)
            if event["event"] == "progress":
                progress(event["done"], event["total"])
            elif event["event"] == "done":
                return dict(event["result"])
            elif event["event"] == "input-error":
                raise InputError(event["problem"], where=event["where"], fix=event["fix"])
            else:
                raise StageFailed(f"{request['title']} failed: {event['message']}\n{event['trace']}")
        code = self._process.wait()
        if self._stopped:
            raise ClozelineError(f"the run was stopped during {request['title']}")
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace")[-2000:]
        raise StageLost(f"the process that ran {request['title']} went away (exit status {code})\n{tail}".rstrip())

    def stop(self) -> None:
        """End it at once."""
        self._stopped = True
        self._process.kill()
        self._process.wait()


class StageProcesses:
    """The processes of one run: one for each device, or `LANES` without a GPU.

    Args:
        devices: how many CUDA devices there are.
    """

    def __init__(self, devices: int = 0) -> None:
        self._free: queue.Queue[tuple[int | None, StageProcess | None]] = queue.Queue()
        self._all: set[StageProcess] = set()
        self._lock = threading.Lock()
        self.closed = False
        for device in range(devices) if devices else [None] * LANES:
            self._free.put((device, None))

    @contextmanager
    def lease(self) -> Iterator[StageProcess]:
        """Hold a process; started when first wanted, replaced when it died."""
        device, process = self._free.get()
        try:
            with self._lock:
                if self.closed:
                    raise ClozelineError("the run was stopped")
                if process is None or not process.alive:
                    process = StageProcess(device)
                    self._all.add(process)
            yield process
        finally:
            self._free.put((device, process))

    def close(self) -> None:
        """Stop all of them, whatever they are doing."""
        with self._lock:
            self.closed = True
            for process in self._all:
                process.stop()


def _serve() -> None:
    """Run the stages that standard input asks for."""
    requests: queue.Queue[str] = queue.Queue()
    # Whatever a library prints goes to standard error: standard output carries events alone.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # the parent is gone, or has no more work; a half-built artifact stays under its temporary name

    threading.Thread(target=listen, daemon=True).start()

    def say(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    while True:
        request = json.loads(requests.get())
        said = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said > _PROGRESS_SECONDS or done >= total:
                said = now
                say(event="progress", done=done, total=total)

        try:
            import torch
            import transformers

            from pipeline.stages import run_stage

            torch.set_num_threads(max(CORES // LANES, 1) if request["stage"] == "fit" else CORES)
            transformers.logging.disable_progress_bar()
            transformers.logging.set_verbosity_error()
            artifact, built = run_stage(request, progress)
            result = {
                "path": str(artifact.path),
                "meta": artifact.meta,
                "seconds": artifact.seconds,
                "built": built,
            }
            say(event="done", result=result)
        except InputError as error:
            say(event="input-error", problem=error.problem, where=error.where, fix=error.fix)
        except Exception as error:
            say(event="error", message=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


if __name__ == "__main__":
    _serve()
