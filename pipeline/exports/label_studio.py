"""Label Studio: a JSON list of tasks with our prediction, and the labelling configuration that fits it.

Row ids, priority and probabilities stand in ``data``, the one place whose keys survive Label Studio's own export.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

NAME = "label_studio.json"


def export(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], text: Sequence[str], version: str
) -> dict[str, str]:
    """``label_studio.json`` and ``label_config.xml``."""
    tasks = [
        {
            "data": {
                **{name: row[name] for name in text},
                "row_id": row["row_id"],
                "content_hash": row["content_hash"],
                "priority": row["priority"],
                **{f"p_{label}": probability for label, probability in zip(labels, row["probs"], strict=True)},
            },
            "predictions": [
                {
                    "model_version": version,
                    "score": row["confidence"],
                    "result": [
                        {
                            "id": row["row_id"],
                            "from_name": "label",
                            "to_name": text[0],
                            "type": "choices",
                            "value": {"choices": [row["label_name"]]},
                        }
                    ],
                }
            ],
        }
        for row in rows
    ]
    shown = "".join(f"\n  <Text name={quoteattr(name)} value={quoteattr('$' + name)}/>" for name in text)
    choices = "".join(f"\n    <Choice value={quoteattr(label)}/>" for label in labels)
    config = (
        f'<View>{shown}\n  <Choices name="label" toName={quoteattr(text[0])} choice="single">{choices}\n'
        "  </Choices>\n</View>\n"
    )
    return {NAME: _text(tasks), "label_config.xml": config}


def without(content: str, contents: Collection[str]) -> str:
    """The tasks that `export` wrote, without the rows of some content hashes."""
    return _text([task for task in json.loads(content) if task["data"]["content_hash"] not in contents])


def _text(tasks: list[Any]) -> str:
    return json.dumps(tasks, ensure_ascii=False, indent=1)
