"""Runs that the server takes for alive although their process is gone."""

from __future__ import annotations

import socket
from pathlib import Path

from prefect.client.schemas.objects import FlowRun


def is_gone(run: FlowRun) -> bool:
    """Whether a run's process was on this machine, and is no more.

    A worker notes the process of each run that it starts. Where machine and process died at once, or the worker did
    before the run had begun, nobody tells the server, and the run counts against its pool's limit.
    """
    host, _, pid = (run.infrastructure_pid or "").rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:  # somebody else's, so one that lives
        return False
    return f"PREFECT__FLOW_RUN_ID={run.id}".encode() not in environment.split(b"\0")
