"""The exports for labelling tools, read back as those tools read them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from pipeline.exports import WITHOUT, export_queue

LABELS = ["good & bad", '"fine"']


@pytest.fixture
def exported() -> dict[str, str]:
    row: dict[str, Any] = {
        "row_id": "a1",
        "content_hash": "0" * 16,
        "title": "Heads <b>up</b>",
        "body": None,
        "priority": 0.9,
        "probs": [0.25, 0.75],
        "confidence": 0.75,
        "label_name": '"fine"',
    }
    return export_queue([row, {**row, "row_id": "b2", "body": "Zwei\nZeilen"}], LABELS, ["title", "body"], "1234abcd")


def test_label_studio_predictions_fit_the_labelling_configuration(exported: dict[str, str]) -> None:
    config = ElementTree.fromstring(exported["label_config.xml"])
    choices = [choice.get("value") for choice in config.iter("Choice")]
    shown = {text.get("name"): text.get("value") for text in config.iter("Text")}
    target = next(config.iter("Choices"))
    assert choices == LABELS
    assert shown == {"title": "$title", "body": "$body"}
    for task in json.loads(exported["label_studio.json"]):
        [prediction] = task["predictions"]
        [result] = prediction["result"]
        assert result["from_name"] == target.get("name")
        assert result["to_name"] == target.get("toName")
        assert result["to_name"] in shown
        assert set(result["value"]["choices"]) <= set(choices)
        assert prediction["model_version"] == "1234abcd"
        assert task["data"]["p_good & bad"] == 0.25
        assert set(shown) <= set(task["data"])


def test_doccano_has_one_line_a_row_in_the_queues_order(exported: dict[str, str]) -> None:
    lines = [json.loads(line) for line in exported["doccano.jsonl"].splitlines()]
    assert [line["row_id"] for line in lines] == ["a1", "b2"]
    assert lines[1]["text"] == "Heads <b>up</b>\nZwei\nZeilen"
    assert lines[0]["label"] == ['"fine"']


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_rows_are_left_out_by_their_content_and_the_others_stay_as_they_were(
    name: str, exported: dict[str, str]
) -> None:
    assert WITHOUT[name](exported[name], {"f" * 16}) == exported[name]
    assert "Heads" not in WITHOUT[name](exported[name], {"0" * 16})
