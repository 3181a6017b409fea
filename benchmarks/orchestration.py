"""What orchestration costs: a stage on each engine, a run in which all is cached, two hundred stages at once.

    python benchmarks/orchestration.py --part overhead
    python benchmarks/orchestration.py --part cached --home HOME
    python benchmarks/orchestration.py --part fanout --database-url postgresql+asyncpg://postgres@127.0.0.1:5499/postgres

Everything is real: the command in a process of its own, and the server and workers of `deploy/cluster.sh` in a
temporary home, whatever is configured on this machine. No GPU is used.

`overhead` runs a task of eight annotators of a tiny random model with `clozeline run --engine ENGINE`, each time with
an empty store, on one server, and compares the Parquet. A stage is due while its task run is Running on the server;
the lanes are two, so that at most two are due at once. What a lane spends on stages beyond the work itself is overhead:

    (sum over time of min(lanes, device task runs that are Running) - seconds of the device stages) / device stages

The time begins when the first stage computes; what comes before is the engine's start, and stands apart. The seconds
of the stages are those in the run.json of the engine local, whose processes are warm: an engine that runs each task in
a process of its own pays for imports and first calls again, and part of that is in the seconds of its own run.json.

`cached` runs the sample task again and again over a store that has all of it: that of HOME, where an earlier
`clozeline run data/tickets/task.yaml` was made with CLOZELINE_HOME=HOME, or one that is filled first, in minutes.

`fanout` submits 200 ingest stages, a row each, from one flow to the engine local. In Prefect's cluster the database is
SQLite, and then that of --database-url. The server is what is measured: the same stages without Prefect stand beside
it, and a flow with one task run that finds its work done, on the quiet server and right after the 200.
A PostgreSQL server for it, as any user but root, in an empty directory DIR:

    initdb -D DIR/data -U postgres -A trust
    pg_ctl -D DIR/data -l DIR/log -o "-p 5499 -k DIR -c listen_addresses=127.0.0.1" -w start
    pg_ctl -D DIR/data -m immediate stop    # afterwards
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from pipeline.plan import ON_DEVICE, Call, build_plan
from pipeline.store import Store
from pipeline.worker import LANES
from tests.server.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "tickets" / "task.yaml"
REPEATS = 5
FANOUT = 200
WORDS = ["It was", "All in all:", "Just", "In short:", "So", "Really", "A word:", "They were"]
Record = dict[str, Any]
Span = tuple[float, float]


@contextmanager
def cluster(home: Path, **environment: str) -> Iterator[Cluster]:
    """A server, a worker for runs and two for stages, for as long as the block lasts."""
    one = Cluster(home, **environment)
    try:
        one("up")
        yield one
    finally:
        one("down")


def clozeline_run(home: Path, task: Path, *options: str, api: str | None = None) -> tuple[float, Record]:
    """Run the command; gives its seconds, from its start to its end, and its summary."""
    environment = {**os.environ, "CLOZELINE_HOME": str(home)}
    if api is not None:
        environment["PREFECT_API_URL"] = api
    command = [sys.executable, "-m", "flows.cli", "run", str(task), "--json", *options]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return seconds, json.loads(done.stdout)


def ask(one: Cluster, path: str, body: Record | None = None) -> Any:
    """Ask the server, again where it is too busy (SQLite is locked), as Prefect's client does."""
    until = time.monotonic() + 60
    while True:
        try:
            return one.ask(path, body)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 503 or time.monotonic() > until:
                raise
            time.sleep(0.5)


def instant(text: str) -> float:
    """A time of the server's as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def stages_in(task_run: Record) -> int:
    """How many stages a task run stands for, by its name."""
    _, _, more = task_run["name"].partition(" and ")
    return 1 + int(more.split()[0]) if more else 1


def device_task_runs(one: Cluster, stages: int) -> list[Span]:
    """When the task runs of the latest run that run a model were Running.

    The server records task runs from events, some seconds late and in no order: all are there when they add up to
    the run's number of stages.
    """
    latest = {"flows": {"name": {"any_": ["label"]}}, "sort": "START_TIME_DESC", "limit": 1}
    [run] = ask(one, "/flow_runs/filter", latest)
    until = time.monotonic() + 60
    found: list[Record] = []
    while sum(stages_in(task_run) for task_run in found if task_run["end_time"]) < stages:
        if time.monotonic() > until:
            sys.exit("the server did not hear of the end of all task runs")
        time.sleep(0.5)
        found = ask(one, "/task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [run["id"]]}}})
    return [
        (instant(task_run["start_time"]), instant(task_run["end_time"]))
        for task_run in found
        if task_run["name"].split()[0] in ON_DEVICE
    ]


def lane_seconds(due: Sequence[Span], begun: float) -> float:
    """The time that lanes were taken by stages that were due, from a moment on."""
    moments = sorted({begun, *(moment for span in due for moment in span if moment > begun)})
    return sum(
        min(LANES, sum(first <= start and end <= last for first, last in due)) * (end - start)
        for start, end in itertools.pairwise(moments)
    )


def overhead(scratch: Path, engines: Sequence[str]) -> list[Record]:
    """The same small task on each engine."""
    from tests.conftest import write_tiny_model, write_tiny_task

    write_tiny_model(scratch / "model")
    changes = {
        "inputs": {"test": None},
        "annotators": [f"{{text}} {words} {{mask}}." for words in WORDS],
        "training": {"steps": 60, "folds": 0},
        "student": {"steps": 20},
    }
    task = write_tiny_task(scratch / "task", scratch / "model", changes)
    records, local = list[Record](), dict[str, Any]()
    with cluster(scratch / "cluster") as one:
        for engine in ("local", *engines):
            home = scratch / engine
            seconds, summary = clozeline_run(home, task, "--engine", engine, api=one.api)
            data = {file.name: file.read_bytes() for file in Path(summary["release"]).glob("data/*.parquet")}
            runs = [json.loads(file.read_text()) for file in (home / ".clozeline" / "store").glob("*/*/run.json")]
            computing = [(run["started"], run["started"] + run["seconds"]) for run in runs if "device" in run]
            due = device_task_runs(one, len(summary["executed"]))
            begun = min(start for start, _ in computing)
            worked = sum(end - start for start, end in computing)
            local = local or {"seconds": seconds, "worked": worked, "data": data}
            records.append(
                {
                    "engine": engine,
                    "seconds": seconds,
                    "of_local": seconds / local["seconds"],
                    "device_stages": len(computing),
                    "task_runs": len(due),
                    "computing": worked,
                    "start": begun - min(start for start, _ in due),
                    "overhead": (lane_seconds(due, begun) - local["worked"]) / len(computing),
                    "equal_parquet": data == local["data"],
                }
            )
            say(records[-1])
    return records


def cached(scratch: Path, home: Path | None) -> list[Record]:
    """The sample task again, from the command line and through its deployment."""
    first = None
    if home is None:
        home = scratch / "home"
        first, _ = clozeline_run(home, DEMO)
        say({"case": "first run", "seconds": first})
    home = home.absolute()

    releases = set[str]()

    def again(api: str | None = None) -> float:
        seconds, summary = clozeline_run(home, DEMO, api=api)
        releases.add(str(Path(summary["release"]).parent.parent))
        if summary["executed"] or summary["new"]:
            sys.exit(f"{home} does not hold a run of {DEMO} as it is now: {summary['executed']} had to be run")
        return seconds

    cases: dict[str, list[float]] = {"clozeline run, its own server": [again() for _ in range(REPEATS)]}
    with cluster(scratch / "cluster", CLOZELINE_STORE=str(home / ".clozeline" / "store")) as one:
        cases["clozeline run, a server that is there"] = [again(one.api) for _ in range(REPEATS)]
        deployment = ask(one, "/deployments/name/label/default")
        body = {"parameters": {"task": str(DEMO), "out": releases.pop()}}
        took, waited = [], []
        for _ in range(REPEATS):
            run = ask(one, f"/deployments/{deployment['id']}/create_flow_run", body)
            while not run["end_time"]:
                time.sleep(0.2)
                run = ask(one, f"/flow_runs/{run['id']}")
            if run["state_type"] != "COMPLETED":
                sys.exit(f"the run of label/default ended {run['state']}")
            took.append(instant(run["end_time"]) - instant(run["start_time"]))
            waited.append(instant(run["end_time"]) - instant(run["created"]))
        if ask(one, "/flow_runs/count", {"flows": {"name": {"any_": ["stage"]}}}):
            sys.exit("a run through the deployment sent stages to the pool: not all was cached")
        cases |= {"label/default on the pool, flow run": took, "label/default on the pool, created to end": waited}
    records = [
        {"case": case, "seconds": statistics.median(found), "least": min(found), "most": max(found)}
        for case, found in cases.items()
    ]
    return records if first is None else [{"case": "first run", "seconds": first}, *records]


def one_row_files(scratch: Path) -> list[Call]:
    """The stages that read `FANOUT` files of a row each, from a real plan."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.task import Task
    from tests.conftest import write_tiny_model, write_tiny_task

    write_tiny_model(scratch / "model")
    changes = {"inputs": {"unlabelled": ["pool-*.parquet"]}}
    task = Task.load(write_tiny_task(scratch / "task", scratch / "model", changes))
    for i in range(FANOUT):
        columns = {"key": [f"row-{i}"], "text": [f"the food was good and warm, {i} times."], "shop": ["north"]}
        pq.write_table(pa.table(columns), scratch / "task" / f"pool-{i:03d}.parquet")
    plan = build_plan(task, task.base())
    return [call for call in plan.find("ingest") if "label" not in call.spec]


def without_prefect(calls: Sequence[Call], store: Store) -> float:
    """Seconds of the same stages on the same engine, with no flow around them."""
    from pipeline.engines.local import LocalEngine

    engine = LocalEngine()

    def run(call: Call) -> None:
        engine.run(call.title, [{**call.request(store), "on_device": call.on_device}], lambda done, total: None)

    try:
        start = time.perf_counter()
        with ThreadPoolExecutor(LANES) as threads:
            list(threads.map(run, calls))
        return time.perf_counter() - start
    finally:
        engine.close()


def fan_out(calls: Sequence[Call], done: Store, empty: Store) -> Record:
    """Submit the stages at once; to be called in a process whose environment names the server.

    Args:
        calls: the stages.
        done: a store that has the first one.
        empty: a store that has none.
    """
    from prefect import flow
    from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings

    from flows import dispatch

    refused: list[int] = []

    class Refused(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and (status := record.args[3]) >= 500:
                refused.append(status)

    # Prefect's client tries again in silence; its own logger is set back with every flow.
    http = logging.getLogger("httpx")
    http.setLevel(logging.INFO)
    http.propagate = False
    http.addHandler(Refused())

    def stages(chosen: Sequence[Call], store: Store) -> tuple[float, int]:
        @flow(name="fan-out")
        def submit_all() -> int:
            run, dispatcher = uuid.uuid4().hex, dispatch.Dispatcher("local", store, "ad-hoc")
            cache = {PREFECT_RESULTS_LOCAL_STORAGE_PATH: store.root / "prefect"}
            with dispatch.registered(run, dispatcher), temporary_settings(cache):
                missing = {call.key for call in chosen}
                futures = [dispatch.submit([call], store, run, {}, missing) for call in chosen]
                for future in futures:
                    future.wait()
                return sum(not future.state.is_completed() for future in futures)

        start = time.perf_counter()
        failed = submit_all()
        return time.perf_counter() - start, failed

    stages(calls[:1], done)  # the first flow of a process pays for what it loads
    before = statistics.median(stages(calls[:1], done)[0] for _ in range(3))
    refused.clear()
    seconds, failed = stages(calls, empty)
    ended = time.time()
    after, _ = stages(calls[:1], done)
    return {
        "seconds": seconds,
        "task_runs_a_second": len(calls) / seconds,
        "failed": failed,
        "refused": len(refused),
        "one_before": before,
        "one_after": after,
        "ended": ended,
    }


def on_server(name: str, scratch: Path, calls: Sequence[Call], done: Store, **environment: str) -> Record:
    """The stages on a server with a certain database."""
    with cluster(scratch / name, PREFECT_API_LOG_RETRYABLE_ERRORS="true", **environment) as one:
        before = ask(one, "/task_runs/count", COMPLETED)
        os.environ["PREFECT_API_URL"] = one.api
        # A process for each server: Prefect keeps connections and queues for as long as a process lasts.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(fan_out, calls, done, Store(scratch / f"store-{name}")).result()
        recorded = found.pop("ended")
        until = time.monotonic() + 120
        while ask(one, "/task_runs/count", COMPLETED) - before < len(calls) + 5 and time.monotonic() < until:
            time.sleep(0.2)
        log = (one.state / "logs" / "server.log").read_text(errors="replace")
        return {
            "server": name,
            "task_runs": len(calls),
            **found,
            "completed": ask(one, "/task_runs/count", COMPLETED) - before - 5,
            "recorded_after": time.time() - recorded,
            "database_is_locked": log.count("database is locked"),
        }


COMPLETED = {"flows": {"name": {"any_": ["fan-out"]}}, "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}


def fanout(scratch: Path, database_url: str | None) -> list[Record]:
    """All stages at once, on each kind of database."""
    calls = one_row_files(scratch)
    done = Store(scratch / "store-done")
    records: list[Record] = [
        {"server": "no Prefect", "task_runs": len(calls), "seconds": (seconds := without_prefect(calls, done))}
    ]
    records[0]["task_runs_a_second"] = len(calls) / seconds
    say(records[0])
    records.append(on_server("SQLite", scratch, calls, done))
    say(records[-1])
    if database_url is not None:
        records.append(on_server("PostgreSQL", scratch, calls, done, CLOZELINE_DATABASE_URL=database_url))
        say(records[-1])
    return records


def say(record: Record) -> None:
    """Tell of a finished measurement at once."""
    print(record, file=sys.stderr, flush=True)


def table(records: Sequence[Record], headings: dict[str, str]) -> str:
    """Records as Markdown, a column for each heading."""
    lines = ["| " + " | ".join(headings.values()) + " |", "|---" * len(headings) + "|"]
    for record in records:
        cells = []
        for name in headings:
            value = record.get(name)
            if isinstance(value, bool):
                cells.append("yes" if value else "no")
            elif isinstance(value, float):
                cells.append(f"{value:.2f}")
            else:
                cells.append("" if value is None else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


HEADINGS = {
    "overhead": {
        "engine": "engine",
        "seconds": "run, s",
        "of_local": "of local",
        "device_stages": "stages with a model",
        "task_runs": "task runs",
        "computing": "seconds in run.json",
        "start": "engine's start, s",
        "overhead": "overhead a stage, s",
        "equal_parquet": "equal Parquet",
    },
    "cached": {"case": "case", "seconds": "median, s", "least": "least", "most": "most"},
    "fanout": {
        "server": "database",
        "task_runs": "task runs",
        "seconds": "all, s",
        "task_runs_a_second": "a second",
        "failed": "failed",
        "refused": "answers of 5xx",
        "database_is_locked": "database is locked",
        "recorded_after": "recorded after, s",
        "one_before": "one task before, s",
        "one_after": "one task after, s",
    },
}


def main() -> None:
    """Measure one part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(HEADINGS), required=True)
    parser.add_argument("--engines", default="pool,ray,dask", help="for overhead, beside local")
    parser.add_argument("--home", type=Path, help="for cached: CLOZELINE_HOME of an earlier run")
    parser.add_argument("--database-url", help="for fanout: a PostgreSQL database to measure beside SQLite")
    parser.add_argument("--json", action="store_true", help="print the records as JSON instead of a table")
    arguments = parser.parse_args()
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "CLOZELINE_")):
            del os.environ[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and workers end with a time-out, too
    # Short, since Ray keeps sockets below it whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="cloze-", ignore_cleanup_errors=True) as directory:
        scratch = Path(directory)
        os.environ |= {
            "CUDA_VISIBLE_DEVICES": "",
            "PREFECT_HOME": str(scratch / "prefect"),
            "RAY_TMPDIR": str(scratch / "ray"),
        }
        if arguments.part == "overhead":
            records = overhead(scratch, arguments.engines.split(","))
        elif arguments.part == "cached":
            records = cached(scratch, arguments.home)
        else:
            records = fanout(scratch, arguments.database_url)
    print(json.dumps(records, indent=1) if arguments.json else table(records, HEADINGS[arguments.part]))


if __name__ == "__main__":
    main()
