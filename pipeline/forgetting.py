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
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import locations, transfer
from pipeline.errors import InputError, writing
from pipeline.exports import WITHOUT
from pipeline.housekeeping import discard_texts, holding
from pipeline.inventory import Stored
from pipeline.publishing import release_lease, remove_unfinished
from pipeline.settings import Settings
from pipeline.store import MANIFEST, TEMPORARY, Store, sha256_of, sync_tree
from pipeline.tables import BATCH_ROWS, holds_content, opened, parquet_writer
from pipeline.versions import (
    VERSIONS,
    Forgotten,
    below,
    publishing_lease,
    read_file,
    read_forgotten,
    read_json,
    some_versions,
    write_file,
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
        InputError: no version has one of the rows, a version is damaged, or there is none.
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
        with (
            writing("the release", release, "ask whoever owns it, then give the same command again"),
            publishing_lease(release) as held,
        ):
            found = plan_forgetting(release, row_ids, store)
            contents = sorted({*read_forgotten(release).contents, *found.all_contents})
            write_forgotten(release, Forgotten(contents, found.contents, found.sources))
            remove_unfinished(release)
            for name in some_versions(release):
                run.check()
                held.check()
                _rewrite(release, name, found.all_contents)
        discard_texts(store, found.all_contents)
        _discard_copies(Settings().cache_path, found.all_contents)
        write_forgotten(release, Forgotten(contents))
    return found


def _manifest(release: str, name: str) -> dict[str, Any]:
    version = below(release, VERSIONS, name)
    manifest = read_json(below(version, MANIFEST))
    if manifest is None or "files" not in manifest or "rows" not in manifest:
        raise InputError(
            "the version's manifest can't be read; nothing was changed", where=version, fix="remove the version"
        )
    for file in manifest["files"]:
        locations.inside(Path(version), file)
    return manifest


def _data(manifest: dict[str, Any]) -> list[str]:
    return [name for name in manifest["files"] if name.startswith("data/") and name.endswith(".parquet")]


def _contents_of(release: str, manifests: dict[str, dict[str, Any]], row_ids: set[str]) -> dict[str, set[str]]:
    """The content hashes of rows over all versions: a row may have had another text in an earlier one."""
    found: dict[str, set[str]] = {}
    wanted = pa.array(sorted(row_ids), pa.string())
    for version, manifest in manifests.items():
        for name in _data(manifest):
            with opened(below(release, VERSIONS, version, name)) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=["row_id", "content_hash"]):
                    mine = batch.filter(pc.is_in(batch.column("row_id"), wanted))
                    for row in mine.to_pylist():
                        found.setdefault(row["row_id"], set()).add(row["content_hash"])
    return found


def _count(location: str, contents: Iterable[str]) -> int:
    wanted = pa.array(list(contents), pa.string())
    with opened(location) as file:
        batches = file.iter_batches(BATCH_ROWS, columns=["content_hash"])
        return sum(int(pc.sum(pc.is_in(batch.column(0), wanted)).as_py() or 0) for batch in batches)


def _sources(store: Store, artifacts: list[Stored]) -> set[str]:
    """The user's files that artifacts were read from."""
    found = (store.find(*stored.reference) for stored in artifacts)
    return {locations.masked(artifact.run["source"]) for artifact in found if artifact and "source" in artifact.run}


def _rewrite(release: str, name: str, contents: Collection[str]) -> None:
    """Take rows out of a version.

    The new manifest goes before the files that it describes: killed in between, the files that still hold a text
    are the ones that the next try writes again, and the manifest is right about all the others.
    """
    version = below(release, VERSIONS, name)
    manifest = _manifest(release, name)
    work = _work(version)
    shutil.rmtree(work, ignore_errors=True)
    try:
        written = [file for file in manifest["files"] if _write_without(version, file, contents, work / file)]
        if not written:
            return
        sync_tree(work)
        for file in written:
            manifest["files"][file] = {"bytes": (work / file).stat().st_size, "sha256": sha256_of(work / file)}
        for split in manifest["rows"]:
            files = [file for file in _data(manifest) if file.startswith(f"data/{split}-")]
            places = [str(work / file) if file in written else below(version, file) for file in files]
            manifest["rows"][split] = sum(_rows(place) for place in places)
        write_file(below(version, MANIFEST), json.dumps(manifest, indent=1, sort_keys=True))
        if locations.is_url(version):
            transfer.upload_tree(work, written, version)
        else:
            for file in written:
                os.replace(work / file, Path(version, file))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _work(version: str) -> Path:
    """Where new files are written, on the same disk as a version on a disk; the same place at each try."""
    if locations.is_url(version):
        return Settings().cache_path / "forgetting" / hashlib.sha256(version.encode()).hexdigest()[:16]
    return Path(version, ".forgetting")


def _write_without(version: str, name: str, contents: Collection[str], out: Path) -> bool:
    """Write a file of a version without some rows; gives whether it held any."""
    location = below(version, name)
    if name.startswith("data/") and name.endswith(".parquet") and holds_content(location, contents):
        out.parent.mkdir(parents=True, exist_ok=True)
        _copy_without(location, contents, out)
        return True
    if name.startswith("exports/") and (without := WITHOUT.get(name.removeprefix("exports/"))):
        text = (read_file(location) or b"").decode()
        left = without(text, contents)
        if left != text:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(left.encode())
            return True
    return False


def _copy_without(location: str, contents: Collection[str], out: Path) -> None:
    """Row group by row group, with the same schema; a file that becomes empty stays with no rows."""
    unwanted = pa.array(sorted(contents), pa.string())
    with opened(location) as file, parquet_writer(out, file.schema_arrow) as writer:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            left = group.filter(pc.invert(pc.is_in(group.column("content_hash"), unwanted)))
            if left.num_rows:
                writer.write_table(left, row_group_size=left.num_rows)


def _rows(location: str) -> int:
    with opened(location) as file:
        return int(file.metadata.num_rows)


def _discard_copies(cache: Path, contents: Collection[str]) -> None:
    """Remove this machine's copies: of the user's files all, of artifacts behind URLs those that hold a text."""
    # Which column of a user's file holds the text is not known here, and a copy may be fetched again at any time.
    shutil.rmtree(cache / "files", ignore_errors=True)
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
