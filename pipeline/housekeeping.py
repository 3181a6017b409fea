"""What lies in a store, and what of it may go.

An artifact stays while one of these names it: the last releases of a task at a release path (``released/``), those
that are held there, which somebody may promote, work that runs (``uses/``), work that failed or was killed within the
last week, so that its next try finds what it had done, or a builder that is at it. All else goes, and with it what
killed processes left behind.

A collection and the registration of new work exclude each other (see `Store.using`), so that whoever has
registered never loses what it looks for afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa

from pipeline import locations
from pipeline.errors import InputError
from pipeline.inventory import Inventory, Litter, Stored, take_inventory
from pipeline.leases import lease, locked
from pipeline.remote_store import LEASES, RemoteStore
from pipeline.store import LOCKS, Store
from pipeline.tables import holds_content

_DAY = 86_400.0
_UNFINISHED_DAYS = 7


@dataclass(frozen=True)
class Collection:
    """What a collection takes and leaves.

    Attributes:
        goes: the artifacts that nothing needs.
        stays: the others, each with the reason.
        litter: what goes with them.
    """

    goes: list[Stored] = field(default_factory=list)
    stays: list[tuple[Stored, str]] = field(default_factory=list)
    litter: list[Litter] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """How much is freed."""
        return sum(stored.bytes for stored in self.goes) + sum(litter.bytes for litter in self.litter)


def list_artifacts(store: Store) -> list[Stored]:
    """Every artifact of a store, oldest first.

    Raises:
        StorageTrouble: the storage did not answer.
    """
    inventory = take_inventory(store)
    return inventory.artifacts(inventory.uses())


def disk_use(store: Store) -> dict[str, int]:
    """The bytes of each stage's artifacts, largest first."""
    totals: dict[str, int] = {}
    for stored in list_artifacts(store):
        totals[stored.stage] = totals.get(stored.stage, 0) + stored.bytes
    return dict(sorted(totals.items(), key=lambda entry: -entry[1]))


def plan_gc(store: Store, keep: int) -> Collection:
    """What `collect` would take and leave at this moment; nothing is removed or written.

    Args:
        store: the store.
        keep: how many versions of each task at each release path keep what they were made of, beside those that are
            held.

    Raises:
        InputError: the storage does not tell when files were written.
        StorageTrouble: the storage did not answer.
    """
    return _plan(take_inventory(store), keep)


def collect(store: Store, keep: int) -> Collection:
    """Remove what nothing needs.

    Args:
        store: the store.
        keep: how many versions of each task at each release path keep what they were made of, beside those that are
            held.

    Returns:
        What was removed and what was left.

    Raises:
        InputError: the storage does not tell when files were written.
        StorageTrouble: the storage did not answer, or another collection took over while this one was held up.
    """
    with _alone(store) as check:
        inventory = take_inventory(store)
        plan = _plan(inventory, keep)
        removed = []
        for stored in plan.goes:
            check()
            if inventory.discard(stored):
                removed.append(stored)
        check()
        inventory.sweep([litter.name for litter in plan.litter])
    busy = [(stored, "being built") for stored in plan.goes if stored not in removed]
    return Collection(removed, [*plan.stays, *busy], plan.litter)


def holding(store: Store, contents: Iterable[str]) -> list[Stored]:
    """The artifacts that hold a text, and those that can't be read to make sure that they don't.

    Args:
        store: the store; nothing is written to it.
        contents: content hashes.

    Raises:
        StorageTrouble: the storage did not answer.
    """
    return _holding(take_inventory(store), contents)


def _holding(inventory: Inventory, contents: Iterable[str]) -> list[Stored]:
    wanted = set(contents)
    return [stored for stored in inventory.artifacts(inventory.uses()) if _holds(inventory.store, stored, wanted)]


def _holds(store: Store, stored: Stored, contents: set[str]) -> bool:
    artifact = store.find(*stored.reference)
    if artifact is None:
        return True  # damaged, and of no use to anybody
    names = [name for name in artifact.manifest["files"] if name.endswith(".parquet")]
    try:
        return any(holds_content(store.file(artifact, name), contents) for name in names)
    except (OSError, pa.ArrowException):
        return True


def discard_texts(store: Store, contents: Iterable[str]) -> list[Stored]:
    """Remove the artifacts that hold a text, and what killed builders left, which may hold it; see `holding`.

    Returns:
        The artifacts. Whatever needs one builds it again.

    Raises:
        InputError: the store can't be written.
        StorageTrouble: the storage did not answer.
    """
    with _alone(store) as check:
        inventory = take_inventory(store)
        _refuse_without_times(inventory)
        found = _holding(inventory, contents)
        for stored in found:
            check()
            if not inventory.discard(stored):  # somebody is at it
                store.discard(*stored.reference)
        check()
        inventory.sweep([litter.name for litter in inventory.litter(young=True)])
    return found


@contextmanager
def _alone(store: Store) -> Iterator[Callable[[], None]]:
    """Exclude other collections, and work that wants to register, meanwhile."""
    if isinstance(store, RemoteStore):
        with lease(locations.join(store.location, LEASES, "gc"), ttl=store.ttl) as held:
            yield held.check
    else:
        with locked(store.root / LOCKS / "gc"):
            yield lambda: None


def _refuse_without_times(inventory: Inventory) -> None:
    """Whether a use, a lease or an upload is alive shows in its age alone."""
    if isinstance(inventory.store, RemoteStore) and not all(entry.modified for entry in inventory.files.values()):
        raise InputError(
            "this storage does not tell when files were written, so that nobody knows what is in use",
            where=inventory.store.location,
            fix="keep the store where it is told (a disk, S3), or delete all of it while nothing runs",
        )


def _plan(inventory: Inventory, keep: int) -> Collection:
    _refuse_without_times(inventory)
    uses = inventory.uses()
    reasons, outdated = inventory.releases(keep)
    plan = Collection(litter=[*outdated, *inventory.litter()])
    for use in sorted(uses, key=lambda use: use.live):
        if not use.live and time.time() - use.time > _UNFINISHED_DAYS * _DAY:
            plan.litter.append(Litter(use.name, 0, "work that ended without a word long ago"))
            continue
        about = f"{use.about}, " if use.about else ""
        state = "in use" if use.live else f"named by work that did not finish, {_date(use.time)}"
        for reference in use.references:
            reasons[reference] = f"{state}: {about}{use.holder}"
    for stored in inventory.artifacts(uses):
        why = "being built" if inventory.is_busy(stored.stage, stored.key) else reasons.get(stored.reference)
        if why is None:
            plan.goes.append(stored)
        else:
            plan.stays.append((stored, why))
    return plan


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
