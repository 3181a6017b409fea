"""Credentials for stores and releases behind URLs, from a Prefect block."""

from __future__ import annotations

import json
import os

from pipeline.errors import InputError


def use_storage_block(name: str | None) -> None:
    """Give this process, and the stage processes that it starts, the credentials of a block.

    They go into the environment variable that fsspec reads (``FSSPEC_S3`` for ``s3://``), never into parameters,
    requests or keys.

    Args:
        name: ``remote-file-system/NAME``, a block whose settings are the filesystem's keyword arguments; None for
            what the environment has.

    Raises:
        InputError: there is no such block, or it is of another kind.
    """
    if name is None:
        return
    import fsspec.config
    from prefect.blocks.core import Block
    from prefect.filesystems import RemoteFileSystem

    try:
        block = Block.load(name)
    except ValueError as error:
        raise InputError(
            f"can't load the Prefect block {name!r}: {error}",
            where="storage_block",
            fix="prefect block ls shows the blocks; it is called remote-file-system/NAME",
        ) from None
    if not isinstance(block, RemoteFileSystem):
        raise InputError(
            f"{name} is no remote file system", where="storage_block", fix="make a block remote-file-system/NAME"
        )
    protocol = block.basepath.split("://", 1)[0]
    os.environ[f"FSSPEC_{protocol.upper()}"] = json.dumps(block.settings)
    fsspec.config.conf.setdefault(protocol, {}).update(block.settings)
