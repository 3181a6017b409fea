"""Forgetting rows: their texts go from every version, the store and this machine's copies, and stay out.

A row is named by its id and forgotten by its content hash: whatever holds the same text goes with it. The hashes are
noted beside the versions before anything is removed, and the row ids with them until all is done, so that a command
that was killed at any moment is finished by the same command.

What belongs to the user (the files that a task names) is never touched, and a model can't forget what it was fitted
to; both are told.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import locations, transfer
from pipeline.errors import InputError, writing
from pipeline.exports import WITHOUT
from pipeline.housekeeping import discard_texts, holding
from pipeline.inventory import Stored, dead_work
from pipeline.locations import below, read_file, read_json, remove_file, write_file
from pipeline.publishing import release_lease, remove_unfinished
from pipeline.report import CARD, card_without
from pipeline.settings import Settings
from pipeline.store import CHECKPOINTS, MANIFEST, TEMPORARY, Store, make_publishable, sha256_of
from pipeline.tables import BATCH_ROWS, holds_content, opened, parquet_writer
from pipeline.versions import (
    VERSIONS,
    Forgotten,
    publishing_lease,
    read_forgotten,
    some_versions,
    write_forgotten,
)


@dataclass(frozen=True)
class Forgetting:
    """What is removed.

    Attributes:
        contents: the content hashes of each row id.
        versions: how many rows of each version go.
        artifacts: what of the store goes; it is built again when it is needed.
        sources: the user's files that hold the texts, as far as the store knows them.
    """

    contents: dict[str, list[str]]
    versions: dict[str, int] = field(default_factory=dict)
    artifacts: list[Stored] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def all_contents(self) -> list[str]:
        """The content hashes, sorted."""
        return sorted({content for contents in self.contents.values() for content in contents})


def plan_forgetting(release: str, row_ids: Collection[str], store: Store) -> Forgetting:
    """What `forget` would remove at this moment; nothing is written.

    Args:
        release: the release path or URL.
        row_ids: the rows, by the column ``row_id`` of any version; what an earlier command that was killed had
            begun is part of it.
        store: the artifact store.

    Raises:
        InputError: no version has one of the rows, a version can't be read, or there is none.
        StorageTrouble: the storage did not answer.
    """
    manifests = {name: _manifest(release, name) for name in some_versions(release)}
    before = read_forgotten(release)
    known = _contents_of(release, manifests, set(row_ids))
    unknown = [row_id for row_id in row_ids if row_id not in known and row_id not in before.pending]
    if unknown:
        raise InputError(
            f"no version has a row {', '.join(map(repr, unknown))}; nothing was changed",
            where=release,
            fix="row ids stand in the column row_id of data/*.parquet",
        )
    found = Forgetting({**before.pending, **{row_id: sorted(contents) for row_id, contents in known.items()}})
    counts = {
        name: sum(_count(below(release, VERSIONS, name, file), found.all_contents) for file in _data(manifest))
        for name, manifest in manifests.items()
    }
    artifacts = holding(store, found.all_contents)
    sources = sorted({*before.sources, *_sources(store, artifacts)})
    return Forgetting(found.contents, {name: rows for name, rows in counts.items() if rows}, artifacts, sources)


def forget(release: str, row_ids: Collection[str], store: Store) -> Forgetting:
    """Remove rows for good; waits for a run that publishes to the release.

    Args:
        release: the release path or URL.
        row_ids: see `plan_forgetting`.
        store: the artifact store.

    Returns:
        What was removed.

    Raises:
        InputError: see `plan_forgetting`; or the release or the store can't be written.
        StorageTrouble: the storage did not answer, or another process took over while this one was held up.
    """
    some_versions(release)  # before a lock is left where no release is
    # A run that had planned before would publish the texts once more: hence the lease of whole runs.
    with release_lease(release) as run:
        with ExitStack() as stack:
            with _writing(release):
                held = stack.enter_context(publishing_lease(release))
            found = plan_forgetting(release, row_ids, store)
            contents = sorted({*read_forgotten(release).contents, *found.all_contents})
            with _writing(release):
                write_forgotten(release, Forgotten(contents, found.contents, found.sources))
                remove_unfinished(release)
            for name in some_versions(release):
                run.check()
                held.check()
                with _writing(release):
                    _rewrite(release, name, found.all_contents)
        discard_texts(store, found.all_contents)
        _discard_copies(Settings().cache_path, found.all_contents)
        with _writing(release):
            write_forgotten(release, Forgotten(contents))
    return found


def _writing(release: str) -> AbstractContextManager[None]:
    """Tell what keeps a block from writing to the release; what it reads stands in `_reading`."""
    return writing("the release", release, "ask whoever owns it, then give the same command again")


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Tell what keeps a block from reading a file of a version as the user's to mend.

    Raises:
        InputError: it can't be read.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"can't read a file of the version: {error}",
            where=file,
            fix="put it back from a backup, or remove the version, then give the same command again",
        ) from error


def _manifest(release: str, name: str) -> dict[str, Any]:
    """A version's manifest, without the files of empty splits that a command which was killed has removed."""
    version = below(release, VERSIONS, name)
    manifest = read_json(below(version, MANIFEST))
    if manifest is None or "files" not in manifest or "rows" not in manifest:
        raise InputError(
            "the version's manifest can't be read; nothing was changed", where=version, fix="remove the version"
        )
    for file in manifest["files"]:
        locations.inside(Path(version), file)
    empty = [file for split, rows in manifest["rows"].items() if not rows for file in _data(manifest, split)]
    if empty:
        there = _names_in(below(version, "data"))
        for file in empty:
            if file.removeprefix("data/") not in there:
                del manifest["files"][file]
    return manifest


def _names_in(directory: str) -> set[str]:
    if locations.is_url(directory):
        return set(locations.entries(directory))
    return {path.name for path in Path(directory).glob("*")}


def _data(manifest: dict[str, Any], split: str | None = None) -> list[str]:
    """The Parquet files of a split, or of all."""
    start = "data/" if split is None else f"data/{split}-"
    return [name for name in manifest["files"] if name.startswith(start) and name.endswith(".parquet")]


def _contents_of(release: str, manifests: dict[str, dict[str, Any]], row_ids: set[str]) -> dict[str, set[str]]:
    """The content hashes of rows over all versions: a row may have had another text in an earlier one."""
    found: dict[str, set[str]] = {}
    wanted = pa.array(sorted(row_ids), pa.string())
    for version, manifest in manifests.items():
        for name in _data(manifest):
            location = below(release, VERSIONS, version, name)
            with _reading(location), opened(location) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=["row_id", "content_hash"]):
                    mine = batch.filter(pc.is_in(batch.column("row_id"), wanted))
                    for row in mine.to_pylist():
                        found.setdefault(row["row_id"], set()).add(row["content_hash"])
    return found


def _count(location: str, contents: Iterable[str]) -> int:
    wanted = pa.array(list(contents), pa.string())
    with _reading(location), opened(location) as file:
        batches = file.iter_batches(BATCH_ROWS, columns=["content_hash"])
        return sum(int(pc.sum(pc.is_in(batch.column(0), wanted)).as_py() or 0) for batch in batches)


def _sources(store: Store, artifacts: list[Stored]) -> set[str]:
    """The user's files that artifacts were read from."""
    found = (store.find(*stored.reference) for stored in artifacts)
    return {locations.masked(artifact.run["source"]) for artifact in found if artifact and "source" in artifact.run}


def _rewrite(release: str, name: str, contents: Collection[str]) -> None:
    """Take rows out of a version, and with its last row a split: `datasets` loads no version that has an empty one.

    The new manifest goes before the files that it describes: killed in between, the files that still hold a text
    are the ones that the next try writes again, and the manifest is right about all the others. A split that became
    empty stays in it, with no rows, until its files are gone (see `_manifest`).
    """
    version = below(release, VERSIONS, name)
    manifest = _manifest(release, name)
    work = _work(version)
    shutil.rmtree(work, ignore_errors=True)
    try:
        written = [file for file in manifest["files"] if _write_without(version, file, contents, work / file)]
        if written:
            for split in manifest["rows"]:
                files = _data(manifest, split)
                places = [str(work / file) if file in written else below(version, file) for file in files]
                manifest["rows"][split] = sum(_rows(place) for place in places)
        empty = [split for split, rows in manifest["rows"].items() if not rows]
        gone = [file for split in empty for file in _data(manifest, split)]
        if _write_card_without(version, empty, work / CARD):
            written.append(CARD)
        if written:
            _replace(version, manifest, written, gone, work)
        if empty:
            for file in gone:
                remove_file(below(version, file))
                del manifest["files"][file]
            manifest["rows"] = {split: rows for split, rows in manifest["rows"].items() if rows}
            _write_manifest(version, manifest)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(version: str, manifest: dict[str, Any], written: list[str], gone: list[str], work: Path) -> None:
    """Put new files in a version's place, behind the manifest that describes them; those of ``gone`` are left out."""
    make_publishable(work)
    for file in written:
        manifest["files"][file] = {"bytes": (work / file).stat().st_size, "sha256": sha256_of(work / file)}
    _write_manifest(version, manifest)
    kept = [file for file in written if file not in gone]
    if locations.is_url(version):
        transfer.upload_tree(work, kept, version)
    else:
        for file in kept:
            os.replace(work / file, Path(version, file))


def _write_manifest(version: str, manifest: dict[str, Any]) -> None:
    write_file(below(version, MANIFEST), json.dumps(manifest, indent=1, sort_keys=True))


def _work(version: str) -> Path:
    """Where new files are written, on the same disk as a version on a disk; the same place at each try."""
    if locations.is_url(version):
        return Settings().cache_path / "forgetting" / hashlib.sha256(version.encode()).hexdigest()[:16]
    return Path(version, ".forgetting")


def _write_without(version: str, name: str, contents: Collection[str], out: Path) -> bool:
    """Write a file of a version without some rows; gives whether it held any."""
    location = below(version, name)
    if name.startswith("data/") and name.endswith(".parquet"):
        with _reading(location):
            held = holds_content(location, contents)
        if held:
            out.parent.mkdir(parents=True, exist_ok=True)
            _copy_without(location, contents, out)
        return held
    if name.startswith("exports/") and (without := WITHOUT.get(name.removeprefix("exports/"))):
        with _reading(location):
            text = (read_file(location) or b"").decode()
        left = without(text, contents)
        if left != text:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(left.encode())
            return True
    return False


def _write_card_without(version: str, splits: list[str], out: Path) -> bool:
    """Write a version's card without the entries of some splits; gives whether it had any."""
    if not splits:
        return False
    location = below(version, CARD)
    with _reading(location):
        card = (read_file(location) or b"").decode()
    left = card_without(card, splits)
    if left == card:
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(left.encode())
    return True


def _copy_without(location: str, contents: Collection[str], out: Path) -> None:
    """Row group by row group, with the same schema.

    A file that becomes empty is written with no rows: beside others of its split it stays, which `datasets` copes with.
    """
    unwanted = pa.array(sorted(contents), pa.string())
    with ExitStack() as stack:
        with _reading(location):
            file = stack.enter_context(opened(location))
        writer = stack.enter_context(parquet_writer(out, file.schema_arrow))
        for number in range(file.num_row_groups):
            with _reading(location):
                group = file.read_row_group(number)
            left = group.filter(pc.invert(pc.is_in(group.column("content_hash"), unwanted)))
            if left.num_rows:
                writer.write_table(left, row_group_size=left.num_rows)


def _rows(location: str) -> int:
    with _reading(location), opened(location) as file:
        return int(file.metadata.num_rows)


def _discard_copies(cache: Path, contents: Collection[str]) -> None:
    """Remove this machine's copies: of the user's files all, of artifacts behind URLs those that hold a text."""
    # Which column of a user's file holds the text is not known here, and a copy may be fetched again at any time.
    shutil.rmtree(cache / "files", ignore_errors=True)
    shutil.rmtree(cache / CHECKPOINTS, ignore_errors=True)  # of models that read the text
    for root in sorted((cache / "stores").glob("*")):
        for path in dead_work(root):
            shutil.rmtree(path, ignore_errors=True)
    for file in sorted((cache / "stores").glob("*/*/*/*/**/*.parquet")):
        store, stage, key, prefix = file.relative_to(cache / "stores").parts[:4]
        if stage != TEMPORARY and file.exists() and _may_hold(file, contents):
            shutil.rmtree(cache / "stores" / store / stage / key / prefix)


def _may_hold(file: Path, contents: Collection[str]) -> bool:
    """Whether a copy holds a text, as one that can't be read may: it is fetched again when it is wanted."""
    try:
        return holds_content(str(file), contents)
    except (OSError, pa.ArrowException):
        return True
