"""Files at paths and behind fsspec URLs: read, written, put once, listed (`pipeline.transfer` copies them).

Credentials come from the environment alone (``AWS_*``, ``FSSPEC_S3``, ...). Listings are never cached, so that
another process's writes are seen at once. Storage errors become three kinds: what is not there is
`FileNotFoundError` (or None), what the user can fix is `InputError`, what may pass is `StorageTrouble`.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import ClozelineError, InputError, StorageTrouble

AT_ONCE = 8
_EXTRAS = {"s3": "s3", "s3a": "s3"}
# What tells one content of a file from another, as the filesystems that fsspec knows call it.
_VALIDATORS = (
    "ETag",
    "etag",
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "generation",
    "created",
    "Content-MD5",
)
_PASSING = frozenset({errno.EREMOTEIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE})
# By name: the packages that define them need not be installed.
_PASSING_KINDS = frozenset(
    {"ConnectionError", "FSTimeoutError", "HTTPClientError", "IncompleteRead", "ResponseParserError"}
)
_PASSING_CODES = frozenset({"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling"})
_PASSING_STATUS = frozenset({408, 409, 425, 429})
# user:password@ in a URL; host:port/ with an @ later on, and what Azure writes (container@account), is none.
_CREDENTIALS = re.compile(r"://(?!\[)[^/@:]*:(?!\d+(?:/|$))[^@]*@")
# With a colon before it, up to the last @: a secret may hold slashes, and masking too much does no harm.
_MASKED = re.compile(r"://(?:[^@]*:.*@|[^/@]*@)")


@dataclass(frozen=True)
class Entry:
    """A file in a listing.

    Attributes:
        bytes: its size.
        modified: when it was written, in seconds since 1970; 0 where the storage does not tell.
        validator: what changes with its content.
    """

    bytes: int
    modified: float
    validator: str


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL rather than a path.

    >>> is_url("s3://bucket/store"), is_url("/data/store")
    (True, False)
    """
    return "://" in str(location)


def local_path(location: str | Path) -> Path | None:
    """The path of a location on this machine (a path, or a ``file://`` URL); None for any other URL.

    >>> local_path("file:///data/store"), local_path("s3://bucket/store")
    (PosixPath('/data/store'), None)
    """
    scheme, url, rest = str(location).partition("://")
    if not url:
        return Path(location)
    return Path(unquote(rest.removeprefix("localhost"))) if scheme == "file" else None


def join(location: str, *parts: str) -> str:
    """A location below another.

    >>> join("s3://bucket/store/", "fit", "0a"), join("s3://bucket/tasks", "../rows/a.parquet"), join("/data", "fit")
    ('s3://bucket/store/fit/0a', 's3://bucket/rows/a.parquet', '/data/fit')

    Raises:
        InputError: it would lie above the bucket.
    """
    scheme, url, inner = location.rpartition("://")
    inner = "/".join([inner.rstrip("/"), *(part.strip("/") for part in parts)])
    if url and {".", ".."} & set(inner.split("/")):  # object stores take both for names
        bucket, _, path = inner.partition("/")
        path = posixpath.normpath(path)
        if path.split("/")[0] == "..":
            raise InputError(
                f"{'/'.join(parts)!r} leads above the bucket",
                where=masked(location),
                fix="correct the path, or give a URL",
            )
        inner = bucket if path == "." else f"{bucket}/{path}"
    return f"{scheme}{url}{inner}"


def parent(url: str) -> str:
    """The directory of a URL.

    >>> parent("s3://bucket/tasks/task.yaml"), parent("memory://task.yaml")
    ('s3://bucket/tasks', 'memory://')
    """
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{posixpath.dirname(rest)}"


def masked(location: str) -> str:
    """A URL without the credentials in it.

    >>> masked("s3://me:secret@bucket/store"), masked("s3://bucket/store")
    ('s3://***@bucket/store', 's3://bucket/store')
    """
    return _MASKED.sub("://***@", location)


def refuse_credentials(location: str) -> None:
    """Make sure that a URL holds no password: it would end up in manifests, logs and parameters.

    Raises:
        InputError: it holds one.
    """
    if _CREDENTIALS.search(location):
        raise InputError(
            "a URL must not hold credentials",
            where=masked(location),
            fix="take them out; they come from the environment (AWS_ACCESS_KEY_ID, FSSPEC_..., ...) or a Prefect block",
        )


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it.

    Raises:
        InputError: there is no such protocol, its package is not installed, or the URL holds credentials.
    """
    import fsspec

    refuse_credentials(url)
    with translated(url):
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, str(path)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what storage clients raise into `InputError`, `StorageTrouble` and `FileNotFoundError`."""
    try:
        yield
    except (ClozelineError, FileExistsError):
        raise
    except Exception as error:
        told = _translation(error, url)
        if told is None:
            raise
        raise told from error


def _translation(error: Exception, url: str) -> Exception | None:
    scheme = url.partition("://")[0]
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    response = response if isinstance(response, Mapping) else {}
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or getattr(error, "status", 0))
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ImportError):
        package = f"clozeline[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else f"the fsspec package for {scheme}"
        return InputError(f"{scheme}:// needs a package: {error}", where=url, fix=f"install {package}")
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return InputError(f"there is no storage called {scheme}://", where=url, fix="use a path, s3://, memory://, ...")
    if code == "NoSuchBucket":
        return InputError("the bucket does not exist", where=url, fix="create it, or correct the URL")
    if isinstance(error, FileNotFoundError):
        return None
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "NoRegionError", "ProfileNotFound"}:
        return InputError(
            f"there are no credentials for this storage: {error}",
            where=url,
            fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and AWS_ENDPOINT_URL unless it is "
            "Amazon's",
        )
    if (isinstance(error, PermissionError) and error.filename is None) or status in {401, 403}:
        return InputError(
            f"access was denied ({code or error})",
            where=url,
            fix="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, and what they are allowed to do",
        )
    if (
        isinstance(error, TimeoutError | ConnectionError)
        or bool(kinds & _PASSING_KINDS)
        or (isinstance(error, OSError) and error.errno in _PASSING)
        or code in _PASSING_CODES
        or status in _PASSING_STATUS
        or status >= 500
    ):
        return StorageTrouble(f"{url}: {type(error).__name__}: {error}")
    if status:
        return InputError(f"the storage refused: {code or status} ({error})", where=url, fix="correct the URL")
    # The HTTP client's own: an answer with a status was told above.
    return StorageTrouble(f"{url}: {type(error).__name__}: {error}") if "ClientError" in kinds else None


def read(url: str) -> bytes | None:
    """The content of a file, or None where there is none."""
    fs, path = filesystem(url)
    try:
        with translated(url):
            return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return None


def write(url: str, content: bytes) -> None:
    """Write a small file, or replace it, whole."""
    fs, path = filesystem(url)
    with translated(url):
        fs.pipe_file(path, content)


def put_if_absent(url: str, content: bytes) -> bool:
    """Create a file unless it is there: of many that try at once, one succeeds.

    On S3, Google Cloud Storage and Azure this is one conditional request. Filesystems without it look first and
    write then, which leaves a gap between the two.

    Args:
        url: the file.
        content: must differ from what any other writer would put there: an answer that was lost on the way is
            told from another's success by the content alone.

    Returns:
        Whether the file holds ``content`` by this call.
    """
    fs, path = filesystem(url)
    for wait in (0.1, 0.2, 0.4, None):
        try:
            with translated(url):
                fs.pipe_file(path, content, mode="create")
            break
        except FileExistsError:
            return read(url) == content
        except StorageTrouble as error:
            if wait is None or "ConditionalRequestConflict" not in str(error):
                raise
            time.sleep(wait)  # two conditional writes met: S3 asks to try again
    return True


def remove(urls: Iterable[str]) -> None:
    """Remove files; those that are not there are no error."""
    urls = list(urls)
    if not urls:
        return
    fs, _ = filesystem(urls[0])

    def remove_one(url: str) -> None:
        try:
            with translated(url):
                fs.rm_file(fs._strip_protocol(url))
        except FileNotFoundError:
            pass

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(remove_one, urls))


def given(location: str) -> str:
    """A directory or URL as a user gives it, in the one form used from then on.

    Raises:
        InputError: it is a URL with credentials.
    """
    refuse_credentials(location)
    return location.rstrip("/") if is_url(location) else str(Path(location).absolute())


def inside(root: Path, name: str) -> Path:
    """The path of a name that came from a listing or a manifest, which must not lead out of its root.

    Raises:
        InputError: it does.
    """
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise InputError(f"the name {name!r} leads out of its directory", where=str(root), fix="remove what has it")
    return root / name


def entries(url: str) -> dict[str, Entry]:
    """Every file below a URL, by its name relative to it, in order; nothing where there is nothing."""
    fs, path = filesystem(url)
    root = path.rstrip("/") + "/"
    with translated(url):
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError as error:
            if _translation(error, url) is not None:
                raise
            return {}
    return {
        name.removeprefix(root): entry_of(info)
        for name, info in sorted(found.items())
        if name.startswith(root) and info.get("type", "file") == "file"
    }


def entry_of(info: Mapping[str, Any]) -> Entry:
    """What a filesystem says of a file."""
    modified = next((info[key] for key in ("LastModified", "mtime", "last_modified", "created") if key in info), 0)
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    validator = "|".join(f"{key}={info[key]}" for key in _VALIDATORS if info.get(key))
    return Entry(int(info.get("size") or 0), float(modified) if isinstance(modified, int | float) else 0.0, validator)


def matches(pattern: str) -> list[str]:
    """The URLs of the files that a URL with wildcards matches, sorted."""
    fs, path = filesystem(pattern)
    with translated(pattern):
        found = fs.glob(path, detail=True)
    return sorted(fs.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file")


def below(location: str | Path, *parts: str) -> str:
    """The path or URL of something below a directory, itself a path or a URL."""
    here = local_path(location)
    return join(str(location), *parts) if here is None else str(here.joinpath(*parts))


def read_file(location: str) -> bytes | None:
    """The content of a small file at a path or URL, or None where there is none."""
    if is_url(location):
        return read(location)
    try:
        return Path(location).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_file(location: str, text: str) -> None:
    """Write a small file at a path or URL, or replace it, whole."""
    if is_url(location):
        write(location, text.encode())
        return
    Path(location).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(location), text)


def remove_file(location: str) -> None:
    """Remove a file at a path or URL; one that is not there is no error."""
    if is_url(location):
        remove([location])
    else:
        Path(location).unlink(missing_ok=True)


def read_json(location: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none, or it can't be read."""
    try:
        return dict(json.loads(read_file(location) or b""))
    except (OSError, ValueError, TypeError):  # the last is a number's, which is JSON and no object
        return None
