"""How fast rows are scored with one pattern, annotators fitted and models adapted, beside what else one could run.

    python benchmarks/annotate.py --data DIR                  # a table
    python benchmarks/annotate.py --data DIR --json           # the ratios alone
    python benchmarks/annotate.py --data DIR --part fit
    python benchmarks/annotate.py --data DIR --part adapt --repeats 3

DIR holds ``ag_news/test.parquet`` (and ``train.parquet`` for fit and adapt). The model is the embedded one, or
``--model``.

Scoring, rows a second from texts to log-probabilities of the labels, with one pattern and a word a label:

============== ======================================================================================
clozeline      `pipeline.annotators.pet` as the annotate stage calls it
fill_mask_fp32 the fill-mask pipeline of transformers with `targets`, in batches, as it comes
fill_mask_bf16 the same with the model in bf16
padded_loop    what the published PET code does (2020): batches of 8 rows padded to 256 tokens, fp32,
               the whole vocabulary at every position
bare_encoder   tokens a second of the encoder alone, in clozeline's numbers, on full batches of one length
               (the mean of the rows) without padding, from token ids to vectors
============== ======================================================================================

Everything is measured in one process, one after the other, five times over (``--repeats``); a method's figure is its
median. Methods get numbers of rows that take them seconds, taken evenly from the rows ordered by length, so that each
sees the same mixture. Each is first checked to give the labels that clozeline gives, but for rows that bf16 decides.

Fitting (``--part fit``), optimizer steps a second over the same ``--labels`` rows (40) in batches of 16:

============== ======================================================================================
clozeline      the training loop of `pipeline.annotators.pet` with the quick preset
bare           forward and backward pass of the same batches through encoder and head, in the same numbers,
               a row as often as it is drawn (clozeline reads it once a step):
               no optimizer, no tokens to be made, no loss but the sum of the vectors at the mask
procedure_2020 the same rows and batches as the published code trains: padded to 256, fp32, the model's
               dropout, all weights trained, the whole vocabulary at every position, AdamW by a loop
============== ======================================================================================

Adapting (``--part adapt``), tokens a second of training texts, steps of 4,096:

================ ====================================================================================
clozeline        `pipeline.adapt` with its defaults, by the median step without those behind which held-out
                 texts are measured and a checkpoint is written, twenty times a training
bare             forward and backward pass of the encoder alone, in the same numbers, on full batches of
                 the same tokens and one length, without padding: no head, no loss but a sum, no optimizer
whole_vocabulary forward and backward pass of the whole model on the same, with the vocabulary's logits and
                 the loss at every position
================ ====================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.worker import NATIVE_SETTINGS

os.environ.update({**NATIVE_SETTINGS, **os.environ})  # before torch is imported

import numpy as np
import pyarrow.parquet as pq
import torch
from size import peak_mb
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, pipeline

from pipeline.adapt import EVALUATIONS, Adapting
from pipeline.annotators import Labelled, pet
from pipeline.base_model import BaseModel, resolve_base_model
from pipeline.batching import TOKEN_BUDGET, pad
from pipeline.device import numeric_profile
from pipeline.precision import attention_for, scoring, training_numbers
from pipeline.task import PRESETS, Adapt
from pipeline.training import prepare_for_few_steps, seed_of

PATTERN = "{text} This is about {mask}."
WORDS = {"World": "politics", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"}
PADDED_TO, PADDED_BATCH, PIPELINE_BATCH = 256, 8, 64
ADAPT_ROWS = 1000


def texts_of(data: Path, name: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a file of AG News."""
    table = pq.read_table(data / "ag_news" / f"{name}.parquet")
    columns = [table.column(column).to_pylist() for column in ("title", "description", "label")]
    return [f"{title} {text}".strip() for title, text in zip(*columns[:2], strict=True)], list(map(str, columns[2]))


def settings(**changes: Any) -> dict[str, Any]:
    """An annotator's settings: the quick preset's."""
    words = [[label, [word]] for label, word in WORDS.items()]
    preset = PRESETS["quick"]["training"]
    return {**preset, "pattern": PATTERN, "words": words, "labels": list(WORDS), "truncation": "head", **changes}


def evenly(texts: Sequence[str], count: int) -> list[str]:
    """Texts of all lengths, the longest and the shortest among them."""
    ordered = sorted(texts, key=len)
    return [ordered[i] for i in np.linspace(0, len(ordered) - 1, count).round().astype(int)]


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- scoring -------------------------------------------------------------------------------------------


def score(base: BaseModel, data: Path, rows: dict[str, int], repeats: int) -> dict[str, Any]:
    """Measure scoring; see the module's text."""
    texts, _ = texts_of(data, "test")
    annotator = pet.PetAnnotator(settings(max_length=PADDED_TO), base, numeric_profile())
    mine = {name: evenly(texts, count) for name, count in rows.items()}
    encoded = annotator.encode({"text": mine["clozeline"]})[1].tokens
    tokens, length = len(encoded.values), round(float(encoded.lengths.mean()))

    pipelines = {
        f"fill_mask_{name}": pipeline(
            "fill-mask",
            model=AutoModelForMaskedLM.from_pretrained(base.path, dtype=dtype),
            tokenizer=annotator.tokenizer.from_pretrained(base.path),
        )
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    plain = AutoModelForMaskedLM.from_pretrained(base.path, dtype=torch.float32).eval()

    def fill_mask(name: str) -> list[str]:
        filled = pipelines[name](
            [annotator.template.render({"text": text}, annotator.tokenizer.mask_token) for text in mine[name]],
            targets=list(WORDS.values()),
            top_k=len(WORDS),
            batch_size=PIPELINE_BATCH,
            tokenizer_kwargs={"truncation": True, "max_length": PADDED_TO},
        )
        return [max(found, key=lambda one: one["score"])["token_str"] for found in filled]

    def padded_loop() -> list[str]:
        ids_of = annotator.tokenizer.convert_tokens_to_ids(list(WORDS.values()))
        chosen: list[str] = []
        for start in range(0, len(mine["padded_loop"]), PADDED_BATCH):
            some = annotator.encode({"text": mine["padded_loop"][start : start + PADDED_BATCH]})[1]
            ids = np.full((len(some), PADDED_TO), annotator.tokenizer.pad_token_id)
            for row, tokens_of_row in enumerate(some.tokens):
                ids[row, : len(tokens_of_row)] = tokens_of_row
            tensor = torch.from_numpy(ids)
            with torch.no_grad():
                logits = plain(input_ids=tensor, attention_mask=(tensor != 0).long()).logits
            at_mask = logits[torch.arange(len(some)), torch.from_numpy(some.mask_at[:, 0])][:, ids_of]
            chosen += [list(WORDS.values())[i] for i in at_mask.argmax(-1).tolist()]
        return chosen

    def clozeline() -> list[str]:
        scores = annotator.log_probabilities({"text": mine["clozeline"]})
        return [list(WORDS.values())[i] for i in scores.argmax(-1)]

    full = torch.randint(1000, 20000, (TOKEN_BUDGET // length, length))
    attention = torch.ones_like(full)
    bare = AutoModelForMaskedLM.from_pretrained(base.path, dtype=torch.float32).base_model.eval()
    batches = max(tokens // full.numel(), 1)

    def bare_encoder() -> None:
        with scoring(bare, bare, annotator.model.dtype):
            for _ in range(batches):
                bare(input_ids=full, attention_mask=attention)

    methods: dict[str, Callable[[], Any]] = {
        "clozeline": clozeline,
        "fill_mask_fp32": lambda: fill_mask("fill_mask_fp32"),
        "fill_mask_bf16": lambda: fill_mask("fill_mask_bf16"),
        "padded_loop": padded_loop,
        "bare_encoder": bare_encoder,
    }
    for name in ("fill_mask_fp32", "fill_mask_bf16", "padded_loop"):  # warm, and right
        scores = annotator.log_probabilities({"text": mine[name]})
        agree = np.mean(
            [list(WORDS.values())[i] == word for i, word in zip(scores.argmax(-1), methods[name](), strict=True)]
        )
        if agree < 0.97:
            sys.exit(f"{name} gives other labels: {agree:.1%} agree")
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, work in methods.items():
            taken[name].append(seconds_of(work))
    seconds = {name: statistics.median(found) for name, found in taken.items()}
    rates = {name: rows[name] / seconds[name] for name in rows}
    return {
        "rows_per_s": rates["clozeline"],
        "vs_fill_mask_fp32": rates["clozeline"] / rates["fill_mask_fp32"],
        "vs_fill_mask_bf16": rates["clozeline"] / rates["fill_mask_bf16"],
        "vs_padded_loop": rates["clozeline"] / rates["padded_loop"],
        "of_bare_encoder": (tokens / seconds["clozeline"]) / (batches * full.numel() / seconds["bare_encoder"]),
        "details": {
            "rows": rows,
            "tokens_a_row": tokens / rows["clozeline"],
            "rows_per_s": rates,
            "spread": {name: max(found) / min(found) for name, found in taken.items()},
        },
    }


def peak(base: BaseModel, data: Path, rows: int) -> float:
    """Peak resident memory in MB of a process that scores and does nothing else."""
    command = [
        sys.executable,
        __file__,
        "--part",
        "peak",
        "--data",
        str(data),
        "--model",
        base.name,
        "--rows",
        str(rows),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def score_alone(base: BaseModel, data: Path, rows: int) -> float:
    texts, _ = texts_of(data, "test")
    annotator = pet.PetAnnotator(settings(max_length=PADDED_TO), base, numeric_profile())
    annotator.log_probabilities({"text": evenly(texts, rows)})
    return peak_mb()


# ---- fitting -------------------------------------------------------------------------------------------


def fit(base: BaseModel, data: Path, labels: int, steps: int, repeats: int) -> dict[str, Any]:
    """Measure fitting; see the module's text."""
    texts, names = texts_of(data, "train")
    rows = np.random.default_rng(seed_of("rows")).permutation(len(texts))[:labels]
    numbers = np.array([sorted(set(names)).index(names[i]) for i in rows], dtype=np.int64)
    labelled = Labelled({"text": [texts[i] for i in rows]}, numbers)
    profile = numeric_profile()
    spec = settings(max_length=PADDED_TO, steps=steps)
    batch = spec["batch_size"]
    order = [rows for rows, _ in zip(pet.epochs(labels, batch, 0), range(steps), strict=False)]

    def clozeline() -> float:
        """Seconds between the first and the last step's end, times steps over steps - 1."""
        ends: list[float] = []
        pet.train(spec, labelled, {"text": []}, base, profile, 0, lambda done, total: ends.append(time.perf_counter()))
        return (ends[-1] - ends[0]) * steps / (steps - 1)

    annotator = pet.PetAnnotator(spec, base, profile)
    annotator.model.last = None  # the encoder as it is
    encoded = annotator.encode(labelled.texts)[1]
    model, pad_id = annotator.model, annotator.tokenizer.pad_token_id
    pet.prepare_for_few_steps(model.model, dropout=spec["dropout"], freeze_embeddings=spec["freeze_embeddings"])
    batches = []
    for some in order:
        for part in pet.split_by_length(encoded.tokens.lengths[some], model.device):
            ids, attention = pad(encoded.tokens, some[part], pad_id, model.device)
            at = torch.from_numpy(encoded.mask_at[some[part], 0])
            batches.append((ids, attention, torch.arange(len(part)), at))
    words = torch.tensor([word.ids[0] for word in annotator.verbalizer.words])

    def bare() -> float:
        model.train()

        def passes() -> None:
            for ids, attention, at_row, at in batches:
                with model.autocast():
                    total = model.logits_at(ids, attention, at_row, at, words).sum()
                total.backward()

        taken = seconds_of(passes)
        model.zero_grad(set_to_none=True)
        return taken

    targets = torch.from_numpy(numbers)

    def procedure_2020(count: int) -> float:
        plain = AutoModelForMaskedLM.from_pretrained(base.path, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=spec["learning_rate"], foreach=False, fused=False)
        ids = np.full((labels, PADDED_TO), pad_id)
        for row, tokens_of_row in enumerate(encoded.tokens):
            ids[row, : len(tokens_of_row)] = tokens_of_row

        def run() -> None:
            for some in order[:count]:
                tensor = torch.from_numpy(ids[some])
                logits = plain(input_ids=tensor, attention_mask=(tensor != pad_id).long()).logits
                at_mask = logits[torch.arange(len(some)), torch.from_numpy(encoded.mask_at[some, 0])][:, words]
                F.cross_entropy(at_mask, targets[some]).backward()
                torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0, foreach=False)
                optimizer.step()
                optimizer.zero_grad()

        return seconds_of(run) * steps / count

    few = max(steps // 10, 2)
    methods = {"clozeline": clozeline, "bare": bare, "procedure_2020": lambda: procedure_2020(few)}
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, work in methods.items():
            taken[name].append(work())
    seconds = {name: statistics.median(found) for name, found in taken.items()}
    return {
        "steps_per_s": steps / seconds["clozeline"],
        "of_bare_forward_backward": seconds["bare"] / seconds["clozeline"],
        "vs_procedure_2020": seconds["procedure_2020"] / seconds["clozeline"],
        "details": {"steps": steps, "spread": {name: max(found) / min(found) for name, found in taken.items()}},
    }


# ---- adapting ------------------------------------------------------------------------------------------


def adapt(base: BaseModel, data: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Measure adapting; see the module's text."""
    texts, _ = texts_of(data, "train")
    spec = {**Adapt(steps=steps).model_dump(), "max_length": PADDED_TO}
    profile = numeric_profile()
    device, dtype = torch.device(profile["device"]), getattr(torch, profile["dtype"])
    plain = AutoModelForMaskedLM.from_pretrained(base.path, dtype=torch.float32, **attention_for(device)).to(device)
    prepare_for_few_steps(plain.train(), dropout=0.0, freeze_embeddings=False)
    rates: dict[str, list[float]] = {"clozeline": [], "bare": [], "whole_vocabulary": []}
    for repeat in range(repeats):
        adapting = Adapting(spec, texts[:ADAPT_ROWS], base, profile, repeat)
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as directory:
            adapting.run(Path(directory), lambda done, total, ends=ends: ends.append(time.perf_counter()))
        # Behind some steps held-out texts are measured and a checkpoint is written, before the next one begins.
        parts = [done * EVALUATIONS // steps for done in range(steps + 1)]
        alone = [ends[done] - ends[done - 1] for done in range(1, adapting.step) if parts[done] == parts[done - 1]]
        rates["clozeline"].append(adapting.tokens / adapting.step / statistics.median(alone))
        length = round(float(adapting.train.tokens.lengths.mean()))
        ids = torch.randint(1000, 20000, (spec["batch_tokens"] // length, length), device=device)
        for name, model in (("bare", plain.base_model), ("whole_vocabulary", plain)):

            def step(model: Any = model, ids: torch.Tensor = ids) -> None:
                given = {"labels": ids} if model is plain else {}
                with training_numbers(device, dtype):
                    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
                (out.loss if given else out[0].float().sum()).backward()
                plain.zero_grad(set_to_none=True)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            step()
            rates[name].append(ids.numel() / statistics.median(seconds_of(step) for _ in range(max(steps // 4, 3))))
    median = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "tokens_per_s": median["clozeline"],
        "of_bare_forward_backward": median["clozeline"] / median["bare"],
        "vs_whole_vocabulary": median["clozeline"] / median["whole_vocabulary"],
        "details": {"steps": steps, "spread": {name: max(found) / min(found) for name, found in rates.items()}},
    }


def main() -> None:
    """Measure one part and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=["score", "fit", "adapt", "peak"], default="score")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=4000, help="for clozeline; the others get fewer")
    parser.add_argument("--labels", type=int, default=40, help="labelled rows, for fit")
    parser.add_argument("--steps", type=int, default=50, help="for fit and adapt; adapt needs 40 or more")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    base = resolve_base_model(arguments.model)
    if arguments.part == "peak":
        print(score_alone(base, arguments.data, arguments.rows))
        return
    if arguments.part == "fit":
        found = fit(base, arguments.data, arguments.labels, arguments.steps, arguments.repeats)
    elif arguments.part == "adapt":
        found = adapt(base, arguments.data, arguments.steps, arguments.repeats)
    else:
        shares = {"clozeline": 1, "fill_mask_fp32": 12, "fill_mask_bf16": 4, "padded_loop": 24}
        rows = {name: max(arguments.rows // share, 16) for name, share in shares.items()}
        found = score(base, arguments.data, rows, arguments.repeats)
        found["peak_rss_mb"] = peak(base, arguments.data, arguments.rows)
    details = found.pop("details")
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:28} {value:.2f}")
    print(json.dumps(details), file=sys.stderr)


if __name__ == "__main__":
    main()
