"""The stages as plain functions: each reads artifacts and writes one.

Any stage can be run by hand, from the request that `pipeline.plan.Call.request` gives::

    python -m pipeline.stages request.json
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.annotators import Labelled, method
from pipeline.base_model import EMBEDDED, BaseModel, resolve_base_model
from pipeline.batching import batch_share
from pipeline.cross_validation import stratified_folds
from pipeline.device import device_name, numeric_profile
from pipeline.ensemble import blend, disagreement, majority, margin, match_prior, shrunk_weights
from pipeline.errors import InputError, StoreDamaged
from pipeline.locations import is_url
from pipeline.metrics import classification_metrics
from pipeline.prepare import prepare_rows
from pipeline.routing import CANDIDATES_PER_ROW, lowest
from pipeline.settings import Settings
from pipeline.store import Artifact, Reference, Store, open_store, sha256_of
from pipeline.tables import ColumnRoles, Floats, Rows, from_lists, texts_of, to_lists
from pipeline.training import seed_of
from pipeline.transfer import fetch_file, fetch_tree

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What a stage is given.

    Attributes:
        spec: its settings.
        inputs: the artifacts it reads, by name.
        where: locations.
        key: its content key; seeds derive from its spec.
        out: an empty directory for its files.
        progress: called with work done and work in all.
    """

    spec: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    where: Mapping[str, Any]
    key: str
    out: Path
    progress: Progress

    def all(self, prefix: str) -> list[Artifact]:
        """The inputs whose names begin with ``prefix:``, in order."""
        return [self.inputs[name] for name in sorted(self.inputs) if name.startswith(prefix + ":")]

    def base(self) -> BaseModel:
        """The base model, found anew on this machine: only a directory or a URL lies where the plan saw it.

        Raises:
            InputError: it is not there, or is another one.
        """
        name = self.where["base_name"]
        of_hub = "@" in name and not Path(name).is_absolute()
        found = resolve_base_model(name if name == EMBEDDED or of_hub else str(self.where["base"]))
        if self.spec.get("base", found.weights) != found.weights:
            raise InputError(
                "the base model on this machine is not the one that the run was planned with",
                where=str(found.path),
                fix="install the same version of clozeline, or put the same directory, on every machine",
            )
        return found

    def labelled(self) -> Labelled:
        """The labelled rows, or none."""
        if "labelled" not in self.inputs:
            return Labelled({}, np.zeros(0, dtype=np.int64))
        rows = Rows(self.inputs["labelled"].path).read()
        return Labelled(texts_of(rows), np.array(rows.column("label").to_pylist(), dtype=np.int64))


def ingest(job: Job) -> dict[str, Any]:
    """Read one of the user's files; leaves ``rows.parquet`` (`pipeline.tables.rows_schema`) and ``quarantine.parquet``.

    Raises:
        InputError: the file changed since the plan was made, or a row can't be used.
    """
    file, spec = Path(job.where["file"]), job.spec
    if sha256_of(file) != spec["file"]:
        raise InputError("the file changed while the run was going on", where=str(file), fix="run again")
    roles = ColumnRoles(tuple(spec["text"]), spec["id"], tuple(spec["carry"]), spec.get("label"))
    if "label" in spec:
        roles = _without_absent(roles, file)
    found = tables.ingest(
        file, roles, job.out, label_names=spec.get("labels"), quarantine=spec["on_bad_rows"] == "quarantine"
    )
    if spec.get("distinct"):
        return {**vars(found), **_drop_repeated(job.out, str(file))}
    return dict(vars(found))


def _without_absent(roles: ColumnRoles, file: Path) -> ColumnRoles:
    """Labelled and test files need neither ids nor carried columns."""
    names = set(tables.open_parquet(file).schema_arrow.names)
    carry = tuple(name for name in roles.carry if name in names)
    return ColumnRoles(roles.text, roles.id if roles.id in names else None, carry, roles.label)


def _drop_repeated(out: Path, where: str) -> dict[str, Any]:
    """Keep the first of equal labelled rows; refuse equal texts with different labels."""
    rows = Rows(out).read()
    first: dict[str, int] = {}
    keep = []
    labels = rows.column("label").to_pylist()
    for i, content in enumerate(rows.column("content_hash").to_pylist()):
        if content not in first:
            first[content] = i
            keep.append(i)
        elif labels[first[content]] != labels[i]:
            raise InputError(
                f"rows {first[content]} and {i} hold the same text with different labels",
                where=where,
                fix="decide for one label and drop the other row",
            )
    if len(keep) < rows.num_rows:
        tables.write_table(out / "rows.parquet", rows.take(pa.array(keep)))
    counts = np.bincount(rows.column("label").take(pa.array(keep, pa.int64())).to_numpy())
    return {"rows": len(keep), "dropped": rows.num_rows - len(keep), "label_counts": counts.tolist()}


def prepare(job: Job) -> dict[str, Any]:
    """The view over all files; leaves ``renames.parquet`` (ids made unique) and ``excluded.parquet`` (labelled)."""
    sets = {name: Rows(job.inputs[name].path) for name in ("labelled", "test") if name in job.inputs}
    return prepare_rows(
        [Rows(artifact.path) for artifact in job.all("shard")],
        sets,
        job.out,
        names=job.where["names"],
        given_ids=job.spec["ids"],
    )


def sample(job: Job) -> dict[str, Any]:
    """Draw the transfer set: distinct texts with the lowest hashes, none of them labelled or in the test set.

    Leaves ``rows.parquet``: content_hash and the text columns, in the order of the hashes. Memory: 16 bytes a row.

    Raises:
        InputError: no row is left.
    """
    taken: set[str] = set()
    for name in ("labelled", "test"):
        if name in job.inputs:
            taken |= set(Rows(job.inputs[name].path).read(["content_hash"]).column(0).to_pylist())
    shards = [Rows(artifact.path) for artifact in job.all("shard")]
    # A content hash is uniform already, so its lowest values are a random draw that depends on nothing else.
    hashes = [
        np.array(batch.column(0).to_pylist(), dtype="S16")
        for rows in shards
        for batch in rows.batches(["content_hash"])
    ]
    distinct = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, dtype="S16")
    distinct = distinct[~np.isin(distinct, np.array(sorted(taken), dtype="S16"))] if taken else distinct
    chosen = distinct[: job.spec["rows"]]
    wanted = {value.decode() for value in chosen}
    picked = []
    for rows in shards:
        names = [name for name in rows.schema.names if name == "content_hash" or name.startswith(tables.TEXT)]
        for batch in rows.batches(names):
            at = []
            for i, content in enumerate(batch.column("content_hash").to_pylist()):
                if content in wanted:
                    wanted.discard(content)
                    at.append(i)
            if at:
                picked.append(batch.take(pa.array(at)))
    if not picked:
        raise InputError("there is no unlabelled row left once labelled and test rows are set aside", where="inputs")
    table = pa.Table.from_batches(picked).sort_by("content_hash")
    tables.write_table(job.out / "rows.parquet", table)
    return {
        "rows": table.num_rows,
        "pool_rows": int(sum(rows.count for rows in shards)),
        "distinct": len(distinct),
    }


def fit(job: Job) -> dict[str, Any]:
    """Train one annotator, and cross-validate it.

    Leaves ``annotator/`` and, where there are folds, ``cv.parquet``: out-of-fold log-probabilities.

    Raises:
        Diverged: the loss is no longer a number.
    """
    spec, labelled = job.spec, job.labelled()
    transfer = texts_of(Rows(job.inputs["sample"].path).read())
    train = method(spec["method"]).train
    base, profile = job.base(), spec["profile"]
    seed = seed_of("fit", spec["pattern"], spec["seed"])
    # All annotators share the folds, so that their out-of-fold scores can be blended too.
    folds = stratified_folds(labelled.labels, spec["folds"], seed_of("folds"))
    rounds = 1 + (0 if folds is None or spec["steps"] == 0 else int(folds.max()) + 1)
    steps = max(spec["steps"], 1) if len(labelled) else 1

    def part(number: int) -> Progress:
        return lambda done, total: job.progress(number * steps + done * steps // max(total, 1), rounds * steps)

    meta: dict[str, Any] = {"cv_accuracy": None, "cv_folds": 0, "labelled_rows": len(labelled)}
    if rounds > 1:
        assert folds is not None
        scores = np.zeros((len(labelled), len(spec["labels"])), dtype=np.float32)
        for number in range(rounds - 1):
            held = np.flatnonzero(folds == number)
            rest = labelled.take(np.flatnonzero(folds != number))
            one = train(spec, rest, transfer, base, profile, seed_of(seed, "fold", number), part(number))
            scores[held] = one.log_probabilities(labelled.take(held).texts)
            del one
            gc.collect()  # models hold reference cycles: without this each fold's stays until a full round
        _write_scores(job.out / "cv.parquet", scores)
        meta["cv_accuracy"] = round(float((scores.argmax(axis=1) == labelled.labels).mean()), 6)
        meta["cv_folds"] = rounds - 1
    annotator = train(spec, labelled, transfer, base, profile, seed, part(rounds - 1))
    job.progress(rounds * steps, rounds * steps)
    (job.out / "annotator").mkdir()
    annotator.save(job.out / "annotator")
    return meta


def annotate(job: Job) -> dict[str, Any]:
    """Score rows with one annotator; leaves ``scores.parquet``, float32 log-probabilities ``[rows, labels]``."""
    fitted = job.inputs["fit"]
    loaded = method(fitted.manifest["spec"]["method"]).load(fitted.path / "annotator", job.base(), job.spec["profile"])
    rows = Rows(job.inputs["rows"].path).read()
    scores = loaded.log_probabilities(texts_of(rows), job.progress) if rows.num_rows else _no_scores(fitted)
    _write_scores(job.out / "scores.parquet", scores)
    return {"rows": len(scores)}


def _no_scores(fitted: Artifact) -> Floats:
    return np.zeros((0, len(fitted.manifest["spec"]["labels"])), dtype=np.float32)


def _write_scores(path: Path, scores: Floats) -> None:
    tables.write_table(path, pa.table({"log_probabilities": to_lists(scores)}))


def _scores(artifact: Artifact, name: str = "scores.parquet") -> Floats:
    return from_lists(pq.read_table(artifact.path / name).column(0))


def blend_annotators(job: Job) -> dict[str, Any]:
    """Weigh the annotators and blend their scores of the transfer set.

    Leaves ``soft.parquet``: probs float32 ``[rows, labels]`` at T = 1 and disagreement float32 ``[rows]``.
    """
    fits = job.all("fit")
    accuracies = [artifact.meta["cv_accuracy"] for artifact in fits]
    labelled = job.labelled()
    settings = job.spec["ensemble"]
    if settings["weights"] == "uniform":
        weights = np.full(len(fits), 1 / len(fits))
    else:
        weights = shrunk_weights(accuracies, len(labelled))
    scores = [_scores(artifact) for artifact in job.all("annotate")]
    soft = blend(scores, weights)
    if settings["prior"] == "labelled" and len(labelled):
        counts = np.bincount(labelled.labels, minlength=len(job.spec["labels"])) + 1.0  # smoothed: none is zero
        soft = match_prior(soft, counts / counts.sum())
    table = pa.table({"probs": to_lists(soft), "disagreement": disagreement(scores, weights)})
    tables.write_table(job.out / "soft.parquet", table)
    shares = soft.mean(axis=0)
    return {
        "weights": [round(float(weight), 6) for weight in weights],
        "cv_accuracy": accuracies,
        "soft_shares": dict(zip(job.spec["labels"], [round(float(share), 6) for share in shares], strict=True)),
        "mean_disagreement": round(float(table.column("disagreement").to_numpy().mean()), 6),
    }


def distill(job: Job) -> dict[str, Any]:
    """Train the student on the soft labels and the labelled rows; leaves ``model/``."""
    from pipeline.student import distill as train_student

    soft = from_lists(pq.read_table(job.inputs["blend"].path / "soft.parquet", columns=["probs"]).column(0))
    transfer = texts_of(Rows(job.inputs["sample"].path).read())
    student = train_student(
        job.spec,
        soft,
        transfer,
        job.labelled(),
        job.base(),
        job.spec["profile"],
        seed_of("distill"),
        job.progress,
    )
    (job.out / "model").mkdir()
    student.save(job.out / "model")
    return {"transfer_rows": len(soft)}


def label(job: Job) -> dict[str, Any]:
    """Score all rows of a shard with the student, batch by batch; leaves ``scores.parquet`` in the shard's order."""
    from pipeline.student import Student, shifted

    student = Student.load(job.inputs["distill"].path / "model", job.spec["profile"])
    rows = Rows(job.inputs["rows"].path)
    names = [name for name in rows.schema.names if name.startswith(tables.TEXT)]
    schema = pa.schema([("log_probabilities", tables.probability_type(len(student.labels)))])
    total = rows.count
    with tables.parquet_writer(job.out / "scores.parquet", schema) as writer:
        done = 0
        for batch in rows.batches(names):
            scores = student.log_probabilities(texts_of(batch), shifted(job.progress, done, total))
            writer.write_batch(pa.record_batch([to_lists(scores)], schema=schema))
            done += batch.num_rows
    return {"rows": total}


def route(job: Job) -> dict[str, Any]:
    """Choose the candidates for review: the student's lowest margins, each text once, none labelled already.

    Leaves ``rows.parquet``: content_hash, the text columns, shard, row and margin. Memory: 4 bytes a row.
    """
    excluded = pq.read_table(job.inputs["prepare"].path / "excluded.parquet")
    margins, shards = [], job.all("shard")
    for number, scored in enumerate(job.all("label")):
        parts = [
            margin(np.exp(from_lists(batch.column(0))))
            for batch in pq.ParquetFile(scored.path / "scores.parquet").iter_batches(tables.BATCH_ROWS)
        ]
        values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
        mine = excluded.filter(pc.equal(excluded.column("shard"), number)).column("row").to_numpy()
        values[mine] = np.inf
        margins.append(values)
    flat = np.concatenate(margins)
    open_rows = int(np.isfinite(flat).sum())
    want = CANDIDATES_PER_ROW * job.spec["budget"]
    # Equal texts are reviewed once: where they crowd the lowest margins, the window widens until it holds enough.
    window = min(2 * want, open_rows)
    while True:
        table = _candidates(shards, margins, lowest(flat, window), want)
        if table.num_rows == want or window == open_rows:
            break
        window = min(4 * window, open_rows)
    tables.write_table(job.out / "rows.parquet", table)
    return {"rows": table.num_rows}


def _candidates(shards: list[Artifact], margins: list[Floats], best: np.ndarray, want: int) -> pa.Table:
    """Rows given by their number over all shards: lowest margin first, each text once, at most ``want``."""
    offsets = np.cumsum([0, *(len(values) for values in margins)])
    picked = [_take(Rows(shards[0].path), np.zeros(0, dtype=np.int64), 0, margins[0])]
    for number, artifact in enumerate(shards):
        mine = best[(best >= offsets[number]) & (best < offsets[number + 1])]
        if len(mine):
            picked.append(_take(Rows(artifact.path), np.sort(mine - offsets[number]), number, margins[number]))
    order = [(name, "ascending") for name in ("margin", "content_hash", "shard", "row")]
    table = pa.concat_tables(picked).sort_by(order)
    first: dict[str, int] = {}
    for i, content in enumerate(table.column("content_hash").to_pylist()):
        first.setdefault(content, i)
    return table.take(pa.array(list(first.values())[:want], pa.int64()))


def _take(rows: Rows, at: np.ndarray, shard: int, margins: Floats) -> pa.Table:
    """Some rows of a shard with their place and margin."""
    names = [name for name in rows.schema.names if name == "content_hash" or name.startswith(tables.TEXT)]
    table = rows.take(at, names)
    table = table.append_column("shard", pa.array(np.full(len(at), shard), pa.int64()))
    table = table.append_column("row", pa.array(at, pa.int64()))
    return table.append_column("margin", pa.array(margins[at], pa.float32()))


def evaluate(job: Job) -> dict[str, Any]:
    """Compare annotators, blends and student, by cross-validation and on the test file; leaves ``metrics.json``."""
    names, labels = job.spec["members"], job.spec["labels"]
    blended = job.inputs["blend"].meta
    weights = np.array(blended["weights"]) / sum(blended["weights"])
    uniform = np.full(len(names), 1 / len(names))
    accuracies = dict(zip(names, blended["cv_accuracy"], strict=True))
    known = {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}
    chosen = max(known, key=lambda name: known[name]) if known else None
    metrics: dict[str, Any] = {"cross_validation": None, "test": None, "best_annotator": chosen}
    labelled = job.labelled()
    if known and len(known) == len(names):
        held_out = [_scores(artifact, "cv.parquet") for artifact in job.all("fit")]
        metrics["cross_validation"] = {
            name: classification_metrics(part.argmax(axis=1), labelled.labels, labels)
            for name, part in [*zip(names, held_out, strict=True), ("weighted", blend(held_out, weights))]
        }
    if "test" in job.inputs:
        rows = Rows(job.inputs["test"].path).read()
        keep = np.ones(rows.num_rows, dtype=np.bool_)
        if "labelled" in job.inputs:
            known_texts = set(Rows(job.inputs["labelled"].path).read(["content_hash"]).column(0).to_pylist())
            keep = np.array([h not in known_texts for h in rows.column("content_hash").to_pylist()], dtype=np.bool_)
        truth = rows.column("label").to_numpy()[keep]
        scores = [_scores(artifact)[keep] for artifact in job.all("annotate")]
        each = {name: part.argmax(axis=1) for name, part in zip(names, scores, strict=True)}
        oracle = max(each, key=lambda name: int((each[name] == truth).sum()))
        methods = {
            "best annotator": each[chosen] if chosen else None,
            "majority": majority(scores),
            "uniform": blend(scores, uniform).argmax(axis=1),
            "weighted": blend(scores, weights).argmax(axis=1),
            "student": _scores(job.inputs["student"])[keep].argmax(axis=1),
            "oracle annotator": each[oracle],
        }
        metrics["test"] = {
            "rows": len(truth),
            "dropped_as_labelled": int((~keep).sum()),
            "oracle_annotator": oracle,
            "annotators": {name: classification_metrics(part, truth, labels) for name, part in each.items()},
            "methods": {
                name: None if part is None else classification_metrics(part, truth, labels)
                for name, part in methods.items()
            },
        }
    (job.out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True), encoding="utf-8")
    return {"best_annotator": chosen}


def release(job: Job) -> dict[str, Any]:
    """Write the labelled dataset as it will be published; leaves ``version/``."""
    from pipeline.release import write_release

    shutil.copytree(job.inputs["distill"].path / "model", job.out / "model")
    return write_release(job.spec, job.inputs, job.out, job.key, job.progress)


STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "ingest": ingest,
    "prepare": prepare,
    "sample": sample,
    "fit": fit,
    "annotate": annotate,
    "blend": blend_annotators,
    "distill": distill,
    "label": label,
    "route": route,
    "evaluate": evaluate,
    "release": release,
}


def run_stage(
    request: Mapping[str, Any],
    progress: Progress = lambda done, total: None,
    building: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Artifact, bool]:
    """Run one stage, unless the store has its artifact.

    Args:
        request: what `pipeline.plan.Call.request` gives.
        progress: called with work done and work in all.
        building: entered once it is sure that the artifact must be built, here and now; held while it is.

    Returns:
        The artifact, and whether it was built just now.

    Raises:
        InputError: the user's data is at fault.
        StoreDamaged: an input is missing from the store, or did not match its manifest and was discarded.
    """
    store = open_store(request["store"])
    mine = (request["stage"], request["key"])
    references = {name: (stage, key) for name, (stage, key) in request["inputs"].items()}
    built, record = False, dict[str, Any]()
    planned, here = request["spec"].get("profile"), numeric_profile()
    if planned is not None and any(planned[name] != here[name] for name in ("device", "torch")):
        raise InputError(
            f"the run was planned for {planned['device']} with torch {planned['torch']}, and this machine has "
            f"{here['device']} with torch {here['torch']}",
            where=request["title"],
            fix="set CLOZELINE_STAGE_DEVICE where runs are planned to what the workers have",
        )

    def build(out: Path) -> dict[str, Any]:
        nonlocal built
        built = True
        fetched = {reference: _fetched(store, reference, request["title"]) for reference in set(references.values())}
        inputs = {name: fetched[reference] for name, reference in references.items()}
        job = Job(request["spec"], inputs, _located(request["where"]), request["key"], out, progress)
        with building():
            started = time.time()
            meta = STAGES[request["stage"]](job)
            seconds = time.time() - started  # while the device is held: waiting for it is no part of the time
        record.update(started=started, seconds=round(seconds, 3), batch_share=batch_share())
        if request.get("on_device"):
            record["device"] = device_name()
        return meta

    header = {
        "version": request["version"],
        "spec": request["spec"],
        "inputs": {name: list(reference) for name, reference in references.items()},
    }
    with store.using([mine, *references.values()], {"stage": request["title"]}):
        return store.get_or_build(*mine, build, header, record), built


def _fetched(store: Store, reference: Reference, title: str) -> Artifact:
    """An input with its files on this machine; whoever planned the stage has a missing one built again."""
    found = store.find(*reference)
    if found is None:
        raise StoreDamaged(
            f"{title} needs {'/'.join(reference)}, which the store does not have (any more): another stage may have "
            "found it damaged and discarded it"
        )
    try:
        return store.fetch(found)
    except StoreDamaged:
        store.discard(*reference)
        raise


def _located(where: Mapping[str, Any]) -> Mapping[str, Any]:
    """Locations on this machine: what lies behind a URL is fetched by whoever reads it."""
    cache, located = Settings().cache_path, dict(where)
    if "file" in where:
        located["file"] = fetch_file(where["file"], cache)
    if is_url(where.get("base", "")):
        located["base"] = fetch_tree(where["base"], cache)
        if located["base"] is None:
            raise InputError("there is no base model", where=where["base"], fix="put it back, or run again")
    return located


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(run_stage(json.loads(Path(file).read_text(encoding="utf-8")))[0].path)
