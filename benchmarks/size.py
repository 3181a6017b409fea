"""What each stage takes for ten thousand and for half a million distinct rows: memory, time, and how much is the model.

    python benchmarks/size.py --data DIR

DIR holds ``ag_news/train.parquet``; titles and descriptions of different rows are joined until there are as many
distinct texts as are wanted, so that lengths are those of real text. Each stage runs in a process of its own, which
tells its peak resident memory, its seconds, and the seconds that the model's forward passes took (for stages that
score; training is left out). The task has two patterns, 40 labelled rows, the quick preset and by default
the embedded model.

The half million takes the embedded model an hour or two. ``--tiny`` puts a random model of two narrow layers in its
place: for the stages that have nothing to do with a model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.worker import NATIVE_SETTINGS

os.environ.update({**NATIVE_SETTINGS, **os.environ})  # before torch is imported

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.base_model import resolve_base_model
from pipeline.plan import build_plan
from pipeline.stages import run_stage
from pipeline.store import Store
from pipeline.tables import write_table
from pipeline.task import Task

SIZES = [10_000, 500_000]
TASK = Path(__file__).resolve().parent / "tasks" / "ag_news.yaml"
PATTERNS, BUDGET, LABELLED = 2, 500, 40


def peak_mb() -> float:
    """This process's peak resident memory; `getrusage` would count what its parent had when it was started."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def tiny_model(path: Path) -> str:
    """Save a random model that costs next to nothing, with the embedded one's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    embedded = resolve_base_model("embedded").path
    AutoTokenizer.from_pretrained(embedded).save_pretrained(path)
    config = BertConfig.from_pretrained(
        embedded, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1
    )
    BertForMaskedLM(config).save_pretrained(path)
    return str(path)


def write_task(data: Path, root: Path, rows: int, model: str) -> Path:
    """A task over ``rows`` distinct texts in files of 250,000."""
    root.mkdir()
    source = pq.read_table(data / "ag_news" / "train.parquet")
    labelled, source = source.slice(0, LABELLED), source.slice(LABELLED)
    titles, texts = (source.column(name).to_pylist() for name in ("title", "description"))
    draw = np.random.default_rng(0)
    pairs = draw.integers(0, len(titles), (rows, 2))
    joined = [f"{titles[a]} {texts[b]}".strip() for a, b in pairs.tolist()]
    distinct = list(dict.fromkeys(joined))
    distinct += [f"{text} {i}" for i, text in enumerate(joined[: rows - len(distinct)])]
    for number, start in enumerate(range(0, rows, 250_000)):
        write_table(root / f"part-{number}.parquet", pa.table({"text": distinct[start : start + 250_000]}))
    names = yaml.safe_load(TASK.read_text(encoding="utf-8"))["labels"]
    both = [
        f"{title} {text}".strip()
        for title, text in zip(*(labelled.column(name).to_pylist() for name in ("title", "description")), strict=True)
    ]
    labels = labelled.column("label").to_pylist()
    given = [list(names)[label] if isinstance(label, int) else label for label in labels]
    write_table(root / "labelled.parquet", pa.table({"text": both, "label": given}))
    task = {
        "labels": names,
        "base_model": model,
        "training": {"preset": "quick"},  # which the embedded one has by itself
        "inputs": {"labelled": "labelled.parquet", "unlabelled": "part-*.parquet"},
        "annotators": ["{text} This is about {mask}.", "{mask} news: {text}"],
        "release": {"review_budget": BUDGET},
    }
    path = root / "task.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return path


def run_alone(request: Path) -> None:
    """Run one stage in this process and print what it took."""
    in_model, depth, began = 0.0, 0, 0.0
    if json.loads(request.read_text())["stage"] in {"annotate", "label"}:
        import torch
        from transformers import PreTrainedModel

        def enter(module: Any, inputs: Any) -> None:
            nonlocal depth, began
            if isinstance(module, PreTrainedModel):
                began = began if depth else time.perf_counter()
                depth += 1

        def leave(module: Any, inputs: Any, output: Any) -> None:
            nonlocal depth, in_model
            if isinstance(module, PreTrainedModel):
                depth -= 1
                in_model += 0 if depth else time.perf_counter() - began

        torch.nn.modules.module.register_module_forward_pre_hook(enter)
        torch.nn.modules.module.register_module_forward_hook(leave)
    artifact, _ = run_stage(json.loads(request.read_text(encoding="utf-8")))
    peak = peak_mb()
    print(json.dumps({"seconds": artifact.seconds, "peak_mb": peak, "in_model": in_model}))


def measure(data: Path, scratch: Path, rows: int, model: str) -> dict[str, dict[str, float]]:
    """All stages over so many rows: for each kind the seconds in all, the highest peak and the model's seconds."""
    task = Task.load(write_task(data, scratch / str(rows), rows, model))
    plan = build_plan(task, task.base())
    store = Store(scratch / str(rows) / "store")
    found: dict[str, dict[str, float]] = {}
    for call in plan.calls:
        request = scratch / "request.json"
        request.write_text(json.dumps(call.request(store)), encoding="utf-8")
        command = [sys.executable, __file__, "--stage", str(request)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        took = json.loads(done.stdout.splitlines()[-1])
        kind = found.setdefault(call.stage, {"seconds": 0.0, "peak_mb": 0.0, "in_model": 0.0})
        kind["seconds"] += took["seconds"]
        kind["in_model"] += took["in_model"]
        kind["peak_mb"] = max(kind["peak_mb"], took["peak_mb"])
        print(rows, call.title, took, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure both sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="two numbers of rows")
    parser.add_argument("--tiny", action="store_true", help="a random tiny model in place of the embedded one")
    parser.add_argument("--stage", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        run_alone(arguments.stage)
        return
    small, large = map(int, arguments.sizes.split(","))
    with tempfile.TemporaryDirectory(prefix="clozeline-size-") as directory:
        model = tiny_model(Path(directory, "tiny")) if arguments.tiny else "embedded"
        few, many = (measure(arguments.data, Path(directory), rows, model) for rows in (small, large))
    print(
        f"| stage | peak MB, {small} rows | peak MB, {large} rows | growth | s per 100,000 rows | outside the model |"
    )
    print("|---|---|---|---|---|---|")
    for stage, took in many.items():
        outside = f"{1 - took['in_model'] / took['seconds']:.0%}" if took["in_model"] else ""
        print(
            f"| {stage} | {few[stage]['peak_mb']:.0f} | {took['peak_mb']:.0f} | "
            f"{took['peak_mb'] - few[stage]['peak_mb']:.0f} | {took['seconds'] * 100_000 / large:.2f} | {outside} |"
        )


if __name__ == "__main__":
    main()
