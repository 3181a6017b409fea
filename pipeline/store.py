"""Artifacts by content key: immutable directories, each with a manifest written last.

The store is the truth about what has been computed. An artifact is ``<root>/<stage>/<key>/``; it is built under
a temporary name and renamed into place while a lock is held, and the lock (flock) dies with its holder. A
process killed at any moment leaves either the whole artifact or none, and litter under ``tmp/`` that the next
build of the same key sweeps.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, StoreDamaged

MANIFEST = "manifest.json"
RUN = "run.json"
Json = Any


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


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_tree(root: Path) -> None:
    """Flush every file and directory below ``root`` to the disk, so that a rename publishes whole files."""
    for directory, _, files in os.walk(root):
        for path in [*(os.path.join(directory, file) for file in files), directory]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel drops it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Artifact:
    """What a stage left in the store.

    Attributes:
        path: its directory.
        manifest: inputs, settings, files with their hashes, and what the stage says of it (``meta``).
    """

    path: Path
    manifest: dict[str, Json]

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
        return float(json.loads((self.path / RUN).read_text())["seconds"])

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            StoreDamaged: a file differs from the manifest.
        """
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file() or sha256_of(file) != expected["sha256"]:
                raise StoreDamaged(f"{file} does not match its manifest; delete {self.path} and run again")


class Store:
    """A directory of artifacts.

    Args:
        root: created when missing.

    Raises:
        InputError: the directory can't be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"can't write the store: {error}",
                where=str(root),
                fix="set CLOZELINE_STORE to another directory",
            ) from error

    def path_of(self, stage: str, key: str) -> Path:
        """Where an artifact lies, or would lie."""
        return self.root / stage / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact, if it is there and its files have the sizes that the manifest states."""
        path = self.path_of(stage, key)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            whole = all((path / name).stat().st_size == f["bytes"] for name, f in manifest["files"].items())
        except (OSError, ValueError, KeyError):
            return None
        return Artifact(path, manifest) if whole else None

    def get_or_build(
        self, stage: str, key: str, build: Callable[[Path], Mapping[str, Json]], header: Mapping[str, Json]
    ) -> Artifact:
        """Return the artifact, building it if it is not there.

        Args:
            stage: the stage's name.
            key: its content key.
            build: writes the files into the directory it is given and returns the ``meta`` of the manifest.
            header: inputs and settings for the manifest.

        Two builders of one key take turns, and the second finds what the first left.
        """
        found = self.find(stage, key)
        if found:
            return found
        with locked(self.root / "locks" / f"{stage}-{key}"):
            found = self.find(stage, key)
            if found:
                return found
            temporary_root = self.root / "tmp"
            temporary_root.mkdir(exist_ok=True)
            for litter in temporary_root.glob(f"{stage}-{key}-*"):
                shutil.rmtree(litter, ignore_errors=True)
            temporary = temporary_root / f"{stage}-{key}-{uuid.uuid4().hex[:8]}"
            temporary.mkdir()
            try:
                self._build_into(temporary, stage, key, build, header)
                final = self.path_of(stage, key)
                final.parent.mkdir(parents=True, exist_ok=True)
                if final.exists():  # there, yet find() did not accept it: a damaged artifact gives way
                    os.rename(final, temporary_root / f"{stage}-{key}-{uuid.uuid4().hex[:8]}")
                os.rename(temporary, final)
            finally:
                for litter in temporary_root.glob(f"{stage}-{key}-*"):
                    shutil.rmtree(litter, ignore_errors=True)
        built = self.find(stage, key)
        if built is None:
            raise StoreDamaged(f"{self.path_of(stage, key)} vanished while it was being published")
        return built

    def _build_into(
        self,
        directory: Path,
        stage: str,
        key: str,
        build: Callable[[Path], Mapping[str, Json]],
        header: Mapping[str, Json],
    ) -> None:
        started = time.time()
        meta = dict(build(directory))
        run = {"seconds": round(time.time() - started, 3), "host": socket.gethostname(), "started": started}
        files = {
            str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        (directory / RUN).write_text(canonical_json(run), encoding="utf-8")
        manifest = {"stage": stage, "key": key, **header, "files": files, "meta": meta}
        (directory / MANIFEST).write_text(canonical_json(manifest), encoding="utf-8")
        sync_tree(directory)
