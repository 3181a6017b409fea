"""Ragged token ids to padded batches: sorted by length, so that padding costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipeline.ragged import Numbers, Ragged

# Measured on two cores with the embedded model: batches of 1,024 to 4,096 tokens are alike, those of 8,192 slower by
# a third.
TOKEN_BUDGET = 4096
_CUDA_TOKEN_BUDGET = 65536
# Attention as it is computed on a CPU keeps rows * length^2 scores a head: for longer rows a batch shrinks so that they
# take no more memory than at this length, where those of the embedded model are as large as its widest activations.
# Measured with it: no slower.
_SQUARE_FROM = 128
# What one more forward and backward pass costs beside its tokens, in tokens: kernels started, weights cast. On CUDA a
# guess (ten milliseconds to start the kernels of a pass, 1.5 million tokens a second).
_PASS_TOKENS, _CUDA_PASS_TOKENS = 150, 16384
_batch_share = 1.0


def set_batch_share(share: float) -> None:
    """Let this process compute in smaller pieces, after it ran out of memory: ``share`` of the usual size, at most 1.

    A step's effective batch stays as it is, since gradients are accumulated; a result may differ in its last bits.
    """
    global _batch_share
    _batch_share = share


def batch_share() -> float:
    """The share in force."""
    return _batch_share


def by_length(lengths: Sequence[int] | Numbers, device: torch.device) -> list[npt.NDArray[np.int64]]:
    """Group row numbers into batches of similar length that keep a device busy.

    Args:
        lengths: tokens of each row.
        device: where they will be computed.

    Returns:
        Batches of row numbers, every row in exactly one, smaller under a `batch_share` below 1; the longest rows
        first, so that running out of memory shows at once.
    """
    cuda = device.type == "cuda"
    budget = max(int((_CUDA_TOKEN_BUDGET if cuda else TOKEN_BUDGET) * _batch_share), 1)
    if cuda:
        return steps_by_length(lengths, budget)
    return _by_length(lengths, lambda longest: budget * min(_SQUARE_FROM, longest) // longest**2)


def steps_by_length(lengths: Sequence[int] | Numbers, token_budget: int) -> list[npt.NDArray[np.int64]]:
    """Batches whose rows times longest row stay within a budget, but for a single longer row.

    For steps of training, whatever the `batch_share`: which rows a step holds must not depend on memory.
    """
    return _by_length(lengths, lambda longest: token_budget // longest)


def _by_length(lengths: Sequence[int] | Numbers, rows_of: Callable[[int], int]) -> list[npt.NDArray[np.int64]]:
    """Batches of the rows from the longest on; ``rows_of`` says how many rows go with a longest one."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = min(start + max(rows_of(longest), 1), len(order))
        batches.append(order[start:stop])
        start = stop
    return batches


def pad(
    tokens: Ragged, rows: npt.NDArray[np.integer], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows, padded on the right.

    Returns:
        int64 ``input_ids`` and ``attention_mask``, both ``[rows, longest]``.
    """
    ids, own = tokens.padded(rows, pad_id)
    return torch.from_numpy(ids.astype(np.int64)).to(device), torch.from_numpy(own.astype(np.int64)).to(device)


def split_by_length(lengths: Sequence[int] | Numbers, device: torch.device) -> list[npt.NDArray[np.int64]]:
    """Split the rows of one training step into micro-batches: two if that saves padding, more to spare memory.

    One long text among sixteen pads all of them to its length. The step's gradient is the same either way; the
    cost is in padded tokens, plus what a second pass costs: so much on CUDA that a step of few rows stays whole.

    Args:
        lengths: tokens of each row of the step.
        device: where they will be computed.

    Returns:
        Arrays of positions in ``lengths``; one or two of them, each cut further under a `batch_share` below 1.
    """
    parts = _two_by_length(lengths, _CUDA_PASS_TOKENS if device.type == "cuda" else _PASS_TOKENS)
    if _batch_share == 1.0:
        return parts
    most = max(int(len(lengths) * _batch_share), 1)
    return [part[at : at + most] for part in parts for at in range(0, len(part), most)]


def _two_by_length(lengths: Sequence[int] | Numbers, pass_tokens: int) -> list[npt.NDArray[np.int64]]:
    order = np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable")
    ordered = np.asarray(lengths, dtype=np.int64)[order]
    rows = len(ordered)
    cuts = np.arange(1, rows)
    costs = cuts * ordered[:-1] + (rows - cuts) * ordered[-1] + pass_tokens
    if rows < 2 or costs.min() >= rows * ordered[-1]:
        return [order]
    best = int(cuts[costs.argmin()])
    return [order[:best], order[best:]]
