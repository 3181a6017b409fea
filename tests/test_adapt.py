"""Masked-language modelling on the task's own texts."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, BertModel
from typer.testing import CliRunner

from flows.cli import app
from pipeline import batching
from pipeline.adapt import Adapting, Curve
from pipeline.base_model import BaseModel, load_tokenizer, resolve_base_model
from pipeline.cloze import ClozeModel
from pipeline.errors import InputError, StoreDamaged
from pipeline.masking import inside_words, mask
from pipeline.stages import checkpoints_of, run_stage
from pipeline.template import Encoder
from pipeline.training import Diverged
from pipeline.worker import SMALLEST_SHARE, StageProcess
from tests.conftest import BAD, GOOD, POSITIONS, sentence
from tests.stage_run import Run
from tests.test_cloze import FAMILIES
from tests.test_worker import data_megabytes

SPEC = {
    "steps": 40,
    "minutes": None,
    "batch_tokens": 512,
    "learning_rate": 3e-3,
    "mask_share": 0.15,
    "whole_words": False,
    "keep": 0.0,
    "max_length": 32,
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    return [sentence(draw, GOOD if i % 2 else BAD) for i in range(300)]


@pytest.fixture
def headless(tiny_model: Path, tmp_path: Path) -> BaseModel:
    """The tiny model without its head, as a sentence encoder comes."""
    path = tmp_path / "encoder"
    BertModel.from_pretrained(tiny_model, add_pooling_layer=False).save_pretrained(path)
    load_tokenizer(tiny_model).save_pretrained(path)
    return resolve_base_model(str(path), headless=True)


def adapted(base: BaseModel, profile: dict[str, str], texts: list[str], place: Path, **changes: Any) -> Adapting:
    found = Adapting({**SPEC, **changes}, texts, base, profile, seed=0)
    found.run(place / "checkpoints")
    return found


def test_held_out_loss_falls_and_the_model_is_a_base_model(
    base: BaseModel, profile: dict[str, str], texts: list[str], tmp_path: Path
) -> None:
    found = adapted(base, profile, texts, tmp_path)
    first, last = found.curve.points[0], found.curve.points[found.curve.best]
    assert last["loss"] < 0.8 * first["loss"]
    assert last["accuracy"] > first["accuracy"]
    found.save(tmp_path / "model")
    saved = resolve_base_model(str(tmp_path / "model"))
    again = Adapting(SPEC, texts, saved, profile, seed=0)
    again._evaluate()
    assert again.curve.points[0]["loss"] == pytest.approx(last["loss"], abs=1e-4)


def test_an_encoder_without_a_head_gets_one_that_learns(
    headless: BaseModel, profile: dict[str, str], texts: list[str], tmp_path: Path
) -> None:
    found = adapted(headless, profile, texts, tmp_path)
    points = found.curve.points
    assert points[-1]["loss"] < 0.9 * points[0]["loss"]
    found.save(tmp_path / "model")
    _, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_without_steps_of_adaptation_an_encoder_without_a_head_is_refused(headless: BaseModel) -> None:
    with pytest.raises(InputError, match=r"no masked-LM head"):
        resolve_base_model(str(headless.path))


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_killed_run_goes_on_to_the_same_bytes(
    base: BaseModel, profile: dict[str, str], texts: list[str], tmp_path: Path, keep: float
) -> None:
    adapted(base, profile, texts, tmp_path / "calm", keep=keep).save(tmp_path / "calm-model")

    def kill(done: int, total: int) -> None:
        if done == 21:
            raise Killed

    spec = {**SPEC, "keep": keep}
    with pytest.raises(Killed):
        Adapting(spec, texts, base, profile, seed=0).run(tmp_path / "checkpoints", kill)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000020"]
    (tmp_path / "checkpoints" / "writing").mkdir()  # as a kill in the middle of writing leaves it
    second = Adapting(spec, texts, base, profile, seed=0)
    steps: list[int] = []
    second.run(tmp_path / "checkpoints", lambda done, total: steps.append(done))
    assert steps[0] == 21
    second.save(tmp_path / "model")
    calm, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("calm-model", "model"))
    assert all(torch.equal(calm[name], killed[name]) for name in calm)


def test_keeping_the_encoder_near_holds_its_vectors(
    base: BaseModel, profile: dict[str, str], texts: list[str], tmp_path: Path
) -> None:
    free, kept = (
        adapted(base, profile, texts, tmp_path / str(keep), keep=keep).curve.points[-1]["cosine"]
        for keep in (1e-6, 30.0)
    )
    assert kept > free + 0.02


def test_training_ends_when_the_held_out_texts_get_no_better() -> None:
    curve = Curve()
    for step, loss in enumerate([5.0, 4.0, 3.0, 3.1, 3.2, 3.05]):
        curve.points.append({"step": step, "objective": loss})
    assert curve.best == 2
    assert not curve.is_over
    curve.points.append({"step": 6, "objective": 3.3})
    assert curve.is_over


@pytest.mark.parametrize(("rows", "ends"), [(300, False), (40, True)])
def test_training_ends_early_only_on_texts_that_were_read_before(
    base: BaseModel, profile: dict[str, str], texts: list[str], tmp_path: Path, rows: int, ends: bool
) -> None:
    """At a rate at which nothing is learned, which shows at the first evaluations."""
    found = adapted(base, profile, texts[:rows], tmp_path, learning_rate=1.0, batch_tokens=64)
    assert found.curve.best == 0
    assert (found.step < SPEC["steps"]) == ends
    assert (found.tokens > len(found.train.tokens.values)) == ends


def test_minutes_end_training_early_and_the_learning_rate_with_it(
    base: BaseModel, profile: dict[str, str], texts: list[str], tmp_path: Path
) -> None:
    found = adapted(base, profile, texts, tmp_path, steps=1_000_000, minutes=0.02)
    assert 0 < found.step < 1_000_000
    assert found.optimizer.param_groups[0]["lr"] < 0.5 * SPEC["learning_rate"]


def test_a_loss_that_is_no_number_is_told(
    tiny_model: Path, profile: dict[str, str], texts: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForMaskedLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    model.save_pretrained(broken)
    load_tokenizer(tiny_model).save_pretrained(broken)
    with pytest.raises(Diverged, match="after step 0"):
        adapted(resolve_base_model(str(broken)), profile, texts, tmp_path)


def test_too_few_texts_are_an_error(base: BaseModel, profile: dict[str, str]) -> None:
    with pytest.raises(InputError, match="too few"):
        Adapting(SPEC, ["the food was good."], base, profile, seed=0)


def test_whole_texts_lose_no_token_and_long_ones_are_cut_evenly(tiny_model: Path) -> None:
    encoder = Encoder(load_tokenizer(tiny_model), 12)
    words = " ".join(GOOD * 3)
    found = encoder.encode_whole(["the food", words, "[MASK] was"])
    rows = [row.tolist() for row in found.tokens]
    assert max(map(len, rows)) <= 12
    lengths = [len(row) for row in rows[1:-1]]
    assert max(lengths) - min(lengths) <= 1
    plain = encoder.tokenizer.backend_tokenizer.encode(words, add_special_tokens=False).ids
    assert [token for row in rows[1:-1] for token in row[1:-1]] == plain
    assert all(row[0] == rows[0][0] and row[-1] == rows[0][-1] for row in rows)
    assert encoder.tokenizer.mask_token_id not in rows[-1]
    assert found.own.sum() == len(found.tokens.values) - 2 * len(rows)


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level"])
def test_words_are_hidden_whole(tiny_model: Path, byte_level: Any, kind: str) -> None:
    tokenizer: Any = load_tokenizer(tiny_model) if kind == "wordpiece" else byte_level
    encoded = Encoder(tokenizer, POSITIONS).encode_whole(["the xylophone was zigzagging, and the yaks unhappy."] * 50)
    inside = inside_words(tokenizer)
    masked = mask(encoded, tokenizer.mask_token_id, len(tokenizer), np.random.default_rng(0), 0.3, inside)
    hidden = np.zeros(len(encoded.own), dtype=np.bool_)
    rows = np.repeat(np.arange(50), np.diff(masked.first))
    hidden[encoded.tokens.offsets[rows] + masked.columns] = True
    goes_on = encoded.own & inside[encoded.tokens.values]
    at = np.flatnonzero(goes_on[1:] & encoded.own[:-1]) + 1
    assert len(at)
    assert (hidden[at] == hidden[at - 1]).all()
    assert 0 < hidden.sum() < encoded.own.sum()


ADAPT = {"steps": 12, "batch_tokens": 256, "learning_rate": 3e-3}


def test_an_adapted_base_model_is_what_annotators_and_student_start_from(tiny_task: Callable[..., Path]) -> None:
    run = Run(tiny_task(changes={"adapt": ADAPT}))
    executed = run()
    assert executed.index("adapt base model") < executed.index("fit p0")
    plan = run.plan()
    for stage in ("fit", "annotate", "distill", "release"):
        assert all("adapt" in call.inputs for call in plan.find(stage))
    [adapt] = plan.find("adapt")
    model = run.store.find("adapt", adapt.key).path / "model"  # type: ignore[union-attr]
    student = load_file(run.version / "model" / "model.safetensors")
    assert torch.equal(
        load_file(model / "model.safetensors")["bert.embeddings.word_embeddings.weight"],
        student["bert.embeddings.word_embeddings.weight"],  # frozen, so that the student has what it started from
    )
    for file in ("README.md", "report.html"):
        assert "first trained on" in (run.version / file).read_text()
    assert "<svg" in (run.version / "report.html").read_text()
    assert run() == []
    again = run("adapt.steps=14")
    assert {"adapt base model", "fit p0", "distill"} <= set(again)
    assert "sample transfer set" not in again


def test_an_encoder_without_a_head_labels_a_dataset_once_it_is_adapted(
    headless: BaseModel, tiny_task: Callable[..., Path]
) -> None:
    path = tiny_task(changes={"adapt": ADAPT, "base_model": str(headless.path)})
    run = Run(path)
    run()
    assert run.summary["rows"]["rest"]
    with pytest.raises(InputError, match=r"let adapt.steps train one"):
        run("adapt.steps=0")


def test_checkpoints_go_once_the_artifact_is_in_the_store(
    tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOZELINE_CACHE", str(tmp_path / "cache"))
    run = Run(tiny_task(changes={"adapt": ADAPT}))
    [adapt] = run.plan().find("adapt")
    kept = checkpoints_of(run.store, adapt.key)
    seen: list[bool] = []

    def progress(done: int, total: int) -> None:
        seen.append(kept.is_dir())

    for call in run.plan().calls[: run.plan().calls.index(adapt)]:
        run_stage(call.request(run.store))
    run_stage(adapt.request(run.store), progress)
    assert any(seen)
    assert not kept.exists()


def test_the_command_adapts_alone_and_copies_the_model(
    tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, runner = str(tiny_task()), CliRunner()
    refused = runner.invoke(app, ["adapt", path])
    assert isinstance(refused.exception, InputError)
    settings = [f"--set=adapt.{name}={value}" for name, value in ADAPT.items()]
    settings.append("--set=inputs.labelled=null")  # of which check warns, and not in the midst of the JSON
    done = runner.invoke(app, ["adapt", path, *settings, "--half", "--out", str(tmp_path / "model"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert not found["cached"]
    assert found["curve"][-1]["step"] == ADAPT["steps"]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert resolve_base_model(str(tmp_path / "model")).weights
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "safetensors keeps what it writes to its owner"
    shown = runner.invoke(app, ["adapt", path, *settings])
    assert "(cached)" in shown.stdout
    taken = runner.invoke(app, ["adapt", path, *settings, "--out", str(tmp_path / "model")])
    assert isinstance(taken.exception, InputError)


@pytest.mark.server
def test_the_command_goes_on_in_smaller_pieces_when_memory_runs_out(
    tiny_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the embedded model, whose steps of 4,096 tokens take hundreds of megabytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOZELINE_STAGE_DEVICE", "cpu")
    adapt = {"steps": 1, "batch_tokens": 4096, "learning_rate": 1e-4}
    path = tiny_task(unlabelled=100, changes={"adapt": adapt, "base_model": "embedded"})
    file = path.parent / "unlabelled.parquet"
    rows = pq.read_table(file).to_pylist()
    long = [{**row, "text": f"{row['text']} and the soup was {i} degrees" * 6} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(long), file)
    run = Run(path)
    calls = run.plan().calls
    [call] = run.plan().find("adapt")
    for before in calls[: calls.index(call)]:
        run_stage(before.request(run.store))
    taken = 0
    with StageProcess() as free, ThreadPoolExecutor(1) as beside:
        ends = beside.submit(
            free.run, {**call.request(run.store), "batch_share": SMALLEST_SHARE}, lambda done, total: None
        )
        while not ends.done():
            taken = max(taken, data_megabytes(free.pid))
            time.sleep(0.01)
        ends.result()
    monkeypatch.setenv("CLOZELINE_STAGE_MEMORY", str(taken + 150))
    monkeypatch.setenv("CLOZELINE_STORE", str(tmp_path / "bounded"))
    done = CliRunner().invoke(app, ["adapt", str(path)])
    assert done.exit_code == 0, done.output
    assert "ran out of memory; trying again with 0.5 of the usual batches" in done.stderr
    [record] = (tmp_path / "bounded" / "adapt").glob("*/run.json")
    assert SMALLEST_SHARE <= json.loads(record.read_text())["batch_share"] < 1


@pytest.mark.parametrize("damage", ["layout", "torn"])
def test_a_checkpoint_that_cannot_be_read_costs_its_work_and_no_more(
    base: BaseModel, profile: dict[str, str], texts: list[str], tmp_path: Path, damage: str
) -> None:
    adapted(base, profile, texts, tmp_path / "calm").save(tmp_path / "calm-model")
    state = tmp_path / "checkpoints" / "step-000000020"
    state.mkdir(parents=True)
    save_file({"weight:other": torch.zeros(1)}, state / "state.safetensors")
    (state / "state.json").write_text('{"step": 20, "tokens": 1, "seconds": 1.0, "points": []}')
    if damage == "torn":
        (state / "state.safetensors").write_bytes(b"\0" * 20)
    adapted(base, profile, texts, tmp_path).save(tmp_path / "model")
    calm, other = (load_file(tmp_path / name / "model.safetensors") for name in ("calm-model", "model"))
    assert all(torch.equal(calm[name], other[name]) for name in calm)


def test_steps_hold_the_same_rows_when_memory_is_short(
    base: BaseModel, profile: dict[str, str], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Adapting(SPEC, texts, base, profile, seed=0)
    whole = [rows.tolist() for rows in itertools.islice(found._batches(), 20)]
    monkeypatch.setattr(batching, "_batch_share", 0.5)
    assert [rows.tolist() for rows in itertools.islice(found._batches(), 20)] == whole
    lengths = np.full(300, 32)
    assert len(found._parts(lengths)) > len(batching.steps_by_length(lengths, batching.TOKEN_BUDGET))


def test_held_out_texts_whose_loss_is_no_number_are_told(
    base: BaseModel, profile: dict[str, str], texts: list[str]
) -> None:
    found = Adapting(SPEC, texts, base, profile, seed=0)
    with torch.no_grad():
        next(found.model.parameters()).fill_(torch.nan)
    with pytest.raises(Diverged, match="held-out"):
        found._evaluate()


@pytest.mark.parametrize("family", [name for name in FAMILIES if "own head" not in name])
def test_every_family_without_its_head_learns_to_fill_masks(
    family: str, tiny_model: Path, profile: dict[str, str], texts: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    settings = {**FAMILIES[family], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **settings)
    AutoModelForMaskedLM.from_config(config).base_model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    base = resolve_base_model(str(tmp_path / "encoder"), headless=True)
    found = Adapting({**SPEC, "steps": 20}, texts, base, profile, seed=0)
    counts = np.bincount(found.train.tokens.values[found.train.own], minlength=len(tokenizer)) + 1.0
    shares = torch.from_numpy(np.log(counts / counts.sum())).float()
    biases = [
        p for n, p in found.model.model.named_parameters() if n in found.model.new_head and p.shape == shares.shape
    ]
    assert len(biases) == 1
    assert torch.allclose(biases[0], shares)
    found.run(tmp_path / "checkpoints")
    assert found.curve.points[found.curve.best]["loss"] < found.curve.points[0]["loss"]
    found.save(tmp_path / "model")
    assert ClozeModel(tmp_path / "model", profile).new_head == []


def test_word_pieces_that_go_on_are_known_by_their_marks(tiny_model: Path, byte_level: Any) -> None:
    word_piece = load_tokenizer(tiny_model)
    inside = inside_words(word_piece)
    assert not inside[word_piece.convert_tokens_to_ids(["food", "x", "!", "[MASK]"])].any()
    assert inside[word_piece.convert_tokens_to_ids(["##x", "##1"])].all()
    inside = inside_words(byte_level)
    assert not inside[byte_level.convert_tokens_to_ids(["Ġfood", "!", "<mask>"])].any()
    assert inside[byte_level.convert_tokens_to_ids(["x", "1"])].all()


def test_fits_to_an_adapted_model_that_was_built_anew_differently_are_discarded(
    tiny_task: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(tiny_task(changes={"adapt": ADAPT}))
    run()
    plan = run.plan()
    [adapt], fit, annotate = plan.find("adapt"), plan.find("fit")[0], plan.find("annotate")[0]
    run.store.discard(annotate.stage, annotate.key)
    artifact = run.store.find("adapt", adapt.key)
    assert artifact is not None
    weights = load_file(artifact.path / "model" / "model.safetensors")
    run.store.discard("adapt", adapt.key)

    def another(out: Path) -> dict[str, Any]:
        shutil.copytree(tmp_path / "kept", out / "model")
        name = "bert.embeddings.word_embeddings.weight"
        save_file({**weights, name: weights[name] + 1}, out / "model" / "model.safetensors", {"format": "pt"})
        return artifact.meta

    shutil.copytree(Path(fit.where["base"]), tmp_path / "kept")
    run.store.get_or_build("adapt", adapt.key, another, {"version": 1, "spec": {}, "inputs": {}}, {})
    with pytest.raises(StoreDamaged, match="built anew"):
        run_stage(annotate.request(run.store))
    assert run.store.find("fit", fit.key) is None
