"""How the quick preset was chosen: settings of the fit and of the student, on rows cut from train, never on test.

    python benchmarks/presets.py --data DIR --part fit --draws 3
    python benchmarks/presets.py --data DIR --part learned --labels 10
    python benchmarks/presets.py --data DIR --part student --draws 2
    python benchmarks/presets.py --data DIR --part base --labels 10 --draws 4 --base embedded --base MODEL

DIR is that of `benchmarks/quality.py`. For each dataset and draw, ``--labels`` rows (40; two more a label where there
are more labels) are cut from train; other train rows are the transfer set and the rows that are judged. `fit` trains
one pattern with each setting and prints its accuracy; `learned` does so for shares of the way that training goes, and
the preset's rule; `student` trains two patterns with the preset and distills their blend with each setting; `base` asks
which base model is the better start: untrained, trained with the preset, and for logistic regression on its vectors, a
pattern a draw, and how far each is ahead of the first on the same draws.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality import TASKS, Pool, draw, interval

from pipeline.annotators import Labelled, method
from pipeline.base_model import resolve_base_model
from pipeline.device import numeric_profile
from pipeline.ensemble import blend
from pipeline.student import distill
from pipeline.tables import ColumnRoles
from pipeline.task import Task

FIT = [
    {},
    {"dropout": None, "freeze_embeddings": False},
    {"freeze_embeddings": False},
    {"steps": 30},
    {"steps": 100},
    {"learning_rate": 5e-5},
    {"learning_rate": 2e-4},
    {"mlm_alpha": 1e-4},
    {"mlm_alpha": 1e-2},
]
LEARNED = [{}, *({"learned": share} for share in (0.0, 0.25, 0.5, 0.75, 1.0))]
STUDENT = [
    {},
    {"dropout": None, "freeze_embeddings": False},
    {"steps": 100},
    {"steps": 400},
    {"learning_rate": 5e-5},
    {"learning_rate": 2e-4},
]
TRANSFER, JUDGED = 1000, 500


def cut(data: Path, name: str, labels: int, seed: int) -> tuple[Task, Labelled, Labelled, Labelled]:
    """Labelled, transfer and judged rows of one draw, all from train."""
    task = Task.load(TASKS / f"{name}.yaml")
    roles = ColumnRoles(tuple(task.inputs.text), label="label")
    pool = Pool.read(data / name / "train.parquet", roles, task.label_names)
    labelled = draw(pool.labels, max(labels, 2 * len(task.labels)), seed)
    others = np.random.default_rng(seed + 1000).permutation(np.setdiff1d(np.arange(len(pool.labels)), labelled))
    everything = Labelled(pool.texts, pool.labels)
    parts = (labelled, others[:TRANSFER], others[TRANSFER : TRANSFER + JUDGED])
    return task, *(everything.take(part) for part in parts)


def judged(
    data: Path, name: str, labels: int, seed: int, part: str, bases: Sequence[str]
) -> Iterator[tuple[Mapping[str, Any], float, float]]:
    """Each setting with its accuracy on the judged rows and its seconds."""
    task, labelled, transfer, rows = cut(data, name, labels, seed)
    base, profile = resolve_base_model("embedded"), numeric_profile()

    def spec(changes: Mapping[str, Any], pattern: int) -> dict[str, Any]:
        annotator = task.annotators[pattern]
        words = [[label, words] for label, words in task.words_of(annotator).items()]
        return {**task.resolved("training"), "pattern": annotator.pattern, "words": words, **changes}

    pet = method("pet")
    if part == "base":
        pattern = seed % len(task.annotators)
        reads = {**spec({}, pattern), "template": task.student_template, "labels": task.label_names}
        uses = {"untrained": ("pet", labelled.take(np.arange(0))), "trained": ("pet", labelled)}
        uses["vectors"] = ("embedding", labelled)
        for place in bases:
            base = resolve_base_model(place, headless=True)
            for use, (kind, taught) in uses.items():
                start = time.perf_counter()
                trained = method(kind).train(reads, taught, transfer.texts, base, profile, seed)
                scores = trained.log_probabilities(rows.texts)
                seconds = time.perf_counter() - start
                yield {place: use}, float((scores.argmax(axis=1) == rows.labels).mean()), seconds
        return
    if part != "student":
        for changes in FIT if part == "fit" else LEARNED:
            start = time.perf_counter()
            fitted = pet.train(spec(changes, 0), labelled, transfer.texts, base, profile, seed)
            seconds = time.perf_counter() - start
            scores = fitted.log_probabilities(rows.texts)
            yield changes, float((scores.argmax(axis=1) == rows.labels).mean()), seconds
        return
    fits = [pet.train(spec({}, i), labelled, transfer.texts, base, profile, seed) for i in (0, 1)]
    half = np.full(2, 0.5)
    soft = blend([fit.log_probabilities(transfer.texts) for fit in fits], half)
    together = blend([fit.log_probabilities(rows.texts) for fit in fits], half)
    yield {"the ensemble itself": True}, float((together.argmax(axis=1) == rows.labels).mean()), 0.0
    shared = {
        **task.resolved("student"),
        "template": task.student_template,
        "labels": task.label_names,
        "max_length": task.resolved("training")["max_length"],
        "truncation": "head",
    }
    for changes in STUDENT:
        start = time.perf_counter()
        student = distill({**shared, **changes}, soft, transfer.texts, labelled, base, profile, seed)
        seconds = time.perf_counter() - start
        scores = student.log_probabilities(rows.texts)
        yield changes, float((scores.argmax(axis=1) == rows.labels).mean()), seconds


def main() -> None:
    """Print a Markdown table: a row a setting, a column a dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=["fit", "learned", "student", "base"], default="fit")
    parser.add_argument("--datasets", default="ag_news,sst2,trec6,yelp")
    parser.add_argument("--labels", type=int, default=40, help="labelled rows")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--base", action="append", default=[], metavar="MODEL", help="for the part base")
    arguments = parser.parse_args()
    if arguments.part == "base" and not arguments.base:
        parser.error("--part base needs --base MODEL")
    names = arguments.datasets.split(",")
    table: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(arguments.draws):
        for name in names:
            for changes, accuracy, took in judged(
                arguments.data, name, arguments.labels, seed, arguments.part, arguments.base
            ):
                setting = ", ".join(f"{key} {value}" for key, value in changes.items()) or "the preset"
                table.setdefault(setting, {}).setdefault(name, []).append(100 * accuracy)
                seconds.setdefault(setting, []).append(took)
                print(f"{name} draw {seed}: {setting}: {accuracy:.3f} in {took:.1f} s", file=sys.stderr, flush=True)
    print("| setting | " + " | ".join(names) + " | mean | time |")
    print("|---" * (len(names) + 3) + "|")
    preset = sum(next(iter(seconds.values())))
    for setting, found in table.items():
        means = [float(np.mean(found[name])) for name in names]
        cells = " | ".join(f"{mean:.1f}" for mean in [*means, float(np.mean(means))])
        print(f"| {setting} | {cells} | {sum(seconds[setting]) / preset:.2f} |")
    if arguments.part != "base" or arguments.draws < 2:
        return
    print(f"\nAhead of {arguments.base[0]} on the same draws, points: mean and its 95 % interval\n")
    print("| setting | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for setting, found in table.items():
        place, _, use = setting.rpartition(" ")
        first = table[f"{arguments.base[0]} {use}"]
        apart = [interval(np.subtract(found[name], first[name]).tolist()) for name in names]
        if place != arguments.base[0]:
            print(f"| {setting} | {' | '.join(apart)} |")


if __name__ == "__main__":
    main()
