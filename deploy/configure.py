"""Give a Prefect server what Clozeline needs: work pools, queues, deployments and the heartbeat automation.

Run it again whenever you like: what is there stays as it is, switched-on schedules stay on::

    PREFECT_API_URL=http://127.0.0.1:4200/api python deploy/configure.py --gpus 2
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

PROJECT = Path(__file__).resolve().parent.parent
POOLS = {
    "cpu": "runs that plan, hand out stages and publish",
    "gpu": "stages that run a model; one worker for each GPU",
}
# Lower is taken first. Prefect's own queue `default` comes after both.
PRIORITIES = {"ad-hoc": 1, "nightly": 2}
HEARTBEATS = "mark runs without heartbeats as crashed"
# Three heartbeats of PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30.


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
    """Create the automation that notices machines that died: their runs would be `Running` for ever.

    A server that was away for longer than `silence` takes the runs that lived through it for dead, too.
    """
    try:
        await Automation.aread(name=HEARTBEATS)
    except ValueError:
        # Whatever ends or parks a run also ends its heartbeats.
        ends = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
        await Automation(
            name=HEARTBEATS,
            description=f"A run without heartbeats for {silence.seconds} s is gone with its process or machine.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ends)},
                match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=silence,
            ),
            actions=[
                ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {silence.seconds} seconds")
            ],
        ).acreate()


async def active_schedules(client: PrefectClient) -> set[tuple[str, str]]:
    """Deployment and slug of each schedule that is switched on."""
    flows = {flow.id: flow.name for flow in await client.read_flows()}
    return {
        (f"{flows[deployment.flow_id]}/{deployment.name}", schedule.slug)
        for deployment in await client.read_deployments()
        for schedule in deployment.schedules
        if schedule.active and schedule.slug
    }


async def deploy(client: PrefectClient) -> None:
    """Deploy all of prefect.yaml. It sets every switch to what the file says: those that people turned are put back."""
    active = await active_schedules(client)
    disabled = {automation.name for automation in await client.read_automations() if not automation.enabled}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"prefect deploy --all failed:\n{done.stdout}{done.stderr}")
    for name, slug in sorted(active - await active_schedules(client)):
        try:
            deployment = await client.read_deployment_by_name(name)
        except ObjectNotFound:
            continue
        for schedule in deployment.schedules:
            if schedule.slug == slug:
                await client.update_deployment_schedule(deployment.id, schedule.id, active=True)
    for automation in await client.read_automations():
        if automation.name in disabled and automation.enabled:
            await client.pause_automation(automation.id)


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
    asyncio.run(configure(options.gpus, timedelta(seconds=options.silence)))


if __name__ == "__main__":
    main()
