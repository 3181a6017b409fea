"""Runs without a lasting server: killed twenty times, hanging, out of memory, on Ray and Dask, with a store on S3."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import Machine, bytes_of
from tests.test_worker import data_megabytes, lengthen

pytestmark = pytest.mark.server
MakeTask = Callable[..., Path]
# Each stage that Ray, Dask or S3 sees costs seconds: as few of them as show what is to be shown.
SMALL: dict[str, Any] = {"annotators": ["{text} It was {mask}."], "inputs": {"test": None}}


def workers(root: psutil.Process) -> list[psutil.Process]:
    """The stage processes below a process."""
    found = []
    for child in root.children(recursive=True):
        try:
            if "pipeline.worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for_fit(machine: Machine) -> Path:
    """Wait until a fit is being built; gives its directory."""
    until = time.monotonic() + 90
    while not (building := list((machine.root / ".clozeline" / "store" / "tmp").glob("fit-*"))):
        assert time.monotonic() < until
        time.sleep(0.02)
    return building[0]


def test_twenty_kills_at_random_moments_end_with_the_same_bytes(
    machine: Machine, tiny_task: MakeTask, tmp_path: Path, prefect_home: Path
) -> None:
    path = str(tiny_task(changes={"training": {"steps": 150}, "student": {"steps": 50}}))
    calm = machine.summary(path)
    draw = random.Random(20)
    kills, finished, other = 0, 0, Machine(tmp_path / "killed-0", prefect_home)
    while kills < 20:
        process = other.start("run", path, "--json")
        time.sleep(draw.uniform(1.0, 10.0))
        if process.poll() is not None:  # it got through: on with a fresh store
            process.communicate()
            assert process.returncode == 0
            assert bytes_of(str(latest(other))) == bytes_of(calm["release"])
            finished += 1
            other = Machine(tmp_path / f"killed-{finished}", prefect_home)
            continue
        # The whole command, or one of the processes that run its stages.
        victims = [process.pid, *(found.pid for found in workers(psutil.Process(process.pid)))]
        victim = draw.choice(victims)
        os.kill(victim, signal.SIGKILL)
        kills += 1
        if victim == process.pid:
            process.communicate()
            other.wait_until_nothing_runs()
        else:
            assert process.wait(240) == 0, process.communicate()
            process.communicate()
    final = other.summary(path)
    assert bytes_of(final["release"]) == bytes_of(calm["release"])
    assert Path(final["release"]).name == Path(calm["release"]).name
    other.wait_until_nothing_runs()
    assert not list((other.root / ".clozeline" / "store" / "tmp").iterdir())


def latest(machine: Machine) -> Path:
    release = machine.root / "releases" / "tiny"
    return release / "versions" / (release / "LATEST").read_text().strip()


def test_stage_that_hangs_is_killed_and_tried_again(
    machine: Machine, tiny_task: MakeTask, tmp_path: Path, prefect_home: Path
) -> None:
    path = str(tiny_task(changes={**SMALL, "training": {"steps": 60}}))
    calm = Machine(tmp_path / "calm", prefect_home).summary(path)
    machine.environment["CLOZELINE_STAGE_TIMEOUT"] = "8"
    process = machine.start("run", path, "--json")
    wait_for_fit(machine)
    stopped = workers(psutil.Process(process.pid))
    for worker in stopped:
        worker.suspend()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert bytes_of(json.loads(out)["release"]) == bytes_of(calm["release"])
    assert not any(worker.is_running() for worker in stopped)


def test_stage_out_of_memory_is_tried_again_in_half_batches(machine: Machine, tiny_task: MakeTask) -> None:
    # With dropout, since without it a row is read once a step however often it is drawn.
    big = {"steps": 1, "folds": 0, "batch_size": 1024, "max_length": 64, "dropout": 0.1}
    path = str(tiny_task(changes={"training": big}))
    lengthen(Path(path).parent / "labelled.parquet")
    free = machine.start("run", path, "--json", "--set", "training.batch_size=8")
    taken = 0
    until = time.monotonic() + 200
    while free.poll() is None:
        assert time.monotonic() < until
        for worker in workers(psutil.Process(free.pid)):
            taken = max(taken, data_megabytes(worker.pid))
        time.sleep(0.05)
    free.communicate()
    machine.environment["CLOZELINE_STAGE_MEMORY"] = str(taken + 40)
    summary = machine.summary(path)
    records = [json.loads(file.read_text()) for file in machine.root.glob(".clozeline/store/fit/*/run.json")]
    assert summary["new"]
    assert {record["batch_share"] for record in records} > {1.0}  # those with batches of 8, and halved ones


@pytest.mark.parametrize("engine", ["ray", "dask"])
def test_engine_gives_the_same_bytes_and_is_not_started_for_what_is_cached(
    engine: str, machine: Machine, tiny_task: MakeTask, tmp_path: Path, prefect_home: Path
) -> None:
    module = {"ray": "ray", "dask": "distributed"}[engine]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -e '.[{engine}]'")
    path = str(tiny_task(changes=SMALL))
    calm = Machine(tmp_path / "calm", prefect_home).summary(path)
    # Ray keeps its sockets below a path that must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
        machine.environment["RAY_TMPDIR"] = short
        found = machine.summary(path, "--engine", engine)
    assert "fit p0" in found["executed"]
    assert bytes_of(found["release"]) == bytes_of(calm["release"])
    machine.wait_until_nothing_runs()
    machine.environment[f"CLOZELINE_{engine.upper()}_ADDRESS"] = "127.0.0.1:1"  # nobody is there
    assert machine.summary(path, "--engine", engine)["executed"] == []


def test_damaged_artifact_rebuilds_that_stage_alone(machine: Machine, tiny_task: MakeTask) -> None:
    path = str(tiny_task(changes=SMALL))
    calm = machine.summary(path)
    before = bytes_of(calm["release"])
    store = machine.root / ".clozeline" / "store"
    [soft] = store.glob("blend/*/soft.parquet")
    content = bytearray(soft.read_bytes())
    content[len(content) // 2] ^= 1  # of the right size: only its hash tells
    soft.write_bytes(content)
    for gone in store.glob("distill/*"):
        subprocess.run(["rm", "-r", str(gone)], check=True)
    [data] = store.glob("release/*/version/data/train-*.parquet")
    data.write_bytes(data.read_bytes()[:-1] + b"X")
    again = machine.summary(path)
    assert sorted(again["executed"]) == ["blend", "distill", "release"]
    assert (again["new"], bytes_of(again["release"])) == (False, before)


def on_s3(name: str, url: str, tmp_path: Path) -> Machine:
    """A machine with a home, a Prefect and a cache of its own, whose store lies behind a URL."""
    (tmp_path / name / "prefect").mkdir(parents=True)
    machine = Machine(tmp_path / name, tmp_path / name / "prefect")
    machine.environment |= {"CLOZELINE_STORE": f"{url}/store", "CLOZELINE_CACHE": str(tmp_path / name / "cache")}
    return machine


def files_behind(url: str) -> dict[str, bytes]:
    """The data and the weights of the latest version of a release behind a URL."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    version = f"{root}/versions/{fs.cat(f'{root}/LATEST').decode().strip()}"
    wanted = [path for path in fs.find(version) if path.endswith((".parquet", ".safetensors"))]
    return {path.removeprefix(version + "/"): fs.cat(path) for path in wanted}


def test_two_machines_on_one_store_behind_a_url_build_each_stage_once(
    s3_url: str, machine: Machine, tiny_task: MakeTask, tmp_path: Path
) -> None:
    path = str(tiny_task(changes={**SMALL, "training": {"steps": 30}}))
    calm = machine.summary(path)
    machines = [on_s3(name, s3_url, tmp_path) for name in ("one", "two")]
    # Each with a release of its own: it is the stages that they share.
    running = [m.start("run", path, "--json", "--out", f"{s3_url}/release-{i}") for i, m in enumerate(machines)]
    ended = [process.communicate(timeout=280) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    executed = [title for out, _ in ended for title in json.loads(out)["executed"]]
    assert len(executed) == len(set(executed)) == len(calm["executed"])
    for i in range(2):
        assert files_behind(f"{s3_url}/release-{i}") == bytes_of(calm["release"])


def test_killed_with_a_store_behind_a_url_the_same_command_finishes_it(
    s3_url: str, machine: Machine, tiny_task: MakeTask, tmp_path: Path
) -> None:
    path = str(tiny_task(changes={**SMALL, "training": {"steps": 30}}))
    calm = machine.summary(path)
    draw, killed = random.Random(5), on_s3("killed", s3_url, tmp_path)
    for _ in range(4):
        process = killed.start("run", path, "--out", f"{s3_url}/release")
        time.sleep(draw.uniform(3, 12))
        process.kill()
        process.communicate()
        killed.wait_until_nothing_runs()
    fresh = on_s3("fresh", s3_url, tmp_path)  # another machine, which has nothing of it
    summary = fresh.summary(path, "--out", f"{s3_url}/release")
    assert files_behind(f"{s3_url}/release") == bytes_of(calm["release"])
    assert Path(summary["release"]).name == Path(calm["release"]).name


WITH_BLOCK = textwrap.dedent("""\
    import json, sys
    from flows.cli import _prefect_server

    task, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.stdin.read())
    with _prefect_server():
        from prefect.filesystems import RemoteFileSystem

        from flows.label import label

        RemoteFileSystem(basepath="s3://clozeline", settings=settings).save("labels", overwrite=True)
        summary = label(task=task, out=out, storage_block="remote-file-system/labels")
    print(summary["release"])
    """)


def test_credentials_come_from_a_block_and_are_in_no_parameter(
    s3_url: str, tiny_task: MakeTask, tmp_path: Path
) -> None:
    path, machine = str(tiny_task(changes=SMALL)), on_s3("block", s3_url, tmp_path)
    environment = {name: value for name, value in machine.environment.items() if not name.startswith("AWS_")}
    settings: dict[str, Any] = {
        "key": os.environ["AWS_ACCESS_KEY_ID"],
        "secret": "a-secret-of-the-block",
        "client_kwargs": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "region_name": "us-east-1"},
    }
    done = subprocess.run(
        [sys.executable, "-c", WITH_BLOCK, path, f"{s3_url}/release"],
        input=json.dumps(settings),
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(f"{s3_url}/release/versions/")
    assert "a-secret-of-the-block" not in done.stdout + done.stderr
    database = tmp_path / "block" / "prefect" / "prefect.db"
    assert database.is_file()
    assert b"a-secret-of-the-block" not in database.read_bytes()  # blocks are encrypted, parameters are not
