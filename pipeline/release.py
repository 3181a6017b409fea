"""The labelled dataset: its row schema and its files, written whole inside the store.

`pipeline.publishing` copies them under a release path.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import tables
from pipeline.ensemble import disagreement, margin
from pipeline.exports import export_queue
from pipeline.prepare import Renames, excluded_rows
from pipeline.progress import Progress
from pipeline.report import CARD, dataset_card, html_report
from pipeline.routing import ROUTES, priorities, reasons
from pipeline.store import Artifact, sha256_of
from pipeline.tables import CARRY, TEXT, Floats, Rows, from_lists, to_lists

SCHEMA_VERSION = 1
ROWS_PER_FILE = 500_000
# What a release adds to the user's columns; a column of one of these names can't be carried along.
OWN_COLUMNS = (
    "row_id",
    "content_hash",
    "label",
    "label_name",
    "confidence",
    "margin",
    "probs",
    "votes",
    "disagreement",
    "route",
    "priority",
    "reasons",
)
VERSION = "version"


def release_features(labels: list[str], text: list[str], carried: pa.Schema) -> Any:
    """The `datasets.Features` of a release.

    ClassLabel columns are nullable int64 (any other type loses the names on the way through `datasets`), and
    distributions are lists of fixed length, in the order of the ClassLabel's names.
    """
    from datasets import ClassLabel, Features, List, Value

    features: dict[str, Any] = {"row_id": Value("string"), "content_hash": Value("string")}
    features |= {name: Value("string") for name in text}
    features |= Features.from_arrow_schema(carried)
    label = ClassLabel(names=labels)
    vote = {
        "annotator": Value("string"),
        "label": label,
        "confidence": Value("float32"),
        "weight": Value("float32"),
    }
    features |= {
        "label": label,
        "label_name": Value("string"),
        "confidence": Value("float32"),
        "margin": Value("float32"),
        "probs": List(Value("float32"), length=len(labels)),
        "votes": List(vote),
        "disagreement": Value("float32"),
        "route": ClassLabel(names=ROUTES),
        "priority": Value("float32"),
        "reasons": List(Value("string")),
    }
    return Features(features)


def write_release(
    spec: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    out: Path,
    key: str,
    progress: Progress,
) -> dict[str, Any]:
    """Write ``out/version``: data, card, report, metrics and manifest (the student's ``model`` is moved in)."""
    writer = _Writer(spec, inputs, out / VERSION)
    (out / VERSION / "data").mkdir(parents=True)
    (out / "model").rename(out / VERSION / "model")
    splits = {"review": writer.review(progress), "rest": writer.rest(progress), "train": writer.train()}
    counts = {name: rows for name, rows in splits.items() if rows}
    metrics = json.loads((inputs["evaluate"].path / "metrics.json").read_text(encoding="utf-8"))
    diverged = writer.diverged(metrics)
    summary = {
        "name": spec["name"],
        "rows": counts,
        "label_counts": dict(zip(spec["labels"], [int(count) for count in writer.label_counts], strict=True)),
        "weights": dict(zip(spec["members"], inputs["blend"].meta["weights"], strict=True)),
        "best_annotator": metrics["best_annotator"],
        "test": _brief(metrics),
        "quarantined": sum(artifact.meta["quarantined"] for artifact in writer.shards),
        "excluded_as_labelled": inputs["prepare"].meta.get("labelled_in_pool", 0),
        **diverged,
        **({"adapted": inputs["adapt"].meta} if "adapt" in inputs else {}),
    }
    version = out / VERSION
    (version / "metrics.json").write_text(json.dumps({**metrics, "summary": summary}, indent=1, sort_keys=True))
    (version / CARD).write_text(dataset_card(spec, summary, metrics), encoding="utf-8")
    (version / "report.html").write_text(html_report(spec, summary, metrics), encoding="utf-8")
    if counts.get("review"):
        (version / "exports").mkdir()
        queue = pq.read_table(writer.file("review")).to_pylist()
        for name, content in export_queue(queue, spec["labels"], spec["text"], key[:8]).items():
            (version / "exports" / name).write_text(content, encoding="utf-8")
    files = {
        str(path.relative_to(version)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(version.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "name": spec["name"],
        "labels": spec["labels"],
        "rows": counts,
        "files": files,
        "inputs": {name: list(_reference(artifact)) for name, artifact in inputs.items()},
        "sampled_from": spec["sampled_from"],
        "sampled_beside": spec["sampled_beside"],
        "task": spec["task"],
        **diverged,
        "environment": {
            "clozeline": package_version("clozeline"),
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("torch", "transformers", "pyarrow", "datasets")},
        },
    }
    (version / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    return summary


def _reference(artifact: Artifact) -> tuple[str, str]:
    return str(artifact.manifest["stage"]), artifact.key


def _brief(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the summary shows of the test: one line a method."""
    if metrics["test"] is None:
        return None
    keys = ("rows", "accuracy", "accuracy_low", "accuracy_high", "macro_f1")
    return {
        name: None if found is None else {key: found[key] for key in keys}
        for name, found in metrics["test"]["methods"].items()
    }


class _Writer:
    """Writes the splits of one version."""

    def __init__(self, spec: Mapping[str, Any], inputs: Mapping[str, Artifact], version: Path) -> None:
        self.spec, self.inputs, self.data = spec, inputs, version / "data"
        self.labels: list[str] = spec["labels"]
        self.shards = [inputs[name] for name in sorted(inputs) if name.startswith("shard:")]
        self.scored = [inputs[name] for name in sorted(inputs) if name.startswith("label:")]
        self.rows = [Rows(artifact.path) for artifact in self.shards]
        self.total = sum(rows.count for rows in self.rows)
        carried = [self.rows[0].schema.field(CARRY + name) for name in spec["carry"]]
        self.carried = pa.schema([field.with_name(field.name.removeprefix(CARRY)) for field in carried])
        self.schema = release_features(self.labels, spec["text"], self.carried).arrow_schema
        self.label_counts = np.zeros(len(self.labels), dtype=np.int64)
        prepared = inputs["prepare"].path
        self.queue = self._queue()
        shards, rows = (self.queue.column(name).to_numpy() for name in ("shard", "row"))
        self.left_out = [
            np.sort(np.concatenate([excluded_rows(prepared, number), rows[shards == number]]))
            for number in range(len(self.shards))
        ]

    def _annotated(self) -> list[tuple[str, float, Artifact]]:
        """The name, the weight and the scores of the queue of each annotator."""
        scored = [self.inputs[name] for name in sorted(self.inputs) if name.startswith("annotate:")]
        return list(zip(self.spec["members"], self.inputs["blend"].meta["weights"], scored, strict=True))

    def diverged(self, metrics: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """``diverged``: who was left out, and why; nothing where nobody was.

        Of somebody who took part in the blend it says where the scores are no numbers: only there they are left out.
        """
        members: list[str] = self.spec["members"]
        why = dict(zip(members, self.inputs["blend"].meta.get("diverged", [None] * len(members)), strict=True))
        queued = {name: artifact.meta.get("diverged") for name, _, artifact in self._annotated()}
        parts = [("the test file", (metrics["test"] or {}).get("diverged", {})), ("the review queue", queued)]
        for name in members:
            if why[name] is None:
                why[name] = "; ".join(f"{found[name]}, in {part}" for part, found in parts if found.get(name))
        told = {name: text for name, text in why.items() if text}
        return {"diverged": told} if told else {}

    def _queue(self) -> pa.Table:
        """The budget's rows among the candidates, most urgent first, with votes and disagreement."""
        candidates = Rows(self.inputs["route"].path).read()
        voters = [part for part in self._annotated() if part[1] > 0 and "diverged" not in part[2].meta]
        members, weights = [name for name, _, _ in voters], np.array([weight for _, weight, _ in voters])
        scores = [from_lists(pq.read_table(artifact.path / "scores.parquet").column(0)) for _, _, artifact in voters]
        margins = candidates.column("margin").to_numpy()
        apart = disagreement(scores, weights / weights.sum()) if voters else np.zeros_like(margins)
        urgency = priorities(margins, apart)
        best = np.argsort(-urgency, kind="stable")[: self.spec["budget"]]
        medians = (float(np.median(margins)), float(np.median(apart))) if len(margins) else (0.0, 0.0)
        votes = [
            [
                {
                    "annotator": name,
                    "label": int(part[i].argmax()),
                    "confidence": float(np.exp(part[i].max())),
                    "weight": float(weight),
                }
                for name, part, weight in zip(members, scores, weights, strict=True)
            ]
            for i in best
        ]
        table = candidates.select(["shard", "row"]).take(pa.array(best, pa.int64()))
        table = table.append_column("votes", pa.array(votes, self.schema.field("votes").type))
        table = table.append_column("disagreement", pa.array(apart[best], pa.float32()))
        table = table.append_column("priority", pa.array(urgency[best], pa.float32()))
        why = [reasons(float(margins[i]), float(apart[i]), *medians) for i in best]
        return table.append_column("reasons", pa.array(why, pa.list_(pa.string())))

    def _batch(self, columns: Mapping[str, Any], rows: int) -> pa.RecordBatch:
        """Columns in the release's schema; what is not given is null."""
        arrays = []
        for field in self.schema:
            given = columns.get(field.name)
            arrays.append(pa.nulls(rows, field.type) if given is None else _cast(given, field.type))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _columns(self, batch: pa.RecordBatch | pa.Table) -> dict[str, Any]:
        """The user's columns and the ids of a batch of rows."""
        names = batch.schema.names
        own = {name: batch.column(name) for name in ("row_id", "content_hash")}
        texts = {name: batch.column(TEXT + name) for name in self.spec["text"]}
        return own | texts | {name: batch.column(CARRY + name) for name in self.carried.names if CARRY + name in names}

    def _scores(self, scores: Floats) -> dict[str, Any]:
        """The student's columns."""
        probabilities = np.exp(scores)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        chosen = probabilities.argmax(axis=1) if len(scores) else np.zeros(0, dtype=np.int64)
        self.label_counts += np.bincount(chosen, minlength=len(self.labels))
        return {
            "label": pa.array(chosen, pa.int64()),
            "label_name": pa.array([self.labels[i] for i in chosen], pa.string()),
            "confidence": pa.array(probabilities.max(axis=1) if len(scores) else [], pa.float32()),
            "margin": pa.array(margin(probabilities) if len(scores) else [], pa.float32()),
            "probs": to_lists(probabilities),
        }

    def _labelled_batches(self, number: int) -> Iterator[tuple[int, pa.RecordBatch, Floats]]:
        """The batches of a shard, each with the number of its first row and its scores."""
        start, renames = 0, Renames(self.inputs["prepare"].path, number)
        scores = pq.ParquetFile(self.scored[number].path / "scores.parquet").iter_batches(tables.BATCH_ROWS)
        for batch, scored in zip(self.rows[number].batches(), scores, strict=True):
            ids = renames.apply(batch.column("row_id"), start)
            batch = batch.set_column(batch.schema.get_field_index("row_id"), "row_id", ids)
            yield start, batch, from_lists(scored.column(0))
            start += batch.num_rows

    def file(self, split: str, number: int = 0, files: int = 1) -> Path:
        """Where a file of a split lies."""
        return self.data / f"{split}-{number:05d}-of-{files:05d}.parquet"

    def review(self, progress: Progress) -> int:
        """The queue, most urgent first."""
        if self.queue.num_rows == 0:
            return 0
        found: dict[tuple[int, int], pa.RecordBatch] = {}
        wanted: list[set[int]] = [set() for _ in self.shards]
        places = list(zip(*(self.queue.column(name).to_pylist() for name in ("shard", "row")), strict=True))
        for shard, row in places:
            wanted[shard].add(row)
        done = 0
        for number, mine in enumerate(wanted):
            for start, batch, scores in self._labelled_batches(number) if mine else ():
                done += batch.num_rows
                progress(done, 2 * self.total)
                for row in sorted(mine & set(range(start, start + batch.num_rows))):
                    at = row - start
                    # Taken, not sliced: a slice would keep its whole batch, and the queue has rows of nearly all.
                    one = self._columns(batch.take(pa.array([at]))) | self._scores(scores[at : at + 1])
                    found[number, row] = self._batch(one, 1)
        table = pa.Table.from_batches([found[place] for place in places])
        for name in ("votes", "disagreement", "priority", "reasons"):
            column = _cast(self.queue.column(name), self.schema.field(name).type)
            table = table.set_column(table.schema.get_field_index(name), self.schema.field(name), column)
        table = self._routed(table, "review")
        tables.write_table(self.file("review"), table)
        return int(table.num_rows)

    def _routed(self, table: Any, route: str) -> Any:
        column = pa.array(np.full(table.num_rows, ROUTES.index(route)), pa.int64())
        return table.set_column(table.schema.get_field_index("route"), self.schema.field("route"), column)

    def rest(self, progress: Progress) -> int:
        """Every other row, in the order of the files, `ROWS_PER_FILE` a file."""
        expected = self.total - sum(len(left_out) for left_out in self.left_out)
        files = max(-(-expected // ROWS_PER_FILE), 1)
        if expected == 0:
            return 0
        number, inside, done = 0, 0, 0
        writer = tables.parquet_writer(self.file("rest", 0, files), self.schema)
        try:
            for shard in range(len(self.shards)):
                for start, batch, scores in self._labelled_batches(shard):
                    done += batch.num_rows
                    progress(self.total + done, 2 * self.total)
                    first, last = np.searchsorted(self.left_out[shard], [start, start + batch.num_rows])
                    at = np.delete(np.arange(batch.num_rows), self.left_out[shard][first:last] - start)
                    while len(at):
                        part, at = at[: ROWS_PER_FILE - inside], at[ROWS_PER_FILE - inside :]
                        chosen = batch.take(pa.array(part, pa.int64()))
                        columns = self._columns(chosen) | self._scores(scores[part])
                        writer.write_batch(self._routed(self._batch(columns, len(part)), "rest"))
                        inside += len(part)
                        if inside == ROWS_PER_FILE and number + 1 < files:
                            writer.close()
                            number, inside = number + 1, 0
                            writer = tables.parquet_writer(self.file("rest", number, files), self.schema)
        finally:
            writer.close()
        return expected

    def train(self) -> int:
        """The labelled rows as they were given."""
        if "labelled" not in self.inputs:
            return 0
        table = Rows(self.inputs["labelled"].path).read()
        columns = self._columns(table)
        columns["label"] = table.column("label")
        columns["label_name"] = pa.array([self.labels[i] for i in table.column("label").to_pylist()], pa.string())
        batch = self._routed(self._batch(columns, table.num_rows), "train")
        tables.write_table(self.file("train"), pa.Table.from_batches([batch]))
        return int(table.num_rows)


def _cast(column: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column if column.type == kind else pc.cast(column, kind)
