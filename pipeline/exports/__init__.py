"""The review queue in the import formats of labelling tools, one file a tool.

An exporter is a function ``(rows, labels, text, version) -> {file name: content}``; rows are those of the review split,
most urgent first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pipeline.exports import doccano, label_studio

Row = Mapping[str, Any]
EXPORTERS: dict[str, Callable[[Sequence[Row], Sequence[str], Sequence[str], str], dict[str, str]]] = {
    "label-studio": label_studio.export,
    "doccano": doccano.export,
}

# What of the files holds rows, and how to leave some out: ``(content, content hashes) -> content``.
WITHOUT: dict[str, Callable[[str, Collection[str]], str]] = {
    label_studio.NAME: label_studio.without,
    doccano.NAME: doccano.without,
}


def export_queue(rows: Sequence[Row], labels: Sequence[str], text: Sequence[str], version: str) -> dict[str, str]:
    """All exports of a queue, by file name."""
    return {
        name: content for export in EXPORTERS.values() for name, content in export(rows, labels, text, version).items()
    }
