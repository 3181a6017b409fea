"""doccano: JSON lines. It has no score, so that the order of the lines is the priority."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

NAME = "doccano.jsonl"


def export(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], text: Sequence[str], version: str
) -> dict[str, str]:
    """``doccano.jsonl``; several text columns are joined by a line break."""
    lines = [
        json.dumps(
            {
                "text": "\n".join(row[name] or "" for name in text),
                "label": [row["label_name"]],
                "row_id": row["row_id"],
                "content_hash": row["content_hash"],
                "model_version": version,
            },
            ensure_ascii=False,
        )
        for row in rows
    ]
    return {NAME: "".join(line + "\n" for line in lines)}


def without(content: str, contents: Collection[str]) -> str:
    """What `export` wrote, without the rows of some content hashes."""
    lines = content.split("\n")  # a text may hold what other functions take for the end of a line
    return "\n".join(line for line in lines if not line or json.loads(line)["content_hash"] not in contents)
