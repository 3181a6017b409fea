"""The training loop."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pipeline.training import Diverged, epochs, prepare_for_few_steps, seed_of, taken_once, train


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**48))
def test_every_epoch_shows_each_row_once_however_batches_fall(rows: int, batch_size: int, seed: int) -> None:
    steps = 3 * rows // batch_size + 2
    batches = list(itertools.islice(epochs(rows, batch_size, seed), steps))
    assert {len(batch) for batch in batches} == {batch_size}
    order = np.concatenate(batches)
    for at in range(0, len(order) - rows + 1, rows):
        assert sorted(order[at : at + rows].tolist()) == list(range(rows))
    again = np.concatenate(list(itertools.islice(epochs(rows, batch_size, seed), steps)))
    assert again.tolist() == order.tolist()


def test_epochs_are_shuffled_anew() -> None:
    stream = epochs(50, 50, 0)
    assert next(stream).tolist() != next(stream).tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_rows_taken_once_are_the_same_rows_as_often(batch: list[int]) -> None:
    rows, times = taken_once(np.array(batch), 0.0)
    assert np.repeat(rows, times.astype(int)).tolist() == sorted(batch)
    for dropout in (0.1, None):  # each repetition has a mask of its own
        rows, times = taken_once(np.array(batch), dropout)
        assert rows.tolist() == batch
        assert set(times.tolist()) == {1.0}


def test_a_seed_depends_on_its_parts_alone() -> None:
    code = "from pipeline.training import seed_of; print(seed_of('fit', 'p0', 3))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(elsewhere.stdout) == seed_of("fit", "p0", 3)
    assert len({seed_of("fit", "p0", 3), seed_of("fit", "p0", 4), seed_of("fit", "p03"), seed_of("fit", "p0")}) == 4


def separable(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(64, 2, generator=draw)
    return points, (points[:, 0] + points[:, 1] > 0).long()


def classifier(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))


def run(model: nn.Module, seed: int = 0, steps: int = 40) -> list[float]:
    points, labels = separable()
    return train(
        model, lambda step: [F.cross_entropy(model(points), labels)], steps=steps, learning_rate=0.05, seed=seed
    )


def test_training_learns_what_can_be_learnt_and_ends_in_evaluation_mode() -> None:
    model = classifier()
    losses = run(model)
    assert len(losses) == 40
    assert losses[-1] < 0.15 < losses[0]
    points, labels = separable(seed=1)
    assert (model(points).argmax(-1) == labels).float().mean() > 0.9
    assert not model.training


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().ravel() for parameter in model.parameters()])


def test_the_same_seed_gives_the_same_weights_whatever_ran_before() -> None:
    one, other = classifier(dropout=0.5), classifier(dropout=0.5)
    run(one, seed=3)
    torch.rand(1000)
    run(other, seed=3)
    assert torch.equal(weights(one), weights(other))
    another = classifier(dropout=0.5)
    run(another, seed=4)
    assert not torch.equal(weights(one), weights(another))


class Constant(nn.Module):
    """Parameters whose gradients are what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Parameter(torch.zeros(1))


def test_the_learning_rate_falls_in_a_line_to_nought() -> None:
    model = Constant()
    path: list[float] = []

    def loss(step: int) -> list[torch.Tensor]:
        path.append(model.bias.item())
        return [model.bias.sum()]

    train(model, loss, steps=4, learning_rate=0.1, seed=0)
    # With a gradient that never changes, Adam moves by the learning rate.
    moves = -np.diff([*path, model.bias.item()])
    assert moves.tolist() == pytest.approx([0.1, 0.075, 0.05, 0.025], rel=1e-3)


def test_a_new_head_learns_at_its_own_rate() -> None:
    model = Constant()
    train(
        model,
        lambda step: [model.bias.sum(), model.head.sum()],
        steps=1,
        learning_rate=0.01,
        seed=0,
        head=lambda name: name == "head",
        head_faster=10.0,
    )
    assert model.bias.item() == pytest.approx(-0.01, rel=1e-3)
    assert model.head.item() == pytest.approx(-0.1, rel=1e-3)


def test_matrices_decay_and_biases_do_not() -> None:
    model = Constant()
    with torch.no_grad():
        model.bias.fill_(1)
    train(model, lambda step: [0 * (model.bias.sum() + model.matrix.sum())], steps=1, learning_rate=0.1, seed=0)
    assert model.bias.item() == 1
    assert model.matrix.flatten().tolist() == pytest.approx([1 - 0.1 * 0.01] * 4)


def test_frozen_parameters_stay_as_they_are() -> None:
    model = Constant()
    model.matrix.requires_grad_(False)
    train(model, lambda step: [(model.bias + model.matrix).sum()], steps=3, learning_rate=0.1, seed=0)
    assert model.matrix.tolist() == [[1, 1], [1, 1]]
    assert model.bias.item() != 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_its_step(value: float) -> None:
    model = Constant()
    with pytest.raises(Diverged, match="at step 2 of 5"):
        train(
            model,
            lambda step: [model.bias.sum() * (value if step == 1 else 1.0)],
            steps=5,
            learning_rate=0.1,
            seed=0,
        )


def test_no_steps_change_nothing() -> None:
    model = classifier()
    before = weights(model)
    assert run(model, steps=0) == []
    assert torch.equal(weights(model), before)


def test_progress_is_told_step_by_step() -> None:
    model, told = Constant(), []
    train(
        model,
        lambda step: [model.bias.sum()],
        steps=3,
        learning_rate=0.1,
        seed=0,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_few_step_settings_freeze_the_embeddings_and_set_dropout(tiny_model: object) -> None:
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(tiny_model)
    prepare_for_few_steps(model, dropout=None, freeze_embeddings=False)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert all(parameter.requires_grad for parameter in model.parameters())
    prepare_for_few_steps(model, dropout=0.0, freeze_embeddings=True)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["bert.embeddings.word_embeddings.weight"]


def test_a_loss_in_addends_trains_as_the_whole_does() -> None:
    def trained(pieces: int) -> tuple[torch.Tensor, list[float]]:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        points, labels = torch.randn(8, 3), torch.arange(8) % 2

        def losses(step: int) -> list[torch.Tensor]:
            parts = torch.arange(8).chunk(pieces)
            return [F.cross_entropy(model(points[at]), labels[at], reduction="sum") / 8 for at in parts]

        losses_of_steps = train(model, losses, steps=5, learning_rate=0.05, seed=0)
        return weights(model), losses_of_steps

    whole, pieces = trained(1), trained(4)
    assert torch.allclose(whole[0], pieces[0], atol=1e-6)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5)


def test_a_gradient_that_is_no_number_stops_even_at_the_last_step() -> None:
    model = Constant()
    with pytest.raises(Diverged, match="the gradient became nan at step 1 of 1"):
        train(
            model,
            lambda step: [(model.bias - model.bias.detach()).abs().sqrt().sum()],
            steps=1,
            learning_rate=0.1,
            seed=0,
        )
