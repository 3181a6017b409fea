"""A task run stage by stage without Prefect, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checks import check_task
from pipeline.plan import Plan, build_plan
from pipeline.publishing import publish
from pipeline.stages import run_stage
from pipeline.store import Store
from pipeline.task import Task
from pipeline.versions import newest_manifest


class Run:
    """A task run stage by stage in this process, published below its own directory."""

    def __init__(self, path: Path, store: Path | None = None) -> None:
        self.path, self.store = path, Store(store or path.parent / "store")
        self.out = path.parent / "releases"

    def plan(self, *overrides: str) -> Plan:
        task = Task.load(self.path, overrides)
        check_task(task)
        return build_plan(task, task.base(), newest_manifest(self.out))

    def __call__(self, *overrides: str) -> list[str]:
        """Run and publish; returns the titles of the stages that were executed."""
        plan = self.plan(*overrides)
        results = [(call.title, *run_stage(call.request(self.store))) for call in plan.calls]
        self.published = publish(results[-1][1], self.out)
        self.version, self.summary = Path(self.published.path), results[-1][1].meta
        return [title for title, _, built in results if built]

    def bytes(self) -> dict[str, bytes]:
        files = [*self.version.glob("data/*"), *self.version.glob("model/*.safetensors")]
        return {str(file.relative_to(self.version)): file.read_bytes() for file in sorted(files)}

    def rows(self, split: str) -> list[dict[str, Any]]:
        table = pa.concat_tables(pq.read_table(file) for file in sorted(self.version.glob(f"data/{split}-*.parquet")))
        return table.to_pylist()
