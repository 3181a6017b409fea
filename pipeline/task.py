"""The task file: what is to be labelled, and how.

A task is YAML, validated before anything else happens. Paths in it are relative to the file, which may lie behind
an fsspec URL, as may whatever it names; what lies behind a URL is fetched into the cache of this machine. The
smallest useful one names the labels with a word each, the Parquet files and two patterns; everything else has a
default. Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline import base_model as base_models
from pipeline import locations, transfer
from pipeline.errors import InputError
from pipeline.settings import Settings
from pipeline.tables import is_readable
from pipeline.template import Template

_MOST_VALUES = 100_000
# What the YAML library lets through for a date that there is not, a number too long, or a value of another type than
# its tag says.
_NO_VALUE = (ValueError, KeyError, AttributeError)
_OWN = ("root", "base_url")  # the library's own fields, not keys of the file


def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if isinstance(value, list) else [value]


def _words(value: Any) -> Any:
    """Label words: one stands for a list of one, and what YAML took for something else than text is told."""
    words = _listed(value)
    for word in words:
        if isinstance(word, bool | int | float):
            raise ValueError(f"the word {word!r} is not text; {_quote_it(word)}")
    return words


def _quote_it(value: object) -> str:
    if isinstance(value, bool):
        return "quote it: YAML takes yes, no, on, off, true and false without quotes for truth values"
    return f'quote it: "{value}"'


def _pattern_alone(value: Any) -> Any:
    """A bare pattern stands for a PET annotator with that pattern."""
    return {"pattern": value} if isinstance(value, str) else value


Words = Annotated[list[str], BeforeValidator(_words), Field(min_length=1)]
Columns = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class Section(BaseModel):
    """A part of the task file: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Inputs(Section):
    """Where the rows are and what their columns mean."""

    labelled: str | None = Field(None, description="Parquet with the labelled rows; without it: zero-shot")
    unlabelled: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] = Field(
        description="Parquet to label: one path or glob, or a list of them"
    )
    test: str | None = Field(None, description="Parquet with labels that are used for the report alone")
    text: Columns = Field(default=["text"], description="the text column, or several")
    label: str = Field("label", description="the label column of the labelled and the test file")
    id: str | None = Field(None, description="a unique column; without it the id is a hash of the text")
    carry: Annotated[list[str], BeforeValidator(_listed)] = Field(
        default=[], description="columns to carry along into the release"
    )
    on_bad_files: Literal["fail", "skip"] = Field(
        "fail", description="what to do with an unlabelled file that is no readable Parquet: stop, or leave it out"
    )
    on_bad_rows: Literal["fail", "quarantine"] = Field(
        "fail", description="what to do with a row without text: stop, or set it aside and go on"
    )


class Annotator(Section):
    """One pattern and its verbalizer, fine-tuned once a seed."""

    pattern: str
    words: dict[str, Words] | None = Field(None, description="label words of its own")
    seeds: int = Field(1, ge=1, le=20, description="how many models with different seeds")
    name: str | None = None

    @field_validator("pattern")
    @classmethod
    def _parses(cls, pattern: str) -> str:
        try:
            Template.parse(pattern).require_mask()
        except InputError as error:
            raise ValueError(f"{error.problem}; {error.fix}") from None
        return pattern


class Training(Section):
    """How each annotator is fine-tuned. A preset fills what is left out."""

    preset: Literal["quick", "paper"] | None = Field(
        None, description="quick is the default for the embedded model, paper (table 5) for any other"
    )
    steps: Literal["auto"] | Annotated[int, Field(ge=0, le=100_000)] | None = Field(
        None, description="auto: eight times over the labelled rows, 50 at least and 1,000 at most"
    )
    batch_size: int | None = Field(None, ge=1, le=1024)
    learning_rate: float | None = Field(None, gt=0, le=0.1)
    mlm_alpha: float | None = Field(
        None, ge=0, lt=1, description="the share of the MLM loss: (1 - alpha) * CE + alpha * MLM"
    )
    mlm_batch_size: int | None = Field(None, ge=1, le=1024)
    max_length: int | None = Field(None, ge=8, le=8192)
    folds: int | None = Field(None, ge=0, le=20, description="cross-validation folds; each costs one more fit")
    dropout: float | None = Field(None, ge=0, lt=1, description="by default the preset's")
    freeze_embeddings: bool | None = Field(None, description="leave the word embeddings as they are")
    learned: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="where between the base model's weights (0) and the trained ones (1) an annotator stands; "
        "auto: rows / 40, at most 1",
    )
    match_prior: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="how far a trained annotator's label shares are moved to the labelled rows' shares; "
        "auto: (1 - rows / 40) / 3, 0 from 40 rows on",
    )
    truncation: Literal["head", "tail"] = "head"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class Adapt(Section):
    """Masked-language modelling on the transfer set, before any annotator is fitted (`pipeline.adapt`)."""

    steps: int = Field(0, ge=0, le=10_000_000, description="optimizer steps; 0 leaves the base model as it is")
    minutes: float | None = Field(
        None, gt=0, description="end earlier, after so long; the result then depends on the machine's speed"
    )
    batch_tokens: int = Field(4096, ge=64, le=10_000_000, description="tokens of a step")
    learning_rate: float = Field(2e-4, gt=0, le=0.1)
    mask_share: float = Field(0.15, gt=0, lt=1, description="the part of the tokens (or words) that is hidden")
    whole_words: bool = Field(False, description="hide all tokens of a word, or none")
    keep: float = Field(
        0.0, ge=0, le=1000, description="weight of staying near the base model's mean-pooled vectors (1 - cosine)"
    )


class Ensemble(Section):
    """How the annotators are blended."""

    weights: Literal["weighted", "uniform"] = "weighted"
    prior: Literal["none", "labelled"] = Field(
        "none", description="'labelled' moves the soft labels' shares towards the labelled rows' shares"
    )


class Ipet(Section):
    """Later generations of annotators, trained on what others were sure of (iPET)."""

    generations: int = Field(
        0, ge=0, le=10, description="how many times the annotators are trained anew on drawn rows too; 0 is PET"
    )
    growth: float = Field(
        5.0, gt=1, le=100, description="d: labelled and drawn rows together grow by it each generation"
    )
    share: float = Field(
        0.25, ge=0, le=1, description="lambda: the part of the other annotators that labels one's rows; one at least"
    )


class Sample(Section):
    """The transfer set: the unlabelled rows that the soft labels are made of."""

    rows_per_label: int = Field(10_000, ge=1)
    refresh_growth: float | None = Field(
        None, ge=0, description="draw it again when the pool has grown by more than this share; by default never"
    )


class Student(Section):
    """The classifier that is distilled from the soft labels and labels everything."""

    steps: Literal["auto"] | Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="auto: six for each label, 150 at least"
    )
    batch_size: int | None = Field(None, ge=1, le=1024)
    learning_rate: float | None = Field(None, gt=0, le=0.1)
    temperature: float = Field(2.0, gt=0, le=100)
    dropout: float | None = Field(None, ge=0, lt=1)
    freeze_embeddings: bool | None = None
    template: str | None = Field(None, description="what it reads; by default the text columns, joined")


class Gate(Section):
    """When a new version is held, so that the one in force stays. No part of any key: limits change no byte."""

    enabled: bool = Field(True, description="false puts every new version in force")
    cv_drop: float = Field(
        0.05, ge=0, le=1, description="hold where cross-validated accuracy fell by more, and beyond chance"
    )
    share_shift: float = Field(
        0.2, ge=0, le=1, description="hold where more than this share of the rows would have to change labels"
    )
    min_rows: float = Field(0.5, ge=0, description="hold where there are fewer than so many times the rows")


class Release(Section):
    """What is published."""

    path: str | None = Field(None, description="the release directory; by default releases/NAME")
    review_budget: int = Field(500, ge=0, description="rows for people to review")
    gate: Gate = Gate()


# Chosen by measuring (docs/benchmarks.md, "Choosing the quick preset").
_EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 8, 50, 1000
_STUDENT_STEPS_A_LABEL, _FEWEST_STUDENT_STEPS = 6, 150
PRESETS: dict[str, dict[str, Any]] = {
    # Table 5 of Schick & Schütze (2021): one labelled and three unlabelled texts a step, four steps
    # accumulated, 1,000 steps; the classifier 5,000 steps of 16.
    "paper": {
        "training": {
            "steps": 1000,
            "batch_size": 4,
            "learning_rate": 1e-5,
            "mlm_alpha": 1e-4,
            "mlm_batch_size": 12,
            "max_length": 256,
            "folds": 4,
            "freeze_embeddings": False,
            "learned": 1.0,
            "match_prior": 0.0,
        },
        "student": {"steps": 5000, "batch_size": 16, "learning_rate": 1e-5, "freeze_embeddings": False},
    },
    # Chosen by measuring on rows cut from train (docs/benchmarks.md, "Choosing the quick preset").
    "quick": {
        "training": {
            "steps": "auto",
            "batch_size": 16,
            "learning_rate": 1e-4,
            "mlm_alpha": 0.0,
            "mlm_batch_size": 16,
            "max_length": 128,
            "folds": 2,
            "dropout": 0.0,
            "freeze_embeddings": True,
            "learned": "auto",
            "match_prior": "auto",
        },
        "student": {
            "steps": "auto",
            "batch_size": 32,
            "learning_rate": 1e-4,
            "dropout": 0.0,
            "freeze_embeddings": True,
        },
    },
}


class Task(Section):
    """A validated task.

    >>> task = Task.load("data/tickets/task.yaml")  # doctest: +SKIP
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    labels: dict[str, Words] = Field(description="each label with its word or words")
    inputs: Inputs
    annotators: list[Annotated[Annotator, BeforeValidator(_pattern_alone)]] = Field(min_length=1)
    base_model: str = Field(
        "embedded",
        description="'embedded', a directory (behind a URL, too), or a hub name with a revision: NAME@REVISION",
    )
    adapt: Adapt = Adapt()
    training: Training = Training()
    ensemble: Ensemble = Ensemble()
    ipet: Ipet = Ipet()
    sample: Sample = Sample()
    student: Student = Student()
    release: Release = Release()
    root: Path = Field(default=Path("."), exclude=True)
    base_url: str | None = Field(None, exclude=True)
    _sources: dict[Path, str] = PrivateAttr(default_factory=dict)

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_need_words(cls, labels: Any) -> Any:
        if not isinstance(labels, dict) or len(labels) < 2:
            raise ValueError("give at least two labels, each with its words:  {good: [great, good], bad: awful}")
        for label, words in labels.items():
            if not isinstance(label, str):
                raise ValueError(f"the label {label!r} is not text; {_quote_it(label)}")
            if words is None or words == [] or words == "":
                raise ValueError(f"the label {label!r} has no word")
        return labels

    @model_validator(mode="after")
    def _annotators_agree(self) -> Self:
        names = [name for name, *_ in self.members()]
        doubles = {name for name in names if names.count(name) > 1}
        if doubles:
            raise ValueError(f"two annotators are called {sorted(doubles)[0]!r}; give each a name of its own")
        for annotator in self.annotators:
            for label in set(annotator.words or self.labels) ^ set(self.labels):
                raise ValueError(
                    f"the words of the pattern {annotator.pattern!r} and the task's labels differ at {label!r}"
                )
            for column in Template.parse(annotator.pattern).columns:
                if column not in self.inputs.text:
                    raise ValueError(
                        f"the pattern {annotator.pattern!r} names the column {column!r}, which is not among "
                        f"inputs.text ({', '.join(self.inputs.text)})"
                    )
        return self

    @property
    def label_names(self) -> list[str]:
        """The labels in the one order used everywhere."""
        return list(self.labels)

    def members(self) -> Iterator[tuple[str, Annotator, int]]:
        """Each member of the ensemble: its name, its annotator and its seed."""
        for i, annotator in enumerate(self.annotators):
            base = annotator.name or f"p{i}"
            # Where nothing is trained, models of different seeds are one and the same.
            trained = self.inputs.labelled is not None or self.ipet.generations > 0
            seeds = annotator.seeds if trained else 1
            for seed in range(seeds):
                yield (base if seeds == 1 else f"{base}-s{seed}"), annotator, seed

    def words_of(self, annotator: Annotator) -> dict[str, list[str]]:
        """The verbalizer's words in the labels' order."""
        words = annotator.words or self.labels
        return {label: list(words[label]) for label in self.labels}

    def base(self) -> base_models.BaseModel:
        """The base model that the file names.

        Raises:
            InputError: it is not there, or can't be used.
        """
        return base_models.resolve_base_model(self.base_model, self.root, headless=self.adapt.steps > 0)

    @property
    def preset(self) -> str:
        """The preset in force."""
        return self.training.preset or ("quick" if self.base_model == "embedded" else "paper")

    def resolved(self, section: Literal["training", "student"]) -> dict[str, Any]:
        """A section's settings with the preset's values where the file leaves them out.

        The student's steps are a number; those of training depend on the labelled rows (`training_on`).
        """
        given = getattr(self, section).model_dump(exclude={"preset"})
        found = {**given, **{k: v for k, v in PRESETS[self.preset][section].items() if given[k] is None}}
        if section == "student" and found["steps"] == "auto":
            found["steps"] = max(_STUDENT_STEPS_A_LABEL * len(self.labels), _FEWEST_STUDENT_STEPS)
        return found

    def training_on(self, rows: int) -> dict[str, Any]:
        """The settings of training for a number of labelled rows: `resolved`, with the steps that ``auto`` means.

        A handful is read often in few steps; of many rows each is to be read as often as it takes to be learned.
        """
        training = self.resolved("training")
        if training["steps"] == "auto":
            steps = math.ceil(_EPOCHS * rows / training["batch_size"])
            training["steps"] = min(max(steps, _FEWEST_STEPS), _MOST_STEPS)
        return training

    @property
    def student_template(self) -> str:
        """What the student reads."""
        return self.student.template or " ".join("{" + column + "}" for column in self.inputs.text)

    def locate(self, given: str) -> str:
        """A path or URL of the file, relative to the file."""
        if locations.is_url(given) or Path(given).is_absolute():
            return given
        return locations.join(self.base_url, given) if self.base_url else str(self.root / given)

    def path(self, given: str) -> Path:
        """A file of the task on this machine; what lies behind a URL is fetched.

        Raises:
            InputError: there is no such file behind the URL.
        """
        return self._fetch(self.locate(given))

    def source_of(self, file: Path) -> str:
        """Where the base model, or a file that `path` or `matched_files` gave, lies for whatever machine reads it."""
        return self._sources.get(file) or str(file.absolute())

    def _fetch(self, location: str) -> Path:
        file = transfer.fetch_file(location, Settings().cache_path)
        if locations.local_path(location) is None:
            self._sources[file] = location
        return file

    def unlabelled_files(self) -> list[Path]:
        """The Parquet files to label, each once, unreadable ones left out if told to.

        Those of a glob are sorted by path; globs and names keep the order of the task file.

        Raises:
            InputError: a path or glob matches nothing.
        """
        found = self.matched_files()
        if self.inputs.on_bad_files == "fail":
            return found  # whoever opens an unreadable one tells
        readable = [file for file in found if is_readable(file)]
        if not readable:
            raise InputError(
                "none of the unlabelled files can be read", where="inputs.unlabelled", fix="write them again"
            )
        return readable

    def matched_files(self) -> list[Path]:
        """What `inputs.unlabelled` matches, readable or not; what lies behind a URL is fetched.

        Raises:
            InputError: a path or glob matches nothing.
        """
        with ThreadPoolExecutor(locations.AT_ONCE) as pool:
            return list(pool.map(self._fetch, self.matched_locations()))

    def matched_locations(self) -> list[str]:
        """The paths and URLs that `inputs.unlabelled` matches, each once.

        Raises:
            InputError: a path or glob matches nothing.
        """
        found: dict[str, None] = {}
        for given in self.inputs.unlabelled:
            matches = self._matches(given)
            if not matches:
                raise InputError(
                    f"no file matches {given!r}",
                    where=f"inputs.unlabelled (looked in {self.base_url or self.root.resolve()})",
                    fix="paths are relative to the task file",
                )
            found.update(dict.fromkeys(matches))
        return list(found)

    def _matches(self, given: str) -> list[str]:
        def below(root: str) -> str:
            if locations.is_url(given) or Path(given).is_absolute():
                return given
            return locations.join(root, given) if self.base_url else os.path.join(root, given)

        root = self.base_url or str(self.root)
        file = locations.local_path(below(root))
        if file is not None and file.is_file():  # whose name may have brackets
            return [str(file)]
        # The pattern alone is a glob: the task's own directory may have brackets in its name.
        where = below(glob.escape(root))
        here = locations.local_path(where)
        if here is not None:
            return [str(Path(match)) for match in sorted(glob.glob(str(here), recursive=True))]
        single = where.startswith(("http://", "https://")) or not glob.has_magic(given)
        return [self.locate(given)] if single else locations.matches(where)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Task:
        """Read a task file.

        Args:
            path: the YAML file, or its URL.
            overrides: ``dotted.key=value`` settings that win over the file's; values are YAML.

        Raises:
            InputError: the file is missing, is not YAML, or does not describe a task; all mistakes are told
                at once, each with its line.
        """
        here = locations.local_path(path)
        source = _source(path)
        try:
            node, raw = _parsed(source, str(path))
        except yaml.YAMLError as error:
            raise InputError(f"this is not YAML: {error}", where=str(path)) from error
        if not isinstance(raw, dict):
            raise InputError("a task file is a mapping of keys to values", where=str(path))
        for override in overrides:
            _apply(raw, override)
        root: Path | str = locations.parent(str(path)) if here is None else here.parent
        file = Path(str(path)) if here is None else here.resolve()
        fallback = file.stem if file.stem != "task" else file.parent.name
        raw.setdefault("name", re.sub(r"[^A-Za-z0-9_-]+", "-", fallback).strip("-_")[:64] or "task")
        changed = [override.partition("=")[0].strip().split(".") for override in overrides]
        return cls.from_dict(raw, root=root, where=str(path), node=node, changed=changed)

    @classmethod
    def from_dict(
        cls,
        raw: Mapping[str, Any],
        *,
        root: Path | str = Path("."),
        where: str = "task",
        node: yaml.Node | None = None,
        changed: Sequence[Sequence[str]] = (),
    ) -> Task:
        """Validate a task given as a mapping.

        Args:
            raw: keys and values as in a task file.
            root: what its paths are relative to: a directory or a URL.
            where: what errors call it.
            node: the YAML that it comes from, for the lines of mistakes.
            changed: the keys, as steps, that do not come from there.

        Raises:
            InputError: it does not describe a task.
        """
        for own in _OWN:
            if own in raw:
                raise InputError(f"{where}: unknown key {own!r}", fix="paths are relative to the task file")
        _refuse_half_characters(raw, where)
        # A section of which nothing is left but its name is one without settings.
        empty = {key for key in raw if raw[key] is None and next(_models_in(_annotation(cls, key)), None) is not None}
        given: dict[str, Any] = {key: value for key, value in raw.items() if key not in empty}
        given["root"] = Path(".") if isinstance(root, str) else root
        if isinstance(root, str):
            given["base_url"] = root
        base_model = _fetched_base_model(raw.get("base_model"), given.get("base_url"))
        if base_model is not None:
            given["base_model"] = str(base_model[0])
        try:
            task = cls.model_validate(given)
        except ValidationError as error:
            told = [_tell(cls, problem, where, node, changed) for problem in error.errors()]
            raise InputError("\n".join(told), fix="docs/task-file.md lists every key") from None
        if base_model is not None:
            task._sources[base_model[0].resolve()] = base_model[1]
        return task


def _source(path: str | Path) -> str:
    """The text of a task file."""
    here = locations.local_path(path)
    try:
        if here is not None:
            return here.read_text(encoding="utf-8")
        content = locations.read(str(path))
        if content is None:
            raise FileNotFoundError("there is no such file")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"can't read the task file: {error}", where=str(path), fix="`clozeline init` writes one"
        ) from error


def _parsed(source: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML text, with their lines, and its values.

    Raises:
        yaml.YAMLError: it is no YAML.
        InputError: it is nested too deeply, or unfolds to more than any task has: a few lines of aliases to aliases
            stand for billions of values.
    """
    try:
        node = yaml.compose(source, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(node, where)
        if node is not None and _unfolded(node, {}) > _MOST_VALUES:
            raise InputError(
                f"its aliases unfold to more than {_MOST_VALUES} values", where=where, fix="write the values out"
            )
        return node, yaml.safe_load(source)
    except _NO_VALUE as error:
        raise yaml.YAMLError(f"a value can't be read: {error}") from error
    except RecursionError:
        raise InputError("the YAML is nested too deeply", where=where, fix="a task needs four levels") from None


def _refuse_repeated_keys(root: yaml.Node | None, where: str) -> None:
    """Make sure that no key stands twice in one mapping, of which YAML would take the last in silence.

    Raises:
        InputError: one does.
    """
    waiting, seen = [root] if root is not None else [], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            waiting += [key, value]
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise InputError(
                    f"the key {key.value!r} is there twice, in lines {lines[key.value]} and {line}",
                    where=where,
                    fix="write it once; several values stand in a list: [great, fine]",
                )


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for with its aliases written out; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


def _refuse_half_characters(raw: Mapping[str, Any], where: str) -> None:
    """Make sure that every text is one: YAML's escapes, and bytes on a command line, may give lone surrogates.

    Raises:
        InputError: one is not.
    """
    try:
        json.dumps(dict(raw), skipkeys=True, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        around = ascii(error.object[max(error.start - 20, 0) : error.end])
        raise InputError(f"a text holds half a character: {around}", where=where, fix="write it as UTF-8") from None


def _fetched_base_model(name: Any, base_url: str | None) -> tuple[Path, str] | None:
    """The copy on this machine, and the URL, of a base model that is a directory behind a URL."""
    if not isinstance(name, str) or name == "embedded" or Path(name).is_absolute():
        return None
    if locations.is_url(name):
        url = name
    elif base_url is None or "@" in name:
        return None
    else:
        url = locations.join(base_url, name)
    if url.startswith(("http://", "https://")):
        return None
    here = locations.local_path(url)
    if here is not None:
        return here, str(here)
    tree = transfer.fetch_tree(url, Settings().cache_path)
    return None if tree is None else (tree, url)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in a raw task."""
    key, equals, value = override.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise InputError(f"{override!r} is not dotted.key=value", where="--set", fix="for example training.steps=100")
    try:
        _, parsed = _parsed(value, "--set")
    except yaml.YAMLError:
        parsed = value  # a pattern such as "{text} It was {mask}." is no YAML, and meant as it stands
    at: Any = raw
    for depth, step in enumerate(steps):
        place: Any = int(step) if isinstance(at, list) and step.isdecimal() else step
        if isinstance(at, list) and not (isinstance(place, int) and place < len(at)):
            raise InputError(f"{key!r}: the list has no entry {step!r}; entries count from 0", where="--set")
        if depth == len(steps) - 1:
            at[place] = parsed
            return
        inner = at[place] if isinstance(at, list) else at.setdefault(place, {})
        if isinstance(inner, str) and steps[0] == "annotators":
            inner = at[place] = _pattern_alone(inner)
        if not isinstance(inner, dict | list):
            raise InputError(f"{step!r} in {key!r} holds a value, not a section", where="--set")
        at = inner


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that a task knows at a place."""
    at: Any = model
    for step in location:
        if isinstance(step, int):
            continue
        field = at.model_fields.get(step) if isinstance(at, type) and issubclass(at, BaseModel) else None
        if field is None:
            return []
        at = next((kind for kind in _models_in(field.annotation)), None)
    return [key for key in at.model_fields if key not in _OWN] if at is not None else []


def _annotation(model: type[BaseModel], key: str) -> Any:
    field = model.model_fields.get(key)
    return None if field is None else field.annotation


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def _line_of(node: yaml.Node | None, location: Sequence[str | int]) -> int | None:
    """The line on which a key stands, counted from one."""
    line = None
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line


# What ends a location where a value may be a word or a number: the kind that it is not.
_KINDS = {"literal['auto']", "constrained-int", "constrained-float"}


def _tell(
    model: type[BaseModel], problem: Any, where: str, node: yaml.Node | None, changed: Sequence[Sequence[str]]
) -> str:
    """One validation error as a line that a user can act on."""
    location = problem["loc"]
    if location and location[-1] in _KINDS:
        location = location[:-1]
    steps = [str(step) for step in location]
    key = ".".join(steps)
    line = _line_of(node, location)
    place = f"{where}{f':{line}' if line else ''}"
    if any(steps[: len(other)] == list(other) for other in changed):
        place = "--set"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
        return f"{place}: unknown key {key!r}; the nearest known key is {near[0] if near else '(none)'!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "is missing"
    return f"{place}: {key + ': ' if key else ''}{message}"
