"""The page that --report writes, read back by html.parser: one file that loads nothing, in which
every text is escaped and every thumbnail is of the image that it stands for."""

import base64
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import OOD, png_that_claims, set_info, write_image
from PIL import Image

from lhact import imagenet
from lhact.evaluation.metrics import METRICS
from lhact.evaluation.predictions import Predictions
from lhact.evaluation.results import About, MethodResult, Result, Row
from lhact.evaluation.score import MethodScores
from lhact.published import Numbers
from lhact.reporting import beside
from lhact.reporting.page import Parts, most_wrong, page
from lhact.reporting.page_style import SCRIPT, STYLE
from lhact.reporting.thumbnails import NoThumbnail, Place, thumbnail

VOID = {"meta", "img", "br"}
TAGS = """html head title style body header main section nav div h1 h2 h3 h4 p ul li a table caption
span thead tbody tr th td button strong details summary figure figcaption b pre code dl dt dd"""
KNOWN = VOID | set(TAGS.split())
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&lt;"
TURNED = "gpj.\u202e<b>a</b>"


class Read(HTMLParser):
    """The elements of a page in order, each with its attributes and the text in it; that they nest
    is asserted on the way."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def named(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]

    def text(self):
        return self.named("html")[0][1]


# A page made of given parts


def row(dataset, fpr95, auroc, tied=0.0, published=None):
    metrics = {**dict.fromkeys(METRICS, 50.0), "fpr95": fpr95, "auroc": auroc}
    return Row(dataset, 3, metrics, 0.5, tied, published)


def page_of(methods, sets, about=None, **changes):
    """The scores of each image are 0, 1, 2, ... in the order of the paths."""
    result = Result(about or About("imagenet", "own", sets["id"]), tuple(methods))
    scores = {name: np.arange(part.images, dtype=np.float32) for name, part in sets.items()}
    classes = {name: np.arange(part.images) % 5 for name, part in sets.items()}
    halves = {name: values * 0 + np.float32(0.5) for name, values in scores.items()}
    parts = Parts(
        command="python eval.py",
        metrics=("fpr95", "auroc"),
        remarks=(),
        sets=sets,
        places={name: Place(None, "no folder") for name in sets},
        predictions=Predictions(classes, halves, scores, (scores,) * len(methods)),
    )
    scored = [MethodScores(None, scores) for _ in methods]
    return page(result, scored, dataclasses.replace(parts, **changes))


def hostile_page(name, folder):
    published = Numbers(1.0, 2.0, name)
    methods = [
        MethodResult(f"{name} {i}", {name: i}, (row(name, i, i, published=published),))
        for i in (1, 2)
    ]
    write_image(folder / "real.png").rename(folder / name.replace("/", "-"))
    other = set_info([name.replace("/", "-"), f"gone {name}"])
    named = {"arch": name, "checkpoint": name, "settings": {name: name}}
    network = dataclasses.replace(other.network, **named)
    fields = {"network": network, "precision": name, "device": name, "fingerprint": name}
    info = dataclasses.replace(other, labels=(0, 1), versions={name: name}, **fields)
    return page_of(
        methods,
        {"id": info, name: other},
        About(name, name, info, findings=(name,), selected_on=name),
        command=name,
        remarks=(name,),
        places={"id": Place(folder), name: Place(None, name)},
        class_names=[name] * 5,
        pictures=[(name, SVG)],
    )


@pytest.mark.parametrize("name", [HOSTILE, TURNED], ids=["script", "bidi"])
def test_every_text_is_escaped(tmp_path, name):
    content = hostile_page(name, tmp_path)
    read = Read(content)
    assert all(character.isprintable() for character in content.replace("\n", ""))
    scripts = read.named("script")
    assert [text for _, text in scripts] == [SCRIPT]
    assert {tag for tag, _, _ in read.elements} - KNOWN == {"script"}
    assert not [a for _, attributes, _ in read.elements for a in attributes if a.startswith("on")]
    places = ("title", "h1", "li", "h3", "h4", "figcaption", "code", "dt", "dd", "th", "td")
    shown = name if name.isprintable() else ascii(name)[1:-1]
    lines = {tag: " ".join(text for _, text in read.named(tag)) for tag in places}
    missing = [tag for tag, text in lines.items() if shown not in text]
    assert missing == []
    assert f"settings chosen on {shown}, not on what is tested" in lines["li"]
    alternatives = [attributes["alt"] for attributes, _ in read.named("img")]
    assert alternatives == [shown, f"ID image {shown.replace('/', '-')}"]


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    read = Read(hostile_page(HOSTILE, tmp_path))
    links = {"src", "href", "srcset", "data", "poster", "action"}
    loaded = [a[name] for _, a, _ in read.elements for name in links & a.keys()]
    assert len(loaded) > 4
    assert all(place.startswith(("data:image/", "#")) for place in loaded)
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    (policy,) = [a["content"] for a, _ in read.named("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for kind, content in (("style", STYLE), ("script", SCRIPT)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"; {kind}-src 'sha256-{digest}';" in policy
        assert [text for _, text in read.named(kind)] == [content]


def plain(**changes):
    ours = (
        row("SUN", 30.0, 80.0, published=Numbers(28.5, 81.0, "Table 6")),
        row("average", 40, 85),
    )
    methods = [
        MethodResult("lhact", {"order": 2}, ours),
        MethodResult("react", {}, (row("SUN", 20.0, 79.999), row("average", 50.0, 95.0))),
        MethodResult("energy", {}, (row("SUN", 0.0, 99.0, tied=100.0), row("average", 0.0, 99.0))),
    ]
    sets = {"id": set_info(["a.jpg", "b.jpg"]), "SUN": set_info(["c.jpg"])}
    return page_of(methods, sets, **changes)


def test_structure_for_who_reads_it_by_keyboard_or_ear():
    read = Read(plain())
    assert read.named("html")[0][0] == {"lang": "en"}
    levels = [int(tag[1]) for tag, _, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes, _ in read.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [a["href"] for a, _ in read.named("a")]
    assert links == [f"#{name}" for name in ids]
    assert all(a.get("aria-labelledby", ids[0]) in ids for _, a, _ in read.elements)
    boxes = [a for a, _ in read.named("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(read.named("table")) > 0
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in boxes)


def tables(content):
    """Of each table: its columns as (number, title, order at first), and its rows as cells, each
    (value to sort by, text)."""
    found = []
    for tag, attributes, text in Read(content).elements:
        if tag == "table":
            found.append(([], []))
        elif tag == "tr":
            cells = []
        elif tag == "th" and "data-column" in attributes:
            column = int(attributes["data-column"])
        elif tag == "button":
            assert attributes["type"] == "button"
            found[-1][0].append((column, text, attributes["data-first"]))
        elif "data-value" in attributes:
            cells.append((attributes["data-value"], text))
            if len(cells) == 1:
                found[-1][1].append(cells)
    return found


def test_tables_can_be_sorted_by_every_column():
    for columns, rows in tables(plain()):
        assert [number for number, _, _ in columns] == list(range(len(columns)))
        assert rows
        assert {len(cells) for cells in rows} == {len(columns)}
        for number, title, order in columns:
            best_is_high = title.startswith(("AUROC", "AUPR", "images", "threshold"))
            assert order == ("descending" if best_is_high else "ascending")
            if title.startswith(("FPR95", "AU")):
                sorted_by, shown = ([float(cells[number][i]) for cells in rows] for i in (0, 1))
                assert sorted_by == pytest.approx(shown, abs=0.005)


def test_numbers_stand_where_they_belong_and_the_best_is_bold():
    content = plain()
    (columns, rows), (beside, published), *_ = tables(content)
    assert [title for _, title, _ in columns] == ["method", *["FPR95", "AUROC"] * 2]
    assert [[text for _, text in cells] for cells in rows] == [
        ["lhact", "30.00", "80.00", "40.00", "85.00"],
        ["react", "20.00", "80.00", "50.00", "95.00"],
        ["energy", "0.00", "99.00", "0.00", "99.00"],
    ]
    bold = [text for _, text in Read(content).named("strong")]
    # Tied scores have an FPR95 of 0 that is worth nothing; of two that look the same both are best.
    assert bold == ["80.00", "40.00", "20.00", "80.00", "95.00"]
    shown = ["FPR95", "FPR95 published", "FPR95 difference"]
    assert [title for _, title, _ in beside][:5] == ["method", "set", *shown]
    numbers = ["30.00", "28.50", "+1.50", "80.00", "81.00", "-1.00"]
    assert [[text for _, text in cells] for cells in published] == [
        ["lhact", "SUN", *numbers, "Table 6"]
    ]


def test_pictures_are_embedded_or_the_extra_is_named():
    assert "pip install 'lhact[plots]'" in Read(plain()).text()
    png = b"\x89PNG\r\n\x1a\n and what follows"
    read = Read(plain(pictures=[("scores", png), ("curve", SVG)]))
    assert "lhact[plots]" not in read.text()
    assert [(a["alt"], a["src"]) for a, _ in read.named("img")] == [
        (name, f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
        for name, kind, data in (("scores", "png", png), ("curve", "svg+xml", SVG))
    ]


def test_colours_can_be_read_in_light_and_dark():
    """Contrast of WCAG 2.2, AA: 4.5 for text."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    blocks = re.findall(r":root \{([^}]*)\}", STYLE)
    schemes = [dict(re.findall(r"--([a-z-]+): (#\w{6});", block)) for block in blocks]
    assert len(schemes) == 2
    for colours in schemes:
        pairs = [(f, b) for f in ("fore", "quiet", "link") for b in ("back", "soft")]
        for text, back in [*pairs, ("warn", "warn-back")]:
            light = sorted(luminance(colours[name]) for name in (text, back))
            assert (light[1] + 0.05) / (light[0] + 0.05) >= 4.5, (text, back)


@pytest.mark.parametrize("sets", [4, 30], ids=lambda sets: f"{sets} OOD sets")
def test_the_page_is_small_at_the_size_of_imagenet(tmp_path, sets):
    """Also where every picture is noise, which a JPEG cannot make small."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    names = [f"set{i}" for i in range(sets)]
    rows = tuple(row(name, 1, 1) for name in names)
    methods = [MethodResult(method, {"order": 1}, rows) for method in ("lhact", "energy")]
    infos = {"id": set_info(["noise.png"] * 50_000, labels=(4,) * 50_000)}
    infos |= {name: set_info(["noise.png"] * 10_000) for name in names}
    content = page_of(methods, infos, places={name: Place(tmp_path) for name in infos})
    images = Read(content).named("img")
    assert 2 * (sets + 1) <= len(images) <= 160
    assert len(content) < 4_000_000  # 1 MB is left for the pictures
    assert len(images) == 2 * 8 * 5 or sets > 4


# A page of a cache and its images


@pytest.fixture
def images(tmp_path):
    """Where images lie for caches of `write_cache`, each of one colour; see `colour`."""
    folders = {name: f"ood_data/{name}/images" for name in OOD[:3]}
    folders |= {"id": "id_data/ILSVRC-2012/val", "Textures": "ood_data/dtd/images"}
    counts = {"id": 61, "iNaturalist": 30, "SUN": 25, "Places": 20, "Textures": 15}
    for name, count in counts.items():
        for i in range(count):
            path = tmp_path / "datasets" / folders[name] / name.lower() / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (500, 250), colour(name, i)).save(path, "PNG")
    return tmp_path / "datasets"


def colour(dataset, i):
    return (60 * ("id", *OOD).index(dataset), 4 * i, 255 - 4 * i)


@pytest.fixture
def run(tmp_path, write_cache, small_sets, small_head, images, run_eval, monkeypatch):
    """run(*arguments) -> (status, the page, stderr); `run.folder` is the cache."""
    folder = tmp_path / "cache" / "imagenet" / "resnet50"
    write_cache(folder, small_sets, *small_head)

    # The pictures have tests of their own, and take seconds.
    monkeypatch.setattr(beside, "_pictures", lambda *_: ())

    def run(*arguments):
        given = ("--cache-dir", folder.parents[1], "--data-root", images)
        report = tmp_path / "page.html"
        status, _, err = run_eval(*given, "--report", report, *arguments)
        return status, report.read_text("utf-8") if report.is_file() else None, err

    run.folder = folder
    return run


def figures(content):
    """(heading of the method, heading of the set, caption, image or None) of each wrong image."""
    found, headings = [], {}
    for tag, attributes, text in Read(content).elements:
        if re.fullmatch("h[1-6]", tag):
            headings[tag] = text
        elif tag == "figure" and "h4" in headings:
            found.append([headings["h3"], headings["h4"], text, None])
        elif tag == "img" and "svg" not in attributes["src"][:20]:
            kind, _, data = attributes["src"].partition(",")
            assert kind == "data:image/jpeg;base64"
            found[-1][3] = Image.open(io.BytesIO(base64.b64decode(data)))
    return found


def expected_wrong(scores_dir, method, dataset):
    """(number, line) of the eight most confidently wrong images by what --scores-dir holds."""
    with open(scores_dir / method / f"{dataset}.csv", newline="") as file:
        lines = list(enumerate(csv.DictReader(file)))
    sign = 1 if dataset == "id" else -1
    return sorted(lines, key=lambda pair: (sign * float(pair[1]["score"]), pair[0]))[:8]


def test_wrong_images_are_the_right_ones(run, tmp_path):
    status, content, _ = run("--scores-dir", tmp_path / "scores", "--methods", "react", "msp")
    assert status == 0
    found = figures(content)
    wanted = [
        (method, name, i, line)
        for method in ("react", "energy")  # the first, and the energy that is scored along
        for name in (*OOD, "id")
        for i, line in expected_wrong(tmp_path / "scores", method, name)
    ]
    assert len(found) == len(wanted) == 2 * 5 * 8
    for (by, heading, caption, picture), (method, name, i, line) in zip(found, wanted, strict=True):
        assert by == f"By {method}"
        assert heading == ("ID: lowest scores" if name == "id" else f"{name}: highest scores")
        assert caption.endswith(f"{name.lower()}/{i:04}.jpg")
        assert caption.split()[0] == f"{float(line['score']):#.4g}"
        assert f"class {line['predicted_class']} ({float(line['probability']):.0%})" in caption
        assert picture.size == (176, 88)
        np.testing.assert_allclose(np.asarray(picture)[44, 88], colour(name, i), atol=4)


def test_the_first_of_equal_scores_comes_first():
    scores = np.float32([2, 3, 2, 3, 1, 1])
    assert most_wrong(scores, "SUN", 3) == [1, 3, 0]
    assert most_wrong(scores, "id", 3) == [4, 5, 0]


def test_missing_and_broken_files_are_noted_and_no_failure(run, images, tmp_path):
    run("--scores-dir", tmp_path / "scores")
    wrong = expected_wrong(tmp_path / "scores", "lhact", "SUN")
    names = [f"{number:04}.jpg" for number, _ in wrong]
    folder = images / "ood_data" / "SUN" / "images" / "sun"
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(b"no image")
    (folder / names[2]).write_bytes(png_that_claims(60_000, 60_000))
    status, content, err = run()
    assert status == 0
    assert "SUN" not in err
    shown = [f for f in figures(content) if f[:2] == ["By lhact", "SUN: highest scores"]]
    assert [picture is None for *_, picture in shown] == [True] * 3 + [False] * 5
    assert shown[0][2].startswith("the file is gone")
    assert shown[1][2].startswith(reason := "the file cannot be read as an image")
    assert shown[2][2].startswith(reason)
    assert [caption.split("/")[-1] for _, _, caption, _ in shown] == names


def notes(content):
    lines = [text for _, text in Read(content).named("li")]
    return {line.partition(":")[0]: line for line in lines if line.startswith(("ID:", *OOD))}


def test_a_note_where_the_files_may_be_others(run, images):
    """The sidecar of one set holds what its files are, those of the others do not."""
    _, content, _ = run()
    assert set(notes(content)) == {"ID", *OOD}
    assert "a picture may be of another image" in notes(content)["SUN"]
    folder = images / "ood_data" / "SUN" / "images"
    lines = [f"{p.relative_to(folder)}\0{p.stat().st_size}\n" for p in sorted(folder.glob("*/*"))]
    sidecar = json.loads((run.folder / "SUN.json").read_text())
    sidecar["fingerprint"] = hashlib.sha256("".join(lines).encode()).hexdigest()
    (run.folder / "SUN.json").write_text(json.dumps(sidecar))
    _, content, _ = run()
    assert set(notes(content)) == {"ID", *OOD} - {"SUN"}
    (folder / "sun" / "0000.jpg").unlink()
    _, content, _ = run()
    assert "SUN" in notes(content)


def test_a_note_where_no_folder_is_known(run, tmp_path):
    for suffix in ("npy", "json"):
        (run.folder / f"SUN.{suffix}").rename(run.folder / f"birds.{suffix}")
    status, content, _ = run("--data-root", tmp_path / "nowhere")
    assert status == 0
    assert all(picture is None for *_, picture in figures(content))
    assert f"there is no {tmp_path}/nowhere/ood_data/Places/images" in notes(content)["Places"]
    assert "these images are no set of the benchmark" in Read(content).text()


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/secret.png", "\0.png"])
def test_no_file_outside_of_the_folder_is_shown(tmp_path, path):
    """A cache may come from somebody else, and a page goes to others."""
    write_image(tmp_path / "secret.png")
    (tmp_path / "images" / "a").mkdir(parents=True)
    path = path.replace("/secret", f"{tmp_path}/secret") if path[0] == "/" else path
    with pytest.raises(NoThumbnail, match=r"leads out of the folder|is gone"):
        thumbnail(tmp_path / "images", path)


def test_metadata_does_not_come_along(tmp_path):
    picture = Image.new("RGB", (50, 40))
    picture.save(tmp_path / "a.jpg", comment=b"x" * 60_000, icc_profile=b"y" * 60_000)
    assert (tmp_path / "a.jpg").stat().st_size > 120_000
    assert len(thumbnail(tmp_path, "a.jpg")) < 2000


def test_the_page_says_how_it_was_made(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", "--name", "it's"])
    status, content, _ = run("--sweep", "lhact.order=1,2")
    assert status == 0
    read = Read(content)
    [(_, command)] = read.named("pre")
    assert command.startswith(f"python eval.py --device cpu --cache-dir {run.folder.parents[1]} ")
    assert command.endswith("--sweep lhact.order=1,2")
    assert "it's" not in command
    facts = dict(zip(*([t for _, t in read.named(tag)] for tag in ("dt", "dd")), strict=True))
    assert facts["arch"] == "resnet18"
    assert facts["interpolation"] == "bilinear"
    assert re.fullmatch(r"low \S+, low_percentile 33.7, .*order 1", facts["lhact order=1"])
    assert "percentiles of the calibration activations (40 images)" in read.text()
    versions = {cells[0][1]: cells for cells in tables(content)[-1][1]}
    assert versions["numpy"][1][1] == versions["numpy"][2][1] == np.__version__
    assert run("--sweep", "lhact.order=1,2")[1] == content


@pytest.mark.parametrize("change", ["none", "labels", "folder", "classes"])
def test_classes_have_names_where_they_are_those_of_imagenet(
    tmp_path, write_cache, run_eval, change
):
    rows = np.eye(4, dtype=np.float32)
    wnids = imagenet.wnids()
    weight = np.zeros((1000 if change != "classes" else 999, 4), np.float32)
    weight[[0, 1, 24, 937], range(4)] = 5
    labels = [0, 1, 24, 937]
    paths = [f"{wnids[label]}/a.jpg" for label in labels]
    if change == "folder":
        paths[3] = f"{wnids[0]}/b.jpg"
    known = {"id": labels} if change != "labels" else None
    place, sets = tmp_path / "cache" / "imagenet" / "resnet50", {"id": rows, "SUN": rows}
    write_cache(place, sets, weight, np.zeros(len(weight)), labels=known, paths=paths)
    given = ("--cache-dir", tmp_path / "cache", "--report", tmp_path / "p.html")
    assert run_eval(*given, "--methods", "msp")[0] == 0
    captions = " ".join(f[2] for f in figures((tmp_path / "p.html").read_text()))
    assert ("goldfish (" in captions) == (change == "none") != ("class 1 (" in captions)


def test_intervals_have_a_table_of_their_own(run, tmp_path):
    """With the ends that the JSON has; none for a set that is too small."""
    output = tmp_path / "result.json"
    given = ("--methods", "lhact", "energy", "--bootstrap", 100, "--format", "json")
    status, content, _ = run(*given, "--output", output)
    assert status == 0
    assert "95 % intervals of 100 resamples" in content
    rows = {(r["method"], r["dataset"]): r for r in json.loads(output.read_text())["results"]}
    ours, other = rows["lhact", "SUN"], rows["energy", "SUN"]
    low, high = ours["fpr95_ci"]
    assert f">{ours['fpr95']:.2f} ({low:.2f} to {high:.2f})<" in content
    low, high = other["auroc_difference_ci"]
    assert f">{other['auroc_difference']:.2f} ({low:.2f} to {high:.2f})<" in content
    assert rows["lhact", "Textures"]["fpr95_ci"] is None  # 15 images
    assert run(*given[:3])[1].count("resamples") == 0
