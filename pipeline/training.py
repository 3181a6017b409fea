"""The one training loop: AdamW, linear decay, clipped gradients, fp32 master weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import ClozelineError
from pipeline.progress import Progress

CLIP, _WEIGHT_DECAY = 1.0, 0.01  # paper, table 5


class Diverged(ClozelineError):
    """The loss, or what follows from it, is no longer a number."""


def seed_of(*parts: object) -> int:
    """A seed from whatever names the work, never from what ran before in the process.

    >>> seed_of("fit", "p0", 0) == seed_of("fit", "p0", 0)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def epochs(rows: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers for one step after the other, shuffled anew each epoch; a batch may span two epochs."""
    random = np.random.default_rng(seed)
    queue = random.permutation(rows)
    while True:
        while len(queue) < batch_size:
            queue = np.concatenate([queue, random.permutation(rows)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def taken_once(rows: np.ndarray, dropout: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of a step and how often each is in it.

    Where there are fewer labelled rows than a batch takes, most of a step's work is the same row again. Without dropout
    a row weighted by its count gives the same gradient; with it each repetition has a mask of its own, and stays. (What
    little dropout is not a module's stays switched on and gives repetitions one mask: the same gradient on average.)

    Args:
        rows: row numbers of a step, int64 ``[batch]``.
        dropout: as in `prepare_for_few_steps`.

    Returns:
        Row numbers, int64, and counts, float32, of the same length.

    >>> taken_once(np.array([3, 1, 3]), 0.0)
    (array([1, 3]), array([1., 2.], dtype=float32))
    """
    if dropout == 0.0:
        rows, counts = np.unique(rows, return_counts=True)
        return rows, counts.astype(np.float32)
    return rows, np.ones(len(rows), dtype=np.float32)


def weighted_sum(losses: torch.Tensor, times: np.ndarray) -> torch.Tensor:
    """Losses by the counts of `taken_once`, added up: float ``[rows]`` to a scalar of the same numbers.

    No matrix product, which autocast would round to bf16.
    """
    return (losses * torch.from_numpy(times).to(losses)).sum()


def prepare_for_few_steps(model: Any, *, dropout: float | None, freeze_embeddings: bool) -> None:
    """Set what few-shot fine-tuning changes about a pretrained Hugging Face model.

    Args:
        model: changed in place.
        dropout: everywhere; None leaves what the model came with. On a CPU, drawing dropout masks takes a fifth
            of a training step.
        freeze_embeddings: leave the word embeddings (and the output embedding, where tied) as they are: half of
            a small model's weights, of which a few labelled rows touch a few hundred rows.
    """
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    if freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)


def optimizer_for(
    model: nn.Module, learning_rate: float, head: Callable[[str], bool], head_faster: float
) -> torch.optim.AdamW:
    """AdamW over the parameters with ``requires_grad``; see `train` for the arguments."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((head(name), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": learning_rate * head_faster if new else learning_rate,
                "weight_decay": _WEIGHT_DECAY if decays else 0.0,  # biases and layer norms do not decay
            }
            for (new, decays), parameters in groups.items()
        ],
        fused=True,  # 10 ms a step instead of 46 for 23 M parameters (docs/benchmarks.md)
    )


def train(
    model: nn.Module,
    losses_of_step: Callable[[int], Iterable[torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    head: Callable[[str], bool] = lambda name: False,
    head_faster: float = 1.0,
    progress: Progress | None = None,
) -> list[float]:
    """Train a model in place.

    Args:
        model: its parameters with ``requires_grad`` are trained.
        losses_of_step: gives the loss of a step as addends, scalars with a graph each; a graph is freed before the
            next addend is asked for, so that memory holds one micro-batch.
        steps: optimizer steps; the learning rate falls linearly to zero over them.
        learning_rate: of the pretrained weights.
        seed: for dropout.
        head: which parameters, by name, are new and learn ``head_faster`` times as fast.
        head_faster: see ``head``.
        progress: called with steps done and steps in all.

    Returns:
        The loss of each step.

    Raises:
        Diverged: a loss, or its gradient, is not finite.
    """
    optimizer = optimizer_for(model, learning_rate, head, head_faster)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.manual_seed(seed)
    model.train()
    losses = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for loss in losses_of_step(step):
            value += loss.item()
            if not math.isfinite(value):
                raise Diverged(f"the loss became {value} at step {step + 1} of {steps}")
            with torch.autocast(loss.device.type, enabled=False):  # the addend may come out of an open autocast
                loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(trained, CLIP).item()
        if not math.isfinite(norm):  # after the last step no loss would tell
            raise Diverged(f"the gradient became {norm} at step {step + 1} of {steps}")
        optimizer.step()
        schedule.step()
        losses.append(value)
        if progress:
            progress(step + 1, steps)
    model.eval()
    return losses
