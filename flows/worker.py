"""What a flow run owes the worker process that started it."""

from __future__ import annotations

import os
import signal
import threading
import time

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 20.0


def end_with_worker() -> None:
    """End this flow run when its worker dies.

    Prefect leaves the processes of a killed worker running, where no one would cancel them, while a restarted
    worker hands out the same device again. The signal lets Prefect record the run as crashed, so that whoever
    waits for it knows at once.
    """
    if "PREFECT__FLOW_RUN_ID" not in os.environ or os.getppid() == 1:  # not started by a worker beside it
        return
    worker = os.getppid()

    def watch() -> None:
        while os.getppid() == worker:
            time.sleep(_LOOK_SECONDS)
        # What reads this process's output is gone too: the next line of log would end it before it has reported.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
