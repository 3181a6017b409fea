"""A lasting Prefect server on the loopback interface, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def prefect_server(home: Path, **variables: str) -> Iterator[dict[str, str]]:
    """Run a server with these environment variables; gives the environment of a client that knows them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        **variables,
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"{environment['PREFECT_API_URL']}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < until
            time.sleep(0.2)
        yield environment
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
