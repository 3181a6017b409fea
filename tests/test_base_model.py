"""The base model: found by its name, known by its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    CamembertConfig,
    Data2VecTextConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
    XLMRobertaXLConfig,
)

from pipeline.base_model import BaseModel, resolve_base_model
from pipeline.checks import check_task
from pipeline.errors import InputError
from pipeline.task import Task
from tests.conftest import POSITIONS


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the tiny model that a test may spoil."""
    return lambda name: Path(shutil.copytree(tiny_model, tmp_path / name))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        resolve_base_model(str(path))
    return str(caught.value)


def test_a_directory_is_found_relative_to_the_task_file(copy: Callable[[str], Path], tmp_path: Path) -> None:
    copy("mine")
    relative = resolve_base_model("mine", tmp_path)
    assert relative.path == (tmp_path / "mine").resolve()
    assert relative.name == "mine"
    assert relative.weights == resolve_base_model(str(tmp_path / "mine")).weights


def test_the_embedded_model_is_there_and_needs_no_network() -> None:
    base = resolve_base_model("embedded")
    assert base.positions == 512
    assert base.config["architectures"] == ["BertForMaskedLM"]
    # 6 layers of 4 * 384 * 384 + 2 * 384 * 1536 weights; the embeddings are left out.
    assert base.encoder_parameters == 6 * (4 * 384**2 + 2 * 384 * 1536)


def test_equal_models_in_different_places_have_equal_hashes(copy: Callable[[str], Path]) -> None:
    assert resolve_base_model(str(copy("one"))).weights == resolve_base_model(str(copy("other"))).weights


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_change_in_weights_configuration_or_tokenizer_changes_the_hash(
    name: str, copy: Callable[[str], Path], tiny_model: Path
) -> None:
    file = copy("changed") / name
    data = bytearray(file.read_bytes())
    if name == "model.safetensors":
        data[-1] ^= 1
    else:
        data += b"\n"
    file.write_bytes(data)
    assert resolve_base_model(str(file.parent)).weights != resolve_base_model(str(tiny_model)).weights


def test_an_unknown_name_says_what_would_do(tmp_path: Path) -> None:
    told = refusal(tmp_path / "nothing")
    assert "there is no base model" in told
    assert "NAME@REVISION" in told


def test_a_hub_name_without_a_revision_is_refused() -> None:
    with pytest.raises(InputError, match="a hub name with its revision"):
        resolve_base_model("some/model")


def test_a_hub_name_without_a_network_says_so() -> None:
    with pytest.raises(InputError, match=r"can't fetch some/model at 0123abc"):
        resolve_base_model("some/model@0123abc")


def test_a_model_without_safetensors_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("pickled")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "has no safetensors" in refusal(path)


def test_a_model_without_a_masked_lm_head_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("classifier")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    assert "no masked-LM head (it is a BertForSequenceClassification)" in refusal(path)


def test_a_pointer_in_place_of_the_weights_is_told_as_that(copy: Callable[[str], Path]) -> None:
    path = copy("pointer")
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(path)


def test_a_model_whose_files_are_gone_is_told(copy: Callable[[str], Path]) -> None:
    path = copy("links")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "gone")
    assert "can't read the base model" in refusal(path)


def test_a_model_without_a_tokenizer_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("mute")
    for file in [*path.glob("tokenizer*"), *path.glob("vocab*")]:
        file.unlink()
    assert "has no tokenizer" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("config.json", b"[1]"),
        (
            "config.json",
            b'{"model_type": "bert", "architectures": ["BertForMaskedLM"], "max_position_embeddings": "x"}',
        ),
        ("config.json", b'{"model_type": "bert", "num_hidden_layers": 1, "vocab_size": 99, "intermediate_size": 64}'),
    ],
)
def test_a_model_that_can_not_be_loaded_is_told_with_its_directory_by_check(
    name: str, content: bytes, copy: Callable[[str], Path], tiny_task: Callable[..., Path]
) -> None:
    path = copy("damaged")
    (path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"(?s)(can't load|can't read|is no mapping).*{path}"):
        check_task(Task.load(tiny_task(changes={"base_model": str(path)})))


@pytest.mark.parametrize("text", [None, "{", ""])
def test_a_model_without_a_readable_configuration_is_refused(text: str | None, copy: Callable[[str], Path]) -> None:
    path = copy("broken")
    (path / "config.json").unlink()
    if text is not None:
        (path / "config.json").write_text(text)
    assert "can't read the model's configuration" in refusal(path)


@pytest.mark.parametrize(
    "kind", [RobertaConfig, XLMRobertaConfig, XLMRobertaXLConfig, CamembertConfig, MPNetConfig, Data2VecTextConfig]
)
def test_models_that_count_positions_from_behind_the_padding_read_two_tokens_fewer(kind: type) -> None:
    config = kind(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=18,
        pad_token_id=1,
    )
    base = BaseModel("tiny", Path(), "", config.to_dict())
    assert base.positions == 16
    model = AutoModelForMaskedLM.from_config(config)
    assert model(torch.full((1, base.positions), 5)).logits.shape[1] == base.positions
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, base.positions + 1), 5))


def test_a_bert_reads_all_its_positions(tiny_model: Path) -> None:
    base = resolve_base_model(str(tiny_model))
    assert base.positions == POSITIONS
    model = AutoModelForMaskedLM.from_pretrained(tiny_model)
    assert model(torch.full((1, POSITIONS), 5)).logits.shape[1] == POSITIONS
