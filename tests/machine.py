"""The whole command in processes of its own, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil


class Machine:
    """An environment in which commands run: their home, their Prefect, and what they leave behind."""

    def __init__(self, root: Path, prefect_home: Path) -> None:
        self.root = root
        self.environment = {
            **os.environ,
            "CLOZELINE_HOME": str(root),
            "PREFECT_HOME": str(prefect_home),
            "CLOZELINE_TEST_MARK": str(root),
        }
        self.environment.pop("PREFECT_API_URL", None)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            text=True,
            start_new_session=True,
        )

    def clozeline(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def summary(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self.clozeline("run", *arguments, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def processes(self) -> list[str]:
        """What still runs with this environment."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            try:
                if process.environ().get("CLOZELINE_TEST_MARK") == str(self.root):
                    found.append(" ".join(process.info["cmdline"] or []))
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def wait_until_nothing_runs(self) -> None:
        until = time.monotonic() + 15
        while self.processes():
            assert time.monotonic() < until, self.processes()
            time.sleep(0.1)


def bytes_of(release: str) -> dict[str, bytes]:
    root = Path(release)
    files = [*root.glob("data/*"), *root.glob("model/*.safetensors")]
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(files)}
