"""How the quick preset was chosen: settings of the fit and of the student, on rows cut from train, never on test.

    python benchmarks/presets.py --data DIR --part fit --draws 3
    python benchmarks/presets.py --data DIR --part learned --labels 10
    python benchmarks/presets.py --data DIR --part ensemble --labels 10 --draws 3
    python benchmarks/presets.py --data DIR --part prior --labels 10 --draws 4
    python benchmarks/presets.py --data DIR --part student --draws 2
    python benchmarks/presets.py --data DIR --part base --labels 10 --draws 4 --base embedded --base MODEL
    python benchmarks/presets.py --data DIR --part fine-tune --labels 50 --draws 3 --base embedded --base MODEL

DIR is that of `benchmarks/quality.py`. For each dataset and draw, ``--labels`` rows (40; two more a label where there
are more labels) are cut from train; other train rows are the transfer set and the rows that are judged. `fit` tells
what one pattern a draw reaches with each setting; `learned` does so for shares of the way that training goes, and
the preset's rule; `ensemble` does so for all patterns, blended evenly. `prior` moves a trained annotator's label shares
a part of the way to the labelled rows', where those have the shares of all rows, where they were labelled as they came,
and where one label has four fifths of the rows to judge (and of those that the shares are taken from) but not of the
labelled ones; `prior-fine-tune` does the same to a fine-tuned classifier. `student` trains two patterns with the preset
and distills their blend with each setting. `base` asks which base model is the better start: untrained, trained with
the preset, and for logistic regression on its vectors, a pattern a draw, and how far each is ahead of the first on the
same draws. `fine-tune` trains the rival of `benchmarks/quality.py`, each base model with a classification head, with
each setting.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quality import FINE_TUNE, TASKS, Ints, Pool, draw, fit_spec, interval, student_spec

from pipeline.annotators import Annotator, Labelled, method
from pipeline.annotators.pet import PRIOR_ROWS, prior_strength
from pipeline.base_model import BaseModel, resolve_base_model
from pipeline.device import numeric_profile
from pipeline.ensemble import Doubles, blend, prior_shift, smoothed_shares
from pipeline.student import distill
from pipeline.tables import ColumnRoles, Floats
from pipeline.task import Task

_ALL_WEIGHTS: dict[str, Any] = {"dropout": None, "freeze_embeddings": False}
FIT: list[dict[str, Any]] = [
    {},
    {"dropout": None},
    {"freeze_embeddings": False},
    _ALL_WEIGHTS,
    {**_ALL_WEIGHTS, "steps": 150, "learning_rate": 5e-5},
    {"steps": 30},
    {"steps": 100},
    {"learning_rate": 5e-5},
    {"learning_rate": 2e-4},
    {"mlm_alpha": 1e-4},
    {"mlm_alpha": 1e-2},
]
LEARNED: list[dict[str, Any]] = [{}, *({"learned": share, "match_prior": 0.0} for share in (0.0, 0.25, 0.5, 0.75, 1.0))]
ENSEMBLE: list[dict[str, Any]] = [{"learned": share} for share in (0.0, 0.125, 0.25, 0.5)]
SKEWED, TIMES = 0.8, 40
STUDENT: list[dict[str, Any]] = [
    {},
    _ALL_WEIGHTS,
    {"steps": 100},
    {"steps": 400},
    {"learning_rate": 5e-5},
    {"learning_rate": 2e-4},
]
FINE_TUNES: list[dict[str, Any]] = [
    {},
    {"steps": 100, "learning_rate": 1e-4},
    *({"dropout": 0.0, "freeze_embeddings": True, "steps": n, "learning_rate": 1e-4} for n in (50, 100, 300)),
]
TRANSFER, JUDGED = 1000, 500


@dataclass(frozen=True)
class Draw:
    """Labelled, transfer and judged rows, all from train."""

    task: Task
    labelled: Labelled
    transfer: Labelled
    rows: Labelled
    seed: int

    @classmethod
    def cut(cls, data: Path, name: str, labels: int, seed: int) -> Draw:
        """Cut a draw from a dataset."""
        task = Task.load(TASKS / f"{name}.yaml")
        roles = ColumnRoles(tuple(task.inputs.text), label="label")
        pool = Pool.read(data / name / "train.parquet", roles, task.label_names)
        labelled = draw(pool.labels, max(labels, 2 * len(task.labels)), seed)
        others = np.random.default_rng(seed + 1000).permutation(np.setdiff1d(np.arange(len(pool.labels)), labelled))
        everything = Labelled(pool.texts, pool.labels)
        transfer, rows = others[:TRANSFER], others[TRANSFER : TRANSFER + JUDGED]
        return cls(task, everything.take(labelled), everything.take(transfer), everything.take(rows), seed)

    def spec(self, changes: Mapping[str, Any], pattern: int) -> dict[str, Any]:
        """What a PET annotator is told."""
        annotator = self.task.annotators[pattern % len(self.task.annotators)]
        return {**fit_spec(self.task, annotator, len(self.labelled)), **changes}

    def pet(self, changes: Mapping[str, Any], pattern: int) -> Annotator:
        """Train a PET annotator on the embedded model."""
        return self.train("pet", self.spec(changes, pattern), resolve_base_model("embedded"), self.labelled)

    def train(self, name: str, spec: Mapping[str, Any], base: BaseModel, labelled: Labelled) -> Annotator:
        """Train an annotator."""
        return method(name).train(spec, labelled, self.transfer.texts, base, numeric_profile(), self.seed)

    def accuracy(self, scores: Floats) -> float:
        """Of scores of the judged rows."""
        return float((scores.argmax(axis=1) == self.rows.labels).mean())


Judged = Iterator[tuple[Mapping[str, Any], float, float]]
"""Settings, each with its accuracy on the judged rows and its seconds."""


def settings(cut: Draw, of: Sequence[Mapping[str, Any]]) -> Judged:
    """One pattern a draw, trained with each setting."""
    for changes in of:
        start = time.perf_counter()
        fitted = cut.pet(changes, cut.seed)
        seconds = time.perf_counter() - start
        yield changes, cut.accuracy(fitted.log_probabilities(cut.rows.texts)), seconds


def ensembles(cut: Draw) -> Judged:
    """All patterns, each trained a share of the way, blended evenly."""
    patterns = len(cut.task.annotators)
    for changes in ENSEMBLE:
        start = time.perf_counter()
        fits = [cut.pet(changes, i) for i in range(patterns)]
        seconds = time.perf_counter() - start
        scores = [fit.log_probabilities(cut.rows.texts) for fit in fits]
        yield changes, cut.accuracy(blend(scores, np.full(patterns, 1 / patterns))), seconds


def skew(labels: Ints, favoured: int) -> Ints:
    """Row numbers, drawn with replacement so that one label has `SKEWED` of them and the others keep their ratios."""
    mine = labels == favoured
    chance = np.where(mine, SKEWED / mine.sum(), (1 - SKEWED) / (~mine).sum())
    return np.random.default_rng(0).choice(len(labels), size=len(labels), p=chance)


def priors(cut: Draw, name: str) -> Judged:
    """One pattern a draw, or fine-tuning, its label shares moved as far as `PetAnnotator.match_prior` would move them.

    The draws keep the labels' shares. Rows that are labelled as they come do not quite: `shares as they come` takes
    those of `TIMES` random draws for the target, with the training of the row above, and the mean accuracy.
    """
    start = time.perf_counter()
    spec = cut.spec({"match_prior": 0.0}, cut.seed) if name == "pet" else {**student_spec(cut.task), **FINE_TUNE}
    fitted = cut.train(name, spec, resolve_base_model("embedded"), cut.labelled)
    some = cut.transfer.take(np.arange(PRIOR_ROWS))
    on_some, on_rows = np.exp(fitted.log_probabilities(some.texts)), fitted.log_probabilities(cut.rows.texts)
    seconds = time.perf_counter() - start
    labels, random = len(cut.task.labels), np.random.default_rng(cut.seed)
    counts = cut.labelled.counts(labels)
    shares = cut.rows.counts(labels) / len(cut.rows)

    def accuracy(shift: Doubles, of: Ints | slice = slice(None)) -> float:
        found = (on_rows[of] + shift).argmax(axis=1)
        return float((found == cut.rows.labels[of]).mean())

    common = np.flatnonzero(shares >= 0.1)  # of a rare label there would be the same few rows again and again
    favoured = int(common[cut.seed % len(common)])
    skewed, target = skew(cut.rows.labels, favoured), smoothed_shares(counts)
    exact, lopsided = prior_shift(on_some, target), prior_shift(on_some[skew(some.labels, favoured)], target)
    drawn = random.multinomial(len(cut.labelled), shares, size=TIMES)
    came = [prior_shift(on_some, smoothed_shares(other)) for other in drawn]
    for setting in (0.0, "auto", 0.5, 0.75, 1.0):
        strength = prior_strength(setting, len(cut.labelled))
        yield {"match_prior": setting}, accuracy(strength * exact), seconds
        found = [accuracy(strength * shift) for shift in came]
        yield {"match_prior": setting, "shares": "as they come"}, float(np.mean(found)), seconds
        yield {"match_prior": setting, "of one label": SKEWED}, accuracy(strength * lopsided, skewed), seconds


def base_models(cut: Draw, places: Sequence[str]) -> Judged:
    """Base models untrained, trained with one pattern a draw, and their vectors."""
    none, spec = cut.labelled.take(np.arange(0)), cut.spec({}, cut.seed)
    bases = {place: resolve_base_model(place) for place in places}
    for place, base in bases.items():
        for use, name, told, labelled in (
            ("untrained", "pet", spec, none),
            ("trained", "pet", spec, cut.labelled),
            ("vectors", "embedding", student_spec(cut.task), cut.labelled),
        ):
            start = time.perf_counter()
            scores = cut.train(name, told, base, labelled).log_probabilities(cut.rows.texts)
            yield {place: use}, cut.accuracy(scores), time.perf_counter() - start


def fine_tunes(cut: Draw, places: Sequence[str]) -> Judged:
    """Base models with a classification head, fine-tuned with each setting."""
    for place in places:
        base = resolve_base_model(place, headless=True)
        for changes in FINE_TUNES:
            start = time.perf_counter()
            spec = {**student_spec(cut.task), **FINE_TUNE, **changes}
            fitted = cut.train("fine-tune", spec, base, cut.labelled)
            seconds = time.perf_counter() - start
            named = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as in quality.py"
            yield {place: named}, cut.accuracy(fitted.log_probabilities(cut.rows.texts)), seconds


def students(cut: Draw) -> Judged:
    """Two patterns trained with the preset, and their blend distilled with each setting."""
    fits = [cut.pet({}, cut.seed + i) for i in (0, 1)]
    half = np.full(2, 0.5)
    soft = blend([fit.log_probabilities(cut.transfer.texts) for fit in fits], half)
    together = blend([fit.log_probabilities(cut.rows.texts) for fit in fits], half)
    yield {"the ensemble itself": True}, cut.accuracy(together), 0.0
    base, profile, shared = resolve_base_model("embedded"), numeric_profile(), student_spec(cut.task)
    for changes in STUDENT:
        start = time.perf_counter()
        student = distill({**shared, **changes}, soft, cut.transfer.texts, cut.labelled, base, profile, cut.seed)
        seconds = time.perf_counter() - start
        yield changes, cut.accuracy(student.log_probabilities(cut.rows.texts)), seconds


def main() -> None:
    """Print a Markdown table: a row a setting, a column a dataset."""
    parts: dict[str, Callable[[Draw], Judged]] = {
        "fit": lambda cut: settings(cut, FIT),
        "learned": lambda cut: settings(cut, LEARNED),
        "ensemble": ensembles,
        "prior": lambda cut: priors(cut, "pet"),
        "prior-fine-tune": lambda cut: priors(cut, "fine-tune"),
        "student": students,
        "base": lambda cut: base_models(cut, arguments.base),
        "fine-tune": lambda cut: fine_tunes(cut, arguments.base),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=list(parts), default="fit")
    parser.add_argument("--datasets", default="ag_news,sst2,trec6,yelp")
    parser.add_argument("--labels", type=int, default=40, help="labelled rows")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--base", action="append", default=[], metavar="MODEL", help="for the parts base and fine-tune")
    arguments = parser.parse_args()
    if arguments.part in ("base", "fine-tune") and not arguments.base:
        parser.error(f"--part {arguments.part} needs --base MODEL")
    names = arguments.datasets.split(",")
    table: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(arguments.draws):
        for name in names:
            cut = Draw.cut(arguments.data, name, arguments.labels, seed)
            for changes, accuracy, took in parts[arguments.part](cut):
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
    if arguments.part != "base" or len(arguments.base) < 2 or arguments.draws < 2:
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
