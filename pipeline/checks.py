"""Every mistake that can be found before a model runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa

from pipeline import tables
from pipeline.base_model import EMBEDDED, BaseModel, load_tokenizer
from pipeline.errors import InputError
from pipeline.locations import local_path
from pipeline.release import OWN_COLUMNS
from pipeline.settings import Settings
from pipeline.store import open_store
from pipeline.tables import ColumnRoles
from pipeline.task import Task
from pipeline.template import Encoder, Template
from pipeline.verbalizer import Verbalizer

_SAMPLE_ROWS = 1000
_FREE_BYTES = 200_000_000


def check_task(task: Task) -> list[str]:
    """Check a task against its files and its base model.

    Returns:
        Warnings: what works, but may not be meant.

    Raises:
        InputError: all that is wrong, told at once.
    """
    problems: list[InputError] = []
    warnings: list[str] = []
    try:
        base: BaseModel | None = task.base()
    except InputError as error:
        problems.append(error)
        base = None
    if base is not None:
        _patterns(task, base, problems, warnings)
        if base.name != EMBEDDED:
            _cloze_model(base, task.adapt.steps > 0, problems, warnings)
    _columns(task, problems)
    _files(task, problems, warnings)
    _storage(problems)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputError("\n".join(f"{i}. {problem}" for i, problem in enumerate(problems, 1)))
    return warnings


def _storage(problems: list[InputError]) -> None:
    """The store can be reached and written, and there is room on the disk that stages work on."""
    location = Settings().store_location
    here = local_path(location)
    if here is None:
        try:
            open_store(location).find("ingest", "0" * 32)
        except InputError as error:
            problems.append(error)
    directory = here or Settings().cache_path
    what, setting = ("the store", "CLOZELINE_STORE") if here else ("the copies of remote files", "CLOZELINE_CACHE")
    existing = _existing(directory)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "can't be written" if existing.is_dir() else "is no directory"
        problems.append(
            InputError(f"can't write {what}: {existing} {why}", where=str(directory), fix=f"set {setting} elsewhere")
        )
        return
    free = shutil.disk_usage(existing).free
    if free < _FREE_BYTES:
        problems.append(
            InputError(
                f"only {free / 1e6:.0f} MB are free where {what} lie{'s' if here else ''}",
                where=str(directory),
                fix=f"free some space or set {setting}",
            )
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _patterns(task: Task, base: BaseModel, problems: list[InputError], warnings: list[str]) -> None:
    """Label words and pattern lengths, against the tokenizer."""
    try:
        tokenizer = load_tokenizer(base.path)
    except InputError as error:
        problems.append(error)
        return
    longest = min(task.resolved("training")["max_length"], base.positions)
    encoder = Encoder(tokenizer, longest, task.training.truncation)
    told: set[str] = set()
    for name, annotator, _ in task.members():
        where = f"annotators, {name}" if annotator.words else "labels"
        try:
            verbalizer = Verbalizer.resolve(task.words_of(annotator), tokenizer, where=where)
        except InputError as error:
            if str(error) not in told:
                problems.append(error)
                told.add(str(error))
            continue
        fixed = encoder.fixed_length(Template.parse(annotator.pattern), verbalizer.widths[-1])
        if fixed > longest - 8:
            problems.append(
                InputError(
                    f"the pattern {annotator.pattern!r} takes {fixed} of the {longest} tokens that the model reads",
                    where=f"annotators, {name}",
                    fix="shorten it, or raise training.max_length",
                )
            )
        long_words = [word.text for word in verbalizer.words if len(word.ids) > 1]
        if len(verbalizer.widths) > 1 and "widths" not in told:
            told.add("widths")
            warnings.append(
                f"the label words {', '.join(sorted(set(long_words)))} take several tokens each: every text is read "
                f"{len(verbalizer.widths)} times, once for each number of tokens"
            )
    try:
        try:
            template = Template.parse(task.student_template)
        except InputError as error:
            raise InputError(error.problem, where="student.template", fix=error.fix) from None
        if template.has_mask:
            raise InputError("student.template has a {mask}: the student is a plain classifier", where="student")
        for column in template.columns:
            if column not in task.inputs.text:
                raise InputError(f"student.template names {column!r}, which is not among inputs.text", where="student")
    except InputError as error:
        problems.append(error)


def _cloze_model(base: BaseModel, headless: bool, problems: list[InputError], warnings: list[str]) -> None:
    """The base model loads, has its head, and is told when it can't be scored the short way."""
    from pipeline.cloze import ClozeModel

    try:
        shortcut = ClozeModel(base.path, {"device": "cpu", "dtype": "float32"}, new_head=headless).shortcut
    except InputError as error:
        problems.append(InputError(error.problem, where=f"base_model: {base.name}", fix=error.fix))
        return
    if shortcut == "positions":
        warnings.append(
            f"the masked-LM head of {base.name} can't multiply label words alone: it scores the whole vocabulary at "
            "each mask, in fp32"
        )
    elif shortcut == "none":
        warnings.append(
            f"the masked-LM head of {base.name} ({base.config.get('model_type')}) is of an unknown kind: every token "
            "goes through all of it, in fp32, which is right and several times slower"
        )


def _columns(task: Task, problems: list[InputError]) -> None:
    problems.extend(
        InputError(
            f"a release has a column {name!r} of its own",
            where="inputs.text" if name in task.inputs.text else "inputs.carry",
            fix="rename yours, or leave it out",
        )
        for name in [*task.inputs.text, *task.inputs.carry]
        if name in OWN_COLUMNS
    )
    problems.extend(
        InputError(
            f"the export for Label Studio has a field {name!r} of its own", where="inputs.text", fix="rename the column"
        )
        for name in task.inputs.text
        if name in {f"p_{label}" for label in task.labels}
    )
    if len(set(task.inputs.text)) < len(task.inputs.text):
        problems.append(InputError("a text column is named twice", where="inputs.text", fix="name each once"))
    both = set(task.inputs.text) & set(task.inputs.carry)
    if both:
        problems.append(
            InputError(f"{sorted(both)[0]!r} is a text column and carried along", where="inputs", fix="drop one")
        )


def _files(task: Task, problems: list[InputError], warnings: list[str]) -> None:
    """Readability, columns, labels."""
    inputs = task.inputs
    try:
        files = task.unlabelled_files()
    except InputError as error:
        problems.append(error)
        files = []
    if files and inputs.on_bad_files == "skip":
        skipped = [file.name for file in task.matched_files() if file not in files]
        warnings.extend(f"{name} can't be read as Parquet and is left out" for name in skipped)
    roles = ColumnRoles(tuple(inputs.text), inputs.id, tuple(inputs.carry))
    for file in files:
        try:
            tables.check_columns(tables.open_parquet(file), roles, str(file))
        except InputError as error:
            problems.append(error)
    if inputs.carry and files and not problems:
        _carried(inputs.carry, [*files, *_labelled_file(task)], problems)
    if files and not problems and sum(tables.open_parquet(file).metadata.num_rows for file in files) == 0:
        problems.append(InputError("the unlabelled files hold no row", where="inputs.unlabelled"))
    if files and not problems and task.base_model == EMBEDDED:
        _language(files[0], inputs.text, warnings)
    for key in ("labelled", "test"):
        given = getattr(inputs, key)
        if given is None:
            continue
        try:
            path = task.path(given)
            parquet = tables.open_parquet(path)
            tables.check_columns(parquet, ColumnRoles(tuple(inputs.text), label=inputs.label), str(path))
            if parquet.metadata.num_rows == 0:
                warnings.append(f"the {key} file holds no row: the run goes on as if there were none")
                continue
            found = tables.label_names_in(parquet, inputs.label, str(path))
            unknown = {name: row for name, row in found.items() if name not in task.labels}
            if unknown:
                told = [f"row {row} has {tables.unknown_label(name)}" for name, row in list(unknown.items())[:5]]
                problems.append(
                    InputError(
                        ", ".join(told) + (", ..." if len(unknown) > 5 else ""),
                        where=f"{path}, column {inputs.label}",
                        fix=f"the task's labels are: {', '.join(task.labels)}",
                    )
                )
            missing = [name for name in task.labels if name not in found]
            if key == "labelled" and missing:
                warnings.append(f"no labelled row has the label {', '.join(missing)}: the patterns alone must find it")
        except InputError as error:
            problems.append(error)
    if inputs.labelled is None:
        used = "teach the first generation as they are" if task.ipet.generations else "are used as they are"
        warnings.append(f"no labelled rows: the annotators {used} (zero-shot)")


def _labelled_file(task: Task) -> list[Path]:
    """The labelled file, if there is one; what is wrong with it is told elsewhere."""
    if task.inputs.labelled is None:
        return []
    try:
        path = task.path(task.inputs.labelled)
    except InputError:
        return []
    return [path] if path.is_file() else []


def _carried(columns: list[str], files: list[Path], problems: list[InputError]) -> None:
    """A carried column has one type in all files, and one that a release can hold."""
    from datasets import Features

    first: dict[str, tuple[pa.DataType, Path]] = {}
    for file in files:
        schema = tables.open_parquet(file).schema_arrow
        for name in columns:
            if name not in schema.names:
                continue
            kind = tables.plain_type(schema.field(name).type)
            if name not in first:
                first[name] = (kind, file)
                try:
                    Features.from_arrow_schema(pa.schema([(name, kind)]))
                except (ValueError, NotImplementedError) as error:
                    problems.append(
                        InputError(f"can't carry the column {name!r} ({kind}) along: {error}", where=str(file))
                    )
            elif kind != first[name][0]:
                problems.append(
                    InputError(
                        f"the column {name!r} holds {kind} here and {first[name][0]} in {first[name][1].name}",
                        where=str(file),
                        fix="write it with one type in all files, or leave it out of inputs.carry",
                    )
                )


def _language(file: Path, columns: list[str], warnings: list[str]) -> None:
    """The embedded model reads English in lower case; say so when the text looks like something else."""
    batch = tables.first_rows(tables.open_parquet(file), columns, str(file), _SAMPLE_ROWS)
    if batch is None:
        return
    text = "".join(str(value) for column in batch.columns for value in column.to_pylist() if value)
    foreign = sum(not char.isascii() and char.isalpha() for char in text)
    if foreign > 0.02 * max(len(text), 1):
        warnings.append(
            f"{100 * foreign / len(text):.0f} % of the characters are letters outside English, and the embedded model "
            "reads English alone; name a base_model for your language"
        )
