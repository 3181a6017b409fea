"""Artifacts by content key: immutable directories, each with a manifest written last.

The store is the truth about what has been computed. An artifact is ``<root>/<stage>/<key>/``; it is built under
a temporary name and renamed into place while a lock is held, and the lock (flock) dies with its holder. A
process killed at any moment leaves either the whole artifact or none, and litter under ``tmp/`` that the next
build of the same key sweeps.

`open_store` gives the store of a location: this one for a directory, `pipeline.remote_store.RemoteStore` for
any other fsspec URL. Beside artifacts both hold ``uses/`` (what running work needs) and ``released/`` (what was
published), from which `pipeline.housekeeping` tells what may go.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import StoreDamaged, room, writing
from pipeline.leases import holder, locked
from pipeline.locations import local_path, write_atomically

MANIFEST = "manifest.json"
RUN = "run.json"
USES, RELEASED, LOCKS, TEMPORARY = "uses", "released", "locks", "tmp"
CHECKPOINTS = "checkpoints"  # in the cache, since they are this machine's
Json = Any
Reference = tuple[str, str]
Build = Callable[[Path], Mapping[str, Json]]


def canonical_json(value: Json) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def key_of(value: Json) -> str:
    """The content key of a JSON value: the first 32 hex digits of the SHA-256 of its canonical text."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_publishable(root: Path) -> None:
    """Flush every file and directory below ``root`` to the disk, so that a rename publishes whole files.

    Files may be read and written by whom their directory may be: safetensors keeps what it writes to its owner, but
    stores and releases are shared.
    """
    for directory, _, files in os.walk(root):
        mode = stat.S_IMODE(os.stat(directory).st_mode) & 0o666
        for path in [*(os.path.join(directory, file) for file in files), directory]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if path != directory and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                    with suppress(OSError):  # a file system without permissions
                        os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@dataclass(frozen=True)
class Artifact:
    """What a stage left in the store.

    Attributes:
        path: its directory on this machine; behind a URL it is there once `Store.fetch` has been called.
        manifest: inputs, settings, files with their hashes, and what the stage says of it (``meta``).
        run: what differs between equal builds: ``seconds``, ``host``, ``started``.
    """

    path: Path
    manifest: dict[str, Json]
    run: dict[str, Json]

    @property
    def key(self) -> str:
        """Its content key."""
        return str(self.manifest["key"])

    @property
    def meta(self) -> dict[str, Json]:
        """What the stage says of it: counts, metrics, weights."""
        return dict(self.manifest["meta"])

    @property
    def seconds(self) -> float:
        """How long it took to build."""
        return float(self.run["seconds"])

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            StoreDamaged: a file differs from the manifest.
        """
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file() or sha256_of(file) != expected["sha256"]:
                raise StoreDamaged(f"{file} does not match its manifest")


def open_store(location: str | Path) -> Store:
    """The store at a directory or behind an fsspec URL.

    Nothing is read or written yet.
    """
    path = local_path(location)
    if path is not None:
        return Store(path)
    from pipeline.remote_store import RemoteStore

    return RemoteStore(str(location))


class Store:
    """A directory of artifacts.

    Args:
        root: created when something is written to it.

    Attributes:
        location: what another process opens it by.
        root: its directory on this machine.
    """

    setting = "CLOZELINE_STORE"

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.location = str(self.root)

    def _create(self) -> None:
        """Make the root.

        Raises:
            InputError: it can't be written.
        """
        with writing("the store", self.root, self._elsewhere):
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError("the directory is read-only")

    @property
    def _elsewhere(self) -> str:
        return f"set {self.setting} to another directory"

    def path_of(self, stage: str, key: str) -> Path:
        """Where an artifact lies, or would lie."""
        return self.root / stage / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact, if it is there and its files have the sizes that the manifest states."""
        return artifact_in(self.path_of(stage, key))

    def file(self, artifact: Artifact, name: str) -> str:
        """The path or URL of a file of an artifact, for looking into it without fetching the others."""
        return str(artifact.path / name)

    def fetch(self, artifact: Artifact) -> Artifact:
        """The same artifact with its files on this machine, each compared with its hash.

        Raises:
            StoreDamaged: they are not what the manifest says.
        """
        artifact.verify()
        return artifact

    def get_or_build(
        self, stage: str, key: str, build: Build, header: Mapping[str, Json], record: Mapping[str, Json] | None = None
    ) -> Artifact:
        """Return the artifact, building it if it is not there.

        Args:
            stage: the stage's name.
            key: its content key.
            build: writes the files into the directory it is given and returns the ``meta`` of the manifest.
            header: inputs and settings for the manifest.
            record: for ``run.json``, read once ``build`` has returned: what differs between equal runs.

        Two builders of one key take turns, and the second finds what the first left.

        Raises:
            InputError: the store can't be written, or its disk is full.
        """
        found = self.find(stage, key)
        if found:
            return found
        self._create()
        with room(self.root, self._elsewhere), locked(self.root / LOCKS / f"{stage}-{key}"):
            found = self.find(stage, key)
            if found:
                return found
            with self._built(stage, key, build, header, record) as temporary:
                final = self.path_of(stage, key)
                final.parent.mkdir(parents=True, exist_ok=True)
                if final.exists():  # there, yet find() did not accept it: a damaged artifact gives way
                    os.rename(final, self._temporary(stage, key))
                os.rename(temporary, final)
        built = self.find(stage, key)
        if built is None:
            raise StoreDamaged(f"{self.path_of(stage, key)} vanished while it was being published")
        return built

    def discard(self, stage: str, key: str) -> None:
        """Forget an artifact, because it is damaged: the next `get_or_build` builds it anew."""
        with locked(self.root / LOCKS / f"{stage}-{key}"):
            aside = self._temporary(stage, key)
            aside.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                os.rename(self.path_of(stage, key), aside)
            self._sweep(stage, key)

    def _temporary(self, stage: str, key: str) -> Path:
        return self.root / TEMPORARY / f"{stage}-{key}-{uuid.uuid4().hex[:8]}"

    @contextmanager
    def _built(
        self, stage: str, key: str, build: Build, header: Mapping[str, Json], record: Mapping[str, Json] | None
    ) -> Iterator[Path]:
        """A whole artifact under a temporary name; what is left of it at the end of the block is removed."""
        temporary = self._temporary(stage, key)
        self._sweep(stage, key)
        temporary.mkdir(parents=True)
        try:
            _build_into(temporary, stage, key, build, header, {} if record is None else record)
            yield temporary
        finally:
            self._sweep(stage, key)

    def _sweep(self, stage: str, key: str) -> None:
        for litter in (self.root / TEMPORARY).glob(f"{stage}-{key}-*"):
            shutil.rmtree(litter, ignore_errors=True)

    @contextmanager
    def using(self, references: Iterable[Reference], about: Mapping[str, Json]) -> Iterator[None]:
        """Keep artifacts from being collected while a block runs, whether they are there yet or not.

        Args:
            references: stage and key of each.
            about: what needs them, for people (``title``, ``run``, ...).

        A block that fails, or is killed, leaves its word behind, so that what it had done outlives the failure
        for some days.

        Raises:
            InputError: the store can't be written.
        """
        self._create()
        name = f"{uuid.uuid4().hex}.json"
        record = self.root / USES / name
        record.parent.mkdir(exist_ok=True)
        with (
            room(self.root, self._elsewhere),
            (record.parent / f".{name}").open("w", encoding="utf-8") as file,
        ):
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(use_record(references, about))
            file.flush()
            with locked(self.root / LOCKS / "gc", shared=True):
                os.rename(file.name, record)
            yield
            record.unlink(missing_ok=True)

    def record_release(self, name: str, release_location: str, version: str, references: Iterable[Reference]) -> None:
        """Note what a published version was made of.

        Args:
            name: the task's name.
            release_location: the release path or URL.
            version: the version's name under it.
            references: stage and key of each artifact of its plan.
        """
        now = datetime.now(UTC)
        record = {
            "name": name,
            "release": release_location,
            "version": version,
            "time": now.timestamp(),
            "references": sorted({tuple(reference) for reference in references}),
        }
        self._put(f"{RELEASED}/{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex}.json", canonical_json(record))

    def _put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def use_record(references: Iterable[Reference], about: Mapping[str, Json]) -> str:
    """The content of a file under ``uses/``."""
    return canonical_json(
        {
            "about": dict(about),
            "holder": holder(),
            "time": time.time(),
            "references": sorted({tuple(reference) for reference in references}),
        }
    )


def artifact_in(path: Path) -> Artifact | None:
    """The artifact in a directory, if its files have the sizes that the manifest states."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        run = json.loads((path / RUN).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == f["bytes"] for name, f in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return Artifact(path, manifest, run) if whole else None


def _build_into(
    directory: Path, stage: str, key: str, build: Build, header: Mapping[str, Json], record: Mapping[str, Json]
) -> None:
    started = time.time()
    meta = dict(build(directory))
    seconds = round(time.time() - started, 3)
    run = {"seconds": seconds, "host": socket.gethostname(), "started": started, **record}
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / RUN).write_text(canonical_json(run), encoding="utf-8")
    manifest = {"stage": stage, "key": key, **header, "files": files, "meta": meta}
    (directory / MANIFEST).write_text(canonical_json(manifest), encoding="utf-8")
    make_publishable(directory)
