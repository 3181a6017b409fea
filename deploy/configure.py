"""Give a Prefect server what Clozeline needs: work pools, queues, deployments and the heartbeat automation.

It also tells the server which of this machine's runs have lost their processes.

Run it again whenever you like: switches that people turned and schedules that they added stay as they are::

    PREFECT_API_URL=http://127.0.0.1:4200/api python deploy/configure.py --gpus 2
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import Automation
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from flows.leftover import HANDOVER_SECONDS, tell_of_gone

PROJECT = Path(__file__).resolve().parent.parent
POOLS = {
    "cpu": "runs that plan, hand out stages and publish",
    "gpu": "stages that run a model; one worker for each GPU",
}
# Lower is taken first. Prefect's own queue `default` comes after both.
PRIORITIES = {"ad-hoc": 1, "nightly": 2}
HEARTBEATS = "mark runs without heartbeats as crashed"


async def create_pools(client: PrefectClient, gpus: int) -> None:
    """Create what is missing of the work pools and their queues.

    Args:
        client: of the server.
        gpus: how many stages may run at once. A limit that is higher already (GPUs of other machines) stays.
    """
    for pool, description in POOLS.items():
        try:
            found = await client.read_work_pool(pool)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            found = await client.create_work_pool(
                WorkPoolCreate(name=pool, type="process", description=description, base_job_template=template)
            )
        if pool == "gpu" and (found.concurrency_limit or 0) < gpus:
            await client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=gpus))
        there = {queue.name for queue in await client.read_work_queues(work_pool_name=pool)}
        for queue, priority in PRIORITIES.items():
            if queue not in there:
                await client.create_work_queue(queue, priority=priority, work_pool_name=pool)


async def watch_heartbeats(silence: timedelta) -> None:
    """Have the automation that notices machines that died: their runs would be `Running` for ever.

    A server that was away for longer than `silence` takes the runs that lived through it for dead, too.
    """
    seconds = int(silence.total_seconds())
    # Whatever ends or parks a run also ends its heartbeats.
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
    wanted = Automation(
        name=HEARTBEATS,
        description=f"A run without heartbeats for {seconds} s is gone with its process or machine.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ends)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=silence,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {seconds} seconds")],
    )
    try:
        found = await Automation.aread(name=HEARTBEATS)
    except ValueError:
        await wanted.acreate()
        return
    if getattr(found.trigger, "within", None) != silence:
        found.description, found.trigger, found.actions = wanted.description, wanted.trigger, wanted.actions
        await found.aupdate()


async def as_switched(client: PrefectClient, project: dict[str, Any]) -> dict[str, Any]:
    """What prefect.yaml says, with the switches that people turned on the server and the schedules that they added.

    Deploying it sets all of them in one request for each deployment, so that none is lost whenever it is stopped.
    """
    for wanted in project["deployments"]:
        for number, trigger in enumerate(wanted.get("triggers", []), 1):
            name = trigger.setdefault("name", f"{wanted['name']}__automation_{number}")
            for automation in await client.read_automations_by_name(name):
                trigger["enabled"] = automation.enabled
        module, function = wanted["entrypoint"].rsplit(".", 1)
        flow = getattr(importlib.import_module(module), function)
        try:
            found = await client.read_deployment_by_name(f"{flow.name}/{wanted['name']}")
        except ObjectNotFound:
            continue
        active = {schedule.slug: schedule.active for schedule in found.schedules}
        own = {schedule["slug"]: schedule for schedule in wanted.get("schedules", [])}
        for slug, schedule in own.items():
            schedule["active"] = active.get(slug, schedule["active"])
        added = [
            {
                **schedule.schedule.model_dump(mode="json", exclude_none=True),
                **schedule.model_dump(mode="json", include={"active", "parameters", "slug"}, exclude_none=True),
            }
            for schedule in found.schedules
            if schedule.slug not in own
        ]
        wanted["schedules"] = [*own.values(), *added]
    return project


async def deploy(client: PrefectClient) -> None:
    """Deploy all of prefect.yaml."""
    project = await as_switched(client, yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "prefect.yaml"
        file.write_text(yaml.safe_dump(project), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"prefect deploy --all failed:\n{done.stdout}{done.stderr}")


async def configure(gpus: int, silence: timedelta) -> None:
    """All of it, on the server that Prefect is configured for."""
    async with get_client() as client:
        await create_pools(client, gpus)
        await deploy(client)
    await watch_heartbeats(silence)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, required=True, help="how many GPU workers there are in all")
    parser.add_argument(
        "--silence", type=int, default=300, help="seconds without heartbeats after which a run is taken for dead"
    )
    options: Any = parser.parse_args(arguments)
    with get_client(sync_client=True) as client:
        until = time.monotonic() + HANDOVER_SECONDS + 1
        while tell_of_gone(client) and time.monotonic() < until:
            time.sleep(1)
    asyncio.run(configure(options.gpus, timedelta(seconds=options.silence)))


if __name__ == "__main__":
    main()
