"""A masked language model that scores label words at the mask, and nothing else.

Score = logits of the label words at the mask (Schick & Schütze 2021, equation 1). The encoder runs once; only
the vectors at the mask go through the head, and only the label words' rows of the output embedding are
multiplied. The ``[batch, length, vocabulary]`` tensor, two thirds of the work on a small model, never exists.

One path serves every family: a hook on the encoder gathers the wanted positions before the head sees them, and
the output embedding is swapped for one that can multiply a few of its rows. So no family's head is named here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pipeline.batching import by_length, pad
from pipeline.tables import Floats
from pipeline.template import Encoded
from pipeline.verbalizer import Verbalizer

Progress = Callable[[int, int], None]
_DELTA = "delta.safetensors"


class _RowsOfDecoder(nn.Module):
    """The output embedding, able to multiply a few of its rows.

    The rows are multiplied in fp32: a label word's logit decides a label, and costs nothing beside the encoder.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.weight, self.bias = decoder.weight, decoder.bias
        self.rows: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            return F.linear(hidden, self.weight.to(hidden.dtype), self._bias(None, hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight[self.rows].float(), self._bias(self.rows, torch.float32))

    def _bias(self, rows: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        if self.bias is None:
            return None
        bias: torch.Tensor = self.bias if rows is None else self.bias[rows]
        return bias.to(dtype)


class ClozeModel(nn.Module):
    """A masked language model for scoring and for fine-tuning.

    Args:
        path: a directory in the Hugging Face layout.
        profile: the numeric profile (`pipeline.device.numeric_profile`).
    """

    def __init__(self, path: Path, profile: Mapping[str, str]) -> None:
        super().__init__()
        self.device = torch.device(profile["device"])
        self.dtype = getattr(torch, profile["dtype"])
        # Eager attention: on the CPU its backward pass beats scaled-dot-product attention's at these lengths.
        attention = "eager" if self.device.type == "cpu" else "sdpa"
        self.model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        self.decoder = _RowsOfDecoder(self.model.get_output_embeddings())
        self.model.set_output_embeddings(self.decoder)
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None
        # Through a weak reference: a hook that holds its owner would keep every model alive until the garbage
        # collector's next full round, and cross-validation makes many.
        gather = weakref.WeakMethod(self._gather)
        self.model.base_model.register_forward_hook(lambda *call: gather()(*call))  # type: ignore[misc]
        self.to(self.device).eval()

    def _gather(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        rows, columns = self._at  # type: ignore[misc]
        output["last_hidden_state"] = output[0][rows, columns]
        return output

    def autocast(self) -> AbstractContextManager[Any]:
        """The numbers that the profile asks for; master weights stay fp32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def logits_at(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        words: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Vocabulary logits at chosen positions.

        Args:
            input_ids: int64 ``[batch, length]``.
            attention_mask: int64 ``[batch, length]``.
            rows, columns: int64, the positions, of one shape.
            words: int64 ``[words]``: only these rows of the output embedding; all by default.

        Returns:
            float ``[*positions, words]``.
        """
        self._at, self.decoder.rows = (rows, columns), words
        try:
            logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            self._at = self.decoder.rows = None
        return logits

    def save_delta(self, path: Path) -> None:
        """Write the tensors that differ from the base model's into a directory."""
        base = AutoModelForMaskedLM.from_pretrained(self.model.config._name_or_path, dtype=torch.float32).state_dict()
        mine = {name: tensor.detach().cpu() for name, tensor in self.model.named_parameters()}
        changed = {k: v.contiguous() for k, v in mine.items() if k not in base or not torch.equal(v, base[k])}
        save_file(changed, path / _DELTA)

    def load_delta(self, path: Path) -> None:
        """Read what `save_delta` wrote."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in load_file(path / _DELTA).items():
                own[name].copy_(tensor)


class WordScorer:
    """Scores the words of a verbalizer, and from them the labels.

    Words of one token score their logit at the mask. Where words have different numbers of tokens, each word is
    scored with as many masks as it has tokens, and a word's score is the mean of its tokens' log-probabilities
    over the whole vocabulary, so that long and short words, read in different inputs, can be compared. (With a
    single width the normaliser is the same for all words and cancels in the softmax.)

    A label's score is the log-sum-exp of its words' scores, each less its bias: the log of the word's mean
    probability over unlabelled text (contextual calibration, Hu et al. 2022) and the log of the label's number
    of words.
    """

    def __init__(self, model: ClozeModel, verbalizer: Verbalizer) -> None:
        self.model, self.verbalizer = model, verbalizer
        device = model.device
        words = verbalizer.words
        self.bias = torch.zeros(len(words), device=device)
        counts = [sum(word.label == label for word in words) for label in range(verbalizer.labels)]
        # Words of a label, padded with a position that holds minus infinity.
        table = torch.full((verbalizer.labels, max(counts)), len(words), dtype=torch.int64)
        filled = [0] * verbalizer.labels
        for i, word in enumerate(words):
            table[word.label, filled[word.label]] = i
            filled[word.label] += 1
        self._words_of_label = table.to(device)
        self._log_counts = torch.tensor(counts, device=device).float().log()[[word.label for word in words]]
        self._groups: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for width in verbalizer.widths:
            numbers = [i for i, word in enumerate(words) if len(word.ids) == width]
            ids = torch.tensor([words[i].ids for i in numbers])
            unique, where = torch.unique(ids, return_inverse=True)
            self._groups[width] = (torch.tensor(numbers, device=device), unique.to(device), where.to(device))

    def word_scores(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask_at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the words that have as many tokens as the inputs have masks.

        Args:
            input_ids, attention_mask: int64 ``[batch, length]``.
            mask_at: int64 ``[batch, masks]``.

        Returns:
            The words' numbers, int64 ``[some words]``, and float32 ``[batch, some words]``.
        """
        numbers, unique, where = self._groups[mask_at.shape[1]]
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(mask_at)
        mixed = len(self._groups) > 1
        logits = self.model.logits_at(input_ids, attention_mask, rows, mask_at, None if mixed else unique).float()
        if mixed:
            logits = logits.log_softmax(-1)[..., unique]
        tokens = torch.arange(mask_at.shape[1], device=logits.device)
        return numbers, logits[:, tokens, where].mean(-1)

    def label_logits(self, scores: torch.Tensor) -> torch.Tensor:
        """From word scores float ``[batch, words]`` to label logits ``[batch, labels]``."""
        scores = scores - self.bias - self._log_counts
        if len(self.verbalizer.words) == self.verbalizer.labels:
            return scores
        padded = F.pad(scores, (0, 1), value=-torch.inf)
        return padded[:, self._words_of_label].logsumexp(-1)

    def score(self, encoded: Mapping[int, Encoded], progress: Progress | None = None) -> Floats:
        """Word scores of many rows.

        Args:
            encoded: for each token count of the verbalizer, the rows encoded with that many masks.
            progress: called with rows done and rows in all.

        Returns:
            float32 ``[rows, words]``.
        """
        rows = len(next(iter(encoded.values())))
        scores = np.zeros((rows, len(self.verbalizer.words)), dtype=np.float32)
        pad_id = self.model.model.config.pad_token_id or 0
        done, total = 0, rows * len(encoded)
        self.model.eval()
        for inputs in encoded.values():
            for batch in by_length([len(row) for row in inputs.input_ids]):
                ids, attention = pad([inputs.input_ids[i] for i in batch], pad_id, self.model.device)
                at = torch.from_numpy(inputs.mask_at[batch].astype(np.int64)).to(self.model.device)
                with torch.inference_mode(), self.model.autocast():
                    numbers, part = self.word_scores(ids, attention, at)
                scores[np.ix_(batch, numbers.cpu().numpy())] = part.float().cpu().numpy()
                done += len(batch)
                if progress:
                    progress(done, total)
        return scores

    def calibrate(self, scores: Floats) -> None:
        """Set the bias from word scores ``[rows, words]`` on unlabelled text: the log of each word's mean."""
        mean = torch.from_numpy(scores).softmax(-1).mean(0)
        self.bias = mean.clamp_min(1e-8).log().to(self.model.device)

    def log_probabilities(self, scores: Floats) -> Floats:
        """From word scores to log-probabilities of the labels, float32 ``[rows, labels]``."""
        with torch.inference_mode():
            logits = self.label_logits(torch.from_numpy(scores).to(self.model.device))
            result: Floats = logits.log_softmax(-1).cpu().numpy()
        return result


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a model directory."""
    return AutoTokenizer.from_pretrained(path, use_fast=True)


def stack_words(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], words: int) -> torch.Tensor:
    """Join the word scores of several passes into ``[batch, words]``, differentiably."""
    numbers = torch.cat([numbers for numbers, _ in parts])
    scores = torch.cat([part for _, part in parts], dim=1)
    return scores[:, torch.argsort(numbers)] if words > 1 else scores
