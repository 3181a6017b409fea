"""A task that runs the whole job on AG News: 40 labelled rows, 5,000 unlabelled ones, the official test.

    python benchmarks/make_ag_news.py --data DIR --out OUT
    clozeline run OUT/task.yaml

DIR holds ``ag_news/train.parquet`` and ``ag_news/test.parquet``. The labelled rows are those of
``benchmarks/quality.py`` with 40 labels and seed 0; labels, words and patterns are those of its task file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from quality import TASKS, draw

from pipeline.tables import write_table
from pipeline.training import seed_of

LABELLED, UNLABELLED = 40, 5000


def make(data: Path, out: Path, *, labelled: int = LABELLED, unlabelled: int = UNLABELLED) -> Path:
    """Cut the files and write the task.

    Args:
        data: the directory with the folder ``ag_news``.
        out: a directory; made if need be.
        labelled: how many labelled rows.
        unlabelled: how many rows to label, at most.

    Returns:
        The task file.
    """
    task = yaml.safe_load((TASKS / "ag_news.yaml").read_text(encoding="utf-8"))
    names = list(task["labels"])
    train, test = (pq.read_table(data / "ag_news" / f"{name}.parquet") for name in ("train", "test"))
    numbers = np.array([names.index(label) for label in train.column("label").to_pylist()])
    chosen = draw(numbers, labelled, seed=0)
    others = np.setdiff1d(np.arange(len(numbers)), chosen)
    others = np.sort(np.random.default_rng(seed_of("ag_news unlabelled")).permutation(others)[:unlabelled])
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "labelled.parquet", train.take(chosen))
    write_table(out / "unlabelled.parquet", train.take(others).drop_columns(["label"]))
    write_table(out / "test.parquet", test)
    task["inputs"] = {
        "labelled": "labelled.parquet",
        "unlabelled": "unlabelled.parquet",
        "test": "test.parquet",
        "text": ["title", "description"],
        "label": "label",
        "id": "id",
        "carry": ["id"],  # beside row_id, under its own name
    }
    path = out / "task.yaml"
    path.write_text(
        "# AG News, written by benchmarks/make_ag_news.py.\n" + yaml.safe_dump(task, sort_keys=False, width=120),
        encoding="utf-8",
    )
    return path


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT")
    given = parser.parse_args()
    print(make(given.data, given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
