"""A result and its scores in, one HTML page out that needs no other file: tables, pictures, and the
images that are most confidently wrong.

Nothing is loaded from elsewhere, every text from outside is escaped, and the page is complete
without its script, which only sorts tables.
"""

import base64
import hashlib
import html
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import lhact
from lhact.evaluation.metrics import METRICS
from lhact.evaluation.predictions import Predictions
from lhact.evaluation.results import AVERAGE, MethodResult, Result
from lhact.evaluation.score import MethodScores
from lhact.evaluation.uncertainty import RESAMPLED, Uncertainty
from lhact.methods.compose import DEFAULT_SCORE
from lhact.records import SetInfo
from lhact.reporting.lines import TITLES, labels, warnings
from lhact.reporting.markup import Cell, facts, image, list_of, number, table, text
from lhact.reporting.page_style import SCRIPT, STYLE
from lhact.reporting.thumbnails import NoThumbnail, Place, thumbnail

# Thumbnails of each set, and of the whole page; one takes some 8 kB.
MOST_PER_SET, MOST_THUMBNAILS = 8, 160
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Parts:
    """What stands on the page beside the result.

    command: the one that was given. metrics: of the first table. remarks: what a reader must know.
    sets: by name, as cached. places: of those that were scored, where their images lie.
    class_names: of the network's classes in order; empty where they are not known. pictures: (name,
    SVG or PNG).
    """

    command: str
    metrics: Sequence[str]
    remarks: Sequence[str]
    sets: Mapping[str, SetInfo]
    places: Mapping[str, Place]
    predictions: Predictions
    class_names: Sequence[str] = ()
    pictures: Sequence[tuple[str, bytes]] = ()


def page(result: Result, scored: Sequence[MethodScores], parts: Parts) -> str:
    """The page as HTML. scored: for each method in the order of the result."""
    about, network = result.about, result.about.info.network
    title = text(f"{about.benchmark} / {about.name}: out-of-distribution detection")
    weights = network.weights or network.checkpoint or "unknown weights"
    accuracy = about.info.accuracy
    top1 = "top-1 unknown (no labels)" if accuracy is None else f"top-1 {accuracy:.2f} %"
    subtitle = (
        f"{network.arch or 'unknown network'} {weights}, {about.info.precision}. ID: "
        f"{about.info.images:,} images, {top1}."
    )
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(STYLE)}",
            f"script-src {_hash(SCRIPT)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    sections = {
        "results": ("Results", _results(result, parts)),
        "pictures": ("Pictures", _pictures(parts.pictures)),
        "wrong": ("Most confidently wrong images", _wrong(result, scored, parts)),
        "made": ("How this page was made", _made(result, parts)),
    }
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, (name, _) in sections.items())
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{name}</h2>\n{content}\n</section>\n'
        for key, (name, content) in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{text(about.benchmark)} / {text(about.name)}: out-of-distribution detection</h1>
<p class="lead">{text(subtitle)}</p>
{_notices(result, parts)}
<nav aria-label="On this page"><ul>{links}</ul></nav>
</header>
<main>
{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _hash(content: str) -> str:
    """What lets exactly this inline script or style be used, and none that a name smuggled in."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _notices(result: Result, parts: Parts) -> str:
    selected = result.about.selected_on
    lines = [*parts.remarks]
    if selected:
        lines.append(f"settings chosen on {selected}, not on what is tested")
    return list_of(warnings(result), "findings") + list_of(lines, "remarks")


# ---- tables ----


def _first(metric: str) -> str:
    """Which value is the best, and comes first."""
    return "lowest" if metric.startswith("fpr") else "highest"


def _results(result: Result, parts: Parts) -> str:
    named = list(zip(labels(result), result.all_methods, strict=True))
    sentences = ["The title of a column sorts by it."]
    if len(named) > 1:
        sentences.append("In bold the best of each column, without methods whose scores are tied.")
    if len({method.method for _, method in named}) < len(named):
        sentences.append("The best of a method's settings is chosen on these very test sets.")
    return "\n".join(
        (
            main_table(named, parts.metrics),
            _interval_table(result, named),
            f"<p>{' '.join(sentences)}</p>",
            _published_table(named),
            f"<details><summary>All metrics and thresholds</summary>{_long_table(named)}</details>",
        )
    )


def main_table(named: Sequence[tuple[str, MethodResult]], metrics: Sequence[str]) -> str:
    """Methods by sets; the best of each column stands out. named: a label for each method."""
    columns = [(row, metric) for row in range(len(named[0][1].rows)) for metric in metrics]
    best = {}
    for row, metric in columns:
        values = [m.rows[row].metrics[metric] for _, m in named if not m.tied]
        better = min if _first(metric) == "lowest" else max
        best[row, metric] = better(values) if values and len(named) > 1 else None
    rows = [
        (
            label,
            [
                number(
                    value := method.rows[row].metrics[metric],
                    best=value == best[row, metric] and not method.tied,
                )
                for row, metric in columns
            ],
        )
        for label, method in named
    ]
    groups = [
        (row.dataset if row.dataset.endswith(AVERAGE) else f"{row.dataset} ({row.images:,})")
        for row in named[0][1].rows
    ]
    return table(
        f"{' and '.join(TITLES[metric] for metric in metrics)} in %, by OOD set (images)",
        [("method", "words"), *((TITLES[metric], _first(metric)) for _, metric in columns)],
        rows,
        [(group, len(metrics)) for group in groups],
    )


def _published_table(named: Sequence[tuple[str, MethodResult]]) -> str:
    rows = []
    for label, method in named:
        for row in method.rows:
            if row.published is not None:
                cells: list[Cell] = [Cell(row.dataset, row.dataset)]
                for metric in ("fpr95", "auroc"):
                    ours, theirs = row.metrics[metric], vars(row.published)[metric]
                    cells += [number(ours), number(theirs), number(ours - theirs, "+.2f")]
                rows.append((label, [*cells, Cell(row.published.source, row.published.source)]))
    if not rows:
        return ""
    columns = [("method", "words"), ("set", "words")]
    for metric in ("fpr95", "auroc"):
        title = TITLES[metric]
        names = (title, f"{title} published", f"{title} difference")
        columns += [(name, _first(metric)) for name in names]
    columns.append(("source", "words"))
    return "<h3>Beside the published numbers</h3>" + table(
        "Ours, the published numbers, and ours minus published, in % and points", columns, rows
    )


def _long_table(named: Sequence[tuple[str, MethodResult]]) -> str:
    rows = [
        (
            label,
            [
                Cell(row.dataset, row.dataset),
                number(row.images, ","),
                *(number(row.metrics[metric]) for metric in METRICS),
                number(row.threshold, ".6g"),
            ],
        )
        for label, method in named
        for row in method.rows
    ]
    columns = [
        ("method", "words"),
        ("set", "words"),
        ("images", "highest"),
        *((TITLES[metric], _first(metric)) for metric in METRICS),
        ("threshold", "highest"),
    ]
    return table(
        "All metrics in %, and the threshold: the score that keeps 95 % of ID", columns, rows
    )


def _interval_table(result: Result, named: Sequence[tuple[str, MethodResult]]) -> str:
    """Nothing without a bootstrap."""
    if result.bootstrap is None:
        return ""
    rows: list[tuple[str, list[Cell]]] = []
    for label, method in named:
        for row in method.rows:
            cells = [Cell(row.dataset, row.dataset)]
            sure = row.uncertainty or Uncertainty({}, {}, {})
            for metric in RESAMPLED:
                for ends, value in (
                    (sure.intervals, row.metrics[metric]),
                    (sure.difference_intervals, sure.differences.get(metric, math.inf)),
                ):
                    low, high = ends.get(metric, (math.nan, math.nan))
                    known = f"{value:.2f} ({low:.2f} to {high:.2f})"
                    cells.append(Cell(known if metric in ends else "", value))
            rows.append((label, cells))
    columns = [("method", "words"), ("set", "words")]
    for metric in RESAMPLED:
        title = TITLES[metric]
        columns += [(title, _first(metric)), (f"{title}, less {named[0][0]}", _first(metric))]
    caption = (
        f"95 % intervals of {result.bootstrap.resamples:,} resamples of the images, the same for "
        "every method"
    )
    return table(caption, columns, rows)


# ---- pictures ----


def _pictures(pictures: Sequence[tuple[str, bytes]]) -> str:
    if not pictures:
        return (
            "<p>None were made. They need matplotlib: <code>pip install 'lhact[plots]'</code></p>"
        )
    return "\n".join(
        f"<figure>{image(content, 'png' if content.startswith(PNG) else 'svg+xml', name)}"
        f"<figcaption>{text(name)}</figcaption></figure>"
        for name, content in pictures
    )


def most_wrong(scores: np.ndarray, dataset: str, count: int) -> list[int]:
    """The rows that are most confidently wrong: of the ID set those with the lowest scores, of any
    other set those with the highest; the first of equal ones first.

    scores: (images,), higher = more in-distribution.
    """
    order = np.argsort(scores if dataset == "id" else -scores, kind="stable")
    return order[:count].tolist()


def _wrong(result: Result, scored: Sequence[MethodScores], parts: Parts) -> str:
    """The images of the first method, and of plain energy where that is another."""
    named = list(zip(labels(result), result.all_methods, scored, strict=True))
    chosen = named[:1] + [part for part in named[1:] if part[1].method == DEFAULT_SCORE][:1]
    sets = list(scored[0].scores)
    sets = [*(name for name in sets if name != "id"), "id"]
    count = max(1, min(MOST_PER_SET, MOST_THUMBNAILS // (len(chosen) * len(sets))))
    blocks = [
        "<p>OOD images that look most in-distribution by their score, and ID images that look "
        "least so. Below each stand its score, the class that the network predicts without a "
        "rectifier, with its softmax probability, and its name in the cache. Thumbnails show whole "
        "images, not the crop that the network sees.</p>"
    ]
    notes = {_shown_name(name): parts.places[name].note for name in sets}
    blocks.append(list_of((f"{name}: {note}" for name, note in notes.items() if note), "remarks"))
    for position, (label, method, scores) in enumerate(chosen):
        threshold = method.average.threshold
        inner = "".join(
            _wrong_set(name, scores.scores[name], count, parts, threshold) for name in sets
        )
        opened = " open" if position == 0 else ""
        blocks.append(
            f"<details{opened}><summary><h3>By {text(label)}</h3></summary>"
            f"<p>The score that keeps 95 % of ID is {threshold:.6g}.</p>{inner}</details>"
        )
    return "\n".join(blocks)


def _wrong_set(dataset: str, scores: np.ndarray, count: int, parts: Parts, threshold: float) -> str:
    rows = most_wrong(scores, dataset, count)
    which = "lowest" if dataset == "id" else "highest"
    figures = "".join(_figure(dataset, row, float(scores[row]), parts) for row in rows)
    title = text(_shown_name(dataset))
    return f'<h4>{title}: {which} scores</h4><div class="wrong">{figures}</div>'


def _shown_name(dataset: str) -> str:
    return "ID" if dataset == "id" else dataset


def _figure(dataset: str, row: int, score: float, parts: Parts) -> str:
    info, predictions = parts.sets[dataset], parts.predictions
    path, folder = info.paths[row], parts.places[dataset].folder
    if folder is None:
        picture = ""
    else:
        try:
            picture = image(thumbnail(folder, path), "jpeg", f"{_shown_name(dataset)} image {path}")
        except NoThumbnail as error:
            picture = f'<p class="gone">{text(error)}</p>'
    predicted = _class(int(predictions.classes[dataset][row]), parts)
    label = f"<br>label: {_class(info.labels[row], parts)}" if info.labels else ""
    return (
        f"<figure>{picture}<figcaption><b>{score:#.4g}</b> {predicted} "
        f"({predictions.probability[dataset][row]:.0%}){label}<br>"
        f'<span class="path">{text(path)}</span></figcaption></figure>'
    )


def _class(number: int, parts: Parts) -> str:
    return text(parts.class_names[number] if parts.class_names else f"class {number}")


# ---- how it was made ----


def _made(result: Result, parts: Parts) -> str:
    info = result.about.info
    now = {
        "lhact": lhact.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    names = dict.fromkeys([*info.versions, *now])
    parameters = [
        (label, ", ".join(f"{key} {value:.6g}" for key, value in method.parameters.items()) or "-")
        for label, method in zip(labels(result), result.all_methods, strict=True)
    ]
    network = {key: value for key, value in info.network.to_json().items() if value is not None}
    preprocessing = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in info.preprocessing.to_json().items()
    }
    sets = [
        (
            name,
            [
                number(part.images, ","),
                Cell("yes" if part.labels else "no", "yes" if part.labels else "no"),
                Cell(part.fingerprint[:16], part.fingerprint),
            ],
        )
        for name, part in parts.sets.items()
    ]
    versions = [
        (
            name,
            [
                Cell(str(found.get(name, "-")), str(found.get(name, "")))
                for found in (info.versions, now)
            ],
        )
        for name in names
    ]
    word = "words"
    return "\n".join(
        (
            f"<pre><code>{text(parts.command)}</code></pre>",
            "<h3>Parameters</h3>",
            facts(dict(parameters)),
            "<h3>Network</h3>",
            facts({**network, "precision": info.precision, "device": info.device or "-"}),
            "<h3>Preprocessing</h3>",
            facts(preprocessing),
            "<h3>Image sets</h3>",
            table(
                "Image sets of the cache",
                [("set", word), ("images", "highest"), ("labels", word), ("fingerprint", word)],
                sets,
            ),
            "<h3>Versions</h3>",
            table(
                "Versions of libraries",
                [("library", word), ("at the extraction", word), ("at the evaluation", word)],
                versions,
            ),
        )
    )
