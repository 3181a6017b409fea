"""Publishing: a version of the labelled dataset under a release path, local or behind a URL.

A version is whole when its ``_SUCCESS`` is there, and ``LATEST`` moves last. On a disk a version is copied under a
temporary name and renamed into place; behind a URL its files come first, then its manifest, then ``_SUCCESS``, and
what a killed process left without one is removed by the next that publishes there. Unchanged inputs give the
version that is there already.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import locations, transfer
from pipeline.errors import InputError, StorageTrouble
from pipeline.leases import Lease, lease, locked
from pipeline.release import VERSION
from pipeline.settings import Settings
from pipeline.store import MANIFEST, Artifact, sync_tree, write_atomically
from pipeline.task import Task

SUCCESS, LATEST = "_SUCCESS", "LATEST"
_VERSIONS = "versions"
_NAME = re.compile(r"\d{4,}-[0-9a-f]{8}")  # whatever else lies among the versions is somebody else's


@dataclass(frozen=True)
class Published:
    """A version under a release path.

    Attributes:
        path: its directory or URL.
        new: false where it was there already.
    """

    path: str
    new: bool

    @property
    def name(self) -> str:
        """Its number and the beginning of its key."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def uri(self) -> str:
        """Its URL."""
        return self.path if locations.is_url(self.path) else Path(self.path).as_uri()


def release_path(task: Task, out: str | None) -> str:
    """Where a task's versions are published: the command's word, then the task's, then the default.

    Raises:
        InputError: it is a URL with credentials.
    """
    if out is None:
        out = task.locate(task.release.path) if task.release.path else str(Settings().release_path(task.name))
    locations.refuse_credentials(out)
    return out.rstrip("/") if locations.is_url(out) else str(Path(out).absolute())


@contextmanager
def release_lease(release: str, waiting: Callable[[str], None] | None = None) -> Iterator[Lease]:
    """The exclusive lease on a release path, for a whole run: a second run on it waits rather than races.

    Args:
        release: the release path or URL.
        waiting: called once, with who holds it, when it is not free.

    Raises:
        InputError: it can't be written.
        StorageTrouble: the storage did not answer.
    """
    here = locations.local_path(release)
    name = str(here / ".run.lock") if here is not None else locations.join(release, ".leases", "run")
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lease(name, waiting=waiting))
        except OSError as error:
            raise _unwritable(release, error) from error
        yield held


def _unwritable(release: str | Path, error: OSError) -> InputError:
    return InputError(f"can't write the release: {error}", where=str(release), fix="choose another --out")


def latest_manifest(release: str | Path) -> dict[str, Any] | None:
    """The manifest of the version that LATEST names, or None where there is none."""
    here = locations.local_path(release)
    try:
        name = _latest(release)
        if name is None:
            return None
        if here is not None:
            content: str | bytes | None = (here / _VERSIONS / name / MANIFEST).read_text(encoding="utf-8")
        else:
            content = locations.read(locations.join(str(release), _VERSIONS, name, MANIFEST))
        manifest: dict[str, Any] = json.loads(content or b"")
    except (OSError, ValueError):
        return None
    return manifest


def _latest(release: str | Path) -> str | None:
    """The name of the version in force."""
    here = locations.local_path(release)
    if here is None:
        content = locations.read(locations.join(str(release), LATEST))
        return None if content is None else content.decode().strip()
    try:
        return (here / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def publish(artifact: Artifact, release: str | Path) -> Published:
    """Publish a release artifact under a release path, once.

    Args:
        artifact: what the release stage left, with its files on this machine (`pipeline.store.Store.fetch`).
        release: the release path or URL; a directory is created when missing.

    Raises:
        InputError: it can't be written.
        StorageTrouble: the storage did not answer, or another process took over while this one was held up.
    """
    here = locations.local_path(release)
    if here is None:
        with lease(locations.join(str(release), ".leases", "publish")) as held:
            return _upload(artifact, str(release), held)
    try:
        (here / _VERSIONS).mkdir(parents=True, exist_ok=True)
        with locked(here / ".lock"):
            return _copy(artifact, here)
    except OSError as error:
        raise _unwritable(release, error) from error


def _copy(artifact: Artifact, release: Path) -> Published:
    versions = release / _VERSIONS
    for litter in versions.glob(".tmp-*"):
        shutil.rmtree(litter, ignore_errors=True)
    name, new = _choose(artifact, [path.name for path in versions.iterdir() if (path / SUCCESS).is_file()])
    if new:
        temporary = versions / f".tmp-{uuid.uuid4().hex[:8]}"
        shutil.copytree(artifact.path / VERSION, temporary)
        (temporary / SUCCESS).touch()
        sync_tree(temporary)
        temporary.rename(versions / name)
    if _latest(release) != name:
        write_atomically(release / LATEST, name + "\n")
    return Published(str(versions / name), new)


def _upload(artifact: Artifact, release: str, held: Lease) -> Published:
    versions = locations.join(release, _VERSIONS)
    there = locations.entries(versions)
    whole = {name.removesuffix("/" + SUCCESS) for name in there if name.endswith("/" + SUCCESS)}
    locations.remove(
        locations.join(versions, name)
        for name in there
        if _NAME.fullmatch(name.split("/")[0]) and name.split("/")[0] not in whole
    )
    name, new = _choose(artifact, whole)
    target = locations.join(versions, name)
    if new:
        files = _files(artifact)
        transfer.upload_tree(artifact.path / VERSION, [file for file in files if file != MANIFEST], target)
        transfer.upload_tree(artifact.path / VERSION, [MANIFEST], target)
        if {file: entry.bytes for file, entry in locations.entries(target).items()} != files:
            raise StorageTrouble(f"{target} does not hold what was uploaded to it")
        held.check()
        locations.put_if_absent(locations.join(target, SUCCESS), b"")
    if _latest(release) != name:
        held.check()
        locations.write(locations.join(release, LATEST), f"{name}\n".encode())
    return Published(target, new)


def _files(artifact: Artifact) -> dict[str, int]:
    """The files of a version with their sizes."""
    inside = VERSION + "/"
    files = artifact.manifest["files"]
    return {name.removeprefix(inside): files[name]["bytes"] for name in files if name.startswith(inside)}


def _choose(artifact: Artifact, whole: Iterable[str]) -> tuple[str, bool]:
    """The version's name, and whether it is new: that of the same key, else the next number."""
    names = sorted(name for name in whole if _NAME.fullmatch(name))
    for name in names:
        if name.endswith("-" + artifact.key[:8]):
            return name, False
    number = 1 + max((int(name.split("-")[0]) for name in names), default=0)
    return f"{number:04d}-{artifact.key[:8]}", True
