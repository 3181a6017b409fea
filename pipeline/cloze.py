"""A masked language model that scores label words at the mask, and nothing else.

Score = logits of the label words at the mask (Schick & Schütze 2021, equation 1). The encoder runs once; only
the vectors at the mask go through the head, and only the label words' rows of the output embedding are
multiplied. The ``[batch, length, vocabulary]`` tensor, two thirds of the work on a small model, never exists. Where the
family allows it, the encoder's last layer too is computed at the mask alone (`pipeline.last_layer`).

One path serves every family: a hook on the encoder gathers the wanted positions before the head sees them, and
the output embedding is swapped for one that can multiply a few of its rows. So no family's head is named here. Each
model proves itself when it is loaded: what does not give the logits of its own full forward pass is not used.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from pipeline.base_model import WHOLE
from pipeline.batching import by_length, pad
from pipeline.errors import InputError, loading
from pipeline.last_layer import LastLayer, rectangle, shorten, trial_rows
from pipeline.precision import attention_for, scoring, silent_loading, training_numbers
from pipeline.progress import Progress
from pipeline.tables import Floats
from pipeline.template import Encoded
from pipeline.verbalizer import Verbalizer

Shortcut = Literal["label words", "positions", "none"]
_DELTA = "delta.safetensors"


class _RowsOfDecoder(nn.Module):
    """The output embedding, able to multiply a few of its rows.

    The rows are multiplied in fp32: a label word's logit decides a label, and costs nothing beside the encoder.

    Attributes:
        rows: which rows to multiply; all by default.
        exact: weight and bias before `pipeline.precision.scoring` changed their numbers, while it does.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.weight, self.bias = decoder.weight, decoder.bias
        self.rows: torch.Tensor | None = None
        self.exact: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self.exact or (self.weight, self.bias)
        if self.rows is None:
            return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(
                hidden.float(), weight[self.rows].float(), None if bias is None else bias[self.rows].float()
            )


def _load(path: Path, device: torch.device, new_head: bool) -> tuple[Any, list[str]]:
    """A masked language model, and the names of the weights that its head lacks in the file.

    Raises:
        InputError: it lacks others, or any where no new head is wanted, or it can't be loaded.
    """
    with loading("the base model", path, WHOLE), silent_loading():
        model, report = AutoModelForMaskedLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **attention_for(device)
        )
    missing = sorted(report["missing_keys"])
    # A head that is not in the file would be made up at random, and so would every label.
    if missing and (not new_head or any(name.startswith(model.base_model_prefix + ".") for name in missing)):
        raise InputError(
            f"the base model's masked-LM head is not in its file: {', '.join(missing[:3])}",
            where=str(path),
            fix="choose a model that was saved with its masked-LM head",
        )
    _start_head(model, missing)
    return model, missing


def _start_head(model: Any, names: Sequence[str]) -> None:
    """Begin a head so that it hands on what the encoder says: square matrices are the identity, biases nothing.

    Where word embeddings are narrower than the encoder (ALBERT, ELECTRA), the way back is the transpose of the
    encoder's own projection.
    """
    words = model.get_input_embeddings().weight
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            weight = own.get(name)
            if weight is None:  # a buffer
                continue
            if weight.shape == words.shape:
                weight.copy_(words)
            elif weight.ndim == 2:
                forth = [w for n, w in own.items() if n not in names and w.ndim == 2 and w.shape == weight.shape[::-1]]
                if weight.shape[0] != weight.shape[1] and len(forth) == 1:
                    weight.copy_(forth[0].T)
                else:
                    nn.init.eye_(weight)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)  # one-dimensional weights are layer norms'


class ClozeModel(nn.Module):
    """A masked language model for scoring and for fine-tuning.

    Args:
        path: a directory in the Hugging Face layout.
        profile: the numeric profile (`pipeline.device.numeric_profile`).
        new_head: give an encoder without a masked-LM head one that is still to be trained, instead of refusing it.

    Attributes:
        shortcut: how much of the full forward pass is spared. ``label words``: only the positions that are asked for
            go through the head, and only the words' rows are multiplied. ``positions``: those positions, and the
            whole vocabulary. ``none``: the full pass, which is right for any model and slow. Both score in fp32.
        last: the encoder's last layer, if it is computed at those positions alone; None, which may be set, computes
            it everywhere.
        new_head: the names of the weights that were not in the file.

    Raises:
        InputError: the model can't be loaded, or its head is not in its file.
    """

    def __init__(self, path: Path, profile: Mapping[str, str], new_head: bool = False) -> None:
        super().__init__()
        self.device = torch.device(profile["device"])
        self.dtype = getattr(torch, profile["dtype"])
        self.model, self.new_head = _load(path, self.device, new_head)
        self.decoder: _RowsOfDecoder | None = None
        self.last: LastLayer | None = None
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None
        self.model.eval()
        self.shortcut = self._take_shortcut()
        self.to(self.device).eval()

    def _take_shortcut(self) -> Shortcut:
        """The shortest way whose logits are the full forward pass's, on a few made-up rows."""
        vocabulary = int(self.model.config.vocab_size)
        ids, attention = trial_rows(vocabulary)
        rows, columns, words = torch.tensor([0, 1, 1]), torch.tensor([6, 0, 4]), torch.tensor([1, vocabulary // 2])
        with torch.inference_mode():
            full = self.model(input_ids=ids, attention_mask=attention).logits[rows, columns]

        def is_right() -> bool:
            try:
                with torch.inference_mode():
                    found = self.logits_at(ids, attention, rows, columns, words)
            except Exception:  # whatever a head that was not made for this does
                return False
            return found.shape == (3, 2) and torch.allclose(found, full[:, words], rtol=1e-4, atol=1e-4)

        # Through a weak reference: a hook that holds its owner would keep every model alive until the garbage
        # collector's next full round, and cross-validation makes many.
        gather = weakref.WeakMethod(self._gather)
        hook = self.model.base_model.register_forward_hook(lambda *call: gather()(*call))  # type: ignore[misc]
        self.shortcut = "positions"
        if not is_right():
            hook.remove()
            return "none"
        self.last = shorten(self.model)
        if self.last is not None and not is_right():
            self.last = None  # unused it is the layer that was there
        plain = self.model.get_output_embeddings()
        if isinstance(plain, nn.Linear) and plain.out_features == vocabulary:
            self.shortcut, self.decoder = "label words", _RowsOfDecoder(plain)
            _swap(self.model, plain, self.decoder)
            if is_right():
                return "label words"
            _swap(self.model, self.decoder, plain)
            self.decoder = None
        return "positions"

    def _gather(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        output["last_hidden_state"] = output[0][self._at].float()
        return output

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inference in the numbers that the profile asks for; the label words stay exact."""
        if self.decoder is not None:
            bias = self.decoder.bias
            self.decoder.exact = (self.decoder.weight.data, None if bias is None else bias.data)
        try:
            # A head that is handed the word embeddings, or takes what no hook has made fp32, needs all in one format.
            dtype = self.dtype if self.shortcut == "label words" else torch.float32
            with scoring(self, self.model.base_model, dtype):
                yield
        finally:
            if self.decoder is not None:
                self.decoder.exact = None

    def autocast(self) -> AbstractContextManager[Any]:
        """The numbers that the profile asks for; master weights stay fp32."""
        return training_numbers(self.device, self.dtype)

    def logits_at(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor | None,
        columns: torch.Tensor,
        words: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Vocabulary logits at chosen positions.

        Args:
            input_ids: int64 ``[batch, length]``.
            attention_mask: int64 ``[batch, length]``.
            rows, columns: int64, the positions, of one shape. No rows stand for as many columns in each row, int64
                ``[batch, wanted]``.
            words: int64 ``[words]``: only these rows of the output embedding; all by default.

        Returns:
            float ``[*positions, words]``.
        """
        if rows is None:
            rows = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)
            wanted, place = columns, torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        elif self.last is not None:
            wanted, place = rectangle(rows, columns, len(input_ids))
        self._at = (rows, columns if self.last is None else place)
        if self.decoder is not None:
            self.decoder.rows = words
        try:
            with nullcontext() if self.last is None else self.last.at(wanted):
                logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            self._at = None
            if self.decoder is not None:
                self.decoder.rows = None
        if self.shortcut == "none":
            logits = logits[rows, columns]
        return logits if words is None or self.decoder is not None else logits[..., words].float()

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


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place; `set_output_embeddings` of some families does more than that."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


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
        mixed = len(self._groups) > 1
        logits = self.model.logits_at(input_ids, attention_mask, None, mask_at, None if mixed else unique).float()
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
        with self.model.scoring():
            for inputs in encoded.values():
                for batch in by_length(inputs.tokens.lengths, self.model.device):
                    ids, attention = pad(inputs.tokens, batch, pad_id, self.model.device)
                    at = torch.from_numpy(inputs.mask_at[batch]).to(self.model.device)
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


def stack_words(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], words: int) -> torch.Tensor:
    """Join the word scores of several passes into ``[batch, words]``, differentiably."""
    numbers = torch.cat([numbers for numbers, _ in parts])
    scores = torch.cat([part for _, part in parts], dim=1)
    return scores[:, torch.argsort(numbers)] if words > 1 else scores
