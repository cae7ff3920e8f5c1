"""From a cache on disk to results: scores against scalar loops, which thresholds are taken, and how
often files are read."""

import json
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import v1_like

from lhact import cache, identify
from lhact.cache import is_complete
from lhact.evaluation import results, score
from lhact.evaluation.metrics import METRICS
from lhact.methods.compose import (
    BadMethod,
    Setting,
    apply,
    known_methods,
    parse,
    parse_setting,
    variants,
)
from lhact.methods.entries import Rectifier, Score
from lhact.methods.fit import FittedMethod
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

CPU = torch.device("cpu")
OOD = ["iNaturalist", "SUN", "Places", "Textures"]
LOW, HIGH = 0.21940805315971373, 1.3520756840705868
V1 = {"arch": "resnet50", "weights": "IMAGENET1K_V1", "checkpoint": None}


def energy(row, weight, bias, rectifier=lambda value: value):
    """logsumexp(W f(z) + b), one activation at a time in float64."""
    rectified = [rectifier(float(value)) for value in row]
    logits = [
        math.fsum(w * z for w, z in zip(map(float, line), rectified, strict=True))
        for line in weight
    ]
    return math.log(
        math.fsum(math.exp(logit + float(b)) for logit, b in zip(logits, bias, strict=True))
    )


def lhact(value, low, high, order):
    """f of the paper, one activation at a time."""
    raised = max(value, low)
    return raised if raised < high else raised / math.sqrt(1 + (raised / high) ** (2 * order)) + low


@pytest.fixture
def folder(tmp_path, write_cache, small_sets, small_head):
    """A whole cache of a network that is not V1."""
    labels = {name: [i % 5 for i in range(len(small_sets[name]))] for name in ("id", "calibration")}
    return write_cache(
        tmp_path / "cache" / "imagenet" / "resnet50", small_sets, *small_head, labels=labels
    )


@pytest.fixture
def v1_folder(tmp_path, write_cache, v1_sets, v1_head):
    """A cache of the published network, by its name, the shape of its head and its activations."""
    return write_cache(tmp_path / "v1", v1_sets, *v1_head, network=V1)


@dataclass
class Scored:
    """What `scored` found: fitted methods, dataset -> scores of each, and who was left out."""

    methods: list[FittedMethod]
    scores: list[dict[str, np.ndarray]]
    left_out: list[tuple[str, str]]


def run(opened, methods, leave_out=False, **keywords):
    left_out = []
    tell = (lambda method, error: left_out.append((method.name, str(error)))) if leave_out else None
    fitted = score.fit_methods(opened, methods, CPU, tell)
    parts = score.score(opened, fitted, CPU, **keywords)
    return Scored([p.fitted for p in parts], [dict(p.scores) for p in parts], left_out)


def scored(folder, *names, settings=(), published=False, **keywords):
    methods = variants(names, [parse_setting(text) for text in settings], [], published)
    return run(cache.open_cache(folder, OOD), methods, **keywords)


def about(opened, benchmark="imagenet"):
    comparable = benchmark == "imagenet"
    perturbed = is_complete(opened.folder / "odin", "id")
    return results.About(
        benchmark=benchmark,
        name="resnet50",
        info=opened.info,
        findings=tuple(findings_of(opened.folder, benchmark)),
        comparable=comparable and identify.is_v1(opened.info.network),
        perturbation=opened.perturbed("id").info.perturbation if perturbed else None,
    )


def result_of(folder, *names, settings=(), published=True, benchmark="imagenet"):
    opened = cache.open_cache(folder, OOD)
    methods = variants(names, [parse_setting(text) for text in settings], [], published)
    parts = score.score(opened, score.fit_methods(opened, methods, CPU), CPU)
    return results.summarise(about(opened, benchmark), parts).to_json()


# Scores


@pytest.mark.parametrize(
    ("published", "settings"),
    [(True, ()), (False, ()), (True, ("lhact.order=3", "lhact.high=0.9"))],
)
def test_lhact_is_its_formula_for_every_image_in_order(
    folder, small_sets, small_head, published, settings
):
    found = scored(folder, "lhact", settings=settings, published=published)
    low, high = np.percentile(small_sets["calibration"].astype(np.float64), [33.7, 95.5])
    order = 2
    if published:
        low, high = LOW, HIGH
    if settings:
        order, high = 3, 0.9
    assert list(found.scores[0]) == ["id", *OOD]
    for dataset, values in found.scores[0].items():
        expected = [
            energy(row, *small_head, lambda value: lhact(value, low, high, order))
            for row in small_sets[dataset]
        ]
        assert values.dtype == np.float32
        # A score near 0 is a difference of logits of about 1, which float32 knows to some 1e-7
        # each.
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


def test_composition_applies_rectifiers_in_order(folder, small_sets, small_head):
    settings = ("react.high=0.8", "lhact.low=0.3", "lhact.high=0.7")
    there, back = scored(folder, "react+lhact", "lhact+react", settings=settings).scores
    rows = small_sets["SUN"]
    first = [
        energy(row, *small_head, lambda value: lhact(min(value, 0.8), 0.3, 0.7, 2)) for row in rows
    ]
    second = [
        energy(row, *small_head, lambda value: min(lhact(value, 0.3, 0.7, 2), 0.8)) for row in rows
    ]
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.01
    np.testing.assert_allclose(there["SUN"], first, rtol=1e-6)
    np.testing.assert_allclose(back["SUN"], second, rtol=1e-6)


def test_fit_sees_calibration_as_the_rectifiers_before_leave_it(folder, small_sets, small_head):
    """react+bats: mean and standard deviation are those of clipped activations."""
    found = scored(folder, "react+bats", settings=("react.high=0.8",)).scores[0]["SUN"]
    calibration = np.minimum(small_sets["calibration"].astype(np.float64), np.float32(0.8))
    mean, std = calibration.mean(axis=0), calibration.std(axis=0)
    rows = np.clip(
        np.minimum(small_sets["SUN"], np.float32(0.8)), mean - 1.05 * std, mean + 1.05 * std
    )
    np.testing.assert_allclose(found, [energy(row, *small_head) for row in rows], rtol=1e-6)


def test_a_methods_scores_do_not_depend_on_its_company(folder):
    names = ("lhact", "msp", "react", "lhact+msp", "react+lhact", "bats", "energy")
    together = scored(folder, *names)
    for name, scores in zip(names, together.scores, strict=True):
        alone = scored(folder, name)
        fitted = together.methods[names.index(name)]
        assert alone.methods[0].parameters == fitted.parameters
        for dataset, values in alone.scores[0].items():
            np.testing.assert_array_equal(scores[dataset], values)


@pytest.mark.parametrize("rows", [1, 7, 61, 10_000])
@pytest.mark.parametrize("name", [name for name in known_methods() if name != "odin"])
def test_number_of_rows_read_at_a_time_does_not_matter(folder, monkeypatch, name, rows):
    """Batch of two = two batches of one, for every entry of both registries; thresholds are the
    same to the bit."""
    opened = cache.open_cache(folder, OOD)
    method = parse(name)
    for key in {"k", "dim", "bank"} & {n for s in method.steps for n in s.parameters}:
        method = apply(method, Setting(name, key, 4))
    whole = run(opened, [method])
    monkeypatch.setattr(score, "CPU_ROWS", rows)
    parts = run(opened, [method])
    assert parts.methods[0].parameters == whole.methods[0].parameters
    for dataset, values in whole.scores[0].items():
        assert values.shape == (opened.sets[dataset].images,)
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 1
        np.testing.assert_allclose(parts.scores[0][dataset], values, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("piece", [1, 7])
@pytest.mark.parametrize("name", RECTIFIERS)
def test_number_of_rows_rectified_at_a_time_does_not_matter(folder, monkeypatch, name, piece):
    opened = cache.open_cache(folder, OOD)
    assert opened.id.images < score.ROWS_PER_STEP
    whole = run(opened, [parse(name)]).scores[0]
    monkeypatch.setattr(score, "ROWS_PER_STEP", piece)
    for dataset, values in run(opened, [parse(name)]).scores[0].items():
        # Not to the bit: what is left over behind whole vectors of a few numbers may be computed by
        # other instructions.
        np.testing.assert_allclose(values, whole[dataset], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_does_not_change_a_byte(folder, monkeypatch, threads):
    names = [
        name
        for name in known_methods()
        if name not in ("odin", "knn", "nnguide", "vim", "residual", "neco")
    ]
    monkeypatch.setattr(score, "CPU_ROWS", 8)
    wanted = scored(folder, *names)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = scored(folder, *names)
    finally:
        torch.set_num_threads(before)
    for method, ours, theirs in zip(names, found.scores, wanted.scores, strict=True):
        for dataset, values in ours.items():
            np.testing.assert_array_equal(values, theirs[dataset], err_msg=method)


def test_odin_reads_the_perturbed_activations(folder, write_cache, small_sets, small_head):
    rng = np.random.default_rng(5)
    perturbed = {
        name: rows + rng.random(rows.shape, np.float32)
        for name, rows in small_sets.items()
        if name != "calibration"
    }
    write_cache(
        folder / "odin", perturbed, *small_head, odin={"temperature": 1000.0, "epsilon": 0.005}
    )
    odin, msp = scored(folder, "odin", "msp", settings=("odin.temperature=10",)).scores
    for dataset in ("id", *OOD):
        for rows, values, temperature, shift in (
            (perturbed, odin, 10, math.log(4)),
            (small_sets, msp, 1, 0),
        ):
            weight, bias = (part.astype(np.float64) for part in small_head)
            logits = (rows[dataset].astype(np.float64) @ weight.T + bias) / temperature
            p = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)
            np.testing.assert_allclose(
                values[dataset], np.log(p / (1 - p)) + shift, rtol=2e-5, atol=2e-5
            )


# The cache as a contract


def test_what_is_not_known_may_be_absent(tmp_path, write_cache, small_sets, small_head):
    """Labels where known. A tool that knows neither labels nor accuracy need not say so."""
    folder = write_cache(tmp_path / "c", small_sets, *small_head)
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        del content["labels"], content["accuracy"]
        path.write_text(json.dumps(content))
    assert result_of(folder, "lhact", "msp")["id"] == {"images": 61, "accuracy": None}


def test_ood_sets_come_in_the_benchmarks_order_then_by_name(
    tmp_path, write_cache, small_sets, small_head
):
    sets = {**small_sets, "Zebras": small_sets["SUN"], "Apes": small_sets["SUN"]}
    opened = cache.open_cache(write_cache(tmp_path / "c", sets, *small_head), OOD)
    assert opened.ood == [*OOD, "Apes", "Zebras"]
    assert cache.open_cache(tmp_path / "c", []).ood == [
        "Apes",
        "Places",
        "SUN",
        "Textures",
        "Zebras",
        "iNaturalist",
    ]


# Sharing


@pytest.fixture
def readings(monkeypatch):
    """(name of the set) -> how often its rows were read, on average over its rows."""
    counts = Counter()
    reader = cache.Activations.reader

    @contextmanager
    def counted(self):
        with reader(self) as read:

            def read_and_count(start, count):
                rows = read(start, count)
                counts[self.path.stem] += Fraction(len(rows), self.images)
                return rows

            yield read_and_count

    monkeypatch.setattr(cache.Activations, "reader", counted)
    return counts


def test_one_reading_of_each_file_serves_all_methods(folder, readings):
    opened = cache.open_cache(folder, OOD)
    names = [
        "msp",
        "energy",
        "maxlogit",
        "gen",
        "react",
        "bfact",
        "lhact",
        "lhact+msp",
        "react+lhact",
        "ash-s",
        "scale",
        "vra",
        "lts",
    ]
    sweep = [parse_setting(f"lhact.high_percentile={value}") for value in (80, 90, 95)]
    methods = variants(names, [], [sweep], False)
    assert len(methods) == 13 + 3 * 2
    run(opened, methods)
    tested = {name: readings[name] for name in ("id", *OOD)}
    assert tested == dict.fromkeys(("id", *OOD), 1)
    assert readings["calibration"] <= 4


def test_methods_share_rectifiers_and_the_matrix_product(folder, monkeypatch):
    """A common beginning runs once per chunk, and two scores behind it are handed the very same
    logits."""
    calls, logits_seen = [], {"first": [], "second": []}

    def rectifier(activations):
        calls.append(activations.shape[0])
        return activations * 2

    def making(name):
        def function(logits):
            logits_seen[name].append(logits)
            return logits.amax(dim=1)

        return function

    monkeypatch.setitem(RECTIFIERS, "double", Rectifier(rectifier))
    monkeypatch.setitem(SCORES, "first", Score(making("first")))
    monkeypatch.setitem(SCORES, "second", Score(making("second")))
    monkeypatch.setattr(score, "CPU_ROWS", 16)
    opened = cache.open_cache(folder, OOD)
    methods = variants(
        ["double+first", "double+second", "double+react+first"],
        [parse_setting("react.high=1")],
        [],
        False,
    )
    run(opened, methods)
    chunks = sum(math.ceil(opened.sets[name].images / 16) for name in ("id", *OOD))
    # Two images more: every rectifier is tried on one before the work begins.
    assert [images for images in calls if images > 1] == calls[-chunks:]
    assert len(calls) - chunks <= 2
    assert len(logits_seen["second"]) == chunks
    first = {id(logits) for logits in logits_seen["first"]}
    assert all(id(logits) in first for logits in logits_seen["second"])


def test_progress_counts_every_row(folder):
    done = []
    scored(folder, "lhact", "msp", progress=done.append)
    assert sum(done) == 61 + 30 + 25 + 20 + 15


# Which thresholds


def resnet50_folder(write_cache, folder, calibration, classes=1000, **keywords):
    sets = {"id": v1_like(3, 1) * 3, "SUN": v1_like(2, 2)}
    if calibration is not None:
        sets["calibration"] = calibration
    head = np.zeros((classes, 2048), np.float32), np.zeros(classes, np.float32)
    return write_cache(folder, sets, *head, **keywords)


def thresholds_of(folder):
    return identify.thresholds(cache.open_cache(folder, OOD))


def test_the_constants_are_published_for_v1_by_name(tmp_path, write_cache, small_sets, small_head):
    """Whatever its activations are like, here nothing like V1's."""
    found = thresholds_of(write_cache(tmp_path / "c", small_sets, *small_head, network=V1))
    assert found.published is True
    assert "published constants" in found.remark
    assert "IMAGENET1K_V1" in found.remark


def test_percentiles_for_any_other_network(folder):
    found = thresholds_of(folder)
    assert found.published is False
    assert "percentiles of the calibration activations (40 images)" in found.remark


@pytest.mark.parametrize(
    "network", [{"weights": "IMAGENET1K_V2"}, {"arch": "resnet101"}, {"weights": None}]
)
def test_percentiles_for_networks_that_only_resemble_it_by_name(
    tmp_path, write_cache, small_sets, small_head, network
):
    folder = write_cache(tmp_path / "c", small_sets, *small_head, network={**V1, **network})
    assert thresholds_of(folder).published is False


def test_the_constants_are_published_for_a_resnet50_that_agrees(tmp_path, write_cache):
    calibration = v1_like(20)
    assert calibration.mean(dtype=np.float64) == pytest.approx(0.4635, rel=0.005)
    found = thresholds_of(
        resnet50_folder(write_cache, tmp_path / "c", calibration, network={"arch": "resnet50"})
    )
    assert found.published is True
    assert "distributed like" in found.remark
    assert "(20 images)" in found.remark
    assert "0.2194 at percentile 33.0" in found.remark
    assert "1.352 at percentile 95.7" in found.remark


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x * 1.1, "the mean activation"),
        (lambda x: x * 0.9, "the mean activation"),
        (lambda x: np.where((x > 0.13) & (x < 0.22), 0.22, x), "0.2194 lies at percentile 19"),
        (lambda x: np.where((x > 0.95) & (x < 1.2), 0.95, x), "1.0000 lies at percentile 93"),
        (lambda x: np.where((x > 1.25) & (x < 1.36), 1.37, x), "1.3521 lies at percentile 94"),
    ],
)
def test_percentiles_for_a_resnet50_that_does_not_agree(tmp_path, write_cache, change, reason):
    folder = resnet50_folder(
        write_cache, tmp_path / "c", change(v1_like(20)), network={"arch": "resnet50"}
    )
    found = thresholds_of(folder)
    assert found.published is False
    assert "not the published constants" in found.remark
    assert reason in found.remark


def test_agreement_is_asked_of_calibration_not_of_test_images(tmp_path, write_cache):
    """In these caches the ID test images' activations are three times V1's: without a calibration
    set they count."""
    found = thresholds_of(
        resnet50_folder(write_cache, tmp_path / "c", None, network={"arch": "resnet50"})
    )
    assert found.published is False
    assert "ID TEST activations (3 images)" in found.remark


@pytest.mark.parametrize("network", [{"arch": "resnet101"}, {"arch": "wide_resnet50_2"}])
def test_another_architecture_never_gets_the_constants(tmp_path, write_cache, network):
    assert (
        thresholds_of(
            resnet50_folder(write_cache, tmp_path / "c", v1_like(20), network=network)
        ).published
        is False
    )


def test_thresholds_are_percentiles_of_calibration_and_of_no_test_image(
    tmp_path, write_cache, small_sets, small_head
):
    low, high = np.percentile(small_sets["calibration"].astype(np.float64), [33.7, 95.5])
    for factor in (1, 100):
        sets = {
            name: rows * (1 if name == "calibration" else factor)
            for name, rows in small_sets.items()
        }
        found = scored(write_cache(tmp_path / str(factor), sets, *small_head), "lhact")
        expected = {
            "low": low,
            "low_percentile": 33.7,
            "high": high,
            "high_percentile": 95.5,
            "order": 2,
        }
        assert found.methods[0].parameters == pytest.approx(expected, rel=1e-12)


def test_statistics_come_from_calibration_and_no_test_image(
    tmp_path, write_cache, small_sets, small_head
):
    """One OOD set is scored the same by everything that is fitted, whatever the other test images
    are."""
    names = [name for name in known_methods() if name != "odin"]
    labels = {"calibration": [i % 5 for i in range(40)]}
    settings = ["knn.k=4", "nnguide.k=4", "vim.dim=4", "residual.dim=4", "neco.dim=4"]
    found = []
    for factor in (1, 100):
        sets = {
            name: rows * (1 if name in ("calibration", "SUN") else factor)
            for name, rows in small_sets.items()
        }
        folder = write_cache(tmp_path / str(factor), sets, *small_head, labels=labels)
        found.append(scored(folder, *names, settings=settings))
    for method, first, second in zip(names, found[0].scores, found[1].scores, strict=True):
        np.testing.assert_array_equal(first["SUN"], second["SUN"], err_msg=method)


def test_without_calibration_the_id_images_serve_and_the_remark_says_so(
    tmp_path, write_cache, small_sets, small_head
):
    sets = {name: rows for name, rows in small_sets.items() if name != "calibration"}
    folder = write_cache(tmp_path / "c", sets, *small_head)
    assert "TEST" in thresholds_of(folder).remark
    parameters = scored(folder, "react").methods[0].parameters
    assert parameters["high"] == pytest.approx(
        np.percentile(small_sets["id"].astype(np.float64), 90), rel=1e-12
    )


def test_no_percentiles_are_taken_where_none_are_asked_for(folder, readings):
    scored(folder, "lhact", "msp", published=True)
    assert readings["calibration"] == 1, "for the one image that rectifiers are tried on"


# Results


def test_metrics_and_average(folder):
    found = scored(folder, "lhact", "msp")
    rows = result_of(folder, "lhact", "msp", published=False)["results"]
    assert [(row["method"], row["dataset"]) for row in rows] == [
        (m, d) for m in ("lhact", "msp") for d in (*OOD, "average")
    ]
    assert [row["images"] for row in rows[:5]] == [30, 25, 20, 15, 90]
    for number, of_method in enumerate((rows[:5], rows[5:])):
        for row in of_method[:4]:
            scores = found.scores[number]
            expected = {
                name: metric(scores["id"], scores[row["dataset"]])
                for name, metric in METRICS.items()
            }
            assert {name: row[name] for name in METRICS} == expected
        for name in METRICS:
            # Unweighted by the number of images.
            assert of_method[4][name] == pytest.approx(
                sum(row[name] for row in of_method[:4]) / 4, rel=1e-12
            )


def test_result_says_what_it_is_of(folder, small_sets):
    result = result_of(folder, "lhact", published=False)
    assert result["benchmark"] == "imagenet"
    assert result["name"] == "resnet50"
    assert result["network"]["arch"] == "resnet18"
    assert result["preprocessing"]["resize"] == 256
    assert result["precision"] == "fp32"
    assert result["id"] == {"images": 61, "accuracy": None}


def published_of(result):
    return {(row["method"], row["dataset"]): row["published"] for row in result["results"]}


def test_published_numbers_stand_beside_v1s(v1_folder):
    found = published_of(result_of(v1_folder, "lhact", "energy", "react"))
    assert found["lhact", "iNaturalist"]["fpr95"] == 11.07
    assert found["lhact", "average"]["auroc"] == 95.42
    assert found["energy", "Textures"]["fpr95"] == 53.72
    assert found["react", "SUN"]["fpr95"] == 29.60
    assert all(found.values())


def test_published_numbers_stand_beside_no_other_network(folder):
    assert not any(published_of(result_of(folder, "lhact", "energy")).values())


def test_published_numbers_stand_beside_no_lookalike(tmp_path, write_cache):
    """A checkpoint that takes the constants is still another network."""
    folder = resnet50_folder(write_cache, tmp_path / "c", v1_like(20), network={"arch": "resnet50"})
    assert thresholds_of(folder).published
    assert not any(published_of(result_of(folder, "lhact")).values())


def test_published_numbers_stand_beside_no_other_benchmark(v1_folder):
    assert not any(published_of(result_of(v1_folder, "lhact", benchmark="digits")).values())


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("lhact", "lhact.order=3"),
        ("lhact", "lhact.low=0.2"),
        ("lhact", "lhact.high_percentile=95.5"),
        ("lhact", "energy.temperature=2"),
        ("energy", "energy.temperature=2"),
        ("react", "react.high=1.01"),
    ],
)
def test_published_numbers_stand_beside_no_other_parameters(v1_folder, name, setting):
    assert not any(published_of(result_of(v1_folder, name, settings=[setting])).values())


def test_setting_a_parameter_to_its_default_keeps_the_published_numbers(v1_folder):
    assert all(
        published_of(
            result_of(v1_folder, "lhact", settings=["lhact.order=2", f"lhact.low={LOW!r}"])
        ).values()
    )


def test_percentiles_on_v1_are_not_the_published_parameters(v1_folder):
    assert not any(published_of(result_of(v1_folder, "lhact", "react", published=False)).values())


@pytest.mark.parametrize("name", ["lhact+msp", "react+lhact", "scale", "lhact-low"])
def test_methods_without_a_published_row_have_none(v1_folder, name):
    assert not any(published_of(result_of(v1_folder, name)).values())


@pytest.mark.parametrize("change", ["a set less", "a set more"])
def test_the_average_is_compared_over_the_same_sets_alone(
    tmp_path, write_cache, v1_sets, v1_head, change
):
    sets = (
        {**v1_sets, "Openimages": v1_sets["SUN"]}
        if change == "a set more"
        else dict(list(v1_sets.items())[:-1])
    )
    found = published_of(
        result_of(write_cache(tmp_path / "c", sets, *v1_head, network=V1), "lhact")
    )
    assert found["lhact", "average"] is None
    assert found["lhact", "SUN"]["fpr95"] == 16.87
    assert found.get(("lhact", "Openimages")) is None


@pytest.mark.parametrize(
    ("odin", "expected"),
    [
        ({"temperature": 1000.0, "epsilon": 0.005}, 47.66),
        ({"temperature": 1000.0, "epsilon": 0.01}, None),
        ({"temperature": 1.0, "epsilon": 0.005}, None),
    ],
)
def test_odins_published_numbers_are_of_its_own_perturbation(
    v1_folder, write_cache, v1_sets, v1_head, odin, expected
):
    """get_activation.py --odin-temperature and --odin-epsilon make another method of it."""
    sets = {name: rows for name, rows in v1_sets.items() if name != "calibration"}
    write_cache(v1_folder / "odin", sets, *v1_head, network=V1, odin=odin)
    found = published_of(result_of(v1_folder, "odin"))["odin", "iNaturalist"]
    assert (found and found["fpr95"]) == expected


# Whether it is the published network


def described(tmp_path, write_cache, v1_head, rows, **keywords):
    """A cache that claims to be of V1, with these ID activations."""
    keywords = {"network": V1, **keywords}
    return write_cache(tmp_path / "c", {"id": rows, "SUN": v1_like(5, 9)}, *v1_head, **keywords)


def findings_of(folder, benchmark="imagenet"):
    if benchmark != "imagenet":
        return []
    opened = cache.open_cache(folder, OOD)
    return identify.findings(opened.id, opened.weight, opened.bias)


def predicted(rows, weight, bias):
    return (rows.astype(np.float64) @ weight.T.astype(np.float64) + bias).argmax(axis=1)


def test_nothing_is_found_where_activations_are_v1s(tmp_path, write_cache, v1_head):
    folder = described(tmp_path, write_cache, v1_head, v1_like(300))
    assert findings_of(folder) == []
    assert result_of(folder, "lhact")["findings"] == []


def test_what_is_found_is_part_of_the_result(tmp_path, write_cache, v1_head):
    folder = described(tmp_path, write_cache, v1_head, v1_like(300) * np.float32(4))
    result = result_of(folder, "lhact", "energy")
    assert len(result["findings"]) == 1
    assert "normalised twice" in result["findings"][0]


def test_another_benchmark_is_not_compared_with_imagenets_network(tmp_path, write_cache, v1_head):
    folder = described(tmp_path, write_cache, v1_head, v1_like(300) * np.float32(4))
    assert findings_of(folder, "digits") == []
    assert result_of(folder, "lhact", benchmark="digits")["findings"] == []


@pytest.fixture
def evidence(monkeypatch):
    """What identify.diagnose is given, in place of its judgement."""
    given = []
    monkeypatch.setattr(
        "lhact.identify.diagnose", lambda *arguments: given.append(arguments) or ["a finding"]
    )
    return given


def test_findings_are_from_a_sample_of_the_rows(
    tmp_path, write_cache, v1_head, monkeypatch, evidence
):
    monkeypatch.setattr(identify, "SAMPLE_ROWS", 20)
    rows = v1_like(61)
    rows[::7] *= 2
    right = predicted(rows, *v1_head)
    labels = [int(label) if i % 3 else (int(label) + 1) % 1000 for i, label in enumerate(right)]
    folder = described(tmp_path, write_cache, v1_head, rows, labels={"id": labels}, accuracy=12.5)
    assert findings_of(folder) == ["a finding"]
    ((network, preprocessing, statistics, top1, counted),) = evidence
    assert network.weights == "IMAGENET1K_V1"
    assert (network.classes, network.channels) == (1000, 2048)
    assert preprocessing.to_json() == {"resize": 256, "crop": 224, "interpolation": "bilinear"}
    chosen = cache.open_set(folder, "id").sample(20)[1]
    sample = rows[chosen].astype(np.float64)
    assert statistics.images == 20
    assert statistics.mean == pytest.approx(sample.mean(), rel=1e-6)
    assert statistics.percentiles == pytest.approx(
        {t: 100 * (sample < t).mean() for t in (LOW, 1.0, HIGH)}
    )
    assert statistics.spread == pytest.approx(sample.mean(axis=0).std(), rel=1e-6)
    assert top1 == identify.Top1(12.5, 61, len(set(labels)))
    some = [labels[i] for i in chosen]
    share = 100 * sum(i % 3 > 0 for i in chosen) / 20
    assert counted == identify.Top1(share, 20, len(set(some)))


@pytest.mark.parametrize(
    ("images", "accuracy", "expected"),
    [(61, 75.0, (75.0, 61, 61)), (1001, 75.0, (75.0, 1001, 1000)), (61, None, None)],
)
def test_without_labels_the_recorded_accuracy_is_all_there_is(
    tmp_path, write_cache, v1_head, evidence, images, accuracy, expected
):
    """Of as many classes as there can be: ImageNet has 1,000."""
    findings_of(described(tmp_path, write_cache, v1_head, v1_like(images), accuracy=accuracy))
    assert evidence[0][3:] == (expected and identify.Top1(*expected), None)


def test_activations_that_contradict_the_recorded_accuracy(tmp_path, write_cache, v1_head):
    """All labels are wrong, whatever the sidecar says."""
    rows = v1_like(300)
    labels = ((predicted(rows, *v1_head) + 1 + 3 * np.arange(300)) % 1000).tolist()
    folder = described(tmp_path, write_cache, v1_head, rows, labels={"id": labels}, accuracy=76.13)
    first, second = findings_of(folder)
    assert first == "the cache says top-1 76.13 %, its activations 0.00 %"
    assert "top-1 is 0.00 % on 300 images" in second
    assert "wrong labels" in second


# Refusals


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"network": {"sha256": "1" * 64}}, "sha256"),
        ({"network": {"arch": "resnet34"}}, "resnet34"),
        ({"preprocessing": {"resize": 232, "crop": 224, "interpolation": "bilinear"}}, "resize"),
        ({"precision": "fp16"}, "fp16"),
    ],
)
@pytest.mark.parametrize("dataset", ["SUN", "calibration"])
def test_sets_of_different_origin(
    folder, write_cache, small_sets, small_head, dataset, changed, names
):
    write_cache(folder, {dataset: small_sets[dataset]}, *small_head, **changed)
    with pytest.raises(cache.BadCache) as refusal:
        cache.open_cache(folder, OOD)
    assert f"{dataset}.npy is of something else than the ID set beside it" in str(refusal.value)
    assert names in str(refusal.value)
    assert "get_activation.py" in str(refusal.value)


def test_no_id_set(folder):
    for suffix in ("json", "npy"):
        (folder / f"id.{suffix}").unlink()
    with pytest.raises(cache.BadCache, match=r"has no ID set; complete it with get_activation\.py"):
        cache.open_cache(folder, OOD)


def test_no_ood_set(folder):
    for name in OOD:
        for suffix in ("json", "npy"):
            (folder / f"{name}.{suffix}").unlink()
    with pytest.raises(
        cache.BadCache, match=r"has no OOD set; complete it with get_activation\.py"
    ):
        cache.open_cache(folder, OOD)


def test_nothing_there(tmp_path):
    with pytest.raises(
        cache.BadCache, match=r"holds no activations; make them with .*get_activation\.py"
    ):
        cache.open_cache(tmp_path / "nowhere", OOD)


def test_unfinished_run(folder, small_sets):
    """A run that was to make another set besides has left its mark."""
    (folder / "Openimages.rows").write_text("{}")
    with pytest.raises(
        cache.BadCache,
        match=r"is unfinished: Openimages; give the same get_activation\.py command again",
    ):
        cache.open_cache(folder, OOD)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dataset", ["id", "calibration", "Textures"])
def test_activations_that_are_not_finite(folder, small_sets, dataset, value):
    rows = small_sets[dataset].copy()
    rows[13, 5] = value
    np.save(folder / f"{dataset}.npy", rows)
    with pytest.raises(
        cache.BadCache, match=rf"{dataset}\.npy holds NaN or infinite values in row 13"
    ):
        scored(folder, "lhact")


def test_scores_that_are_not_finite(folder, monkeypatch):
    monkeypatch.setitem(SCORES, "log", Score(lambda logits: logits.amin(dim=1).log()))
    with pytest.raises(
        BadMethod, match=r"log on iNaturalist: id_scores must be finite, got \d+ NaN"
    ):
        result_of(folder, "log")


def test_a_filter_whose_cutoff_is_not_positive(folder):
    """On sparse activations a low percentile is 0."""
    with pytest.raises(BadMethod, match=r"bfact.*high must be above 0"):
        scored(folder, "bfact", settings=["bfact.high_percentile=10"])


def test_odin_without_its_cache(folder):
    with pytest.raises(
        BadMethod,
        match=r"odin needs activations of perturbed images: run get_activation\.py .* --odin",
    ):
        scored(folder, "odin")


@pytest.mark.parametrize(
    "changed", [{"fingerprint": "others"}, {"network": {"sha256": "1" * 64}}, {"precision": "bf16"}]
)
def test_odins_cache_of_something_else(folder, write_cache, small_sets, small_head, changed):
    write_cache(folder / "odin", small_sets, *small_head, **changed)
    with pytest.raises(BadMethod, match=r"with --odin .*(other files|something else)"):
        scored(folder, "odin")


@pytest.mark.parametrize("lack", ["missing", "of other files"])
def test_odins_cache_without_one_of_the_sets(folder, write_cache, small_sets, small_head, lack):
    """The last set counts like the first; `--methods all` goes on without ODIN."""
    write_cache(folder / "odin", small_sets, *small_head)
    write_cache(
        folder / "odin", {"Textures": small_sets["Textures"]}, *small_head, fingerprint="others"
    )
    if lack == "missing":
        (folder / "odin" / "Textures.json").unlink()
    with pytest.raises(BadMethod, match=r"with --odin .*Textures"):
        scored(folder, "odin")
    assert [name for name, _ in scored(folder, "odin", "msp", leave_out=True).left_out] == ["odin"]


def test_what_a_fit_cannot_do_is_a_refusal(folder):
    with pytest.raises(BadMethod, match=r"knn: .*1 to 40"):
        scored(folder, "knn", settings=["knn.k=41"])


def test_leave_out_keeps_the_rest(folder):
    settings = ["knn.k=41"]
    found = scored(folder, "odin", "lhact", "knn", "msp", settings=settings, leave_out=True)
    assert [method.name for method in found.methods] == ["lhact", "msp"]
    assert [name for name, _ in found.left_out] == ["odin", "knn"]
    assert "--odin" in found.left_out[0][1]
    for scores, expected in zip(found.scores, scored(folder, "lhact", "msp").scores, strict=True):
        np.testing.assert_array_equal(scores["SUN"], expected["SUN"])


# Accuracy


@pytest.mark.parametrize("rows", [1, 10, 512])
def test_accuracy_is_top1_over_the_given_labels(folder, small_sets, small_head, monkeypatch, rows):
    monkeypatch.setattr(identify, "ROWS", rows)
    weight, bias = map(torch.from_numpy, small_head)
    labels = [i % 5 for i in range(61)]
    right = 0
    for row, label in zip(small_sets["id"], labels, strict=True):
        logits = [
            math.fsum(float(w) * float(z) for w, z in zip(line, row, strict=True)) + float(b)
            for line, b in zip(*small_head, strict=True)
        ]
        right += max(range(5), key=logits.__getitem__) == label
    assert 0 < right < 61
    assert identify.accuracy(cache.open_set(folder, "id"), weight, bias) == pytest.approx(
        100 * right / 61
    )


def test_accuracy_without_labels(folder, small_head):
    assert (
        identify.accuracy(cache.open_set(folder, "SUN"), *map(torch.from_numpy, small_head)) is None
    )
