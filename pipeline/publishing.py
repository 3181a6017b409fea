"""Publishing: a version of the labelled dataset under a release path, local or behind a URL.

A version is whole when its ``_SUCCESS`` is there, and ``LATEST`` moves last. On a disk a version is copied under a
temporary name and renamed into place; behind a URL its files come first, then its manifest, then ``_SUCCESS``, and
what a killed process left without one is removed by the next that publishes there. Unchanged inputs give the
version that is there already.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline import locations, transfer
from pipeline.errors import StorageTrouble, VersionHeld, writing
from pipeline.gate import Measures, reasons_to_hold
from pipeline.leases import Lease, lease
from pipeline.locations import below, read_json
from pipeline.release import VERSION
from pipeline.settings import Settings
from pipeline.store import MANIFEST, Artifact, make_publishable
from pipeline.task import Gate, Task
from pipeline.versions import (
    NAME,
    SUCCESS,
    VERSIONS,
    held_records,
    hold,
    latest_name,
    publishing_lease,
    put_in_force,
    tidy,
    whole_versions,
)

_ELSEWHERE = "choose another --out"


@dataclass(frozen=True)
class Published:
    """A version under a release path.

    Attributes:
        path: its directory or URL.
        new: false where it was there already.
        held: why it is not in force.
    """

    path: str
    new: bool
    held: tuple[str, ...] = ()

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
    return locations.given(out)


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
        with writing("the release", release, _ELSEWHERE):
            held = stack.enter_context(lease(name, waiting=waiting))
        yield held


def publish(artifact: Artifact, release: str | Path, gate: Gate | None = None) -> Published:
    """Publish a release artifact under a release path, once, and put it in force unless it looks worse.

    Args:
        artifact: what the release stage left, with its files on this machine (`pipeline.store.Store.fetch`).
        release: the release path or URL; a directory is created when missing.
        gate: when it is held instead; by default never.

    Returns:
        The version. One that the gate had held before is looked at again, with the limits and the version in force of
        today; one that was rolled back stays held.

    Raises:
        InputError: it can't be written.
        StorageTrouble: the storage did not answer, or another process took over while this one was held up.
    """
    here = locations.local_path(release)
    with writing("the release", release, _ELSEWHERE):
        if here is not None:
            (here / VERSIONS).mkdir(parents=True, exist_ok=True)
        with publishing_lease(release) as held:
            remove_unfinished(release)
            tidy(release)
            name, new = _choose(artifact, whole_versions(release))
            if new and here is not None:
                _copy(artifact, here / VERSIONS, name)
            elif new:
                _upload(artifact, below(release, VERSIONS, name), held)
            reasons = _hold_or_put_in_force(artifact, release, name, gate, held.check)
    return Published(below(release, VERSIONS, name), new, reasons)


def raise_if_held(published: Published, release: str) -> None:
    """End a run whose version is held, once all else is done.

    Raises:
        VersionHeld: it is.
    """
    if published.held:
        told = "".join(f"\n  why: {reason}" for reason in published.held)
        raise VersionHeld(
            f"{published.name} was written and is held: LATEST stays at {latest_name(release)}{told}\n  in: {release}\n"
            f"  fix: look at it, then put it in force with `clozeline promote {release}`, or correct the inputs"
        )


def remove_unfinished(release: str | Path) -> None:
    """Remove what killed processes left among the versions; the `publishing_lease` must be held."""
    here = locations.local_path(release)
    if here is not None:
        for litter in (here / VERSIONS).glob(".tmp-*"):
            shutil.rmtree(litter, ignore_errors=True)
        return
    versions = locations.join(str(release), VERSIONS)
    there = locations.entries(versions)
    owners = {name: name.split("/")[0] for name in there}
    locations.remove(
        locations.join(versions, name)
        for name, owner in owners.items()
        if NAME.fullmatch(owner) and f"{owner}/{SUCCESS}" not in there
    )


def _hold_or_put_in_force(
    artifact: Artifact, release: str | Path, name: str, gate: Gate | None, check: Callable[[], None]
) -> tuple[str, ...]:
    """Decide about a version that is whole; gives why it is held.

    Whoever was killed before this was done comes to the same decision: it depends on the two versions alone.
    """
    latest = latest_name(release)
    if latest is not None and latest != name:
        before = held_records(release).get(name)
        if before is not None and before.rolled_back:
            return before.reasons
        reasons = _reasons(artifact, below(release, VERSIONS, latest), gate)
        if reasons:
            if before is None or before.reasons != tuple(reasons):
                check()
                hold(release, name, reasons)
            return tuple(reasons)
    put_in_force(release, name, check)
    return ()


def _reasons(artifact: Artifact, latest: str, gate: Gate | None) -> list[str]:
    if gate is None:
        return []
    new, old = _measures(str(artifact.path / VERSION)), _measures(latest)
    return [] if new is None or old is None else reasons_to_hold(new, old, gate)


def _measures(version: str) -> Measures | None:
    """What a version says of itself; None where its files are gone or are no version's."""
    manifest, metrics = (read_json(below(version, name)) for name in (MANIFEST, "metrics.json"))
    if manifest is None or metrics is None:
        return None
    try:
        return Measures.of(manifest, metrics)
    except KeyError:
        return None


def _copy(artifact: Artifact, versions: Path, name: str) -> None:
    temporary = versions / f".tmp-{uuid.uuid4().hex[:8]}"
    try:
        shutil.copytree(artifact.path / VERSION, temporary)
        (temporary / SUCCESS).touch()
        make_publishable(temporary)
        temporary.rename(versions / name)
    finally:  # on a full disk half a version must not take what is left of it
        shutil.rmtree(temporary, ignore_errors=True)


def _upload(artifact: Artifact, target: str, held: Lease) -> None:
    files = _files(artifact)
    transfer.upload_tree(artifact.path / VERSION, [file for file in files if file != MANIFEST], target)
    transfer.upload_tree(artifact.path / VERSION, [MANIFEST], target)
    if {file: entry.bytes for file, entry in locations.entries(target).items()} != files:
        raise StorageTrouble(f"{target} does not hold what was uploaded to it")
    held.check()
    locations.put_if_absent(locations.join(target, SUCCESS), b"")


def _files(artifact: Artifact) -> dict[str, int]:
    """The files of a version with their sizes."""
    inside = VERSION + "/"
    files = artifact.manifest["files"]
    return {name.removeprefix(inside): files[name]["bytes"] for name in files if name.startswith(inside)}


def _choose(artifact: Artifact, whole: Iterable[str]) -> tuple[str, bool]:
    """The version's name, and whether it is new: that of the same key, else the next number."""
    names = list(whole)
    for name in names:
        if name.endswith("-" + artifact.key[:8]):
            return name, False
    number = 1 + max((int(name.split("-")[0]) for name in names), default=0)
    return f"{number:04d}-{artifact.key[:8]}", True
