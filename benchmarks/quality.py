"""How good the ensemble and its student are with few labels, beside what else one could do with the same rows.

    python benchmarks/quality.py --data DIR --datasets ag_news,sst2 --labels 0,10,40 --seeds 3

DIR holds a folder for each dataset with ``train.parquet``, ``test.parquet`` and perhaps ``unlabeled.parquet``;
labels, words and patterns come from ``benchmarks/tasks/NAME.yaml`` or from ``--task``. One cell is one dataset,
one number of labelled rows and one seed; it gives accuracy and macro-F1 on the test rows for

=================  ====================================================================================
zero-shot          all patterns with calibrated label words, untrained, blended with equal weights
best-annotator     the one pattern that cross-validation on the labelled rows picks
ensemble           all trained patterns, blended with the weights that cross-validation gives
student            the classifier distilled from the ensemble's soft labels for the transfer set
fine-tune          the base model with a classification head, trained on the labelled rows alone: the
                   student's template and length, all weights, dropout, 300 steps of 16 rows, 5e-5
fine-tune-matched  the same, its label shares moved as those of an annotator are (`training.match_prior`)
embedding          logistic regression on the base model's mean-pooled vectors
tfidf-nb           tf-idf with complement Naive Bayes
ipet               the last of ``--ipet`` generations, blended as the ensemble, which is generation 0
ipet-student       the classifier distilled from its soft labels
original-*         both fine-tunes and embedding with another encoder, ``--original``
=================  ====================================================================================

The first four and those of iPET follow the stages of the flow (`pipeline.stages`: fit, select, blend, distill,
evaluate) with the same functions, settings and seeds, without store and Prefect, so that a cell costs model time alone.
All share one set of fits. Seeds of training never vary, as in the flow: seed s of the benchmark is draw s of the rows.

Rows: equal texts are taken once, and training texts that are test texts are left out. The labelled rows are
drawn from train, stratified, at least one a class. The transfer set is the rest of train, or
``unlabeled.parquet`` where there is one. Transfer set and test set hold at most ``--cap`` rows (2,000), drawn
with one fixed seed. A method that cannot run has a null accuracy: best-annotator where a class has fewer than
two rows (there is no honest cross-validation), or there are none; fine-tune-matched where nothing is moved (by default
from forty rows on). With 0 labels nothing is drawn, so there is one cell, seed 0, without rivals. With
``--dev`` the rows to score are cut from train, by a fixed seed, and the test rows stay untouched: that is how settings
and models are chosen.

``--set adapt.steps=N`` trains the base model on the dataset's unlabelled texts first, once for all its cells: labelled
or not, but never on those that are scored. The seconds of that are in no method's.

`seconds` is what the method needs from the rows to the test scores: for best-annotator, ensemble, student and iPET
that includes all fits and their cross-validation.

Each finished half of a cell, prompting (the first four, and iPET) or its rivals, is appended to ``--out``; one that is
there, from the same data and settings, is not run again, so that other settings of fine-tuning leave the fits alone.
It may come from another machine, where numbers are rounded otherwise (the line tells device and numbers): what is
compared is always of one cell. So a table can be made on several days and machines, and by several processes at once:
``--share 1/2`` and ``--share 2/2`` run every other half each, into the same file; the command without it prints all.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.worker import NATIVE_SETTINGS

os.environ.update({**NATIVE_SETTINGS, **os.environ})  # before torch is imported

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import stats

from pipeline import tables
from pipeline.annotators import Labelled, Texts, method
from pipeline.annotators.pet import prior_strength, shares_shift
from pipeline.base_model import BaseModel, load_tokenizer, resolve_base_model
from pipeline.device import numeric_profile
from pipeline.ensemble import blend, smoothed_shares, soft_labels
from pipeline.errors import ClozelineError, InputError
from pipeline.fitting import fit_annotator
from pipeline.ipet import select_rows, selection_seed, teachers
from pipeline.metrics import classification_metrics
from pipeline.plan import STAGE_VERSIONS, human_seconds
from pipeline.store import key_of, sha256_of
from pipeline.tables import ColumnRoles, Floats, Rows, texts_of
from pipeline.task import Annotator, Task
from pipeline.template import Encoder, Template
from pipeline.training import seed_of

TASKS = Path(__file__).resolve().parent / "tasks"
CAP = 2000
METHODS = ["zero-shot", "best-annotator", "ensemble", "student"]
RIVALS = ["fine-tune", "fine-tune-matched", "embedding", "tfidf-nb"]
IPET_METHODS = ["ipet", "ipet-student"]
ORIGINAL_METHODS = ["original-fine-tune", "original-fine-tune-matched", "original-embedding"]
# All weights, with the model's dropout, as is usual; the best of those tried on rows cut from train (`presets.py
# --part fine-tune`): a rival with bad settings would be no rival.
FINE_TUNE: dict[str, Any] = {
    "steps": 300,
    "batch_size": 16,
    "learning_rate": 5e-5,
    "dropout": None,
    "freeze_embeddings": False,
}
Ints = npt.NDArray[np.int64]
Record = dict[str, Any]


def draw(labels: Ints, rows: int, seed: int) -> Ints:
    """Draw rows so that the labels' shares stay, with at least one row of each label.

    Args:
        labels: int64 ``[all rows]``.
        rows: how many to draw.
        seed: which draw.

    Returns:
        int64 ``[rows]``, row numbers in the order drawn.

    Raises:
        InputError: fewer rows are wanted than there are labels, or more than there are rows.
    """
    counts = np.bincount(labels)
    present = counts > 0
    if not present.sum() <= rows <= len(labels):
        raise InputError(
            f"can't draw {rows} of {len(labels)} rows with at least one of each of {present.sum()} labels",
            where="--labels",
        )
    take = present.astype(np.int64)
    for _ in range(rows - int(take.sum())):
        lack = np.where(take < counts, rows * counts / len(labels) - take, -np.inf)
        take[lack.argmax()] += 1
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in np.flatnonzero(present):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    return order[rank[order] < take[labels[order]]]


@dataclass(frozen=True)
class Pool:
    """Distinct rows of a file: text columns, content hashes, and label numbers if the file has labels."""

    texts: dict[str, list[str]]
    hashes: npt.NDArray[np.str_]
    labels: Ints

    @classmethod
    def read(cls, path: Path, roles: ColumnRoles, names: list[str] | None) -> Pool:
        """Read a file as the flow does; rows without text and texts with two different labels are left out."""
        with tempfile.TemporaryDirectory() as directory:
            tables.ingest(path, roles, Path(directory), label_names=names, quarantine=True)
            table = Rows(Path(directory)).read()
        hashes = table.column("content_hash").to_pylist()
        labels = table.column("label").to_pylist() if names else [0] * len(hashes)
        first: dict[str, int] = {}
        doubtful: set[str] = set()
        for i, content in enumerate(hashes):
            if labels[first.setdefault(content, i)] != labels[i]:
                doubtful.add(content)
        at = [i for content, i in first.items() if content not in doubtful]
        return cls(
            texts_of(table.take(pa.array(at, pa.int64()))),
            np.array([hashes[i] for i in at], dtype=np.str_),
            np.array([labels[i] for i in at], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, rows: Ints) -> Pool:
        """Some of the rows."""
        texts = {name: [column[i] for i in rows] for name, column in self.texts.items()}
        return Pool(texts, self.hashes[rows], self.labels[rows])

    def without(self, other: Pool) -> Pool:
        """The rows whose texts are not among another's."""
        return self.take(np.flatnonzero(~np.isin(self.hashes, other.hashes)))

    def shuffled(self, what: str) -> Pool:
        """All rows in an order that never changes."""
        return self.take(np.random.default_rng(seed_of("quality", what)).permutation(len(self)))

    def head(self, rows: int) -> Pool:
        """The first rows."""
        return self.take(np.arange(min(rows, len(self))))


@dataclass(frozen=True)
class Dataset:
    """A dataset with its task: where labelled rows, transfer set and test set are cut from."""

    name: str
    task: Task
    base: BaseModel
    profile: Mapping[str, str]
    cap: int
    train: Pool
    unlabelled: Pool | None
    test: Pool
    files: Mapping[str, str]
    dev: bool = False
    original: BaseModel | None = None

    @classmethod
    def load(cls, folder: Path, task: Task, cap: int, *, dev: bool = False, original: Path | None = None) -> Dataset:
        """Read a dataset's folder.

        Args:
            folder: where its files lie.
            task: labels, words, patterns, settings.
            cap: the most rows of the transfer set, and of the test set.
            dev: score rows cut from train in place of the test rows.
            original: another encoder, to compare with.

        Raises:
            InputError: a file is missing or does not fit the task.
        """
        inputs = task.inputs
        roles = ColumnRoles(tuple(inputs.text), label=inputs.label)
        paths = {name: folder / f"{name}.parquet" for name in ("train", "test", "unlabeled")}
        train, test = (Pool.read(paths[name], roles, task.label_names) for name in ("train", "test"))
        train, unlabelled = train.without(test), None
        if paths["unlabeled"].is_file():
            unlabelled = Pool.read(paths["unlabeled"], ColumnRoles(tuple(inputs.text)), None).without(test)
        if dev:  # the test rows are behind us, and nobody may look at them
            cut = train.shuffled("dev")
            test = cut.head(min(cap, len(cut) // 2))
            train = train.without(test)
            unlabelled = unlabelled and unlabelled.without(test)
        return cls(
            folder.name,
            task,
            task.base(),
            numeric_profile(task.resolved("training")["dtype"]),
            cap,
            train,
            unlabelled and unlabelled.shuffled("transfer"),
            test.shuffled("test").head(cap),
            {name: sha256_of(path) for name, path in paths.items() if path.is_file()},
            dev,
            None if original is None else resolve_base_model(str(original), headless=True),
        )

    @cached_property
    def start(self) -> BaseModel:
        """What every model starts from: the base model, or what adapting made of it."""
        task = self.task
        if not task.adapt.steps:
            return self.base
        from pipeline.adapt import Adapting

        pool = self._train_shuffled if self.unlabelled is None else self.unlabelled
        texts = pool.head(task.sample.rows_per_label * len(task.labels)).texts
        rows = Template.parse(task.student_template).render_rows(texts)
        spec = {**task.adapt.model_dump(), "max_length": task.resolved("training")["max_length"]}
        # Under a name of its own, since what a model leaves is told apart by its path.
        place = Path(tempfile.mkdtemp(prefix=f"quality-{self.name}-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        adapting = Adapting(spec, rows, self.base, self.profile, seed_of("adapt"))
        adapting.run(place / "checkpoints")
        _say(f"{self.name}, adapted: {adapting.curve.points[0]} to {adapting.curve.points[adapting.curve.best]}")
        adapting.save(place / "model")
        return resolve_base_model(str(place / "model"))

    def cut(self, labels: int, seed: int) -> tuple[Labelled, Texts]:
        """The labelled rows of a draw and the transfer set that goes with it."""
        chosen = self.train.take(draw(self.train.labels, labels, seed) if labels else np.zeros(0, dtype=np.int64))
        # Shuffled before the labelled rows are taken out: the transfer sets of all draws are nearly the same.
        rest = (self._train_shuffled if self.unlabelled is None else self.unlabelled).without(chosen)
        transfer = rest.head(self.cap)
        # As the flow's stage `sample`: in the order of the hashes, and no more than the task wants.
        wanted = self.task.sample.rows_per_label * len(self.task.labels)
        transfer = transfer.take(np.argsort(transfer.hashes)[:wanted])
        return Labelled(chosen.texts, chosen.labels), transfer.texts

    @cached_property
    def _train_shuffled(self) -> Pool:
        return self.train.shuffled("transfer")

    def key(self, labels: int, seed: int, half: str) -> str:
        """The key of half a cell: all that its numbers depend on."""
        task, training = self.task, self.task.training_on(labels)
        adapt = {"adapt": task.adapt.model_dump(), "adapted": STAGE_VERSIONS["adapt"]} if task.adapt.steps else {}
        shared = {
            **adapt,
            **({"dev": "without the test rows"} if self.dev else {}),
            "files": dict(self.files),
            "sample": task.sample.model_dump(),
            "text": task.inputs.text,
            "label": task.inputs.label,
            "base": self.base.weights,
            "cap": self.cap,
            "labels": labels,
            "seed": seed,
        }
        if half == "rivals":
            return key_of(
                {
                    **shared,
                    **({"original": self.original.weights} if self.original else {}),
                    "spec": {**student_spec(task), **FINE_TUNE},
                    "training": {name: training[name] for name in ("dtype", "match_prior")},
                    "stages": {"distill": STAGE_VERSIONS["distill"]},
                }
            )
        ipet = {"ipet": task.ipet.model_dump(), "select": STAGE_VERSIONS["select"]} if task.ipet.generations else {}
        return key_of(
            {
                **shared,
                **ipet,
                "task": task.model_dump(mode="json", include={"labels", "annotators", "ensemble"}),
                "training": training,
                "student": {**task.resolved("student"), "template": task.student_template},
                "stages": {name: STAGE_VERSIONS[name] for name in ("fit", "annotate", "blend", "distill", "label")},
            }
        )


class _Clock:
    """Adds up seconds under names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run_half(data: Dataset, labels: int, seed: int, half: str) -> list[Record]:
    """Train and score one half's methods on one draw.

    Args:
        data: the dataset.
        labels: how many labelled rows.
        seed: which draw.
        half: ``prompting`` (`METHODS` and, where the task has generations, `IPET_METHODS`) or ``rivals`` (`RIVALS` and,
            where there is another encoder, `ORIGINAL_METHODS`).

    Returns:
        One record a method, in that order.
    """
    predicted, seconds = (rivals if half == "rivals" else prompting)(data, labels, seed)
    records = []
    for name, scores in predicted.items():
        found = None
        if scores is not None:
            found = classification_metrics(scores.argmax(axis=1), data.test.labels, data.task.label_names)
        records.append(
            {
                "dataset": data.name,
                "labels": labels,
                "seed": seed,
                "method": name,
                "accuracy": found and found["accuracy"],
                "macro_f1": found and found["macro_f1"],
                "seconds": found and round(seconds[name], 2),
            }
        )
    return records


Predicted = tuple[dict[str, Floats | None], dict[str, float]]
"""Of each method the scores of the test rows, if it can run, and the seconds."""


def prompting(data: Dataset, labels: int, seed: int) -> Predicted:
    """What the stages of the flow do with a draw."""
    task, base, profile = data.task, data.start, data.profile
    labelled, transfer = data.cut(labels, seed)
    names, test = task.label_names, data.test
    clock = _Clock()
    methods = [*METHODS, *(IPET_METHODS if task.ipet.generations else [])]
    predicted: dict[str, Floats | None] = dict.fromkeys(methods)
    untrained: list[Floats] = []
    on_test: list[Floats] = []
    on_transfer: list[Floats] = []
    accuracies: list[float | None] = []

    nothing, pet = Labelled({}, np.zeros(0, dtype=np.int64)), method("pet").train
    for _, annotator, number in task.members():
        spec = fit_spec(task, annotator, labels)
        fit_seed = seed_of("fit", annotator.pattern, number)  # as in the stage
        with clock("zero-shot"):
            untaught = pet(spec, nothing, transfer, base, profile, fit_seed)
            untrained.append(untaught.log_probabilities(test.texts))
        accuracies.append(None)
        if len(labelled):
            with clock("fits"):
                fitted = fit_annotator(spec, labelled, transfer, base, profile, fit_seed)
                accuracies[-1], taught = fitted.accuracy, fitted.annotator
                on_test.append(taught.log_probabilities(test.texts))
        with clock("transfer"):
            on_transfer.append((taught if len(labelled) else untaught).log_probabilities(transfer))
    predicted["zero-shot"] = blend(untrained, np.full(len(untrained), 1 / len(untrained)))
    if not on_test:  # without labels the untrained annotators are the ensemble
        on_test, clock.seconds["fits"] = untrained, clock.seconds["zero-shot"]

    # As the stages `blend` and `evaluate`.
    counts, ensemble = labelled.counts(len(names)), task.ensemble.model_dump()
    soft, weights = soft_labels(on_transfer, accuracies, counts, ensemble)
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if known:
        predicted["best-annotator"] = on_test[known.index(max(known))]
    predicted["ensemble"] = blend(on_test, weights)

    from pipeline.student import distill

    reads = student_spec(task)
    with clock("student"):
        student = distill(reads, soft, transfer, labelled, base, profile, seed_of("distill"))
        predicted["student"] = student.log_probabilities(test.texts)
    if task.ipet.generations:
        with clock("ipet"):
            on_transfer, on_test = later_generations(data, labelled, transfer, accuracies, on_transfer)
            soft, _ = soft_labels(on_transfer, accuracies, counts, ensemble)
            predicted["ipet"] = blend(on_test, weights)
        with clock("ipet-student"):
            student = distill(reads, soft, transfer, labelled, base, profile, seed_of("distill"))
            predicted["ipet-student"] = student.log_probabilities(test.texts)
    spent = clock.seconds
    spent["ensemble"] = spent["best-annotator"] = spent["fits"]
    spent["student"] += spent["fits"] + spent["transfer"]
    if task.ipet.generations:
        spent["ipet"] += spent["fits"] + spent["transfer"]
        spent["ipet-student"] += spent["ipet"]
    return predicted, spent


def rivals(data: Dataset, labels: int, seed: int) -> Predicted:
    """What else one could do with the labelled rows of a draw."""
    labelled, transfer = data.cut(labels, seed)
    task, test, reads = data.task, data.test, student_spec(data.task)
    counts = labelled.counts(len(task.labels))
    strength = prior_strength(task.resolved("training")["match_prior"], len(labelled))
    clock = _Clock()
    predicted: dict[str, Floats | None] = dict.fromkeys([*RIVALS, *(ORIGINAL_METHODS if data.original else [])])
    if len(labelled):
        told = [("fine-tune", {**reads, **FINE_TUNE}), ("embedding", reads), ("tfidf-nb", reads)]
        for prefix, model in [("", data.start), *([("original-", data.original)] if data.original else [])]:
            for name, spec in told if not prefix else told[:2]:  # tf-idf reads no model
                with clock(prefix + name):
                    rival = method(name).train(spec, labelled, transfer, model, data.profile, seed_of(name))
                    scores = rival.log_probabilities(test.texts)
                predicted[prefix + name] = scores
                if name == "fine-tune" and strength:
                    with clock(matched := f"{prefix}fine-tune-matched"):
                        shift = shares_shift(rival, transfer, smoothed_shares(counts), strength)
                        predicted[matched] = (scores + shift).astype(np.float32)
                    clock.seconds[matched] += clock.seconds[prefix + name]
    return predicted, clock.seconds


def fit_spec(task: Task, annotator: Annotator, rows: int) -> dict[str, Any]:
    """What the stage `fit` is told of an annotator, given the number of labelled rows."""
    return {
        **{key: value for key, value in task.training_on(rows).items() if key != "dtype"},
        "method": "pet",
        "pattern": annotator.pattern,
        "words": [[label, words] for label, words in task.words_of(annotator).items()],
        "labels": task.label_names,
    }


def student_spec(task: Task) -> dict[str, Any]:
    """What the student is told, and whoever else reads its template."""
    training = task.resolved("training")
    return {
        **task.resolved("student"),
        "template": task.student_template,
        "labels": task.label_names,
        "max_length": training["max_length"],
        "truncation": training["truncation"],
    }


def later_generations(
    data: Dataset, labelled: Labelled, transfer: Texts, accuracies: Sequence[float | None], scores: list[Floats]
) -> tuple[list[Floats], list[Floats]]:
    """iPET as the stages `select` and `fit` have it.

    Args:
        data: the dataset, whose task has generations.
        labelled: the labelled rows.
        transfer: the transfer set.
        accuracies: generation 0's, cross-validated.
        scores: generation 0's log-probabilities of the transfer set, one array an annotator.

    Returns:
        The last generation's log-probabilities of the transfer set and of the test set.
    """
    task, ipet, members = data.task, data.task.ipet, list(data.task.members())
    counts, on_test = labelled.counts(len(task.labels)), list[Floats]()
    prior = {} if len(labelled) else {"match_prior": 0.0}  # as in the plan
    for generation in range(1, ipet.generations + 1):
        before, scores = scores, []
        for i, (_, annotator, number) in enumerate(members):
            seed = selection_seed(annotator.pattern, number, generation)
            chosen = teachers(i, len(members), ipet.share, seed)
            said, known = [before[j] for j in chosen], [accuracies[j] for j in chosen]
            soft, _ = soft_labels(said, known, counts, task.ensemble.model_dump())
            found = select_rows(soft, counts, generation, ipet.growth, seed).labels
            drawn = Labelled(dict(transfer), found).take(np.flatnonzero(found >= 0))
            fitted = method("pet").train(
                fit_spec(task, annotator, len(labelled)) | prior,
                labelled.joined(drawn),
                transfer,
                data.start,
                data.profile,
                seed_of("fit", annotator.pattern, number),
            )
            scores.append(fitted.log_probabilities(transfer))
            if generation == ipet.generations:
                on_test.append(fitted.log_probabilities(data.test.texts))
    return scores, on_test


class Results:
    """Finished halves of cells in a JSON-lines file.

    Args:
        path: the file; made when the first is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, list[Record]] = {}
        self._torn = False
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            self._torn = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    cell = json.loads(line)
                    self.cells[cell["key"]] = cell["results"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that was being written when the run was killed: the cell is run again

    def add(self, key: str, records: list[Record], **about: Any) -> None:
        """Append half a cell."""
        self.cells[key] = records
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps({"key": key, **about, "results": records}) + "\n")
        self._torn = False


@dataclass(frozen=True)
class Rates:
    """Seconds to load a model, to train on a token and to score one."""

    load: float
    trained: float
    scored: float

    @classmethod
    def measure(cls, data: Dataset) -> Rates:
        """A few steps and a few batches of a dataset."""
        some = data.train.head(64)
        rows, steps = Labelled(some.texts, some.labels), 4
        _, annotator, _ = next(data.task.members())
        spec = {**fit_spec(data.task, annotator, len(rows)), "mlm_alpha": 0.0, "steps": steps}
        none: Texts = {name: [] for name in some.texts}
        nothing = Labelled({}, np.zeros(0, dtype=np.int64))
        spent = []
        for labelled in (nothing, nothing, rows):  # the first imports torch and reads the file from the disk
            start = time.perf_counter()
            fitted = method("pet").train(spec, labelled, none, data.base, data.profile, 0)
            spent.append(time.perf_counter() - start)
        fitted.log_probabilities(data.test.head(16).texts)
        start = time.perf_counter()
        scored = data.test.head(256)
        fitted.log_probabilities(scored.texts)
        tokens = tokens_of_row(data)
        return cls(
            spent[1],
            max(spent[2] - spent[1], 0.0) / (steps * spec["batch_size"] * tokens),
            (time.perf_counter() - start) / (len(scored) * tokens),
        )


def tokens_of_row(data: Dataset) -> float:
    """The mean tokens of a test row in a pattern."""
    longest = min(data.task.resolved("training")["max_length"], data.base.positions)
    encoder = Encoder(load_tokenizer(data.base.path), longest, data.task.training.truncation)
    _, annotator, _ = next(data.task.members())
    encoded = encoder.encode(Template.parse(annotator.pattern), data.test.head(200).texts, masks=1)
    return float(encoded.tokens.lengths.mean())


def estimate(data: Dataset, labels: int, half: str, rates: Rates) -> float:
    """The expected seconds of half a cell, from its steps and rows."""
    training, student = data.task.training_on(labels), data.task.resolved("student")
    members = len(list(data.task.members()))
    pool = data.train if data.unlabelled is None else data.unlabelled
    transfer, test = min(data.cap, len(pool)), len(data.test)
    if half == "rivals":
        encoders = 2 if data.original else 1
        trained = encoders * FINE_TUNE["steps"] * FINE_TUNE["batch_size"]
        scored, loads = 2 * encoders * test, 2 * encoders
    else:
        fits = 1 + training["folds"] if labels and training["steps"] else 0
        # Without dropout a step reads a row once (`pipeline.training.taken_once`).
        batch = min(training["batch_size"], labels) if training["dropout"] == 0.0 else training["batch_size"]
        batch += training["mlm_batch_size"] if training["mlm_alpha"] else 0
        generations = data.task.ipet.generations
        trained = members * (fits + generations) * training["steps"] * batch
        students = 2 if generations else 1
        read = student["batch_size"] * (1.25 if labels else 1.0)  # see `pipeline.student`
        trained += int(students * student["steps"] * read)
        scored = members * (transfer + test * (2 if labels else 1)) + test
        scored += members * (generations * transfer + test) + test if generations else 0
        loads = members * (min(fits, 1) + 1 + generations) + 1
    return tokens_of_row(data) * (trained * rates.trained + scored * rates.scored) + loads * rates.load


def table(records: Sequence[Record], cap: int) -> str:
    """The records as Markdown: means over the seeds with standard deviations, in per cent."""
    known = [*METHODS, *RIVALS, *IPET_METHODS, *ORIGINAL_METHODS]
    methods = [name for name in known if any(record["method"] == name for record in records)]
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["dataset"], record["labels"]), []).append(record)
    parts = []
    for metric, title in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1")):
        lines = [
            f"{title}, per cent: mean ± standard deviation over the seeds (draws of the labelled rows)\n",
            f"| dataset | labels | seeds | {' | '.join(methods)} |",
            f"|---|--:|--:|{'--:|' * len(methods)}",
        ]
        for (dataset, labels), group in groups.items():
            cells = []
            for name in methods:
                values = [100 * r[metric] for r in group if r["method"] == name and r[metric] is not None]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
            seeds = len({record["seed"] for record in group})
            lines.append(f"| {dataset} | {labels} | {seeds} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    parts.append(paired(records))
    parts.append(f"Transfer and test sets hold at most {cap:,} rows each, drawn with a fixed seed.")
    return "\n\n".join(parts)


def paired(records: Sequence[Record]) -> str:
    """How far the ensemble and its student are ahead of fine-tuning on the same draws, with 95 % intervals (t)."""
    lines = [
        "Ahead of fine-tuning on the same draws, points of accuracy: mean, and its 95 % interval over the draws\n",
        "| dataset | labels | ahead of | ensemble | student |",
        "|---|--:|---|--:|--:|",
    ]
    values: dict[tuple[str, int], dict[tuple[str, int], float]] = {}
    for record in records:
        if record["accuracy"] is not None:
            cell = values.setdefault((record["dataset"], record["labels"]), {})
            cell[record["method"], record["seed"]] = 100 * record["accuracy"]
    for (dataset, labels), found in values.items():
        for rival in [name for name in (*RIVALS, *ORIGINAL_METHODS) if "fine-tune" in name]:
            cells = []
            for name in ("ensemble", "student"):
                mine = {seed: value for (other, seed), value in found.items() if other == name}
                apart = [
                    mine[seed] - value for (other, seed), value in found.items() if other == rival and seed in mine
                ]
                cells.append(interval(apart) if len(apart) > 1 else "-")
            if any((rival, seed) in found for _, seed in found):
                lines.append(f"| {dataset} | {labels} | {rival} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """The mean of two values or more, and its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in _names(text)]
    if any(number < 0 for number in numbers):
        raise ValueError("numbers of rows are 0 or more")
    return numbers


def _share(text: str) -> tuple[int, int]:
    k, n = (int(part) for part in text.split("/"))
    if not 1 <= k <= n:
        raise ValueError("shares are 1/N to N/N")
    return k, n


def run(
    data: Path,
    datasets: Sequence[str],
    labels: Sequence[int],
    seeds: int,
    *,
    task: Path | None = None,
    cap: int = CAP,
    ipet: int = 0,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    dev: bool = False,
    original: Path | None = None,
    share: tuple[int, int] = (1, 1),
) -> list[Record]:
    """Run the cells that are not there yet.

    Args:
        data: the directory with a folder for each dataset.
        datasets: names of folders.
        labels: numbers of labelled rows.
        seeds: how many draws, numbered from 0.
        task: a task file instead of that in ``benchmarks/tasks``; then there is one dataset.
        cap: the most rows of the transfer set, and of the test set.
        ipet: the generations of iPET; 0 leaves its methods out.
        out: the JSON-lines file with finished cells.
        overrides: dotted.key=value, for the task.
        dev: score rows cut from train.
        original: another encoder, to fine-tune and to embed with.
        share: (k, n) takes every n-th half alone, from the k-th on.

    Returns:
        The records of these cells: dataset, labels, seed, method, accuracy, macro_f1, seconds.

    Raises:
        InputError: a dataset or a task is missing or does not fit.
    """
    if task is not None and len(datasets) != 1:
        raise InputError("one task file goes with one dataset", where="--task")
    results = Results(out or Path(f"quality-{'+'.join(datasets)}-cap{cap}.jsonl"))
    wanted: list[tuple[str, Dataset, int, int, str]] = []
    for name in datasets:
        settings = [f"ipet.generations={ipet}", *overrides]
        loaded = Dataset.load(
            data / name, Task.load(task or TASKS / f"{name}.yaml", settings), cap, dev=dev, original=original
        )
        for number in labels:
            if number:
                draw(loaded.train.labels, number, 0)  # tells now what can't be drawn, not hours later
            # Without labels nothing is drawn, so that all seeds would give the same.
            halves = ["prompting", "rivals"] if number else ["prompting"]
            for seed in range(seeds if number else 1):
                wanted += [(loaded.key(number, seed, half), loaded, number, seed, half) for half in halves]
    wanted = wanted[share[0] - 1 :: share[1]]
    _say(f"transfer and test sets hold at most {cap:,} rows each, drawn with a fixed seed (--cap)")
    missing = [half for half in wanted if half[0] not in results.cells]
    there = len(wanted) - len(missing)
    _say(f"{len(wanted)} halves of cells, {there} of them are in {results.path} already")
    if missing:
        rates = Rates.measure(missing[0][1])
        expected = [estimate(loaded, number, half, rates) for _, loaded, number, _, half in missing]
        _say(f"expected: {human_seconds(sum(expected))}")
        start = time.perf_counter()
        for i, (key, loaded, number, seed, half) in enumerate(missing):
            began = time.perf_counter()
            records = run_half(loaded, number, seed, half)
            results.add(
                key,
                records,
                dataset=loaded.name,
                labels=number,
                seed=seed,
                half=half,
                cap=cap,
                test_rows=len(loaded.test),
                profile=dict(loaded.profile),
            )
            ended = time.perf_counter()
            left = sum(expected[i + 1 :]) * (ended - start) / sum(expected[: i + 1])
            scores = ", ".join(f"{r['method']} {r['accuracy']:.3f}" for r in records if r["accuracy"] is not None)
            _say(
                f"[{i + 1}/{len(missing)}] {loaded.name}, {number} labels, seed {seed}: {scores}; "
                f"took {human_seconds(ended - began)}, about {human_seconds(left)} left"
            )
    return [record for key, *_ in wanted for record in results.cells[key]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder for each dataset")
    parser.add_argument("--datasets", type=_names, required=True, metavar="NAME[,NAME...]")
    parser.add_argument("--labels", type=_numbers, required=True, metavar="N[,N...]", help="numbers of labelled rows")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="draws, numbered from 0 (default 1)")
    parser.add_argument("--task", type=Path, metavar="FILE", help="a task file instead of benchmarks/tasks/NAME.yaml")
    parser.add_argument("--cap", type=int, default=CAP, metavar="ROWS", help=f"of transfer and test (default {CAP})")
    parser.add_argument("--ipet", type=int, default=0, metavar="N", help="generations of iPET (default 0: none)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the task")
    parser.add_argument("--dev", action="store_true", help="score rows cut from train, and leave the test rows alone")
    parser.add_argument("--original", type=Path, metavar="DIR", help="another encoder to fine-tune and embed with")
    parser.add_argument(
        "--share", type=_share, default=(1, 1), metavar="K/N", help="every N-th half of a cell alone, from the K-th on"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="finished cells; default quality-NAMES-capROWS.jsonl")
    parser.add_argument("--json", action="store_true", help="print the records as JSON instead of tables")
    given = parser.parse_args(arguments)

    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        records = run(
            given.data,
            given.datasets,
            given.labels,
            given.seeds,
            task=given.task,
            cap=given.cap,
            ipet=given.ipet,
            out=given.out,
            overrides=given.set,
            dev=given.dev,
            original=given.original,
            share=given.share,
        )
    except ClozelineError as error:
        _say(f"error: {error}")
        return 2 if isinstance(error, InputError) else 1
    print(json.dumps(records, indent=1) if given.json else table(records, given.cap))
    return 0


if __name__ == "__main__":
    sys.exit(main())
