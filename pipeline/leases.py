"""Exclusive leases on names: a lock on a file of this machine, or a chain of objects behind a URL.

A file's lock (flock) dies with its holder. Storage behind a URL has no such thing, so that there a lease is a
chain of objects ``<location>/<number>``: each is created by a conditional put, its holder rewrites it as long as it
lives, and who sees the last one unchanged for as long as it states, by its own clock, creates the next. No two
machines' clocks are compared, and the last object is never deleted by a holder, so that numbers only grow.

A holder that is held up for too long (a suspended machine) loses its lease without noticing at once. A lease
therefore saves work and keeps order; what must not happen twice is guarded by a conditional put of its own, or by
`Lease.check` right before it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pipeline.errors import ClozelineError, LeaseLost
from pipeline.locations import entries, join, local_path, put_if_absent, read, remove, write

TTL = 30.0
_DIGITS = 12


def holder() -> str:
    """This process, for messages to those who wait for it."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


@contextmanager
def locked(path: Path, *, shared: bool = False, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock on a file; the kernel drops it when its holder dies.

    Args:
        path: created when missing; its content says who holds it.
        shared: let others hold it too, if they also share.
        waiting: called once, with the holder's words about itself, when the lock is not free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                if waiting is not None:
                    waiting(file.read() or "another process")
                    waiting = None
                fcntl.flock(file, how)
            if not _is_at(path, file.fileno()):  # swept while this waited: whoever comes next locks another file
                continue
            file.truncate(0)
            file.write(holder())
            file.flush()
            yield
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file that is there, unless somebody holds it; gives whether it is held now."""
    try:
        file = _opened(path)
    except FileNotFoundError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _opened(path: Path) -> IO[bytes]:
    """A file that is there; network file systems lock exclusively only what may be written."""
    try:
        return path.open("r+b")
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
        return path.open("rb")


class Lease:
    """A lease that is held."""

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            LeaseLost: another process has taken it over.
        """


@contextmanager
def lease(location: str, *, waiting: Callable[[str], None] | None = None, ttl: float = TTL) -> Iterator[Lease]:
    """Hold the exclusive lease on a name; waits for it as long as it takes.

    Args:
        location: a path (of the lock file) or a URL (of the chain).
        waiting: called once, with who holds it, when it is not free.
        ttl: behind a URL: seconds after which a holder that does not renew it is taken for dead.

    Raises:
        StorageTrouble: the storage did not answer.
    """
    path = local_path(location)
    if path is not None:
        with locked(path, waiting=waiting):
            yield Lease()
        return
    held = _Link.take(location, waiting, ttl)
    try:
        yield held
    finally:
        held.release()


def wait_until_free(location: str) -> None:
    """Wait until nobody holds the lease of a URL; a holder that is taken for dead loses it."""
    watch = _Watch(location)
    while watch.look() is not None:
        watch.pause()
    if watch.expired:  # its `Lease.check` must fail should it come back to life
        with lease(location):
            pass


class _Watch:
    """Somebody else's lease, seen from outside."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.number = 0
        self.seen: dict[str, Any] = {}
        self.expired = False
        self._since = time.monotonic()

    def look(self) -> dict[str, Any] | None:
        """What the holder says of itself; None when there is none, or it is dead."""
        self.number, self.expired = _newest(self.location), False
        if self.number == 0:
            return None
        content = read(_link(self.location, self.number))
        if content is None:  # its successor has just removed it
            return self.seen or {"who": "another process", "ttl": TTL}
        link: dict[str, Any] = json.loads(content)
        if link["released"]:
            return None
        if link != self.seen:
            self.seen, self._since = link, time.monotonic()
        self.expired = time.monotonic() - self._since > link["ttl"]
        return None if self.expired else link

    def pause(self) -> None:
        """Sleep until it is worth another look."""
        time.sleep(min(float(self.seen.get("ttl", TTL)) / 20, 1.0) * random.uniform(0.5, 1))


class _Link(Lease):
    """One's own object in a chain, renewed from a thread."""

    def __init__(self, location: str, number: int, content: dict[str, Any]) -> None:
        self._location, self._number, self._content = location, number, content
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {location}", daemon=True)

    @classmethod
    def take(cls, location: str, waiting: Callable[[str], None] | None, ttl: float) -> _Link:
        watch = _Watch(location)
        while True:
            other = watch.look()
            if other is not None:
                if waiting is not None:
                    waiting(other["who"])
                    waiting = None
                watch.pause()
                continue
            number = watch.number + 1
            content = {"who": holder(), "id": uuid.uuid4().hex, "ttl": ttl, "beat": 0, "released": False}
            if not put_if_absent(_link(location, number), _bytes(content)):
                continue
            # Who slept between looking and creating may have filled a gap far behind the end of the chain.
            if _newest(location) == number:
                link = cls(location, number, content)
                link._thread.start()
                remove(_link(location, earlier) for earlier in _numbers(location) if earlier < number)
                return link
            remove([_link(location, number)])

    def _renew(self) -> None:
        while not self._over.wait(self._content["ttl"] / 3):
            # The next beat may get through; if none does, the lease is lost.
            with suppress(ClozelineError, OSError):
                self.check()
                self._content["beat"] += 1
                write(_link(self._location, self._number), _bytes(self._content))

    def check(self) -> None:
        if _newest(self._location) != self._number:
            self._over.set()
            raise LeaseLost(f"{self._location} was taken over by another process, since it was not renewed in time")

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        with suppress(ClozelineError, OSError):  # it then expires by itself
            self.check()
            write(_link(self._location, self._number), _bytes({**self._content, "released": True}))


def _bytes(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _link(location: str, number: int) -> str:
    return join(location, f"{number:0{_DIGITS}d}")


def _numbers(location: str) -> list[int]:
    return [int(name) for name in entries(location) if name.isdecimal()]


def _newest(location: str) -> int:
    return max(_numbers(location), default=0)
