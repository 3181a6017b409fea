"""The last layer where its vectors are wanted: the same numbers, for less work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from pipeline.base_model import BaseModel, load_tokenizer
from pipeline.cloze import ClozeModel
from pipeline.last_layer import LastLayer, rectangle, shorten
from pipeline.ragged import Ragged
from pipeline.student import Student, distill
from pipeline.tables import Floats
from tests.test_cloze import EXACT, FAMILIES, make
from tests.test_student import NOTHING, SPEC, rows, soft_labels

BERT_LIKE = {"bert", "camembert", "electra", "roberta", "xlm-roberta"}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=1, max_size=25))
def test_a_rectangle_has_every_position_in_its_row(at: list[tuple[int, int]]) -> None:
    rows, columns = torch.tensor(at).T
    wanted, place = rectangle(rows, columns, 6)
    assert wanted[rows, place].tolist() == columns.tolist()
    assert len({(row, there) for row, there in zip(rows.tolist(), place.tolist(), strict=True)}) == len(at)
    assert wanted.shape == (6, max(rows.bincount()))


def tokens_through(layer: LastLayer) -> list[int]:
    """Tokens that the layer's feed-forward part computes, call by call."""
    seen: list[int] = []
    layer.intermediate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_berts_kin_is_computed_at_the_masks_alone(
    family: str, tmp_path: Path, profile: Mapping[str, str]
) -> None:
    make(family, tmp_path)
    model = ClozeModel(tmp_path, profile)
    assert (model.last is not None) == (family in BERT_LIKE)
    if model.last is None:
        return
    seen = tokens_through(model.last)
    ids, attention = torch.full((3, 17), 9), torch.ones(3, 17, dtype=torch.int64)
    with torch.no_grad():
        model.logits_at(ids, attention, None, torch.tensor([[4], [5], [6]]))
        model.logits_at(ids, attention, torch.tensor([0, 2, 2]), torch.tensor([4, 6, 1]))
        model.model(input_ids=ids, attention_mask=attention)  # nobody asks for some of them: all
    assert seen == [3, 6, 3 * 17]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_every_family_says_what_the_plain_classifier_says(
    family: str, tmp_path: Path, tiny_model: Path, profile: Mapping[str, str]
) -> None:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family.split()[0], **FAMILIES[family], num_labels=3)
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    load_tokenizer(tiny_model).save_pretrained(tmp_path)
    student = Student(tmp_path, {**SPEC, "max_length": 30}, profile)
    assert (student.last is not None) == (family in BERT_LIKE)
    assert student.model.state_dict().keys() == plain.state_dict().keys()
    draw = np.random.default_rng(0)
    tokens = Ragged.of([draw.integers(5, 80, length).astype(np.int32) for length in (17, 9, 12)])
    with torch.no_grad():
        expected = torch.cat([plain(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits for row in tokens])
        assert (student.logits(tokens, np.arange(3)) - expected).abs().max() < EXACT
    assert expected.std() > 0.01


def test_a_student_learns_the_same_whichever_way_its_last_layer_is_computed(
    base: BaseModel, profile: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, truth = rows()

    def scores() -> Floats:
        student = distill(SPEC | {"dropout": 0.0}, soft_labels(truth), texts, NOTHING, base, profile, seed=0)
        return student.log_probabilities(texts)

    short = scores()
    monkeypatch.setattr("pipeline.student.shorten", lambda model: None)
    whole = scores()
    assert np.abs(short - whole).max() < 1e-4
    assert np.abs(whole - whole.mean(axis=0)).max() > 0.01


def test_a_layer_that_is_not_what_it_looks_like_is_computed_whole(
    tmp_path: Path, profile: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("bert", tmp_path)
    right = LastLayer.forward

    def wrong(self: LastLayer, *given: Any, **named: Any) -> torch.Tensor:
        return right(self, *given, **named) + (0 if self.columns is None else 1)

    def broken(self: LastLayer, *given: Any, **named: Any) -> torch.Tensor:
        if self.columns is not None:
            raise ValueError("no such argument")
        return right(self, *given, **named)

    for forward in (wrong, broken):
        monkeypatch.setattr(LastLayer, "forward", forward)
        model = ClozeModel(tmp_path, profile)
        assert model.last is None
        assert model.shortcut == "label words"
        ids = torch.full((2, 9), 9)
        with torch.no_grad():
            model.logits_at(ids, torch.ones_like(ids), None, torch.tensor([[4], [5]]))  # would raise or be wrong


def test_dropout_in_the_last_layers_attention_is_trainings_alone(tmp_path: Path) -> None:
    make("bert", tmp_path)
    config = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, **config)
    last = shorten(model)
    assert last is not None

    def vectors() -> torch.Tensor:
        with torch.no_grad(), last.at(torch.tensor([[3], [8]])):
            found: torch.Tensor = last(torch.arange(2 * 9 * 32).reshape(2, 9, 32).sin())
        return found

    assert torch.equal(vectors(), vectors())
    model.train()
    assert (vectors() - vectors()).abs().max() > 0.01
