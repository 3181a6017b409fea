"""The dataset card and the report of a release: one Markdown and one offline HTML file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.metrics import METHODS

CARD = "README.md"
Cells = Sequence[object]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _methods(summary: Mapping[str, Any]) -> list[Cells]:
    """The rows of the table of methods on the test file."""
    rows: list[Cells] = []
    for name in METHODS if summary["test"] else ():
        found = summary["test"][name]
        if found is None:
            rows.append([name, "-", "-", "-"])
            continue
        interval = f"{_percent(found['accuracy_low'])} to {_percent(found['accuracy_high'])}"
        rows.append([name, _percent(found["accuracy"]), interval, _percent(found["macro_f1"])])
    return rows


def _generations(spec: Mapping[str, Any]) -> str:
    """How often the annotators were trained anew, and what that means for their figures; nothing without iPET."""
    count = spec["task"].get("ipet", {}).get("generations", 0)
    if not count:
        return ""
    return (
        f"The annotators are those of generation {count} of iPET, each generation trained on rows that others of the "
        "one before labelled; weights and cross-validated figures are those of generation 0."
    )


_METHOD_HEAD = ["method", "accuracy", "95 % interval", "macro-F1"]


def _shares(summary: Mapping[str, Any]) -> list[Cells]:
    total = max(sum(summary["label_counts"].values()), 1)
    return [[label, count, _percent(count / total)] for label, count in summary["label_counts"].items()]


def _diverged(summary: Mapping[str, Any]) -> list[str]:
    """Who was left out, and why."""
    diverged = summary.get("diverged", {})
    return [f"{name} was left out, since its training diverged: {why}." for name, why in diverged.items()]


def _adapted(summary: Mapping[str, Any]) -> str:
    """What adapting the base model did to the loss on texts that it never saw; nothing where it was not adapted."""
    if "adapted" not in summary:
        return ""
    curve, best = summary["adapted"]["curve"], summary["adapted"]["best"]
    first, last = curve[0], curve[best]
    return (
        f"The base model was first trained on {summary['adapted']['texts']:,} of the unlabelled texts by "
        f"masked-language modelling. On texts held out the loss went from {first['loss']:.2f} to {last['loss']:.2f}, "
        f"and the share of hidden tokens that it finds from {_percent(first['accuracy'])} to "
        f"{_percent(last['accuracy'])}, in {last['step']:,} steps."
    )


def _curve(points: Sequence[Mapping[str, float]]) -> str:
    """The held-out loss over the steps, as a drawing that needs nothing from outside."""
    width, height = 480.0, 120.0
    most = max(point["step"] for point in points) or 1
    low, high = min(point["loss"] for point in points), max(point["loss"] for point in points)
    scale = height / ((high - low) or 1)
    at = " ".join(f"{width * p['step'] / most:.1f},{height - (p['loss'] - low) * scale:.1f}" for p in points)
    return (
        f'<svg viewBox="-4 -4 {width + 8:.0f} {height + 8:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="held-out loss from {high:.2f} to {low:.2f}">'
        f'<polyline points="{at}" fill="none" stroke="currentColor" stroke-width="2"/></svg>'
    )


def _markdown(head: Cells, rows: Iterable[Cells]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def dataset_card(spec: Mapping[str, Any], summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The card of a release, with the YAML head that `datasets` and the hub read."""
    files = "".join(map(_data_files, summary["rows"]))
    total = sum(summary["rows"].values())
    size = next(
        name
        for limit, name in (
            (1_000, "n<1K"),
            (10_000, "1K<n<10K"),
            (100_000, "10K<n<100K"),
            (1_000_000, "100K<n<1M"),
            (10_000_000, "1M<n<10M"),
            (10**12, "n>10M"),
        )
        if total < limit
    )
    annotators = [
        [entry["name"], f"`{entry['pattern']}`", f"{summary['weights'][entry['name']]:.3f}"]
        for entry in spec["task"]["annotators"]
    ]
    test = (
        "There was no test file, so nothing is known of the accuracy beyond cross-validation on the labelled rows."
        if metrics["test"] is None
        else f"{metrics['test']['rows']} rows that took no part in training.\n\n"
        + _markdown(_METHOD_HEAD, _methods(summary))
        + "\n\n*best annotator* is picked by cross-validation; *oracle annotator* is the best on the test file itself, "
        "which nobody knows beforehand."
    )
    notes = "".join(f"{note}\n\n" for note in (_adapted(summary), _generations(spec)) if note)
    left_out = "".join(f"\n{line}\n" for line in _diverged(summary))
    return f"""---
pretty_name: {json.dumps(spec["name"])}
task_categories:
- text-classification
annotations_creators:
- machine-generated
- expert-generated
size_categories:
- {size}
configs:
- config_name: default
  data_files:
{files}---
# {spec["name"]}

Labels by Clozeline: {len(spec["members"])} cloze annotators ({spec["task"]["base_model"]["name"]}), blended into soft
labels, distilled into one classifier that labelled every row.

## Splits

{_markdown(["split", "rows", "what it is"], [[s, n, _SPLITS[s]] for s, n in summary["rows"].items()])}

## Labels

{_markdown(["label", "rows", "share"], _shares(summary))}

## Annotators

{_markdown(["name", "pattern", "weight"], annotators)}
{left_out}
{notes}## Accuracy

{test}

`confidence` and `probs` are the classifier's own and not calibrated; no precision is guaranteed for any row.

## Loading

```python
from datasets import load_dataset
dataset = load_dataset("path/to/this/directory")
```
"""


def _data_files(split: str) -> str:
    """A split's entry in the card's head."""
    return f"  - split: {split}\n    path: data/{split}-*.parquet\n"


def card_without(card: str, splits: Iterable[str]) -> str:
    """A release's card with a head that names some splits no more: `datasets` refuses to load what has no rows."""
    for split in splits:
        card = card.replace(_data_files(split), "", 1)
    return card


_SPLITS = {
    "review": "for people to review, most urgent first, with every annotator's vote",
    "rest": "all other rows with the classifier's label",
    "train": "the labelled rows, as given",
}


def _html_table(head: Cells, rows: Iterable[Cells]) -> str:
    def line(cells: Cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #8885; }
.note { color: #888; }
"""


def html_report(spec: Mapping[str, Any], summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The report: one file, no network, every text escaped."""
    annotators = []
    for entry in spec["task"]["annotators"]:
        name = entry["name"]
        cv = (metrics["cross_validation"] or {}).get(name)
        test = metrics["test"]["annotators"].get(name) if metrics["test"] else None
        annotators.append(
            [
                name,
                entry["pattern"],
                f"{summary['weights'][name]:.3f}",
                _percent(cv and cv["accuracy"]),
                _percent(test and test["accuracy"]),
            ]
        )
    parts = [
        f"<h1>{html.escape(spec['name'])}</h1>",
        "<h2>Rows</h2>",
        _html_table(["split", "rows", "what it is"], [[s, n, _SPLITS[s]] for s, n in summary["rows"].items()]),
        f'<p class="note">{summary["quarantined"]} rows set aside as bad, {summary["excluded_as_labelled"]} left out '
        "because their text is labelled already.</p>",
        "<h2>Labels given</h2>",
        _html_table(["label", "rows", "share"], _shares(summary)),
        "<h2>Annotators</h2>",
        _html_table(["name", "pattern", "weight", "cross-validated", "test"], annotators),
        *(f"<p>{html.escape(line)}</p>" for line in _diverged(summary)),
    ]
    if "adapted" in summary:
        parts += [f'<p class="note">{_adapted(summary)}</p>', _curve(summary["adapted"]["curve"])]
    if _generations(spec):
        parts.append(f'<p class="note">{_generations(spec)}</p>')
    if metrics["test"]:
        student = metrics["test"]["methods"]["student"]["per_label"]
        per_label = [
            [label, v["rows"], _percent(v["precision"]), _percent(v["recall"]), _percent(v["f1"])]
            for label, v in student.items()
        ]
        parts += [
            f"<h2>On the {metrics['test']['rows']} test rows</h2>",
            _html_table(_METHOD_HEAD, _methods(summary)),
            '<p class="note">The oracle annotator is the best on this very file: nobody knows it beforehand.</p>',
            "<h2>The student, label by label</h2>",
            _html_table(["label", "rows", "precision", "recall", "F1"], per_label),
        ]
    parts += [
        "<h2>Settings</h2>",
        f"<pre>{html.escape(json.dumps(spec['task'], indent=1, sort_keys=True, ensure_ascii=False))}</pre>",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(spec["name"])}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
