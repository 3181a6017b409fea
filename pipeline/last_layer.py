"""The last layer of an encoder, computed where its vectors are wanted and nowhere else.

A masked language model is asked for the vectors at its masks, a classifier for that of the first token. Every token
goes through the layers before; of the last, all that every token is needed for are keys and values, two of its twelve
``[width, width]`` products (four for attention, eight for the feed-forward part). The other ten are a seventh of the
work of an encoder of six layers, a fourteenth of one of twelve, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Their layers are laid out as BERT's, and each token attends to all others however long the text: a short trial
# would not tell (Longformer, BigBird).
_FAMILIES = frozenset({"bert", "camembert", "electra", "roberta", "xlm-roberta"})


class LastLayer(nn.Module):
    """Takes the place of a BERT layer, with its modules under their names, and is that layer until `at` is used.

    Attributes:
        columns: the tokens of each row whose vectors are wanted, int64 ``[batch, wanted]``; None gives those of all.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        self._whole = (layer,)  # in a tuple, since the weights of a module of its own would have two names
        self.columns: torch.Tensor | None = None
        self.training = layer.training

    @contextmanager
    def at(self, columns: torch.Tensor) -> Iterator[None]:
        """Give the vectors of these tokens alone, ``[batch, wanted, width]``, as long as the block lasts."""
        self.columns = columns
        try:
            yield
        finally:
            self.columns = None

    def forward(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *more: Any, **named: Any
    ) -> torch.Tensor:
        """The layer's output, for all tokens ``[batch, length, width]`` or for `columns`."""
        columns = self.columns
        if columns is None:
            whole: torch.Tensor = self._whole[0](hidden, attention_mask, *more, **named)
            return whole
        own, rows = self.attention.self, torch.arange(len(hidden), device=hidden.device)[:, None]
        asking = hidden[rows, columns]

        def heads(vectors: torch.Tensor) -> torch.Tensor:
            return vectors.view(*vectors.shape[:2], own.num_attention_heads, -1).transpose(1, 2)

        query, key, value = heads(own.query(asking)), heads(own.key(hidden)), heads(own.value(hidden))
        if attention_mask is not None:  # [batch, 1, length or 1, length], True or 0 where a token is seen
            seen = attention_mask.expand(-1, -1, hidden.shape[1], -1)[:, 0][rows, columns][:, None]
            attention_mask = seen if seen.dtype == torch.bool else seen.to(query.dtype)
        dropout = own.dropout.p if self.training else 0.0
        heard = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout)
        attended = self.attention.output(heard.transpose(1, 2).flatten(2), asking)
        found: torch.Tensor = self.output(self.intermediate(attended), attended)
        return found


def shorten(model: Any) -> LastLayer | None:
    """Put a `LastLayer` into a Hugging Face model whose encoder is laid out as BERT's.

    Returns:
        The layer; None, and nothing is changed, where the model is of another kind.
    """
    config, encoder = model.config, getattr(model.base_model, "encoder", None)
    layers = getattr(encoder, "layer", None)
    if config.model_type not in _FAMILIES or config.is_decoder or not layers:
        return None
    layers[-1] = LastLayer(layers[-1])
    return layers[-1]  # type: ignore[no-any-return]


def trial_rows(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two made-up rows, one of them padded, to try a shortcut with before it is relied on.

    Args:
        vocabulary: how many tokens there are. Those at its ends are left out: they are the special ones, which some
            families count or skip.

    Returns:
        int64 ``input_ids`` and ``attention_mask``, both ``[2, 7]``.
    """
    ids = (vocabulary // 2 + torch.arange(14).reshape(2, 7) * 3) % vocabulary
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    return ids, attention


def rectangle(rows: torch.Tensor, columns: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions here and there in a batch, as many in each row as in the one that has most.

    Args:
        rows, columns: int64, the positions, of one shape.
        batch: the number of rows.

    Returns:
        The columns, int64 ``[batch, most]``, filled up with zeros, and where in its row each position went, int64 of
        the shape of ``rows``.

    >>> wanted, place = rectangle(torch.tensor([1, 0, 1]), torch.tensor([5, 7, 6]), 3)
    >>> wanted.tolist(), place.tolist()
    ([[7, 0], [5, 6], [0, 0]], [0, 0, 1])
    """
    flat = rows.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=batch)
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
    wanted = flat.new_zeros(batch, max(int(counts.max()), 1))
    wanted[flat, place] = columns.flatten()
    return wanted, place.view(rows.shape)
