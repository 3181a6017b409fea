"""The base model: from a name in the task file to a directory and a hash of its weights."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, loading
from pipeline.store import sha256_of

EMBEDDED = "embedded"
_POSITIONS_FROM_2 = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text"}
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]
_TOKENIZERS = [
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    "spm.model",
]
_POINTER = b"version https://git-lfs"
WHOLE = "fetch the model again: all of its files, whole"


@dataclass(frozen=True)
class BaseModel:
    """A masked language model on disk.

    Attributes:
        name: as the task file has it.
        path: its directory.
        weights: a hash of weights, configuration and tokenizer; part of every key that depends on them.
        config: the model's ``config.json``.
    """

    name: str
    path: Path
    weights: str
    config: dict[str, Any]

    @property
    def positions(self) -> int:
        """The most tokens it reads, special tokens included."""
        limit = int(self.config.get("max_position_embeddings", 512))
        # RoBERTa counts positions from padding_idx + 1, so that two of them are never used.
        return limit - 2 if self.config.get("model_type") in _POSITIONS_FROM_2 else limit

    @property
    def encoder_parameters(self) -> int:
        """Parameters that every token passes through (embeddings left out), for estimates."""
        width = int(self.config.get("hidden_size") or self.config.get("dim") or 768)
        layers = int(self.config.get("num_hidden_layers") or self.config.get("n_layers") or 12)
        inner = int(self.config.get("intermediate_size") or self.config.get("hidden_dim") or 4 * width)
        return layers * (4 * width * width + 2 * width * inner)


def embedded_path() -> Path:
    """The embedded model: inside an installed wheel, or in a source checkout.

    Raises:
        InputError: neither has it.
    """
    package = Path(__file__).resolve().parent
    for path in (package / "embedded" / "cloze-mini", package.parent / "data" / "models" / "cloze-mini"):
        if (path / "config.json").is_file():
            return path
    raise InputError("the embedded model is not installed", where="base_model: embedded", fix="reinstall clozeline")


def resolve_base_model(name: str, root: Path = Path("."), *, headless: bool = False) -> BaseModel:
    """Find a base model.

    Args:
        name: ``embedded``, a directory (relative to ``root``), or a hub name with a revision, NAME@REVISION.
        root: the task file's directory.
        headless: whether an encoder without a masked-LM head will do, since `pipeline.adapt` trains one.

    Raises:
        InputError: it is not there, has no safetensors, or has no masked-LM head.
    """
    if name == EMBEDDED:
        path = embedded_path()
    elif (root / name).is_dir():
        path = root / name
    elif "@" in name and not name.startswith((".", "/")):
        path = _download(name)
    else:
        raise InputError(
            f"there is no base model {name!r}",
            where=f"base_model (looked in {root.resolve()})",
            fix="use 'embedded', a directory, or a hub name with its revision: NAME@REVISION",
        )
    # A warm process outlives a directory's content: an adapted model that was damaged is built again in its place.
    try:
        stamp = tuple(sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.glob("*.*")))
        return _describe(name, path.resolve(), headless, stamp)
    except OSError as error:  # a link whose target was removed from a hub's cache, above all
        raise InputError(f"can't read the base model: {error}", where=f"base_model: {name}", fix=WHOLE) from error


@functools.cache
def _describe(name: str, path: Path, headless: bool, stamp: tuple[tuple[str, int, int], ...]) -> BaseModel:
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise InputError("the base model has no safetensors", where=str(path), fix="convert it; pickles are not read")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"can't read the model's configuration: {error}", where=str(path / "config.json")) from None
    if not isinstance(config, dict):
        raise InputError("the model's configuration is no mapping", where=str(path / "config.json"), fix=WHOLE)
    if not any((path / file).is_file() for file in _TOKENIZERS):
        raise InputError("the base model has no tokenizer", where=str(path), fix=f"put {_TOKENIZERS[0]} there")
    for file in weights:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise InputError(
                    "this is a pointer to the weights, not the weights", where=str(file), fix="run: git lfs pull"
                )
    architectures = config.get("architectures") or []
    if not headless and architectures and not any("MaskedLM" in a or "PreTraining" in a for a in architectures):
        raise InputError(
            f"the base model has no masked-LM head (it is a {architectures[0]})",
            where=f"base_model: {name}",
            fix="choose a model that was saved with one (…ForMaskedLM), or let adapt.steps train one",
        )
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in path.glob(pattern)}):
        digest.update(f"{file.name}:{sha256_of(file)}\n".encode())
    return BaseModel(name, path, digest.hexdigest()[:32], config)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision = name.rsplit("@", 1)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises a dozen kinds, from OSError to its own
        raise InputError(
            f"can't fetch {repository} at {revision}: {error}",
            where=f"base_model: {name}",
            fix="check name, revision and network, or give a local directory",
        ) from None


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a model directory.

    Raises:
        InputError: it can't be loaded.
    """
    from transformers import AutoTokenizer  # takes half a second

    with loading("the tokenizer", path, WHOLE):
        return AutoTokenizer.from_pretrained(path, use_fast=True)
