"""deploy/cluster.sh as the tests of this folder use it: a server, pools and workers in a directory and on a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "deploy" / "cluster.sh"


class Cluster:
    """The script in a directory and on a port of its own."""

    def __init__(self, home: Path, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "CLOZELINE_"))}
        self.environment = {
            **kept,
            "CLOZELINE_HOME": str(home),
            "CLOZELINE_PORT": str(self.port),
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        self.state = home / ".clozeline" / "cluster"
        self.api = f"http://127.0.0.1:{self.port}/api"

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run the script; gives what it says."""
        done = subprocess.run(
            [SCRIPT, *arguments], env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def pids(self) -> dict[str, int]:
        """The process of each member."""
        return {file.stem: int(file.read_text().split()[0]) for file in self.state.glob("*.pid")}

    def prefect(self, *arguments: str) -> str:
        """The command line of Prefect as a user has it: nothing but the address (and the password)."""
        environment = {**self.environment, "PREFECT_API_URL": self.api, "PREFECT_HOME": str(self.state / "client")}
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, body: Any = None) -> Any:
        """Read from the server: GET, or POST with a body; with a CSRF token."""
        until = time.monotonic() + 120
        with httpx.Client(base_url=self.api, timeout=30) as client:
            while True:
                # A busy server is slow to answer, or its SQLite is locked; Prefect's own client asks again, too.
                try:
                    answer = self._answer(client, path, body)
                    if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > until:
                        break
                except httpx.TransportError:
                    if time.monotonic() > until:
                        raise
                time.sleep(0.5)
        answer.raise_for_status()
        return answer.json()

    def _answer(self, client: httpx.Client, path: str, body: Any) -> httpx.Response:
        if body is None:
            return client.get(path)
        token = client.get("/csrf-token", params={"client": "test"}).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
        return client.post(path, json=body, headers=headers)

    def queues(self, pool: str) -> dict[str, int]:
        """The priorities of a pool's queues."""
        return {queue["name"]: queue["priority"] for queue in self.ask(f"/work_pools/{pool}/queues/filter", {})}

    def content(self) -> dict[str, Any]:
        """What the server holds."""
        pools = self.ask("/work_pools/filter", {})
        return {
            "pools": {pool["name"]: (pool["id"], pool["type"], pool["concurrency_limit"]) for pool in pools},
            "queues": {
                pool["name"]: {
                    queue["name"]: queue["priority"]
                    for queue in self.ask(f"/work_pools/{pool['name']}/queues/filter", {})
                }
                for pool in pools
            },
            "deployments": {found["id"]: found["name"] for found in self.ask("/deployments/filter", {})},
            "automations": sorted((found["name"], found["enabled"]) for found in self.ask("/automations/filter", {})),
        }


def marked(home: Path) -> list[int]:
    """The processes that the cluster started, and what these started."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get("CLOZELINE_CLUSTER_MEMBER", "")
            if process.status() != psutil.STATUS_ZOMBIE and mark.startswith(str(home)):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)
