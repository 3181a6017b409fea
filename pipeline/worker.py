"""A process that runs stages, and the handle by which another process holds it.

Stages run in a process of their own: its memory, or its device, is freed by its exit, running out of memory
costs one retry, and it can be stopped at any moment. It stays warm between stages, since importing torch and
transformers takes as long as most stages of a small task.

The protocol is one JSON object a line: requests on standard input, events on standard output. The process can't
outlive its parent: the kernel kills it when the other end of its life line closes, whatever it is doing.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pipeline.device import hold_device
from pipeline.errors import (
    ClozelineError,
    InputError,
    OutOfMemory,
    RunStopped,
    StageFailed,
    StageHung,
    StageLost,
    rebuilt,
)
from pipeline.progress import Progress
from pipeline.settings import Settings

_PROGRESS_SECONDS = 0.2
_ALIVE_SECONDS = 30.0
_LIFE_LINE = "CLOZELINE_LIFE_LINE"
CORES = len(os.sched_getaffinity(0))
# Without a GPU two stages run side by side, and a fit gets half of the cores: its batches are too small to keep
# two cores busy (measured on two cores, steps a second: one fit on two threads 4.6, two fits on one thread each
# 6.3). The number of threads is fixed for each stage, since it may change the last bits of a result.
LANES = min(CORES, 2)
# The least part of the usual batches that is tried after running out of memory.
SMALLEST_SHARE = 1 / 16
# What native libraries read from the environment when a process starts or torch is imported; the user's own win.
NATIVE_SETTINGS = {
    # Threads that spin while they wait starve whatever else runs on the machine, another worker above all:
    # two fits side by side on two cores took five times as long as with threads that sleep.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Each batch has a shape of its own, and oneDNN would keep what it made for the last thousand: some 300 MB.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    # With a threshold of its own choice glibc also chooses how much free room it keeps at the heap's end; with a
    # fixed one it gives that back: some 100 MB less in scoring, in the same time.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}
# How an allocation that failed shows where no Python exception could be raised any more.
_NO_MEMORY = (
    "bad_alloc",
    "can't start new thread",
    "Cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",  # cuBLAS and cuDNN
)
# All that oneDNN says when it gets no memory for its code or scratchpad; under a limit it is that.
_NO_PRIMITIVE = "could not create a primitive"


class StageProcess:
    """A warm process that runs one stage at a time.

    Args:
        device: the CUDA device that it may see (an index or a UUID); None leaves what this process sees.

    Raises:
        InputError: a setting in the environment is wrong.
    """

    def __init__(self, device: str | None = None) -> None:
        Settings()  # a wrong one is told here rather than by a process that can't start
        environment = {**NATIVE_SETTINGS, **os.environ}
        environment |= {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        self._stopped = False
        self._oom_kills = 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._life: int | None
        life_line, self._life = os.pipe()
        environment[_LIFE_LINE] = str(life_line)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                text=True,
                pass_fds=(life_line,),
                start_new_session=True,  # a terminal's Ctrl-C goes to the parent alone, which then stops this one
            )
        finally:
            os.close(life_line)
        self._events: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(line)
        self._events.put(None)

    def __enter__(self) -> StageProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def run(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Run a stage to its end.

        Args:
            request: what `pipeline.plan.Call.request` gives; ``batch_share`` (at most 1) shrinks its batches.
            progress: called with work done and work in all.

        Returns:
            ``seconds`` and ``built`` (false where the store had it already).

        Raises:
            InputError: the user's data is at fault.
            StageFailed: the stage failed.
            OutOfMemory: it wanted more memory than there is.
            StageHung: it made no progress for `Settings.stage_timeout` seconds.
            StageLost: the process went away.
        """
        try:
            return self._talk(request, progress)
        except (InputError, StageFailed):
            raise
        except BaseException:
            # Whatever came between, the rest of this stage's events must not be read as the next one's; and what
            # ran out of memory still holds it.
            self._process.kill()
            self._process.wait()
            raise

    def _talk(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._oom_kills = _oom_kills()
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        # While it waits for another run's stage or for a device, fetches its inputs, or hashes and uploads what it
        # made, a sign of life is enough; while it works, progress is.
        patience, working = Settings().stage_timeout, False
        deadline = time.monotonic() + patience
        while True:
            try:
                line = self._events.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise StageHung(
                    f"{request['title']} made no progress for {patience:.0f} s and was stopped; "
                    "CLOZELINE_STAGE_TIMEOUT sets how long that may take"
                ) from None
            if line is None:
                raise self._lost(request)
            event = json.loads(line)
            if event["event"] != "alive" or not working:
                deadline = time.monotonic() + patience
            if event["event"] == "alive":
                continue
            if event["event"] == "building":
                working = True
                progress(0, 1)
            elif event["event"] == "built":
                working = False
            elif event["event"] == "progress":
                progress(event["done"], event["total"])
            elif event["event"] == "done":
                return dict(event["result"])
            elif event["event"] == "input-error":
                raise InputError(event["problem"], where=event["where"], fix=event["fix"])
            else:
                raise rebuilt(event["kind"], f"{request['title']} failed: {event['message']}")

    def _lost(self, request: Mapping[str, Any]) -> ClozelineError:
        code = self._process.wait()
        if self._stopped:
            return RunStopped(f"the run was stopped during {request['title']}")
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace")[-2000:]
        for_memory = code == -signal.SIGKILL and _oom_kills() > self._oom_kills
        kind = OutOfMemory if for_memory or any(sign in tail for sign in _NO_MEMORY) else StageLost
        return kind(f"the process that ran {request['title']} went away (exit status {code})\n{tail}".rstrip())

    def stop(self) -> None:
        """End it at once."""
        self._stopped = True
        self._process.kill()
        self._process.wait()
        if self._life is not None:
            os.close(self._life)
            self._life = None


def _oom_kills() -> int:
    """How many processes the kernel has killed for their memory, in this container or on this machine."""
    for file in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError):
            counts = dict(line.split() for line in Path(file).read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent's end of the life line closes, however that happens.

    A thread that watches a pipe would do for most deaths, but not while some library holds the interpreter's
    lock, nor for a process that is stopped.
    """
    line = os.environ.pop(_LIFE_LINE, None)
    if line is None:
        return
    descriptor = int(line)
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, getattr(fcntl, "F_SETSIG", 10), signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError):
        if os.read(descriptor, 1) == b"":  # it closed before the kernel was asked to watch it
            os._exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):  # Arrow's and NumPy's are of this kind
        return True
    # torch raises its own OutOfMemoryError for a GPU and a bare RuntimeError for the CPU.
    signs = _NO_MEMORY if Settings().stage_memory is None else (*_NO_MEMORY, _NO_PRIMITIVE)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _serve() -> None:
    """Run the stages that standard input asks for."""
    _die_with_parent()
    # Whatever a library prints goes to standard error: standard output carries events alone.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    memory = Settings().stage_memory
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory * 2**20, memory * 2**20))

    turn = threading.Lock()

    def say(**event: Any) -> None:
        with turn:
            events.write(json.dumps(event) + "\n")

    def live() -> None:
        while True:
            say(event="alive")
            time.sleep(min(Settings().stage_timeout / 4, _ALIVE_SECONDS))

    threading.Thread(target=live, daemon=True).start()

    for line in sys.stdin:
        request = json.loads(line)
        said = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said > _PROGRESS_SECONDS or done >= total:
                said = now
                say(event="progress", done=done, total=total)

        @contextmanager
        def building(request: Mapping[str, Any] = request) -> Iterator[None]:
            on_device = request.get("on_device")
            with hold_device() if on_device else nullcontext():
                say(event="building")
                try:
                    yield
                finally:
                    say(event="built")
                    if on_device and torch.cuda.is_available():  # the device is another process's turn next
                        gc.collect()  # models hold reference cycles
                        torch.cuda.empty_cache()

        try:
            import torch
            import transformers

            from pipeline import batching
            from pipeline.stages import run_stage

            torch.set_num_threads(max(CORES // LANES, 1) if request["stage"] == "fit" else CORES)
            transformers.logging.disable_progress_bar()
            transformers.logging.set_verbosity_error()
            batching.set_batch_share(request.get("batch_share", 1.0))
            artifact, built = run_stage(request, progress, building)
            say(event="done", result={"seconds": artifact.seconds, "built": built})
        except InputError as error:
            say(event="input-error", problem=error.problem, where=error.where, fix=error.fix)
        except Exception as error:
            if _is_out_of_memory(error):
                kind = OutOfMemory.__name__
            elif isinstance(error, ClozelineError):
                kind = type(error).__name__
            else:
                kind = StageFailed.__name__
            message = f"{type(error).__name__}: {error}"
            say(event="error", kind=kind, message=f"{message}\n{traceback.format_exc()}")


if __name__ == "__main__":
    _serve()
