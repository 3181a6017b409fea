"""Copies of what lies behind URLs: fetched into a cache of this machine, uploaded from it.

The cache may be deleted at any time. A copy is keyed by its URL and by what the storage says of its content (etag,
time, size), and gets its name only when it is whole, so that several processes may share a cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, StorageTrouble, room, writing
from pipeline.locations import AT_ONCE, Entry, entries, entry_of, filesystem, inside, join, local_path, translated

_TRIES = 3
_ELSEWHERE = "set CLOZELINE_CACHE to another directory"


def fetch_file(url: str, cache: Path) -> Path:
    """A copy of a file on this machine, fetched unless the cache has it as it is now.

    Args:
        url: the file; a path and ``file://`` are no copy but the file itself.
        cache: the directory of local copies (`pipeline.settings.Settings.cache_path`).

    Returns:
        A path that ends like the URL (without its query).

    Raises:
        InputError: there is no such file, or it can't be read with these credentials.
    """
    here = local_path(url)
    if here is not None:
        return here
    fs, path = filesystem(url)
    for _ in range(_TRIES):
        before = look_at(url)
        target = _cached(cache / "files", f"{url}|{before.bytes}|{before.validator}", path)
        if before.validator and target.is_file() and target.stat().st_size == before.bytes:
            return target
        _download(fs, path, target, url)
        if look_at(url) == before:
            return target
    raise StorageTrouble(f"{url} kept changing while it was read")


def look_at(url: str) -> Entry:
    """What the storage says of a file; nothing is fetched.

    Raises:
        InputError: there is no such file, or it can't be read with these credentials.
    """
    fs, path = filesystem(url)
    try:
        with translated(url):
            return entry_of(fs.info(path))
    except FileNotFoundError:
        raise InputError("there is no such file", where=url, fix="correct the URL, or write the file") from None


def _cached(cache: Path, identity: str, path: str) -> Path:
    # The whole path stays in the name: people, and ids made unique, tell files apart by their directories. A query
    # is no part of it, may be longer than a name can be, and may be signed.
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    parts = [part for part in path.split("/") if part not in {"", ".", "..", "http:", "https:"}]
    return cache.joinpath(hashlib.sha256(identity.encode()).hexdigest()[:32], *parts)


def _download(fs: Any, path: str, target: Path, url: str, size: int | None = None) -> None:
    with writing("the copies of remote files", target.parent, _ELSEWHERE):
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex[:8]}.part")
    try:
        for _ in range(_TRIES):
            with translated(url), room(target.parent, _ELSEWHERE):
                fs.get_file(path, str(temporary))
            if size is None or temporary.stat().st_size == size:
                break
        else:
            raise StorageTrouble(f"{url} came with {temporary.stat().st_size} bytes instead of {size}")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def fetch_files(url: str, sizes: Mapping[str, int], out: Path) -> None:
    """Copy files below a URL into a directory.

    Args:
        url: what they lie below.
        sizes: the bytes of each by its name: what came in short is no copy, and would stay in a cache for good.
        out: the directory.

    Raises:
        FileNotFoundError: one of them is not there.
        StorageTrouble: one came with another size, again and again.
    """
    fs, _ = filesystem(url)

    def fetch_one(name: str) -> None:
        source = join(url, name)
        _download(fs, fs._strip_protocol(source), inside(out, name), source, sizes[name])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch_one, sizes))


def fetch_tree(url: str, cache: Path) -> Path | None:
    """A copy of a directory on this machine, fetched unless the cache has it as it is now.

    Returns:
        A path that ends like the URL; None where no file lies below it.
    """
    found = entries(url)
    if not found:
        return None
    _, path = filesystem(url)
    identity = "\n".join(f"{name}|{entry.bytes}|{entry.validator}" for name, entry in found.items())
    target = _cached(cache / "trees", f"{url}\n{identity}", path)
    if target.is_dir():
        return target
    temporary = cache / "tmp" / uuid.uuid4().hex
    try:
        try:
            fetch_files(url, {name: entry.bytes for name, entry in found.items()}, temporary)
        except FileNotFoundError as error:
            raise StorageTrouble(f"{url} changed while it was read: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def upload_tree(directory: Path, names: Iterable[str], url: str) -> None:
    """Copy files of a directory below a URL."""
    fs, _ = filesystem(url)

    def upload_one(name: str) -> None:
        target = join(url, name)
        with translated(target):
            fs.put_file(str(directory / name), fs._strip_protocol(target))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(upload_one, names))
