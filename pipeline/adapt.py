"""Domain-adaptive masked-language modelling: the base model reads the task's own unlabelled texts first.

In-domain MLM training helps PET and plain fine-tuning alike (Schick & Schütze 2021, figure 5; Gururangan et al. 2020).
Loss = MLM over the hidden tokens + ``keep`` * (1 - cosine of the mean-pooled vectors before and now), where the second
addend, off by default, holds on to what a sentence encoder knows: the old model reads the text, the new one the text
with its tokens hidden. The vocabulary is multiplied at hidden tokens alone.

An encoder without a masked-LM head gets one, which starts as the identity over the word embeddings, with the logs of
the tokens' shares as its bias.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from pipeline.base_model import BaseModel, load_tokenizer
from pipeline.batching import by_length, pad, steps_by_length
from pipeline.cloze import ClozeModel
from pipeline.errors import InputError, writing
from pipeline.masking import Masked, inside_words, mask
from pipeline.precision import attention_for, silent_loading
from pipeline.progress import Progress
from pipeline.store import canonical_json, make_publishable
from pipeline.template import Encoded, Encoder
from pipeline.training import CLIP, Diverged, optimizer_for, prepare_for_few_steps, seed_of

Point = dict[str, float]

EVALUATIONS = 20  # and checkpoints
_PATIENCE = 4  # evaluations in a row without a new best, once all texts were read: a small pool is read too often
_WARMUP = 0.06  # of the steps (RoBERTa)
_HEAD_FASTER = 3.0
_HELD_OUT_SHARE, _HELD_OUT_PIECES = 0.05, 512
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW remembers of a parameter
_WINDOW = 50  # batches that are sorted by length together


@dataclass
class Curve:
    """How training went.

    Attributes:
        points: at each evaluation: step, tokens read so far, and of the held-out texts loss and accuracy at hidden
            tokens and, where it is kept, the mean cosine.
        best: the number of the point whose model is the result.
    """

    points: list[Point] = field(default_factory=list)

    @property
    def best(self) -> int:
        return min(range(len(self.points)), key=lambda i: self.points[i]["objective"])

    @property
    def is_over(self) -> bool:
        """Whether the held-out texts have not got better for some time."""
        return len(self.points) - 1 - self.best >= _PATIENCE


class Adapting:
    """A masked language model in training on plain texts.

    Args:
        spec: steps, minutes (after which training ends, or None), batch_tokens (a step's), learning_rate, mask_share,
            whole_words, keep, max_length.
        texts: what to read; some of them are held out.
        base: where to start from; its head may be missing.
        profile: the numeric profile.
        seed: for what is held out, the order, the hidden tokens.

    Raises:
        InputError: there is too little text.
    """

    def __init__(
        self, spec: Mapping[str, Any], texts: Sequence[str], base: BaseModel, profile: Mapping[str, str], seed: int
    ) -> None:
        self.spec, self.seed = spec, seed
        self.tokenizer = load_tokenizer(base.path)
        encoder = Encoder(load_tokenizer(base.path), min(spec["max_length"], base.positions))
        self.held_out, self.train = _hold_out(texts, encoder, seed)
        self.model = ClozeModel(base.path, profile, new_head=True)
        self._start_bias()
        prepare_for_few_steps(self.model.model, dropout=0.0, freeze_embeddings=False)
        self.inside = inside_words(self.tokenizer) if spec["whole_words"] else None
        self.teacher = _Teacher(base.path, self.model) if spec["keep"] else None
        if self.teacher is not None:
            self.model.last = None  # mean-pooled vectors need every token
        prefix = self.model.model.base_model_prefix + "."
        faster = _HEAD_FASTER if self.model.new_head else 1.0
        self.optimizer = optimizer_for(
            self.model.model, spec["learning_rate"], lambda name: not name.startswith(prefix), faster
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.curve, self.step, self.tokens, self.seconds = Curve(), 0, 0, 0.0
        self.best: dict[str, torch.Tensor] = {}

    def _start_bias(self) -> None:
        """Set a new head's bias, one number a token, to the logs of the tokens' shares."""
        own = dict(self.model.model.named_parameters())
        for name in self.model.new_head:
            bias = own.get(name)
            if bias is not None and bias.shape == (self.model.model.config.vocab_size,):
                counts = np.bincount(self.train.tokens.values[self.train.own], minlength=len(bias)) + 1.0
                with torch.no_grad():
                    bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))

    def run(self, checkpoints: Path, progress: Progress | None = None) -> None:
        """Train to the end, from the last checkpoint if there is one, and take the best model.

        Args:
            checkpoints: a directory, made here; a killed run goes on from it to the same bytes (unless its end is set
                in minutes).
            progress: called with steps done and steps in all.

        Raises:
            Diverged: a loss or a gradient is no number.
        """
        self._resume(checkpoints)
        batches = itertools.islice(enumerate(self._batches()), self.step, None)
        if not self.curve.points:
            self._evaluate()
        began = time.monotonic() - self.seconds
        # The next batch is made while this one is computed with.
        with ThreadPoolExecutor(1) as beside:
            following = beside.submit(self._hidden, *next(batches))
            while self.step < self.spec["steps"] and not self._is_over():
                share = self._share_done(time.monotonic() - began)
                if share >= 1:
                    break
                encoded, masked = following.result()
                following = beside.submit(self._hidden, *next(batches))
                self._train_step(encoded, masked, share)
                after = self._share_done(time.monotonic() - began)
                if progress:
                    progress(min(int(after * self.spec["steps"]), self.spec["steps"]), self.spec["steps"])
                if int(share * EVALUATIONS) < int(after * EVALUATIONS) < EVALUATIONS:
                    self._evaluate()
                    self.seconds = time.monotonic() - began
                    self._save_checkpoint(checkpoints)
        if self.curve.points[-1]["step"] < self.step:
            self._evaluate()
        with torch.no_grad():
            for name, parameter in self.model.model.named_parameters():
                parameter.copy_(self.best[name])

    def _is_over(self) -> bool:
        """Whether the held-out texts stopped getting better, and not for the rate's height: that mends as it falls.

        Texts that are read for the first time can't be learned by heart.
        """
        return self.tokens > len(self.train.tokens.values) and self.curve.is_over

    def _share_done(self, seconds: float) -> float:
        """How much of the training is done: of the steps, or of the time if that is further."""
        steps, minutes = int(self.spec["steps"]), self.spec["minutes"]
        return max(self.step / steps, seconds / (60 * float(minutes)) if minutes else 0.0)

    def _batches(self) -> Iterator[npt.NDArray[np.int64]]:
        """Row numbers of one step after the other: rows of like length, batches in random order."""
        lengths, random = self.train.tokens.lengths, np.random.default_rng(seed_of(self.seed, "order"))
        wanted = self.spec["batch_tokens"]
        window = max(int(_WINDOW * wanted / max(lengths.mean(), 1)), 1)
        while True:
            order = random.permutation(len(lengths))
            for start in range(0, len(order), window):
                some = order[start : start + window]
                batches = steps_by_length(lengths[some], wanted)
                for i in random.permutation(len(batches)):
                    yield some[batches[i]]

    def _hidden(self, step: int, rows: npt.NDArray[np.int64]) -> tuple[Encoded, Masked]:
        """The rows of a step, as they are and with tokens hidden."""
        encoded = self.train.take(rows)
        return encoded, self._mask(encoded, np.random.default_rng(seed_of(self.seed, "hidden", step)))

    def _train_step(self, encoded: Encoded, masked: Masked, share: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (share / _WARMUP if share < _WARMUP else (1 - share) / (1 - _WARMUP))
            if share < _WARMUP:
                group["lr"] = max(group["lr"], rate / (_WARMUP * self.spec["steps"] + 1))
        torch.manual_seed(seed_of(self.seed, "dropout", self.step))  # what is not a module's stays switched on
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), device=self.model.device)
        with self.model.autocast():
            for part in self._parts(masked.tokens.lengths):
                mlm, _, apart = self._losses(encoded, masked, part)
                loss = mlm / max(len(masked.targets), 1)
                if apart is not None:
                    loss = loss + self.spec["keep"] * apart / len(encoded)
                with torch.autocast(loss.device.type, enabled=False):
                    loss.backward()  # type: ignore[no-untyped-call]
                value += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        if not math.isfinite(float(value + norm)):
            raise Diverged(f"the loss became {float(value)}, its gradient {float(norm)}, at step {self.step + 1}")
        self.optimizer.step()
        self.step += 1
        self.tokens += len(encoded.tokens.values)

    def _mask(self, encoded: Encoded, random: np.random.Generator) -> Masked:
        return mask(
            encoded,
            self.tokenizer.mask_token_id,
            len(self.tokenizer),
            random,
            self.spec["mask_share"],
            self.inside,
        )

    def _parts(self, lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        return by_length(lengths, self.model.device)

    def _losses(
        self, encoded: Encoded, masked: Masked, rows: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of some rows: the summed MLM loss, how many hidden tokens were right, the summed distance to the teacher."""
        device, pad_id = self.model.device, self.tokenizer.pad_token_id
        ids, attention = pad(masked.tokens, rows, pad_id, device)
        at, columns, targets = (torch.from_numpy(part).to(device) for part in masked.of(rows))
        logits, apart = self.model.logits_at(ids, attention, at, columns), None
        if self.teacher is not None:
            plain, _ = pad(encoded.tokens, rows, pad_id, device)
            now, before = _pooled(self.teacher.heard, attention), self.teacher(plain, attention)
            apart = (1 - F.cosine_similarity(now, before)).sum()
        mlm = F.cross_entropy(logits.float(), targets, reduction="sum")
        return mlm, (logits.detach().argmax(-1) == targets).sum(), apart

    def _evaluate(self) -> None:
        """Add a point to the curve, and remember the model if it is the best so far."""
        masked = self._mask(self.held_out, np.random.default_rng(seed_of(self.seed, "held out")))
        loss = right = apart = 0.0
        self.model.eval()
        with torch.inference_mode(), self.model.autocast():
            for part in self._parts(masked.tokens.lengths):
                mlm, hits, distance = self._losses(self.held_out, masked, part)
                loss, right = loss + float(mlm), right + float(hits)
                apart += 0.0 if distance is None else float(distance)
        hidden, rows = max(len(masked.targets), 1), len(self.held_out)
        if not math.isfinite(loss + apart):
            raise Diverged(f"the loss on held-out texts became {loss / hidden} after step {self.step}")
        point = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": round(loss / hidden, 5),
            "accuracy": round(right / hidden, 5),
            "objective": round(loss / hidden + self.spec["keep"] * apart / rows, 5),
        }
        if self.teacher is not None:
            point["cosine"] = round(1 - apart / rows, 5)
        self.curve.points.append(point)
        if self.curve.best == len(self.curve.points) - 1:
            # Buffers are the base model's own and never change.
            self.best = {name: weight.detach().cpu().clone() for name, weight in self._weights()}

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.model.model.named_parameters()  # type: ignore[no-any-return]

    def _save_checkpoint(self, directory: Path) -> None:
        """Write the state under a temporary name, rename it, and remove the one before."""
        names = {parameter: name for name, parameter in self._weights()}
        tensors = {f"weight:{name}": parameter.detach() for name, parameter in self._weights()}
        tensors |= {f"best:{name}": weight for name, weight in self.best.items()}
        for parameter, state in self.optimizer.state.items():
            for moment in _MOMENTS:
                tensors[f"{moment}:{names[parameter]}"] = state[moment]
        target = directory / f"step-{self.step:09d}"
        beside = directory / "writing"
        about = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "points": self.curve.points}
        with writing("the checkpoints", directory, "set CLOZELINE_CACHE to a directory with room"):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / "state.safetensors")
            (beside / "state.json").write_text(canonical_json(about), encoding="utf-8")
            make_publishable(beside)
            beside.rename(target)
            for old in directory.glob("step-*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)

    def _resume(self, directory: Path) -> None:
        """Go on from the last checkpoint; one that can't be read is removed, and training begins anew."""
        for place in sorted(directory.glob("step-*"), reverse=True)[:1]:
            try:
                about = json.loads((place / "state.json").read_text(encoding="utf-8"))
                tensors = load_file(place / "state.safetensors", device=str(self.model.device))
                weights = {name: tensors[f"weight:{name}"] for name, _ in self._weights()}
                best = {name: tensors[f"best:{name}"].cpu() for name in weights}
                step, tokens, seconds, points = (about[name] for name in ("step", "tokens", "seconds", "points"))
            except (OSError, ValueError, KeyError, SafetensorError):
                shutil.rmtree(place, ignore_errors=True)
                continue
            with torch.no_grad():
                for name, parameter in self._weights():
                    parameter.copy_(weights[name])
                    moments = {moment: tensors.get(f"{moment}:{name}") for moment in _MOMENTS}
                    if moments["step"] is not None:
                        self.optimizer.state[parameter] = moments
            self.best, self.curve = best, Curve(points)
            self.step, self.tokens, self.seconds = step, tokens, seconds

    def save(self, path: Path) -> None:
        """Write model and tokenizer in the Hugging Face layout, as something that `base_model` can name."""
        self.model.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


class _Teacher:
    """The base model's encoder as it was, and an ear for what the one in training says before its head hears it."""

    def __init__(self, path: Path, model: ClozeModel) -> None:
        with silent_loading():
            self.encoder = AutoModel.from_pretrained(path, dtype=model.dtype, **attention_for(model.device))
        self.encoder.to(model.device).eval().requires_grad_(False)
        self.heard = torch.zeros(0)
        model.model.base_model.register_forward_hook(self._hear, prepend=True)

    def _hear(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.heard = output[0]

    def __call__(self, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Mean-pooled vectors, float32 ``[rows, width]``."""
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            return _pooled(self.encoder(input_ids=ids, attention_mask=attention)[0], attention)


def _pooled(hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    return (hidden.float() * attention[..., None]).sum(1) / attention.sum(1, keepdim=True)


def _hold_out(texts: Sequence[str], encoder: Encoder, seed: int) -> tuple[Encoded, Encoded]:
    """Some texts to measure on and the others to learn from, in pieces of the model's length.

    Raises:
        InputError: there are too few.
    """
    order = np.random.default_rng(seed_of(seed, "held out texts")).permutation(len(texts))
    count = min(max(int(len(texts) * _HELD_OUT_SHARE), 1), _HELD_OUT_PIECES)
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    parts = [encoder.encode_whole([texts[i] for i in some]) for some in (held, rest)]
    if not all(len(part) for part in parts):
        raise InputError(
            f"{len(texts)} unlabelled texts are too few to adapt the base model to",
            where="adapt",
            fix="set adapt.steps to 0, or give more texts",
        )
    # Pieces of many texts, since those of one are alike.
    some = np.random.default_rng(seed_of(seed, "held out pieces")).permutation(len(parts[0]))[:_HELD_OUT_PIECES]
    return parts[0].take(np.sort(some)), parts[1]
