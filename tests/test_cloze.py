"""Scoring label words at the mask: the same numbers as the full forward pass, at a fraction of its work."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel
from transformers.modeling_outputs import MaskedLMOutput

from pipeline.base_model import load_tokenizer
from pipeline.batching import pad
from pipeline.cloze import ClozeModel, WordScorer, stack_words
from pipeline.errors import InputError
from pipeline.ragged import Ragged
from pipeline.template import Encoded, Encoder, Template
from pipeline.verbalizer import Verbalizer
from tests.conftest import BAD, GOOD, POSITIONS, sentence

ROWS = 12
EXACT = 1e-5
PATTERNS = {"first": "{mask}: {text}", "middle": "{text} It was {mask} {other}", "last": "{text} {other} {mask}"}
# "goodly" and the like take several tokens: the tiny tokenizer knows the word and single letters.
VERBALIZERS: dict[str, dict[str, Sequence[str]]] = {
    "a word a label": {"good": ["good"], "bad": ["bad"], "neutral": ["quite"]},
    "several words a label": {"good": ["good", "great", "fine"], "bad": ["bad"], "neutral": ["quite", "so"]},
    "words of two tokens": {"good": ["goodx"], "bad": ["badx"], "neutral": ["very so"]},
    "words of one and more tokens": {"good": ["good", "goodly"], "bad": ["awfulx"], "neutral": ["very so", "ok"]},
}


def texts(seed: int = 0) -> dict[str, list[str]]:
    """Rows of different lengths, one of them longer than the model."""
    draw = random.Random(seed)
    columns = {
        "text": [sentence(draw, GOOD) for _ in range(ROWS)],
        "other": [sentence(draw, BAD) for _ in range(ROWS)],
    }
    columns["text"][3] = " ".join(sentence(draw, GOOD) for _ in range(8))
    columns["other"][5] = ""
    return columns


class Scene:
    """A scorer beside a plain model that was loaded apart from it, over the same rows."""

    def __init__(
        self, path: Path, profile: Mapping[str, str], pattern: str, words: Mapping[str, Sequence[str]]
    ) -> None:
        tokenizer = load_tokenizer(path)
        encoder = Encoder(tokenizer, POSITIONS)
        self.verbalizer = Verbalizer.resolve(words, tokenizer)
        self.model = ClozeModel(path, profile)
        self.scorer = WordScorer(self.model, self.verbalizer)
        template = Template.parse(pattern)
        self.encoded = {width: encoder.encode(template, texts(), masks=width) for width in self.verbalizer.widths}
        self.plain = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).eval()
        self.pad_id = tokenizer.pad_token_id
        self.mask_id = tokenizer.mask_token_id

    def batch(self, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, attention = pad(encoded.tokens, np.arange(len(encoded)), self.pad_id, torch.device("cpu"))
        return ids, attention, torch.from_numpy(encoded.mask_at)

    def expected_word_scores(self) -> torch.Tensor:
        """Word by word and row by row, from the full forward pass of the plain model, without padding."""
        mixed = len(self.encoded) > 1
        rows = []
        for row in range(ROWS):
            at_masks = {}
            for width, inputs in self.encoded.items():
                ids = torch.from_numpy(inputs.tokens[row].astype(np.int64))
                logits = self.plain(input_ids=ids[None]).logits[0, ids == self.mask_id]
                at_masks[width] = logits.log_softmax(-1) if mixed else logits
            scores = []
            for word in self.verbalizer.words:
                logits = at_masks[len(word.ids)]
                scores.append(sum(logits[i, token] for i, token in enumerate(word.ids)) / len(word.ids))
            rows.append(torch.stack(scores))
        return torch.stack(rows)

    def expected_label_logits(self, scores: torch.Tensor) -> torch.Tensor:
        columns = []
        for label in range(self.verbalizer.labels):
            mine = [i for i, word in enumerate(self.verbalizer.words) if word.label == label]
            columns.append(scores[:, mine].logsumexp(1) - np.log(len(mine)))
        return torch.stack(columns, dim=1)

    def label_logits(self) -> torch.Tensor:
        """As training computes them: in one padded batch a token count, with a graph."""
        parts = [self.scorer.word_scores(*self.batch(inputs)) for inputs in self.encoded.values()]
        return self.scorer.label_logits(stack_words(parts, len(self.verbalizer.words)))


@pytest.fixture
def scene(tiny_model: Path, profile: Mapping[str, str]) -> Callable[[str, str], Scene]:
    return lambda pattern, words: Scene(tiny_model, profile, PATTERNS[pattern], VERBALIZERS[words])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("words", VERBALIZERS)
def test_word_scores_are_the_full_forwards_logits_at_the_mask(
    pattern: str, words: str, scene: Callable[[str, str], Scene]
) -> None:
    given = scene(pattern, words)
    lengths = {len(row) for inputs in given.encoded.values() for row in inputs.tokens}
    assert len(lengths) > 3  # so that batches are padded
    assert max(lengths) == POSITIONS
    with torch.no_grad():
        expected = given.expected_word_scores()
    scores = given.scorer.score(given.encoded)
    assert scores.shape == (ROWS, len(given.verbalizer.words))
    assert np.abs(scores - expected.numpy()).max() < EXACT
    with torch.no_grad():
        wanted = given.expected_label_logits(expected)
        assert (given.label_logits() - wanted).abs().max() < EXACT
    assert np.abs(given.scorer.log_probabilities(scores) - wanted.log_softmax(-1).numpy()).max() < EXACT
    assert np.ptp(wanted.numpy(), axis=0).max() > 0.1  # the rows differ by far more than what is called equal


@pytest.mark.parametrize("words", VERBALIZERS)
def test_a_gradient_step_is_that_of_the_full_forward(words: str, scene: Callable[[str, str], Scene]) -> None:
    given = scene("middle", words)
    targets = torch.arange(ROWS) % 3
    F.cross_entropy(given.label_logits(), targets).backward()
    F.cross_entropy(given.expected_label_logits(given.expected_word_scores()), targets).backward()
    mine = dict(given.model.model.named_parameters())
    theirs = dict(given.plain.named_parameters())
    assert set(mine) == set(theirs)
    largest = 0.0
    for name, parameter in theirs.items():
        gradient, expected = mine[name].grad, parameter.grad
        if expected is None:  # what the loss does not depend on
            assert gradient is None or gradient.abs().max() == 0
            continue
        assert gradient is not None, name
        assert (gradient - expected).abs().max() < EXACT, name
        largest = max(largest, float(expected.abs().max()))
    assert largest > 0.01
    for model in (given.model.model, given.plain):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in theirs.items():
        assert (mine[name] - parameter).abs().max() < EXACT, name


def test_logits_anywhere_and_over_the_whole_vocabulary_are_the_full_forwards(
    scene: Callable[[str, str], Scene],
) -> None:
    given = scene("first", "a word a label")
    ids, attention, _ = given.batch(given.encoded[1])
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, ROWS, (30,), generator=draw)
    columns = (torch.rand(30, generator=draw) * attention.sum(1)[rows]).long()
    with torch.no_grad():
        full = given.plain(input_ids=ids, attention_mask=attention).logits[rows, columns]
        assert (given.model.logits_at(ids, attention, rows, columns) - full).abs().max() < EXACT
        words = torch.tensor([7, 3, 250])
        some = given.model.logits_at(ids, attention, rows, columns, words)
    assert (some - full[:, words]).abs().max() < EXACT


def test_only_the_words_rows_of_the_output_embedding_are_multiplied(scene: Callable[[str, str], Scene]) -> None:
    given = scene("middle", "several words a label")
    shapes: list[tuple[torch.Size, torch.Size]] = []
    assert given.model.decoder is not None
    given.model.decoder.register_forward_hook(
        lambda module, inputs, output: shapes.append((inputs[0].shape, output.shape))
    )
    given.scorer.score(given.encoded)
    assert sum(inputs[0] for inputs, _ in shapes) == ROWS
    for inputs, output in shapes:
        assert inputs[1:] == (1, 32)  # a vector a mask, not one a token
        assert output[1:] == (1, len(given.verbalizer.words))


def test_scores_of_a_row_do_not_depend_on_its_company(scene: Callable[[str, str], Scene]) -> None:
    given = scene("middle", "a word a label")
    together = given.scorer.score(given.encoded)
    inputs = given.encoded[1]
    for row in (0, 3, 5):
        alone = Encoded(Ragged.of([inputs.tokens[row]]), inputs.mask_at[[row]], inputs.own[:0], inputs.shortened[[row]])
        assert np.abs(given.scorer.score({1: alone})[0] - together[row]).max() < EXACT


def test_progress_counts_every_row_of_every_pass(scene: Callable[[str, str], Scene]) -> None:
    given = scene("first", "words of one and more tokens")
    told: list[tuple[int, int]] = []
    given.scorer.score(given.encoded, lambda done, total: told.append((done, total)))
    total = ROWS * len(given.verbalizer.widths)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_bf16_multiplies_the_label_words_in_fp32_and_stays_close(tiny_model: Path, profile: dict[str, str]) -> None:
    exact = Scene(tiny_model, profile, PATTERNS["middle"], VERBALIZERS["a word a label"])
    coarse = Scene(tiny_model, {**profile, "dtype": "bfloat16"}, PATTERNS["middle"], VERBALIZERS["a word a label"])
    assert {parameter.dtype for parameter in coarse.model.parameters()} == {torch.float32}
    apart = np.abs(exact.scorer.score(exact.encoded) - coarse.scorer.score(coarse.encoded))
    assert 0 < apart.max() < 0.25
    ids, attention, at = coarse.batch(coarse.encoded[1])
    with torch.no_grad(), coarse.model.autocast():
        rows = torch.arange(ROWS)[:, None]
        assert coarse.model.logits_at(ids, attention, rows, at, torch.tensor([5])).dtype == torch.float32


# ---- every family by the one path ----------------------------------------------------------------------

_COMMON = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_DISTILBERT = {
    **{key: _COMMON[key] for key in ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")},
    **{"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _COMMON,
    "roberta": {**_COMMON, "pad_token_id": 1},
    "xlm-roberta": {**_COMMON, "pad_token_id": 1},
    "camembert": {**_COMMON, "pad_token_id": 1},
    "mpnet": {**_COMMON, "pad_token_id": 1},
    "albert": {**_COMMON, "embedding_size": 16},
    "electra": {**_COMMON, "embedding_size": 16},
    "distilbert": _DISTILBERT,
    "deberta": _COMMON,
    "deberta-v2": {**_COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    # Its own head, as the published weights have it: it is handed the word embeddings, so that all are multiplied.
    "deberta-v2 with its own head": {**_COMMON, "relative_attention": True, "position_buckets": 16, "legacy": False},
    "modernbert": {**_COMMON, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
}


def make(family: str, path: Path) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family.split()[0], **FAMILIES[family])
    AutoModelForMaskedLM.from_config(config).save_pretrained(path)
    return AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).eval()


class FamilyScene:
    """A tiny random model of a family, beside itself loaded plainly, and rows with masks in several places."""

    ROWS, COLUMNS = torch.tensor([[0, 0], [1, 1], [2, 2]]), torch.tensor([[0, 1], [3, 8], [15, 16]])
    WORDS = torch.tensor([7, 9, 70])

    def __init__(self, family: str, padded: bool, path: Path, profile: Mapping[str, str]) -> None:
        self.plain = make(family, path)
        self.model = ClozeModel(path, profile)
        self.ids = torch.randint(5, 80, (3, 17), generator=torch.Generator().manual_seed(0))
        self.attention = torch.ones_like(self.ids)
        if padded:
            self.ids[1, 9:], self.attention[1, 9:] = FAMILIES[family]["pad_token_id"], 0

    def expected(self) -> torch.Tensor:
        logits: torch.Tensor = self.plain(input_ids=self.ids, attention_mask=self.attention).logits
        return logits[self.ROWS, self.COLUMNS]

    def found(self, words: torch.Tensor | None) -> torch.Tensor:
        return self.model.logits_at(self.ids, self.attention, self.ROWS, self.COLUMNS, words)


@pytest.fixture(params=[True, False], ids=["padded", "unpadded"])
def family_scene(
    request: pytest.FixtureRequest, tmp_path: Path, profile: Mapping[str, str]
) -> Callable[[str], FamilyScene]:
    return lambda family: FamilyScene(family, request.param, tmp_path, profile)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_as_its_own_full_forward(family: str, family_scene: Callable[[str], FamilyScene]) -> None:
    given = family_scene(family)
    with torch.no_grad():
        full = given.expected()
        assert (given.found(None) - full).abs().max() < EXACT
        assert (given.found(given.WORDS) - full[..., given.WORDS]).abs().max() < EXACT
    with given.model.scoring():
        assert (given.found(given.WORDS) - full[..., given.WORDS]).abs().max() < EXACT
    assert full.std() > 0.1
    assert given.model.shortcut == ("positions" if "its own head" in family else "label words")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_step_of_every_family_is_that_of_its_full_forward(
    family: str, family_scene: Callable[[str], FamilyScene]
) -> None:
    given = family_scene(family)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    F.cross_entropy(given.found(given.WORDS).flatten(0, 1), targets).backward()
    F.cross_entropy(given.expected()[..., given.WORDS].flatten(0, 1), targets).backward()
    mine, theirs = dict(given.model.model.named_parameters()), dict(given.plain.named_parameters())
    assert set(mine) == set(theirs)
    for model in (given.model.model, given.plain):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    before = AutoModelForMaskedLM.from_pretrained(given.plain.config._name_or_path).state_dict()
    moved = max(float((parameter.detach() - before[name]).abs().max()) for name, parameter in theirs.items())
    assert moved > 0.01
    for name, parameter in theirs.items():
        assert (mine[name] - parameter).abs().max() < EXACT, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_in_bf16_close_to_fp32(family: str, tmp_path: Path, profile: Mapping[str, str]) -> None:
    given = FamilyScene(family, True, tmp_path, {**profile, "dtype": "bfloat16"})
    with torch.no_grad():
        full = given.expected()[..., given.WORDS]
    with given.model.scoring():
        apart = (given.found(given.WORDS) - full).abs().max()
    assert apart < 0.25
    assert (apart > EXACT) == (given.model.shortcut == "label words")


class NeighbourlyConfig(BertConfig):
    model_type = "neighbourly"


class NeighbourlyForMaskedLM(BertForMaskedLM):
    """A head that looks at the next position, too: no position can be scored without its neighbours."""

    config_class = NeighbourlyConfig

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> MaskedLMOutput:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return MaskedLMOutput(logits=self.cls(hidden + hidden.roll(1, dims=-2)))


class TupleForMaskedLM(BertForMaskedLM):
    """A model whose encoder gives a plain tuple, which no hook changes."""

    config_class = type("TupleConfig", (BertConfig,), {"model_type": "tuple-bert"})

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> MaskedLMOutput:
        hidden, *_ = self.bert(input_ids, attention_mask=attention_mask, return_dict=False)
        return MaskedLMOutput(logits=self.cls(hidden))


@pytest.mark.parametrize("kind", [NeighbourlyForMaskedLM, TupleForMaskedLM])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unknown_family_is_scored_by_its_full_forward(
    kind: Any, dtype: str, tmp_path: Path, profile: Mapping[str, str]
) -> None:
    config_class = kind.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForMaskedLM.register(config_class, kind, exist_ok=True)
    torch.manual_seed(0)
    plain = kind(config_class(**_COMMON)).eval()
    plain.save_pretrained(tmp_path)
    model = ClozeModel(tmp_path, {**profile, "dtype": dtype})
    assert model.shortcut == "none"
    ids = torch.randint(5, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    attention, rows, columns, words = (
        torch.ones_like(ids),
        torch.tensor([0, 1]),
        torch.tensor([3, 8]),
        torch.tensor([9]),
    )
    with torch.no_grad():
        full = plain(ids, attention).logits[rows, columns]
    with model.scoring():
        assert (model.logits_at(ids, attention, rows, columns) - full).abs().max() < EXACT
        assert (model.logits_at(ids, attention, rows, columns, words) - full[:, words]).abs().max() < EXACT


def test_a_model_without_its_head_in_the_file_is_refused(tmp_path: Path, profile: Mapping[str, str]) -> None:
    BertModel(BertConfig(**_COMMON)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"masked-LM head is not in its file: cls\.predictions") as caught:
        ClozeModel(tmp_path, profile)
    assert str(tmp_path) in str(caught.value)


def test_scoring_gives_the_weights_back_as_they_were(tiny_model: Path, profile: Mapping[str, str]) -> None:
    model = ClozeModel(tiny_model, {**profile, "dtype": "bfloat16"})
    before = {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    with model.scoring():
        assert {parameter.dtype for parameter in model.model.base_model.parameters()} == {torch.bfloat16}
        assert model.model.cls.predictions.transform.dense.weight.dtype == torch.float32
    with pytest.raises(KeyboardInterrupt), model.scoring():
        raise KeyboardInterrupt
    assert {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()} == before


# ---- what training leaves ------------------------------------------------------------------------------


def test_a_delta_brings_back_what_training_changed_and_holds_nothing_else(
    scene: Callable[[str, str], Scene], tmp_path: Path
) -> None:
    given, fresh = (scene("middle", "several words a label") for _ in range(2))
    before = given.scorer.score(given.encoded)
    changed = {
        "bert.encoder.layer.1.output.dense.weight",
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
    }
    parameters = dict(given.model.model.named_parameters())
    with torch.no_grad():
        for name in changed:
            parameters[name] += 0.1 * torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(0))
    after = given.scorer.score(given.encoded)
    assert np.abs(after - before).max() > 0.01
    given.model.save_delta(tmp_path)
    assert set(load_file(tmp_path / "delta.safetensors")) == changed
    fresh.model.load_delta(tmp_path)
    assert np.array_equal(fresh.scorer.score(fresh.encoded), after)


def test_an_untrained_models_delta_is_empty(scene: Callable[[str, str], Scene], tmp_path: Path) -> None:
    given = scene("middle", "a word a label")
    given.model.save_delta(tmp_path)
    assert load_file(tmp_path / "delta.safetensors") == {}
    given.model.load_delta(tmp_path)


# ---- calibration ---------------------------------------------------------------------------------------


def test_calibration_subtracts_the_log_of_each_words_mean_probability(scene: Callable[[str, str], Scene]) -> None:
    given = scene("middle", "several words a label")
    scores = given.scorer.score(given.encoded)
    given.scorer.calibrate(scores)
    probabilities = torch.from_numpy(scores).softmax(-1)
    assert torch.allclose(given.scorer.bias, probabilities.mean(0).log(), atol=1e-6)
    corrected = torch.from_numpy(scores) - probabilities.mean(0).log()
    assert np.allclose(
        given.scorer.log_probabilities(scores), given.expected_label_logits(corrected).log_softmax(-1), atol=1e-5
    )


@pytest.mark.parametrize("words", VERBALIZERS)
def test_calibration_evens_out_what_the_model_prefers_everywhere(
    words: str, scene: Callable[[str, str], Scene]
) -> None:
    given = scene("middle", words)
    scores = given.scorer.score(given.encoded)
    scores[:, 0] += 3  # a word that the model likes whatever the text
    before = np.exp(given.scorer.log_probabilities(scores)).mean(axis=0)
    given.scorer.calibrate(scores)
    after = np.exp(given.scorer.log_probabilities(scores)).mean(axis=0)
    assert np.abs(after - 1 / 3).max() < np.abs(before - 1 / 3).max()
    assert np.abs(after - 1 / 3).max() < 0.05


def test_rows_that_all_look_alike_are_calibrated_to_uniform(scene: Callable[[str, str], Scene]) -> None:
    given = scene("first", "several words a label")
    scores = np.tile(np.linspace(-3, 4, len(given.verbalizer.words), dtype=np.float32), (5, 1))
    given.scorer.calibrate(scores)
    assert np.exp(given.scorer.log_probabilities(scores)) == pytest.approx(np.full((5, 3), 1 / 3), abs=1e-6)


def test_a_label_with_more_words_is_not_favoured_for_their_number(scene: Callable[[str, str], Scene]) -> None:
    given = scene("first", "several words a label")
    same = np.zeros((2, len(given.verbalizer.words)), dtype=np.float32)
    assert np.exp(given.scorer.log_probabilities(same)) == pytest.approx(np.full((2, 3), 1 / 3), abs=1e-6)
