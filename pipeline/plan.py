"""The plan of a run: every stage with its key, before any of them runs.

Keys are made of file hashes, settings and other stages' keys, so that the whole plan is known from the start:
what is cached, what is not, and what the rest will cost. A key holds what changes the bytes and nothing else:
no paths, no worker, no log level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.base_model import EMBEDDED, BaseModel
from pipeline.device import numeric_profile
from pipeline.errors import InputError
from pipeline.ipet import selection_seed, teachers
from pipeline.publishing import release_path
from pipeline.store import Store, key_of, sha256_of
from pipeline.tables import first_rows, open_parquet
from pipeline.task import Task
from pipeline.versions import newest_manifest, read_forgotten

# Bumped when a stage's meaning changes, so that what older code left is not taken for its work.
STAGE_VERSIONS = {
    "ingest": 1,
    "prepare": 2,
    "sample": 2,
    "adapt": 3,
    "fit": 7,
    "annotate": 4,
    "select": 1,
    "blend": 1,
    "distill": 3,
    "label": 4,
    "route": 2,
    "evaluate": 1,
    "release": 1,
}
# Stages that read texts and labels of a file and nothing else of it: what is carried along, or how ids are made,
# must not refit a model.
_READ_TEXTS_ALONE = frozenset({"sample", "fit", "annotate", "select", "blend", "distill", "label", "evaluate"})
ON_DEVICE = frozenset({"adapt", "fit", "annotate", "distill", "label"})
# Floating-point operations a second that the stages reach, measured with the embedded model on two cores (bf16
# in hardware and fp32); for a GPU a guess.
_RATES: dict[tuple[str, str], float] = {
    ("cpu", "bfloat16"): 4.0e11,
    ("cpu", "float32"): 1.4e11,
    ("cuda", "bfloat16"): 6e13,
    ("cuda", "float32"): 1e13,
}
_CHARACTERS_PER_TOKEN = 4.4


@dataclass(frozen=True)
class Call:
    """One stage of a plan.

    Attributes:
        stage: its name.
        spec: the settings that change its bytes.
        inputs: the stages whose artifacts it reads, by the name under which it asks for them.
        where: locations (files, the base model's directory); never part of the key.
        label: what it is doing, for people.
        flops: floating-point operations expected, 0 for stages without a model.
        texts: for a user's file, what its texts and labels depend on.
        generation: for what trains and uses annotators, which of iPET's generations it is; never part of the key.
    """

    stage: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, Call] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    flops: float = 0.0
    texts: Mapping[str, Any] | None = None
    generation: int = 0

    @cached_property
    def text_key(self) -> str:
        """The key of the texts (and labels) in it, whatever else it holds."""
        return self.key if self.texts is None else key_of({"texts": self.texts})

    @cached_property
    def key(self) -> str:
        """The content key of what it leaves."""
        return key_of(
            {
                "stage": self.stage,
                "version": STAGE_VERSIONS[self.stage],
                "spec": self.spec,
                "inputs": {
                    name: call.text_key if self.stage in _READ_TEXTS_ALONE else call.key
                    for name, call in self.inputs.items()
                },
            }
        )

    @property
    def on_device(self) -> bool:
        """Whether it runs a model."""
        return self.stage in ON_DEVICE

    @property
    def title(self) -> str:
        """Its stage and what it is doing."""
        return f"{self.stage} {self.label}".strip()

    def request(self, store: Store) -> dict[str, Any]:
        """The call as JSON, for whatever process runs it."""
        return {
            "stage": self.stage,
            "key": self.key,
            "version": STAGE_VERSIONS[self.stage],
            "spec": dict(self.spec),
            "inputs": {name: [call.stage, call.key] for name, call in self.inputs.items()},
            "where": dict(self.where),
            "store": store.location,
            "title": self.title,
        }


@dataclass(frozen=True)
class Plan:
    """All stages of a run, each after what it needs; the last is the release.

    Attributes:
        calls: the stages.
        profile: the numeric profile.
        rows: the unlabelled rows, as the files' footers count them.
        tokens: what they hold, by the mean length of the first rows.
    """

    calls: list[Call]
    profile: Mapping[str, str]
    rows: int
    tokens: float

    @property
    def release(self) -> Call:
        """The last stage."""
        return self.calls[-1]

    def find(self, stage: str) -> list[Call]:
        """The calls of a stage."""
        return [call for call in self.calls if call.stage == stage]

    def to_build(self, store: Store) -> list[Call]:
        """The calls whose artifacts the store does not have."""
        return [call for call in self.calls if store.find(call.stage, call.key) is None]

    def seconds(self, call: Call) -> float:
        """A rough estimate of a call's duration."""
        rate = _RATES.get((self.profile["device"], self.profile["dtype"]), 1e11)
        work, minutes = call.flops / float(rate), call.spec.get("minutes")
        return (1.3 if call.on_device else 0.3) + (min(work, 60 * float(minutes)) if minutes else work)


def build_plan(
    task: Task, base: BaseModel, previous: Mapping[str, Any] | None = None, forgotten: Sequence[str] = ()
) -> Plan:
    """Plan a run.

    Args:
        task: what to do.
        base: its base model.
        previous: the manifest of the release that is there already; its transfer set is kept (see `_Planner.sample`).
        forgotten: content hashes of the texts that are left out.

    Raises:
        InputError: a file can't be read.
    """
    return _Planner(task, base, previous, forgotten).plan()


def plan_run(task: Task, out: str | None) -> Plan:
    """Plan a run of a task, given what was released, and forgotten, at its release path.

    Raises:
        InputError: the base model or a file can't be read, or the release path holds another task's versions.
    """
    release = release_path(task, out)
    newest = newest_manifest(release)
    if newest is not None and newest["name"] != task.name:
        raise InputError(
            f"the newest version there is of the task {newest['name']!r}, and this one is called {task.name!r}",
            where=release,
            fix=f"choose another --out, or, if it is the same task, write name: {newest['name']} into its file",
        )
    return build_plan(task, task.base(), newest, read_forgotten(release).contents)


class _Planner:
    def __init__(
        self, task: Task, base: BaseModel, previous: Mapping[str, Any] | None, forgotten: Sequence[str]
    ) -> None:
        self.task, self.base, self.previous = task, base, previous
        self.labelled_rows = 0
        if task.inputs.labelled is not None:
            self.labelled_rows = open_parquet(task.path(task.inputs.labelled)).metadata.num_rows
        self.training, self.student = task.training_on(self.labelled_rows), task.resolved("student")
        self.profile = numeric_profile(self.training["dtype"])
        self.labels = task.label_names
        # Where nothing was forgotten the keys are as if nothing could be.
        self.forgotten = {"forgotten": sorted(forgotten)} if forgotten else {}
        # A directory goes by its path, whatever it is called: MODEL@1 may be one, or a revision on the hub.
        is_directory = base.name != EMBEDDED and (task.root / base.name).is_dir()
        name = str(base.path) if is_directory else base.name
        self.where = {"base": task.source_of(base.path), "base_name": name}
        self.calls: dict[str, Call] = {}
        self.adapted: dict[str, Call] = {}  # what a model starts from, where that is not the base model itself

    def add(self, call: Call) -> Call:
        return self.calls.setdefault(call.key, call)

    def ingest(self, file: Path, name: str, *, labelled: bool = False, distinct: bool = False) -> Call:
        inputs = self.task.inputs
        spec: dict[str, Any] = {
            "file": sha256_of(file),
            "text": inputs.text,
            "id": inputs.id,
            "carry": inputs.carry,
            "on_bad_rows": inputs.on_bad_rows,
        }
        if labelled:
            spec |= {"label": inputs.label, "labels": self.labels, "distinct": distinct}
        texts = {key: value for key, value in spec.items() if key not in {"id", "carry", "on_bad_rows"}}
        texts["version"] = STAGE_VERSIONS["ingest"]
        return self.add(Call("ingest", spec, where={"file": self.task.source_of(file)}, label=name, texts=texts))

    def plan(self) -> Plan:
        task, inputs = self.task, self.task.inputs
        files = task.unlabelled_files()
        rows = {file: open_parquet(file).metadata.num_rows for file in files}
        characters = _mean_characters(files[0], inputs.text)
        shards = [self.ingest(file, name) for file, name in zip(files, _short_names(files), strict=True)]
        sets: dict[str, Call] = {}
        for name, given in (("labelled", inputs.labelled), ("test", inputs.test)):
            if given is not None:
                # A test set is taken as it is; of equal labelled rows one is enough, and two labels are a mistake.
                file = task.path(given)
                sets[name] = self.ingest(file, file.name, labelled=True, distinct=name == "labelled")
        numbered = {f"shard:{i:06d}": shard for i, shard in enumerate(shards)}
        prepare = self.add(
            Call(
                "prepare",
                {"ids": inputs.id is not None, **self.forgotten},
                {**numbered, **sets},
                {"names": _short_names(files)},
            )
        )
        sample = self.sample(shards, rows, files, sets)
        cap = task.sample.rows_per_label * len(self.labels)
        transfer_rows = min(sum(rows.values()), cap)
        tokens = characters / _CHARACTERS_PER_TOKEN
        if task.adapt.steps:
            self.adapted = {"adapt": self.adapt(sample)}
        forward = 2 * self.base.encoder_parameters
        labelled = {name: call for name, call in sets.items() if name == "labelled"}
        members = self.members(labelled, sample, tokens)
        # Weights and cross-validation are generation 0's (see `pipeline.stages.fit`).
        fits = {f"fit:{i:03d}": fit for i, fit in enumerate(members.values())}
        scored = self.annotate(members, sample, "transfer", transfer_rows, tokens)
        for generation in range(1, task.ipet.generations + 1):
            drawn = self.select(generation, fits, scored, labelled, sample)
            members = self.members(labelled, sample, tokens, generation, drawn)
            scored = self.annotate(members, sample, "transfer", transfer_rows, tokens)
        blend = self.add(
            Call(
                "blend",
                {"ensemble": task.ensemble.model_dump(), "labels": self.labels},
                {**scored, **fits, **labelled},
                {"members": list(members)},  # for messages alone
            )
        )
        read = min(tokens + 2, self.training["max_length"])
        distill = self.add(
            Call(
                "distill",
                {
                    **self.student,
                    "template": task.student_template,
                    "labels": self.labels,
                    "max_length": self.training["max_length"],
                    "truncation": self.training["truncation"],
                    "base": self.base.weights,
                    "profile": self.profile,
                },
                {"blend": blend, "sample": sample, **labelled, **self.adapted},
                self.where,
                flops=3 * forward * 1.4 * self.student["steps"] * self.student["batch_size"] * read,
            )
        )

        def label(rows_of: Call, count: int) -> Call:
            call = Call(
                "label",
                {"profile": self.profile},
                {"distill": distill, "rows": rows_of},
                label=rows_of.label,
                flops=count * read * forward,
            )
            return self.add(call)

        labelled_shards = {
            f"label:{i:06d}": label(shard, rows[file])
            for i, (shard, file) in enumerate(zip(shards, files, strict=True))
        }
        budget = task.release.review_budget
        route = self.add(
            Call(
                "route",
                {"budget": budget},
                {**numbered, **labelled_shards, "prepare": prepare},
                label="review queue",
            )
        )
        queued = self.annotate(members, route, "queue", 2 * budget, tokens)
        evaluated: dict[str, Call] = {**fits, "blend": blend}
        if "test" in sets:
            count = open_parquet(task.path(inputs.test or "")).metadata.num_rows
            evaluated |= self.annotate(members, sets["test"], "test", count, tokens) | {
                "student": label(sets["test"], count)
            }
        evaluate = self.add(Call("evaluate", {"labels": self.labels, "members": list(members)}, {**evaluated, **sets}))
        release = Call(
            "release",
            {
                "name": task.name,
                "labels": self.labels,
                "text": inputs.text,
                "carry": inputs.carry,
                "members": list(members),
                "budget": budget,
                "sampled_from": [call.text_key for name, call in sample.inputs.items() if name.startswith("shard:")],
                "sampled_beside": {name: call.text_key for name, call in sets.items()},
                "task": self.settings(),
            },
            {
                **numbered,
                **labelled_shards,
                **queued,
                **labelled,
                "prepare": prepare,
                "sample": sample,
                "blend": blend,
                "distill": distill,
                "route": route,
                "evaluate": evaluate,
                **self.adapted,
            },
        )
        self.add(release)
        return Plan(list(self.calls.values()), self.profile, sum(rows.values()), sum(rows.values()) * tokens)

    def settings(self) -> dict[str, Any]:
        """The task as it was resolved, without paths: for the manifest and the card."""
        task = self.task
        return {
            "labels": {label: list(words) for label, words in task.labels.items()},
            "annotators": [
                {"name": name, "pattern": annotator.pattern, "words": task.words_of(annotator), "seed": seed}
                for name, annotator, seed in task.members()
            ],
            "base_model": {"name": Path(self.base.name).name, "weights": self.base.weights},
            "preset": task.preset,
            "training": self.training,
            "ensemble": task.ensemble.model_dump(),
            **({"ipet": task.ipet.model_dump()} if task.ipet.generations else {}),
            **({"adapt": task.adapt.model_dump()} if task.adapt.steps else {}),
            "sample": task.sample.model_dump(),
            "student": {**self.student, "template": task.student_template},
            "profile": self.profile,
        }

    def sample(self, shards: list[Call], rows: Mapping[Path, int], files: list[Path], sets: Mapping[str, Call]) -> Call:
        """The transfer set: frozen once drawn, drawn again when the labels change or the pool has grown."""
        counts = {shard.text_key: rows[file] for shard, file in zip(shards, files, strict=True)}
        by_key = {shard.text_key: shard for shard in shards}
        previous, growth = self.previous or {}, self.task.sample.refresh_growth
        drawn = previous.get("sampled_from", [])
        keep = bool(drawn) and all(key in by_key for key in drawn)
        keep = keep and previous["sampled_beside"] == {name: call.text_key for name, call in sets.items()}
        if keep and growth is not None:
            keep = sum(counts.values()) <= sum(counts[key] for key in drawn) * (1 + growth)
        source = [by_key[key] for key in drawn] if keep else list(by_key.values())
        source.sort(key=lambda call: call.text_key)
        inputs = {f"shard:{i:06d}": shard for i, shard in enumerate(source)}
        cap = self.task.sample.rows_per_label * len(self.labels)
        return self.add(Call("sample", {"rows": cap, **self.forgotten}, {**inputs, **sets}, label="transfer set"))

    def adapt(self, sample: Call) -> Call:
        """The base model, trained on the transfer set; each text is read whole, in the columns' order."""
        adapt = self.task.adapt
        spec = {
            **adapt.model_dump(),
            "template": self.task.student_template,
            "max_length": self.training["max_length"],
            "base": self.base.weights,
            "profile": self.profile,
        }
        work = adapt.steps * adapt.batch_tokens * (8 if adapt.keep else 6) * self.base.encoder_parameters
        return self.add(Call("adapt", spec, {"sample": sample}, self.where, "base model", work * 1.4))

    def members(
        self,
        labelled: Mapping[str, Call],
        sample: Call,
        tokens: float,
        generation: int = 0,
        drawn: Mapping[str, Call] | None = None,
    ) -> dict[str, Call]:
        """The ensemble: one fit a pattern and seed, with drawn rows for each from generation 1 on."""
        shared = {key: value for key, value in self.training.items() if key != "dtype"}
        if not labelled:  # rows that annotators drew say nothing of how common labels are
            shared["match_prior"] = 0.0
        if generation:
            shared["folds"] = 0
        elif not labelled:  # nothing is trained, so that hardly a setting of training changes a byte
            shared |= {"steps": 0, "folds": 0, "batch_size": 1, "learning_rate": 0.0, "mlm_alpha": 0.0, "dropout": None}
            shared["learned"] = 1.0
        if shared["mlm_alpha"] == 0:
            shared["mlm_batch_size"] = 0
        length = min(tokens + 10, self.training["max_length"])
        batch, folds = shared["batch_size"], shared["folds"]
        parts = [1.0, *([1 - 1 / folds] * folds if folds else [])]  # of the labelled rows, one training each
        if shared["dropout"] == 0.0 and not generation:  # a step reads a row once (`pipeline.training.taken_once`)
            reads = sum(min(batch, part * self.labelled_rows) for part in parts)
        else:
            reads = len(parts) * batch
        if shared["mlm_alpha"]:
            reads += len(parts) * shared["mlm_batch_size"]
        fits = {}
        for name, annotator, seed in self.task.members():
            spec = {
                **shared,
                "method": "pet",
                "pattern": annotator.pattern,
                "words": [[label, words] for label, words in self.task.words_of(annotator).items()],
                "labels": self.labels,
                "seed": seed if labelled or generation else 0,
                "base": self.base.weights,
                "profile": self.profile,
            }
            fits[name] = self.add(
                Call(
                    "fit",
                    spec,
                    {"sample": sample, **labelled, **self.adapted, **({"drawn": drawn[name]} if drawn else {})},
                    self.where,
                    _titled(name, generation),
                    6 * self.base.encoder_parameters * shared["steps"] * reads * length * 1.4,
                    generation=generation,
                )
            )
        return fits

    def annotate(
        self, members: Mapping[str, Call], rows_of: Call, suffix: str, count: int, tokens: float
    ) -> dict[str, Call]:
        """The scores that each member gives rows."""
        length = min(tokens + 10, self.training["max_length"])
        return {
            f"annotate:{i:03d}": self.add(
                Call(
                    "annotate",
                    {"profile": self.profile},
                    {"fit": fit, "rows": rows_of, **self.adapted},
                    self.where,
                    f"{_titled(name, fit.generation)} on {suffix}",
                    count * length * 2 * self.base.encoder_parameters,
                    generation=fit.generation,
                )
            )
            for i, (name, fit) in enumerate(members.items())
        }

    def select(
        self,
        generation: int,
        fits: Mapping[str, Call],
        scored: Mapping[str, Call],
        labelled: Mapping[str, Call],
        sample: Call,
    ) -> dict[str, Call]:
        """The rows that each member's next generation learns from, by what some of the others say of them."""
        members, ipet = list(self.task.members()), self.task.ipet
        first = generation == 1 and not labelled  # its size is fixed
        calls = {}
        for i, (name, annotator, number) in enumerate(members):
            seed = selection_seed(annotator.pattern, number, generation)
            chosen = teachers(i, len(members), ipet.share, seed)
            names = [f"{stage}:{teacher:03d}" for stage in ("annotate", "fit") for teacher in chosen]
            spec = {
                "ensemble": self.task.ensemble.model_dump(),
                "labels": self.labels,
                "generation": generation,
                "growth": 1.0 if first else ipet.growth,
                "seed": seed,
            }
            inputs = {**{name: {**scored, **fits}[name] for name in names}, "sample": sample, **labelled}
            calls[name] = self.add(Call("select", spec, inputs, label=_titled(name, generation)))
        return calls


def _titled(name: str, generation: int) -> str:
    """An annotator's name for people."""
    return f"{name} generation {generation}" if generation else name


def _short_names(files: list[Path]) -> list[str]:
    """Names for people: the file's own, with as many of its directories as it takes to tell the files apart."""
    for depth in range(1, 20):
        names = ["/".join(file.parts[-depth:]) for file in files]
        if len(set(names)) == len(names):
            break
    return names


def _mean_characters(file: Path, columns: list[str]) -> float:
    """The mean length of the first rows' text, for estimates."""
    parquet = open_parquet(file)
    known = [column for column in columns if column in parquet.schema_arrow.names]
    batch = first_rows(parquet, known, str(file), 256)
    if batch is None or batch.num_rows == 0:
        return 0.0
    lengths = (len(str(value)) for column in batch.columns for value in column.to_pylist() if value is not None)
    return sum(lengths) / int(batch.num_rows)


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> human_seconds(75), human_seconds(4000)
    ('1 min 15 s', '1.1 h')
    """
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if seconds < 3600 else f"{seconds / 3600:.1f} h"
