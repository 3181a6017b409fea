"""The store behind an fsspec URL: the same artifacts and the same bytes, without locks and renames.

``<url>/<stage>/<key>/manifest.json`` is an artifact; it names the prefix ``<url>/<stage>/<key>/<prefix>/`` under
which its builder had uploaded the files before. The manifest is put last, and only where there is none: of two
builders one wins, and the other uses what the winner left. A process killed at any moment leaves a prefix that no
manifest names, which `pipeline.housekeeping` sweeps.

What stages read lies in a cache on this machine, which may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import locations, transfer
from pipeline.errors import ClozelineError, StoreDamaged, room
from pipeline.leases import TTL, lease, locked, wait_until_free
from pipeline.settings import Settings
from pipeline.store import (
    LOCKS,
    MANIFEST,
    RUN,
    USES,
    Artifact,
    Build,
    Json,
    Reference,
    Store,
    artifact_in,
    canonical_json,
    use_record,
)

LEASES = "leases"
USE_SECONDS = 60.0
_verified: set[Path] = set()  # the cached copies that this process has compared with their hashes


class RemoteStore(Store):
    """Artifacts behind an fsspec URL.

    Args:
        url: where they lie; the bucket must exist.
    """

    setting = "CLOZELINE_CACHE"

    def __init__(self, url: str) -> None:
        url = url.rstrip("/")
        super().__init__(Settings().cache_path / "stores" / hashlib.sha256(url.encode()).hexdigest()[:16])
        self.location = url
        self.ttl = TTL

    def url_of(self, stage: str, key: str) -> str:
        """Where an artifact lies, or would lie."""
        return locations.join(self.location, stage, key)

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact, if it is there and its files have the sizes that the manifest states; nothing is fetched."""
        content = locations.read(locations.join(self.url_of(stage, key), MANIFEST))
        try:
            published = json.loads(content or b"")
            prefix, run = published.pop("prefix"), published.pop("run")
            sizes = {name: file["bytes"] for name, file in published["files"].items()}
        except (ValueError, KeyError):
            return None
        there = locations.entries(locations.join(self.url_of(stage, key), prefix))
        if any(name not in there or there[name].bytes != size for name, size in sizes.items()):
            return None
        return Artifact(self.path_of(stage, key) / prefix, published, run)

    def file(self, artifact: Artifact, name: str) -> str:
        return locations.join(self.location, *artifact.path.parts[-3:], name)

    def fetch(self, artifact: Artifact) -> Artifact:
        """The same artifact with its files in the cache of this machine, each compared with its hash.

        A cached copy is compared once a process; one that does not match is fetched again.

        Raises:
            StoreDamaged: what lies behind the URL is not what the manifest says.
        """
        if artifact.path in _verified and artifact_in(artifact.path) is not None:
            return artifact
        self._create()
        stage, key, prefix = artifact.path.parts[-3:]
        source = locations.join(self.url_of(stage, key), prefix)
        with room(self.root, self._elsewhere), locked(self.root / LOCKS / f"{stage}-{key}"):
            if not _matches(artifact):
                self._sweep(stage, key)
                temporary = self._temporary(stage, key)
                temporary.mkdir(parents=True)
                try:
                    try:
                        files = artifact.manifest["files"]
                        transfer.fetch_files(source, {name: files[name]["bytes"] for name in files}, temporary)
                    except FileNotFoundError as error:
                        raise StoreDamaged(f"a file below {source} is gone") from error
                    try:
                        Artifact(temporary, artifact.manifest, artifact.run).verify()
                    except StoreDamaged as error:
                        raise StoreDamaged(f"what lies below {source} does not match its manifest") from error
                    _keep(temporary, artifact)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        _verified.add(artifact.path)
        return artifact

    def discard(self, stage: str, key: str) -> None:
        locations.remove([locations.join(self.url_of(stage, key), MANIFEST)])
        super().discard(stage, key)

    def get_or_build(
        self, stage: str, key: str, build: Build, header: Mapping[str, Json], record: Mapping[str, Json] | None = None
    ) -> Artifact:
        found = self.find(stage, key)
        if found:
            return found
        self._create()
        # The lease is for other machines. The lock keeps a builder of this one, even one that has lost its lease,
        # from having its temporary files swept.
        with (
            room(self.root, self._elsewhere),
            locked(self.root / LOCKS / f"{stage}-{key}"),
            lease(locations.join(self.location, LEASES, f"{stage}-{key}"), ttl=self.ttl),
        ):
            found = self.find(stage, key)
            if found:
                return found
            with self._built(stage, key, build, header, record) as temporary:
                built = artifact_in(temporary)
                assert built is not None
                return self._upload(built, stage, key)

    def _upload(self, built: Artifact, stage: str, key: str) -> Artifact:
        url, prefix = self.url_of(stage, key), uuid.uuid4().hex
        manifest = locations.join(url, MANIFEST)
        content = canonical_json({**built.manifest, "prefix": prefix, "run": built.run}).encode()
        transfer.upload_tree(built.path, built.manifest["files"], locations.join(url, prefix))
        while not locations.put_if_absent(manifest, content):
            theirs = self.find(stage, key)
            if theirs:
                return theirs
            locations.remove([manifest])  # there, yet find() did not accept it: a damaged artifact gives way
        mine = Artifact(self.path_of(stage, key) / prefix, built.manifest, built.run)
        mine.path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(built.path, mine.path)
        return mine

    @contextmanager
    def using(self, references: Iterable[Reference], about: Mapping[str, Json]) -> Iterator[None]:
        url = locations.join(self.location, USES, f"{uuid.uuid4().hex}.json")
        content = use_record(references, about).encode()
        locations.write(url, content)
        # A collection that did not see this yet holds its lease still, and what it takes away is gone before the
        # block looks for it.
        wait_until_free(locations.join(self.location, LEASES, "gc"))
        over = threading.Event()

        def renew() -> None:
            while not over.wait(USE_SECONDS):
                with suppress(ClozelineError, OSError):  # the next beat may get through
                    locations.write(url, content)

        thread = threading.Thread(target=renew, name="use", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        locations.remove([url])

    def _put(self, name: str, text: str) -> None:
        locations.write(locations.join(self.location, name), text.encode())


def _matches(artifact: Artifact) -> bool:
    """Whether the cached copy is whole, by its hashes."""
    if artifact_in(artifact.path) is None:
        return False
    try:
        artifact.verify()
    except StoreDamaged:
        return False
    return True


def _keep(directory: Path, artifact: Artifact) -> None:
    """Make fetched files the cached copy of their artifact; the bytes are those of a store on a disk."""
    (directory / RUN).write_text(canonical_json(artifact.run), encoding="utf-8")
    (directory / MANIFEST).write_text(canonical_json(artifact.manifest), encoding="utf-8")
    artifact.path.parent.mkdir(parents=True, exist_ok=True)
    if artifact.path.exists():  # a damaged copy
        shutil.rmtree(artifact.path)
    os.rename(directory, artifact.path)
