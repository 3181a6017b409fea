"""The progress of a long stage in the Prefect UI."""

from __future__ import annotations

import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

_SECONDS = 2.0


class ProgressArtifact:
    """A bar that is drawn while a stage runs; drawing it never voids the stage."""

    def __init__(self, title: str, key: str) -> None:
        self._title, self._key = title, f"progress-{key[:16]}"
        self._id: UUID | None = None
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Draw it, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._said < _SECONDS and not (self._id and done >= total):
            return
        self._said = now
        share = 100.0 * done / max(total, 1)
        try:
            if self._id is None:
                self._id = create_progress_artifact(share, key=self._key, description=self._title)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._id, share)
        except Exception:  # a stage outweighs its progress bar, whatever the API says
            self._said = float("inf")
