"""What all tests share: a masked language model of a few kilobytes, and a task that uses it."""

from __future__ import annotations

import gc
import os
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
os.environ["OMP_NUM_THREADS"] = "1"  # a tiny model is slower on two threads, and far slower on busy cores

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import settings

# The first example of a property may load a tokenizer, so time limits on single examples say nothing.
settings.register_profile("clozeline", deadline=None, max_examples=50)
settings.load_profile("clozeline")

POSITIONS = 64


def _words(text: str) -> list[str]:
    return text.split()


GOOD = _words("good great fine lovely excellent brilliant superb charming warm fresh delicious friendly clean quick")
BAD = _words("bad awful terrible poor dreadful horrible nasty rude dirty slow stale cold broken bland")
THINGS = _words(
    "food service room staff film book phone hotel meal coffee music story camera battery screen soup bread waiter "
    "kitchen garden window table chair letter parcel ticket train bus road city house door lamp bed bath tea cake"
)
GLUE = _words(
    "the a an and or but it is was were be been this that these those we i you he she they our my your in on at of to "
    "for with from by about very really quite so too not no yes all some any one two three new old big small long "
    "short day night week year time place people man woman child friend family first last again always never often "
    "today yesterday here there what which who when where why how up down out over under more less much many before "
    "after question answer text review label positive negative neutral just only also then than as if because while"
)
VOCABULARY = list(dict.fromkeys([*GOOD, *BAD, *THINGS, *GLUE]))


def sentence(draw: random.Random, words: Sequence[str]) -> str:
    """A sentence of 5 to 15 words whose mood is given by ``words``."""
    about, mood = draw.choice(THINGS), draw.sample(list(words), 2)
    glue = [draw.choice(GLUE) for _ in range(draw.randrange(0, 10))]
    return " ".join(["the", about, "was", mood[0], "and", mood[1], *glue]) + "."


def write_tiny_model(path: Path) -> None:
    """Write a random BERT for masked-language modelling: 2 layers, 32 wide, lower-case WordPiece."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase + string.digits
    pieces = [*specials, *string.punctuation, *characters, *("##" + c for c in characters), *VOCABULARY]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=POSITIONS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(ids),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=POSITIONS,
            pad_token_id=ids["[PAD]"],
            # Ten times the usual spread: otherwise the logits of a random model differ too little to tell
            # a right one from a wrong one.
            initializer_range=0.2,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `write_tiny_model`'s BERT."""
    path = tmp_path_factory.mktemp("models") / "tiny-bert"
    write_tiny_model(path)
    # What the libraries have made by now stays; full collections, of which every fit asks for one, took 0.2 s with it.
    gc.collect()
    gc.freeze()
    return path


@pytest.fixture
def byte_level() -> Any:
    """A tokenizer like RoBERTa's: byte-level BPE that marks the space before a word."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(["", *VOCABULARY])] * 3, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


@pytest.fixture
def profile() -> dict[str, str]:
    """Plain numbers on the CPU, whatever the machine has."""
    from pipeline.device import numeric_profile

    return {**numeric_profile("float32"), "device": "cpu"}


@pytest.fixture
def base(tiny_model: Path) -> Any:
    """The tiny model as the library knows it."""
    from pipeline.base_model import resolve_base_model

    return resolve_base_model(str(tiny_model))


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write columns or a table below the test's directory: ``write_parquet({"text": [...]}, "rows.parquet")``."""

    def write(columns: Mapping[str, Any] | pa.Table, name: str = "rows.parquet") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(dict(columns)), path)
        return path

    return write


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict) and key != "labels":
            _merge(into[key], value)
        else:
            into[key] = value


def write_tiny_task(
    root: Path,
    model: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    labelled: int = 8,
    unlabelled: int = 24,
    test: int = 10,
    seed: int = 0,
) -> Path:
    """Write a task with its Parquet.

    Args:
        root: the directory; made when missing.
        model: the directory of its base model.
        changes: merged into the YAML.
        labelled, unlabelled, test: rows of each file.
        seed: of the sentences.

    Returns:
        The path of its ``task.yaml``.
    """
    root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for name, rows in (("labelled", labelled), ("unlabelled", unlabelled), ("test", test)):
        moods = [i % 2 for i in range(rows)]
        columns = {
            "key": [f"{name}-{i}" for i in range(rows)],
            "text": [sentence(draw, BAD if mood else GOOD) for mood in moods],
            "shop": [draw.choice(["north", "south"]) for _ in moods],
        }
        if name != "unlabelled":
            columns["label"] = ["bad" if mood else "good" for mood in moods]
        pq.write_table(pa.table(columns), root / f"{name}.parquet")
    task: dict[str, Any] = {
        "name": "tiny",
        "labels": {"good": ["good", "great"], "bad": ["bad", "awful"]},
        "inputs": {
            "labelled": "labelled.parquet",
            "unlabelled": ["unlabelled.parquet"],
            "test": "test.parquet",
            "id": "key",
            "carry": ["shop"],
        },
        "annotators": ["{text} It was {mask}.", "{mask}: {text}"],
        "base_model": str(model),
        "training": {
            "preset": "quick",
            "steps": 2,
            "batch_size": 4,
            "mlm_batch_size": 4,
            "max_length": 48,
            "folds": 2,
            "dtype": "float32",
        },
        "student": {"steps": 2, "batch_size": 4},
        "release": {"review_budget": 5},
    }
    _merge(task, changes or {})
    path = root / "task.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def tiny_task(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """`write_tiny_task` with the tiny model, in a folder below the test's directory.

    ``tiny_task("folder", {"training": {"folds": 0}}, labelled=4)`` gives the path of its ``task.yaml``.
    """

    def make(folder: str = "task", changes: Mapping[str, Any] | None = None, **rows: int) -> Path:
        return write_tiny_task(tmp_path / folder, tiny_model, changes, **rows)

    return make


@pytest.fixture(scope="module")
def s3_environment() -> Iterator[dict[str, str]]:
    """An S3 server over HTTP, for the tests of a file; the variables by which clients find it."""
    from tests.s3_server import s3_server

    with s3_server() as environment:
        yield environment


@pytest.fixture
def s3_url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL with nothing below it, on the S3 server that this process and its children then use."""
    from tests.s3_server import use_s3

    return use_s3(monkeypatch, s3_environment, tmp_path / "cache")


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's own directory, shared by the tests of a file: making its database takes seconds."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def machine(tmp_path: Path, prefect_home: Path) -> Any:
    """A `tests.machine.Machine` below the test's directory."""
    from tests.machine import Machine

    return Machine(tmp_path / "home", prefect_home)


@pytest.fixture(params=["disk", "s3"])
def release(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A release path with nothing below it: a directory, and a URL."""
    if request.param == "disk":
        return str(tmp_path / "releases")
    return str(request.getfixturevalue("s3_url")) + "/releases"


def latest_manifest(release: str | Path) -> dict[str, Any] | None:
    """The manifest of the version in force, or None where there is none."""
    from pipeline.locations import below, read_json
    from pipeline.store import MANIFEST
    from pipeline.versions import version_in_force

    version = version_in_force(release)
    return None if version is None else read_json(below(version, MANIFEST))
