"""A temporary Prefect API server that ends with its parent.

Prefect starts one by itself where no server is configured, but that one outlives a parent that is killed, for
ever. This one watches its standard input, which closes when its parent ends, however that happens.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline.leases import locked

_START_SECONDS = 90


@contextmanager
def temporary_server() -> Iterator[str]:
    """Run a server on the loopback interface; gives its API address."""
    from prefect.settings import get_current_settings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Its shutdown prints harmless tracebacks (PrefectHQ/prefect#18934).
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        # Schedules and late runs are the business of a lasting server.
        "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    }
    address = f"http://127.0.0.1:{port}/api"
    with ExitStack() as stack:
        # One after the other: servers that make or migrate one database at the same time end at their start.
        with locked(get_current_settings().home / "clozeline-server.lock"):
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.server", str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            stack.callback(_end, process)
            _wait_for(process, address)
        yield address


def _wait_for(process: subprocess.Popen[bytes], address: str) -> None:
    import httpx

    for _ in range(_START_SECONDS * 10):
        if process.poll() is not None:
            raise RuntimeError(f"the temporary Prefect server ended at its start (status {process.returncode})")
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise RuntimeError("the temporary Prefect server did not answer")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(port: int) -> None:
    import uvicorn

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="critical",
        lifespan="on",
    )


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
