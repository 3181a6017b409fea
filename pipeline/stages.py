"""The stages as plain functions: each reads artifacts and writes one.

Any stage can be run by hand, from the request that `pipeline.plan.Call.request` gives::

    python -m pipeline.stages request.json
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.annotators import Labelled, method
from pipeline.base_model import EMBEDDED, BaseModel, resolve_base_model
from pipeline.batching import batch_share
from pipeline.device import device_name, numeric_profile
from pipeline.ensemble import Doubles, blend, disagreement, majority, margin, soft_labels
from pipeline.errors import InputError, StoreDamaged
from pipeline.fitting import fit_annotator
from pipeline.ipet import Selection, select_rows
from pipeline.locations import is_url
from pipeline.metrics import METHODS, classification_metrics
from pipeline.prepare import excluded_rows, prepare_rows
from pipeline.progress import Progress, part_of, told
from pipeline.ragged import Numbers, offsets_of
from pipeline.repeats import Hashes, find_repeats, gather, hashes_of_hex, on_disk
from pipeline.routing import CANDIDATES_PER_ROW, lowest
from pipeline.settings import Settings
from pipeline.store import CHECKPOINTS, Artifact, Reference, Store, key_of, open_store, sha256_of
from pipeline.tables import ColumnRoles, Floats, Rows, from_lists, texts_of, to_lists
from pipeline.template import Template
from pipeline.training import Diverged, seed_of
from pipeline.transfer import fetch_file, fetch_tree

_CHECKPOINT_SECONDS = 7 * 86_400.0


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
        checkpoints: a directory of this machine, to be made, which outlives a kill and goes once the artifact is there.
        discard: takes an input by its name out of the store, so that whoever planned the stage has it built again.
    """

    spec: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    where: Mapping[str, Any]
    key: str
    out: Path
    progress: Progress
    checkpoints: Path
    discard: Callable[[str], None]

    def all(self, prefix: str) -> list[Artifact]:
        """The inputs whose names begin with ``prefix:``, in order."""
        return [self.inputs[name] for name in sorted(self.inputs) if name.startswith(prefix + ":")]

    def base(self, headless: bool = False) -> BaseModel:
        """What a model starts from: the adapted base model, or the base model itself.

        The latter is found anew on this machine: only a directory or a URL lies where the plan saw it.

        Args:
            headless: whether an encoder without a masked-LM head will do.

        Raises:
            InputError: it is not there, or is another one.
        """
        if "adapt" in self.inputs:
            return resolve_base_model(str(self.inputs["adapt"].path / "model"))
        name = self.where["base_name"]
        of_hub = "@" in name and not Path(name).is_absolute()
        given = name if name == EMBEDDED or of_hub else str(self.where["base"])
        found = resolve_base_model(given, headless=headless)
        if self.spec.get("base", found.weights) != found.weights:
            raise InputError(
                "the base model on this machine is not the one that the run was planned with",
                where=str(found.path),
                fix="install the same version of clozeline, or put the same directory, on every machine",
            )
        return found

    def labelled(self, name: str = "labelled") -> Labelled:
        """The labelled rows, or those of another input; none where there is no such input."""
        if name not in self.inputs:
            return Labelled({}, np.zeros(0, dtype=np.int64))
        rows = Rows(self.inputs[name].path).read()
        return Labelled(texts_of(rows), np.array(rows.column("label").to_pylist(), dtype=np.int64))


def ingest(job: Job) -> dict[str, Any]:
    """Read one of the user's files; leaves ``rows.parquet`` (`pipeline.tables.rows_schema`) and ``quarantine.parquet``.

    Raises:
        InputError: the file changed since the plan was made, or a row can't be used.
    """
    file, spec = Path(job.where["file"]), job.spec
    before = _state_of(file)
    if sha256_of(file) != spec["file"]:
        raise _changed(file)
    roles = ColumnRoles(tuple(spec["text"]), spec["id"], tuple(spec["carry"]), spec.get("label"))
    if "label" in spec:
        roles = _without_absent(roles, file)
    found = tables.ingest(
        file,
        roles,
        job.out,
        label_names=spec.get("labels"),
        quarantine=spec["on_bad_rows"] == "quarantine",
        progress=job.progress,
    )
    if _state_of(file) != before:  # what was read is not what the key stands for
        raise _changed(file)
    if spec.get("distinct"):
        return {**vars(found), **_drop_repeated(job.out, str(file))}
    return dict(vars(found))


def _state_of(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written to, or another takes its place."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _changed(file: Path) -> InputError:
    return InputError("the file changed while the run was going on", where=str(file), fix="run again")


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
                f"rows {first[content]} and {i} (those without text not counted) hold one text with different labels",
                where=where,
                fix="decide for one label and drop the other row",
            )
    if len(keep) < rows.num_rows:
        tables.write_table(out / "rows.parquet", rows.take(pa.array(keep)))
    counts = np.bincount(rows.column("label").take(pa.array(keep, pa.int64())).to_numpy())
    return {"rows": len(keep), "dropped": rows.num_rows - len(keep), "label_counts": counts.tolist()}


def prepare(job: Job) -> dict[str, Any]:
    """The view over all files.

    Leaves ``renames.parquet`` (ids made unique) and ``excluded.parquet`` (rows with a labelled or forgotten text).
    """
    sets = {name: Rows(job.inputs[name].path) for name in ("labelled", "test") if name in job.inputs}
    return prepare_rows(
        [Rows(artifact.path) for artifact in job.all("shard")],
        sets,
        job.out,
        names=job.where["names"],
        given_ids=job.spec["ids"],
        forgotten=job.spec.get("forgotten", ()),
        progress=job.progress,
    )


def sample(job: Job) -> dict[str, Any]:
    """Draw the transfer set: distinct texts with the lowest hashes, none labelled, in the test set or forgotten.

    Leaves ``rows.parquet``: content_hash and the text columns, in the order of the hashes.

    Raises:
        InputError: no row is left, or a labelled or test row holds a forgotten text.
    """
    forgotten = hashes_of_hex(pa.array(job.spec.get("forgotten", ()), pa.string()))
    taken = [forgotten]
    for name in ("labelled", "test"):
        if name in job.inputs:
            hashes = hashes_of_hex(Rows(job.inputs[name].path).read(["content_hash"]).column(0))
            _refuse_forgotten(hashes, forgotten, name)
            taken.append(hashes)
    shards = [Rows(artifact.path) for artifact in job.all("shard")]
    pool = sum(rows.count for rows in shards)
    # A content hash is uniform already, so its lowest values are a random draw that depends on nothing else.
    chosen = np.zeros(0, dtype=np.uint64)
    every = itertools.chain.from_iterable(rows.content_hashes() for rows in shards)
    for batch_hashes in told(every, job.progress, 2 * pool):
        hashes = np.unique(batch_hashes)
        if len(chosen) == job.spec["rows"]:
            hashes = hashes[hashes < chosen[-1]]
        fresh = hashes[~np.isin(hashes, np.concatenate([chosen, *taken]))]
        if len(fresh):
            chosen = np.sort(np.concatenate([chosen, fresh]))[: job.spec["rows"]]
    if not len(chosen):
        raise InputError("there is no unlabelled row left once labelled and test rows are set aside", where="inputs")
    names = ["content_hash", *shards[0].text_columns]
    picked, found = list[pa.RecordBatch](), np.zeros(len(chosen), dtype=np.bool_)
    batches = itertools.chain.from_iterable(rows.batches(names) for rows in shards)
    for batch in told(batches, job.progress, 2 * pool, pool):
        hashes, first = np.unique(hashes_of_hex(batch.column("content_hash")), return_index=True)
        place = np.minimum(np.searchsorted(chosen, hashes), len(chosen) - 1)
        new = (chosen[place] == hashes) & ~found[place]
        if new.any():
            found[place[new]] = True
            picked.append(batch.take(pa.array(np.sort(first[new]))))
    table = pa.Table.from_batches(picked).sort_by("content_hash")
    tables.write_table(job.out / "rows.parquet", table)
    return {"rows": table.num_rows, "pool_rows": pool}


def _refuse_forgotten(hashes: Hashes, forgotten: Hashes, name: str) -> None:
    """Refuse labelled and test rows with a forgotten text, before anything is fitted.

    They are not dropped in silence as unlabelled ones are: people chose each of them, a model would be fitted to a
    handful fewer than its task says, and what is to be forgotten would stay in a file that is read every night.
    """
    rows = np.flatnonzero(np.isin(hashes, forgotten))
    if len(rows):
        shown = ", ".join(str(row) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
        raise InputError(
            f"{len(rows)} {name} rows hold a text that was forgotten: {shown} (counted from 0, rows without text and "
            "repeated ones left out)",
            where=f"inputs.{name}",
            fix="remove the rows from the file",
        )


def adapt(job: Job) -> dict[str, Any]:
    """Train the base model on the transfer set's texts by masked-language modelling; leaves ``model/``.

    What a killed run had done lies in its checkpoints until the artifact is in the store.

    Raises:
        InputError: there is too little text, or training diverged.
    """
    from pipeline.adapt import Adapting

    rows = Template.parse(job.spec["template"]).render_rows(texts_of(Rows(job.inputs["sample"].path).read()))
    _sweep_checkpoints(job.checkpoints.parent)
    adapting = Adapting(job.spec, rows, job.base(headless=True), job.spec["profile"], seed_of("adapt"))
    with _telling_divergence("the base model's", "adapt", job.spec["learning_rate"]):
        adapting.run(job.checkpoints, job.progress)
    (job.out / "model").mkdir()
    adapting.save(job.out / "model")
    curve = adapting.curve
    return {"curve": curve.points, "best": curve.best, "texts": len(rows), "pieces": len(adapting.train)}


@contextmanager
def _telling_divergence(whose: str, section: str, rate: float) -> Iterator[None]:
    """Tell a training without which there is no release as the user's to mend; ``section`` is the task file's.

    Raises:
        InputError: it diverged.
    """
    try:
        yield
    except Diverged as error:
        raise InputError(
            f"{whose} training diverged: {error}", where=section, fix=f"lower {section}.learning_rate (it is {rate:g})"
        ) from error


def checkpoints_of(store: Store, key: str) -> Path:
    """Where this machine keeps the checkpoints of a stage that is not done."""
    return Settings().cache_path / CHECKPOINTS / key_of({"store": store.location, "key": key})


def _sweep_checkpoints(root: Path) -> None:
    """Remove those of stages that nobody went on with for a week: another setting, or another machine, built them."""
    for place in root.glob("*"):
        with suppress(FileNotFoundError):  # another stage has just replaced its checkpoint
            newest = max((path.stat().st_mtime for path in place.glob("*")), default=0.0)
            if time.time() - newest > _CHECKPOINT_SECONDS:
                shutil.rmtree(place, ignore_errors=True)


def fit(job: Job) -> dict[str, Any]:
    """Train one annotator on the labelled and the drawn rows, and cross-validate it.

    Leaves ``annotator/`` and, where there are folds, ``cv.parquet``: out-of-fold log-probabilities. Where training
    diverges, or held-out scores are no numbers, it leaves neither, and ``diverged`` says why: equal inputs diverge
    alike, so that nobody need try again.

    Rows are drawn for iPET's later generations, which have no folds: their teachers saw every labelled row, so that
    a held-out one would be judged by those who know it. The cross-validation of generation 0 stands for all.
    """
    try:
        return _fitted(job)
    except Diverged as error:
        return {"cv_accuracy": None, "cv_folds": 0, "labelled_rows": len(job.labelled()), "diverged": str(error)}


def _fitted(job: Job) -> dict[str, Any]:
    spec, drawn = job.spec, job.labelled("drawn")
    labelled = job.labelled().joined(drawn)
    transfer = texts_of(Rows(job.inputs["sample"].path).read())
    seed = seed_of("fit", spec["pattern"], spec["seed"])
    base = job.base()
    fitted = fit_annotator(spec, labelled, transfer, base, spec["profile"], seed, job.progress)
    meta: dict[str, Any] = {
        "base": base.weights,
        "cv_accuracy": fitted.accuracy,
        "cv_folds": fitted.folds,
        "labelled_rows": len(labelled) - len(drawn),
    }
    if "drawn" in job.inputs:
        meta["drawn_rows"] = len(drawn)
    if fitted.held_out is not None:
        _write_scores(job.out / "cv.parquet", fitted.held_out)
    (job.out / "annotator").mkdir()
    fitted.annotator.save(job.out / "annotator")
    return meta


def annotate(job: Job) -> dict[str, Any]:
    """Score rows with one annotator; leaves ``scores.parquet``, float32 log-probabilities ``[rows, labels]``.

    An annotator that diverged, in training or in what it says of these rows, has no scores: nothing but its
    ``diverged`` is left.
    """
    fitted = job.inputs["fit"]
    if "diverged" in fitted.meta:
        return {"rows": 0, "diverged": fitted.meta["diverged"]}
    base = job.base()
    if fitted.meta["base"] != base.weights:
        job.discard("fit")
        raise StoreDamaged(
            "the adapted base model was built anew and is another one: what was fitted to the one before was discarded"
        )
    loaded = method(fitted.manifest["spec"]["method"]).load(fitted.path / "annotator", base, job.spec["profile"])
    rows, parts, done = Rows(job.inputs["rows"].path), [_no_scores(fitted)], 0
    total = rows.count
    for batch in rows.batches(rows.text_columns):
        parts.append(loaded.log_probabilities(texts_of(batch), part_of(job.progress, done, batch.num_rows, total)))
        done += batch.num_rows
    scores = np.concatenate(parts)
    strange = int((~np.isfinite(scores)).sum())
    if strange:
        return {"rows": 0, "diverged": f"{strange} of its scores of {len(scores)} rows are no numbers"}
    _write_scores(job.out / "scores.parquet", scores)
    return {"rows": len(scores)}


def _no_scores(fitted: Artifact) -> Floats:
    return np.zeros((0, len(fitted.manifest["spec"]["labels"])), dtype=np.float32)


def _write_scores(path: Path, scores: Floats) -> None:
    tables.write_table(path, pa.table({"log_probabilities": to_lists(scores)}))


def _scores(artifact: Artifact, name: str = "scores.parquet") -> Floats:
    return from_lists(pq.read_table(artifact.path / name).column(0))


def select(job: Job) -> dict[str, Any]:
    """Draw the rows that an annotator's next generation learns from, as its teachers label them (`pipeline.ipet`).

    Leaves ``rows.parquet``: content_hash, the text columns and the label, in the order of the transfer set.
    """
    names, spec = job.spec["labels"], job.spec
    counts, sound = job.labelled().counts(len(names)), _sound(job.all("fit"), job.all("annotate"))
    rows = Rows(job.inputs["sample"].path).read()
    if sound:
        accuracies = [artifact.meta["cv_accuracy"] for artifact in _of(job.all("fit"), sound)]
        scores = [_scores(artifact) for artifact in _of(job.all("annotate"), sound)]
        soft, _ = soft_labels(scores, accuracies, counts, spec["ensemble"])
        found = select_rows(soft, counts, spec["generation"], spec["growth"], spec["seed"])
    else:  # all its teachers diverged: it learns from the labelled rows alone, again
        found = Selection(np.full(rows.num_rows, -1), np.zeros(len(names), dtype=np.int64))
    drawn = np.flatnonzero(found.labels >= 0)
    rows = rows.take(pa.array(drawn))
    tables.write_table(job.out / "rows.parquet", rows.append_column("label", pa.array(found.labels[drawn])))
    per_label = np.bincount(found.labels[drawn], minlength=len(names)).tolist()
    return {
        "rows": len(drawn),
        "label_counts": dict(zip(names, per_label, strict=True)),
        "filled": dict(zip(names, found.filled.tolist(), strict=True)),
    }


def blend_annotators(job: Job) -> dict[str, Any]:
    """Weigh the annotators and blend their scores of the transfer set.

    Leaves ``soft.parquet``: probs float32 ``[rows, labels]`` at T = 1 and disagreement float32 ``[rows]``. Who
    diverged has the weight 0, and ``diverged`` says why.

    Raises:
        InputError: so many annotators diverged that no ensemble is left.
    """
    fits, scored = job.all("fit"), job.all("annotate")
    sound = _sound(fits, scored)
    if len(sound) < min(2, len(scored)):
        raise _too_few(job.where["members"], fits, scored, fits[0].manifest["spec"]["learning_rate"])
    accuracies = [artifact.meta["cv_accuracy"] for artifact in fits]
    counts = job.labelled().counts(len(job.spec["labels"]))
    scores = [_scores(artifact) for artifact in _of(scored, sound)]
    soft, weights = soft_labels(scores, [accuracies[i] for i in sound], counts, job.spec["ensemble"])
    table = pa.table({"probs": to_lists(soft), "disagreement": disagreement(scores, weights)})
    tables.write_table(job.out / "soft.parquet", table)
    shares = soft.mean(axis=0)
    weight_of = dict(zip(sound, weights, strict=True))
    why = _why_diverged(fits, scored)
    return {
        **({"diverged": why} if any(why) else {}),
        "weights": [round(float(weight_of.get(i, 0)), 6) for i in range(len(fits))],
        "cv_accuracy": accuracies,
        "soft_shares": dict(zip(job.spec["labels"], [round(float(share), 6) for share in shares], strict=True)),
        "mean_disagreement": round(float(table.column("disagreement").to_numpy().mean()), 6),
    }


def _sound(fits: list[Artifact], scored: list[Artifact]) -> list[int]:
    """The numbers of the annotators that did not diverge."""
    return [i for i, why in enumerate(_why_diverged(fits, scored)) if why is None]


def _why_diverged(fits: list[Artifact], scored: list[Artifact]) -> list[str | None]:
    """Why each annotator diverged, in iPET's first generation or the one that scored; None where it did not."""
    both = zip(fits, scored, strict=True)
    return [fit.meta.get("diverged") or score.meta.get("diverged") for fit, score in both]


def _of(artifacts: list[Artifact], numbers: list[int]) -> list[Artifact]:
    return [artifacts[i] for i in numbers]


def _too_few(names: list[str], fits: list[Artifact], scored: list[Artifact], rate: float) -> InputError:
    """What to say when fewer than two annotators, or not the only one, are left; ``rate`` is the learning rate."""
    told = "; ".join(
        f"{name}: {why}" for name, why in zip(names, _why_diverged(fits, scored), strict=True) if why is not None
    )
    # Nought where there was nothing to train on.
    lower = f"lower training.learning_rate (it is {rate:g}), or " if rate else ""
    return InputError(
        f"training diverged, and fewer than two annotators are left ({told})",
        where="annotators",
        fix=f"{lower}take another base_model",
    )


def distill(job: Job) -> dict[str, Any]:
    """Train the student on the soft labels and the labelled rows; leaves ``model/``.

    Raises:
        InputError: its training diverged.
    """
    from pipeline.student import distill as train_student

    soft = from_lists(pq.read_table(job.inputs["blend"].path / "soft.parquet", columns=["probs"]).column(0))
    transfer = texts_of(Rows(job.inputs["sample"].path).read())
    with _telling_divergence("the student's", "student", job.spec["learning_rate"]):
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
    """Score all rows of a shard with the student, equal texts once; leaves ``scores.parquet`` in the shard's order.

    Raises:
        InputError: scores are no numbers.
    """
    from pipeline.student import Student, sound

    student = Student.load(job.inputs["distill"].path / "model", job.spec["profile"])
    rows = Rows(job.inputs["rows"].path)
    labels = len(student.labels)
    schema = pa.schema([("log_probabilities", tables.probability_type(labels))])
    repeats = find_repeats(gather(rows.content_hashes(), job.out), job.out)
    known = on_disk((repeats.groups, labels), np.float32, job.out)  # of the texts that come again
    done, total = 0, rows.count
    with tables.parquet_writer(job.out / "scores.parquet", schema) as writer:
        for batch in rows.batches(rows.text_columns):
            here = slice(done, done + batch.num_rows)
            group, new = repeats.group[here], repeats.occurrence[here] == 1
            scores = np.zeros((batch.num_rows, labels), dtype=np.float32)
            texts = texts_of(batch.filter(pa.array(new)))
            progress = part_of(job.progress, done, batch.num_rows, total)
            scores[new] = sound(student.log_probabilities(texts, progress))
            known[group[new & (group >= 0)]] = scores[new & (group >= 0)]
            scores[~new] = known[group[~new]]
            writer.write_batch(pa.record_batch([to_lists(scores)], schema=schema))
            done += batch.num_rows
            job.progress(done, total)
    return {"rows": total, "repeated": repeats.repeated}


def route(job: Job) -> dict[str, Any]:
    """Choose the candidates for review: the student's lowest margins, each text once, none labelled already.

    Leaves ``rows.parquet``: content_hash, the text columns, shard, row and margin.
    """
    shards = [Rows(artifact.path) for artifact in job.all("shard")]
    contents = itertools.chain.from_iterable(rows.content_hashes() for rows in shards)
    offsets = offsets_of([rows.count for rows in shards])
    pool = int(offsets[-1])
    repeats = find_repeats(gather(told(contents, job.progress, 2 * pool), job.out), job.out)
    parts = [
        _margins(
            scored,
            excluded_rows(job.inputs["prepare"].path, number),
            repeats.occurrence[offsets[number] : offsets[number + 1]],
        )
        for number, scored in enumerate(job.all("label"))
    ]
    every = told(itertools.chain(*parts), job.progress, 2 * pool, pool)
    best, margins = lowest(every, CANDIDATES_PER_ROW * job.spec["budget"])
    table = _candidates(shards, best, margins)
    tables.write_table(job.out / "rows.parquet", table)
    return {"rows": table.num_rows}


def _margins(scored: Artifact, left_out: Numbers, occurrence: npt.NDArray[np.int32]) -> Iterator[Floats]:
    """The student's margins of a shard, batch by batch, infinite for rows that are left out or repeat a text."""
    start = 0
    with pq.ParquetFile(scored.path / "scores.parquet") as file:
        for batch in file.iter_batches(tables.BATCH_ROWS):
            values = margin(np.exp(from_lists(batch.column(0))))
            first, last = np.searchsorted(left_out, [start, start + len(values)])
            values[left_out[first:last] - start] = np.inf
            values[occurrence[start : start + len(values)] > 1] = np.inf
            start += len(values)
            yield values


def _candidates(shards: list[Rows], best: Numbers, margins: Floats) -> pa.Table:
    """Rows given by their number over all shards, lowest margin first."""
    order = np.argsort(best)
    best, margins = best[order], margins[order]
    offsets = offsets_of([rows.count for rows in shards])
    picked = []
    for number, rows in enumerate(shards):
        mine = slice(*np.searchsorted(best, offsets[number : number + 2]))
        picked.append(_take(rows, best[mine] - offsets[number], number, margins[mine]))
    table = pa.concat_tables(picked)
    return table.sort_by([(name, "ascending") for name in ("margin", "content_hash", "shard", "row")])


def _take(rows: Rows, at: Numbers, shard: int, margins: Floats) -> pa.Table:
    """Some rows of a shard with their place and margin."""
    table = rows.take(at, ["content_hash", *rows.text_columns])
    table = table.append_column("shard", pa.array(np.full(len(at), shard), pa.int64()))
    table = table.append_column("row", pa.array(at, pa.int64()))
    return table.append_column("margin", pa.array(margins, pa.float32()))


def evaluate(job: Job) -> dict[str, Any]:
    """Compare annotators, blends and student, by cross-validation and on the test file; leaves ``metrics.json``."""
    fits, labels = job.all("fit"), job.spec["labels"]
    blended = job.inputs["blend"].meta
    sound = [i for i, weight in enumerate(blended["weights"]) if weight > 0]
    names = [job.spec["members"][i] for i in sound]
    weights = np.array(blended["weights"])
    accuracies = {name: blended["cv_accuracy"][i] for name, i in zip(names, sound, strict=True)}
    known = {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}
    chosen = max(known, key=lambda name: known[name]) if known else None
    metrics: dict[str, Any] = {"cross_validation": None, "test": None, "best_annotator": chosen}
    labelled = job.labelled()
    if known and len(known) == len(names):
        held_out = [_scores(artifact, "cv.parquet") for artifact in _of(fits, sound)]
        metrics["cross_validation"] = {
            name: classification_metrics(part.argmax(axis=1), labelled.labels, labels)
            for name, part in [*zip(names, held_out, strict=True), ("weighted", _weighted(held_out, weights[sound]))]
        }
    if "test" in job.inputs:
        metrics["test"] = _on_test_file(job, sound, weights, chosen)
    (job.out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True), encoding="utf-8")
    return {"best_annotator": chosen}


def _weighted(scores: list[Floats], weights: Doubles) -> Floats:
    """The blend of some of the annotators, whose weights need not sum to one."""
    return blend(scores, weights / weights.sum())


def _on_test_file(job: Job, sound: list[int], weights: Doubles, chosen: str | None) -> dict[str, Any] | None:
    """The test part of the metrics; None where the file holds no row with text.

    Args:
        job: the job of `evaluate`.
        sound: the numbers of the annotators that were blended; one whose scores of these rows are no numbers is left
            out, and named in ``diverged``.
        weights: of all annotators.
        chosen: the best annotator by cross-validation, if any.
    """
    members, labels = job.spec["members"], job.spec["labels"]
    rows = Rows(job.inputs["test"].path).read()
    if not rows.num_rows:
        return None
    keep = np.ones(rows.num_rows, dtype=np.bool_)
    if "labelled" in job.inputs:
        known_texts = set(Rows(job.inputs["labelled"].path).read(["content_hash"]).column(0).to_pylist())
        keep = np.array([h not in known_texts for h in rows.column("content_hash").to_pylist()], dtype=np.bool_)
    truth = rows.column("label").to_numpy()[keep]
    scored = job.all("annotate")
    why = {members[i]: scored[i].meta["diverged"] for i in sound if "diverged" in scored[i].meta}
    here = [i for i in sound if members[i] not in why]
    scores = [_scores(artifact)[keep] for artifact in _of(scored, here)]
    each = {members[i]: part.argmax(axis=1) for i, part in zip(here, scores, strict=True)}
    oracle = max(each, key=lambda name: int((each[name] == truth).sum())) if each else None
    methods: dict[str, Any] = dict.fromkeys(METHODS)
    methods["student"] = _scores(job.inputs["student"])[keep].argmax(axis=1)
    if oracle is not None:
        methods |= {
            "best annotator": each.get(chosen) if chosen else None,
            "majority": majority(scores),
            "uniform": _weighted(scores, np.ones(len(scores))).argmax(axis=1),
            "weighted": _weighted(scores, weights[here]).argmax(axis=1),
            "oracle annotator": each[oracle],
        }
    return {
        "rows": len(truth),
        "dropped_as_labelled": int((~keep).sum()),
        "oracle_annotator": oracle,
        "annotators": {name: classification_metrics(part, truth, labels) for name, part in each.items()},
        "methods": {
            name: None if part is None else classification_metrics(part, truth, labels)
            for name, part in methods.items()
        },
        **({"diverged": why} if why else {}),
    }


def release(job: Job) -> dict[str, Any]:
    """Write the labelled dataset as it will be published; leaves ``version/``."""
    from pipeline.release import write_release

    shutil.copytree(job.inputs["distill"].path / "model", job.out / "model")
    return write_release(job.spec, job.inputs, job.out, job.key, job.progress)


STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "ingest": ingest,
    "prepare": prepare,
    "sample": sample,
    "adapt": adapt,
    "fit": fit,
    "annotate": annotate,
    "select": select,
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
    checkpoints = checkpoints_of(store, request["key"])
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
        job = Job(
            request["spec"],
            inputs,
            _located(request["where"]),
            request["key"],
            out,
            progress,
            checkpoints,
            lambda name: store.discard(*references[name]),
        )
        with building():
            started = time.time()
            meta = STAGES[request["stage"]](job)
            seconds = time.time() - started  # while the device is held: waiting for it is no part of the time
        record.update(started=started, seconds=round(seconds, 3), batch_share=batch_share())
        if "file" in request["where"]:
            record["source"] = request["where"]["file"]
        if request.get("on_device"):
            record["device"] = device_name()
        return meta

    header = {
        "version": request["version"],
        "spec": request["spec"],
        "inputs": {name: list(reference) for name, reference in references.items()},
    }
    with store.using([mine, *references.values()], {"stage": request["title"]}):
        artifact = store.get_or_build(*mine, build, header, record)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return artifact, built


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
