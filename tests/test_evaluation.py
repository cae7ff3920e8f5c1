"""From a cache on disk to results: scores against scalar loops, which thresholds are taken, and how
often files are read."""

import json
import math
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fitted import energies_of, logits_of
from helpers import OOD, v1_like
from scipy.special import softmax

from lhact import cache, identify
from lhact.benchmarks.userfile import open_benchmark
from lhact.evaluation import evaluate, score
from lhact.evaluation.metrics import METRICS
from lhact.methods.compose import BadMethod, known_methods, parse_setting, variants
from lhact.methods.entries import Rectifier, Score
from lhact.methods.fit import FittedMethod
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

CPU = torch.device("cpu")
LOW, HIGH = 0.21940805315971373, 1.3520756840705868
V1 = {"arch": "resnet50", "weights": "IMAGENET1K_V1", "checkpoint": None}
SERVED = [name for name in known_methods() if name != "odin"]


@np.vectorize
def lhact(value, low, high, order=2):
    """f of the paper, one activation at a time."""
    raised = max(value, low)
    return raised if raised < high else raised / math.sqrt(1 + (raised / high) ** (2 * order)) + low


@pytest.fixture
def folder(tmp_path, write_cache, small_sets, small_head):
    """A whole cache of a network that is not V1."""
    labels = {name: [i % 5 for i in range(len(small_sets[name]))] for name in ("id", "calibration")}
    return write_cache(tmp_path / "net", small_sets, *small_head, labels=labels)


@pytest.fixture
def v1_folder(tmp_path, write_cache, v1_sets, v1_head):
    """A cache of the published network, by its name, the shape of its head and its activations."""
    return write_cache(tmp_path / "v1", v1_sets, *v1_head, network=V1)


class Scored(NamedTuple):
    """Fitted methods, dataset -> scores of each, and who was left out, with why."""

    methods: list[FittedMethod]
    scores: list[dict[str, np.ndarray]]
    left_out: dict[str, str]


def scored(folder, *names, settings=(), sweeps=(), published=False, leave_out=False, **keywords):
    methods = variants(names, [*map(parse_setting, settings)], sweeps, published)
    opened, left_out = cache.open_cache(folder, OOD), {}
    tell = (lambda method, error: left_out.update({method.name: str(error)})) if leave_out else None
    parts = score.score(opened, score.fit_methods(opened, methods, CPU, tell), CPU, **keywords)
    return Scored([p.fitted for p in parts], [dict(p.scores) for p in parts], left_out)


def result_of(folder, *names, settings=(), benchmark="imagenet"):
    """What eval.py --format json prints."""
    settings = tuple(map(parse_setting, settings))
    question = evaluate.Question(open_benchmark(benchmark), names, settings)
    opened = cache.open_cache(folder, OOD)
    return evaluate.evaluate(opened, "resnet50", question).result.to_json()


def published_of(*arguments, **keywords):
    """(method, dataset) -> the published numbers beside it."""
    rows = result_of(*arguments, **keywords)["results"]
    return {(row["method"], row["dataset"]): row["published"] for row in rows}


# Scores


@pytest.mark.parametrize(
    ("published", "settings"),
    [(True, ()), (False, ()), (True, ("lhact.order=3", "lhact.high=0.9"))],
)
def test_lhact_is_its_formula_for_every_image_in_order(
    folder, small_sets, small_head, published, settings
):
    (found,) = scored(folder, "lhact", settings=settings, published=published).scores
    low, high = np.percentile(small_sets["calibration"].astype(np.float64), [33.7, 95.5])
    order = 2
    if published:
        low, high = LOW, HIGH
    if settings:
        order, high = 3, 0.9
    assert list(found) == ["id", *OOD]
    for dataset, values in found.items():
        rows = lhact(small_sets[dataset].astype(np.float64), low, high, order)
        assert values.dtype == np.float32
        # A score near 0 is a difference of logits of about 1, which float32 knows to some 1e-7
        # each.
        expected = energies_of(rows, *small_head)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


def test_composition_applies_rectifiers_in_order(folder, small_sets, small_head):
    settings = ("react.high=0.8", "lhact.low=0.3", "lhact.high=0.7")
    found = scored(folder, "react+lhact", "lhact+react", settings=settings).scores
    rows = small_sets["SUN"].astype(np.float64)
    both = lhact(np.minimum(rows, 0.8), 0.3, 0.7), np.minimum(lhact(rows, 0.3, 0.7), 0.8)
    expected = [energies_of(rectified, *small_head) for rectified in both]
    np.testing.assert_allclose([scores["SUN"] for scores in found], expected, rtol=1e-6)
    assert np.ptp(expected, axis=0).max() > 0.01


def test_fit_sees_calibration_as_the_rectifiers_before_leave_it(folder, small_sets, small_head):
    """react+bats: mean and standard deviation are those of clipped activations."""
    found = scored(folder, "react+bats", settings=("react.high=0.8",)).scores[0]["SUN"]
    clipped = {n: np.minimum(rows.astype(float), np.float32(0.8)) for n, rows in small_sets.items()}
    mean, std = clipped["calibration"].mean(axis=0), clipped["calibration"].std(axis=0)
    rows = np.clip(clipped["SUN"], mean - 1.05 * std, mean + 1.05 * std)
    np.testing.assert_allclose(found, energies_of(rows, *small_head), rtol=1e-6)


@pytest.mark.parametrize(
    ("constant", "rows"),
    [
        *(("CPU_ROWS", rows) for rows in (1, 7, 10_000)),
        *(("ROWS_PER_STEP", rows) for rows in (1, 7)),
    ],
)
@pytest.mark.parametrize("name", SERVED)
def test_number_of_rows_in_work_at_a_time_does_not_matter(
    folder, small_sets, monkeypatch, name, constant, rows
):
    """Batch of two = two batches of one, for every entry of both registries; thresholds are the
    same to the bit."""
    assert len(small_sets["id"]) < score.ROWS_PER_STEP < score.CPU_ROWS
    whole = scored(folder, name)
    monkeypatch.setattr(score, constant, rows)
    parts = scored(folder, name)
    assert parts.methods[0].parameters == whole.methods[0].parameters
    for dataset, values in whole.scores[0].items():
        assert values.shape == (len(small_sets[dataset]),)
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 1
        # Not to the bit: what is left over behind whole vectors of a few numbers may be computed by
        # other instructions.
        np.testing.assert_allclose(parts.scores[0][dataset], values, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_company_nor_the_number_of_threads_changes_a_byte(folder, monkeypatch, threads):
    names = {*SERVED, "lhact+msp", "react+lhact"} - {"knn", "nnguide", "vim", "residual", "neco"}
    names = sorted(names)
    monkeypatch.setattr(score, "CPU_ROWS", 8)
    alone = [scored(folder, name) for name in names]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = scored(folder, *names)
    finally:
        torch.set_num_threads(before)
    for name, fitted, ours, theirs in zip(names, found.methods, found.scores, alone, strict=True):
        assert fitted.parameters == theirs.methods[0].parameters
        for dataset, values in theirs.scores[0].items():
            np.testing.assert_array_equal(ours[dataset], values, err_msg=name)


def test_odin_reads_the_perturbed_activations(folder, write_cache, small_sets, small_head):
    rng = np.random.default_rng(5)
    del small_sets["calibration"]
    perturbed = {n: rows + rng.random(rows.shape, np.float32) for n, rows in small_sets.items()}
    odin = {"temperature": 1000.0, "epsilon": 0.005}
    write_cache(folder / "odin", perturbed, *small_head, odin=odin)
    odin, msp = scored(folder, "odin", "msp", settings=("odin.temperature=10",)).scores
    for sets, found, temperature, shift in (
        (perturbed, odin, 10, math.log(4)),
        (small_sets, msp, 1, 0),
    ):
        for dataset, values in found.items():
            p = softmax(logits_of(sets[dataset], *small_head) / temperature, axis=1).max(axis=1)
            wanted = np.log(p / (1 - p)) + shift
            np.testing.assert_allclose(values, wanted, rtol=2e-5, atol=2e-5)


def test_ood_sets_come_in_the_benchmarks_order_then_by_name(
    tmp_path, write_cache, small_sets, small_head
):
    sets = {**small_sets, "Zebras": small_sets["SUN"], "Apes": small_sets["SUN"]}
    folder = write_cache(tmp_path / "c", sets, *small_head)
    assert cache.open_cache(folder, OOD).ood == [*OOD, "Apes", "Zebras"]
    assert cache.open_cache(folder, []).ood == sorted([*OOD, "Apes", "Zebras"])


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
    names = "msp energy maxlogit gen react bfact lhact lhact+msp react+lhact ash-s scale vra lts"
    sweep = [parse_setting(f"lhact.high_percentile={value}") for value in (80, 90, 95)]
    done = []
    found = scored(folder, *names.split(), sweeps=[sweep], progress=done.append)
    assert len(found.methods) == 13 + 3 * 2
    assert {name: readings[name] for name in ("id", *OOD)} == dict.fromkeys(("id", *OOD), 1)
    assert readings["calibration"] <= 4
    assert sum(done) == 61 + 30 + 25 + 20 + 15


def test_methods_share_rectifiers_and_the_matrix_product(folder, small_sets, monkeypatch):
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

        return Score(function)

    monkeypatch.setitem(RECTIFIERS, "double", Rectifier(rectifier))
    for name in logits_seen:
        monkeypatch.setitem(SCORES, name, making(name))
    monkeypatch.setattr(score, "CPU_ROWS", 16)
    names = ["double+first", "double+second", "double+react+first"]
    scored(folder, *names, settings=["react.high=1"])
    chunks = sum(math.ceil(len(small_sets[name]) / 16) for name in ("id", *OOD))
    # Two images more: every rectifier is tried on one before the work begins.
    assert [images for images in calls if images > 1] == calls[-chunks:]
    assert len(calls) - chunks <= 2
    assert len(logits_seen["second"]) == chunks
    assert {*map(id, logits_seen["second"])} <= {*map(id, logits_seen["first"])}


# Which thresholds


@pytest.fixture
def lookalike(tmp_path, write_cache):
    """lookalike(change, ...): a cache of a ResNet-50 of unknown weights, in which the ID test
    images' activations are three times V1's, those of the calibration images V1's, changed by a
    function or a factor."""

    def write(change=1, **network):
        sets = {"id": v1_like(3, 1) * 3, "SUN": v1_like(2, 2)}
        if change:
            rows = v1_like(20)
            sets["calibration"] = change(rows) if callable(change) else np.float32(change) * rows
        head = np.zeros((1000, 2048), np.float32), np.zeros(1000, np.float32)
        network = {"arch": "resnet50", **network}
        return write_cache(tmp_path / "lookalike", sets, *head, network=network)

    return write


def thresholds_of(folder):
    return identify.thresholds(cache.open_cache(folder, OOD))


CALIBRATED = ["percentiles of the calibration activations (20 images)"]
NOT = [*CALIBRATED, "not the published constants"]


@pytest.mark.parametrize(
    ("change", "network", "published", "words"),
    [
        (1, {}, True, ["distributed like", "(20 images)", "0.2194 at percentile 33.0, "]),
        (1.1, {}, False, [*NOT, "the mean activation"]),
        (0.9, {}, False, [*NOT, "the mean activation"]),
        (lambda x: np.where((x > 0.13) & (x < 0.22), 0.22, x), {}, False, [*NOT, "0.2194 lies"]),
        # Without a calibration set the ID test images count.
        (None, {}, False, ["ID TEST activations (3 images)"]),
        (1, {"arch": "resnet101"}, False, CALIBRATED),
        (1, {"arch": "wide_resnet50_2"}, False, CALIBRATED),
        # By its name, whatever its activations are like.
        (1.1, V1, True, ["published constants", "IMAGENET1K_V1"]),
        (1.1, {**V1, "weights": "IMAGENET1K_V2"}, False, NOT),
    ],
)
def test_which_thresholds(lookalike, change, network, published, words):
    found = thresholds_of(lookalike(change, **network))
    assert found.published is published
    assert all(word in found.remark for word in words), found.remark
    assert v1_like(20).mean(dtype=np.float64) == pytest.approx(0.4635, rel=0.005)


def test_what_is_learnt_comes_from_calibration_and_no_test_image(
    tmp_path, write_cache, small_sets, small_head
):
    """One OOD set is scored the same by everything that is fitted, whatever the other test images
    are."""
    labels = {"calibration": [i % 5 for i in range(40)]}
    found = []
    for factor in (1, 100):
        others = {name: rows * factor for name, rows in small_sets.items()}
        sets = {**others, **{name: small_sets[name] for name in ("calibration", "SUN")}}
        folder = write_cache(tmp_path / str(factor), sets, *small_head, labels=labels)
        found.append(scored(folder, *SERVED))
        low, high = np.percentile(small_sets["calibration"].astype(np.float64), [33.7, 95.5])
        expected = {"low": low, "low_percentile": 33.7, "high": high, "high_percentile": 95.5}
        parameters = found[-1].methods[SERVED.index("lhact")].parameters
        assert parameters == pytest.approx({**expected, "order": 2}, rel=1e-12)
    # Where there are none, the ID images serve.
    (folder / "calibration.json").unlink()
    (folder / "calibration.npy").unlink()
    (react,) = scored(folder, "react").methods
    wanted = 100 * np.percentile(small_sets["id"].astype(np.float64), 90)
    assert react.parameters["high"] == pytest.approx(wanted, rel=1e-6)
    for method, first, second in zip(SERVED, found[0].scores, found[1].scores, strict=True):
        np.testing.assert_array_equal(first["SUN"], second["SUN"], err_msg=method)


def test_no_percentiles_are_taken_where_none_are_asked_for(folder, readings):
    scored(folder, "lhact", "msp", published=True)
    assert readings["calibration"] == 1, "for the one image that rectifiers are tried on"


# Results


def test_a_result_says_what_it_is_of_and_the_average_over_all_sets(folder):
    """Metrics are those of the scores; see test_eval.py. A tool that knows neither labels nor
    accuracy need not say so in its cache."""
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        del content["labels"], content["accuracy"]
        path.write_text(json.dumps(content))
    result = result_of(folder, "lhact", "msp")
    assert result["id"] == {"images": 61, "accuracy": None}
    assert (result["benchmark"], result["name"], result["precision"]) == (
        "imagenet",
        "resnet50",
        "fp32",
    )
    assert (result["network"]["arch"], result["preprocessing"]["resize"]) == ("resnet18", 256)
    for rows in (result["results"][:5], result["results"][5:]):
        assert [row["images"] for row in rows] == [30, 25, 20, 15, 90]
        for name in METRICS:  # unweighted by the number of images
            mean = sum(row[name] for row in rows[:4]) / 4
            assert rows[4][name] == pytest.approx(mean, rel=1e-12)


def test_published_numbers_stand_beside_v1s(v1_folder):
    found = published_of(v1_folder, "lhact", "energy", "react")
    assert found["lhact", "iNaturalist"]["fpr95"] == 11.07
    assert found["lhact", "average"]["auroc"] == 95.42
    assert found["energy", "Textures"]["fpr95"] == 53.72
    assert found["react", "SUN"]["fpr95"] == 29.60
    assert all(found.values())
    # A parameter that is set to its default is the published one.
    settings = ["lhact.order=2", f"lhact.low={LOW!r}"]
    assert all(published_of(v1_folder, "lhact", settings=settings).values())


def test_published_numbers_stand_beside_no_lookalike(folder, lookalike):
    """A checkpoint that takes the constants is still another network."""
    assert not any(published_of(folder, "lhact", "energy").values())
    assert thresholds_of(lookalike()).published
    assert not any(published_of(lookalike(), "lhact").values())


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("lhact", "lhact.order=3"),
        ("lhact", "lhact.low=0.2"),
        ("lhact", "lhact.high_percentile=95.5"),
        ("lhact", "energy.temperature=2"),
        ("energy", "energy.temperature=2"),
        ("react", "react.high=1.01"),
        *((name, None) for name in ("lhact+msp", "react+lhact", "scale", "lhact-low")),
    ],
)
def test_published_numbers_stand_beside_no_other_method(v1_folder, name, setting):
    settings = [setting] if setting else []
    assert not any(published_of(v1_folder, name, settings=settings).values())


def test_another_benchmark_is_not_compared(tmp_path, write_cache, v1_sets, v1_head):
    sets = {**v1_sets, "id": v1_like(300) * np.float32(4)}
    folder = write_cache(tmp_path / "c", sets, *v1_head, network=V1)
    assert len(result_of(folder, "lhact")["findings"]) == 1
    assert result_of(folder, "lhact", benchmark="digits")["findings"] == []
    assert not any(published_of(folder, "lhact", benchmark="digits").values())


@pytest.mark.parametrize("more", [False, True])
def test_the_average_is_compared_over_the_same_sets_alone(
    tmp_path, write_cache, v1_sets, v1_head, more
):
    sets = {**v1_sets, "Openimages": v1_sets["SUN"]}
    if not more:
        del sets["Openimages"], sets["Textures"]
    folder = write_cache(tmp_path / "c", sets, *v1_head, network=V1)
    found = published_of(folder, "lhact")
    assert found["lhact", "average"] is None
    assert found["lhact", "SUN"]["fpr95"] == 16.87
    assert found.get(("lhact", "Openimages")) is None


@pytest.mark.parametrize(
    ("temperature", "epsilon", "expected"),
    [(1000.0, 0.005, 47.66), (1000.0, 0.01, None), (1.0, 0.005, None)],
)
def test_odins_published_numbers_are_of_its_own_perturbation(
    v1_folder, write_cache, v1_sets, v1_head, temperature, epsilon, expected
):
    """get_activation.py --odin-temperature and --odin-epsilon make another method of it."""
    sets = {name: rows for name, rows in v1_sets.items() if name != "calibration"}
    odin = {"temperature": temperature, "epsilon": epsilon}
    write_cache(v1_folder / "odin", sets, *v1_head, network=V1, odin=odin)
    found = published_of(v1_folder, "odin")["odin", "iNaturalist"]
    assert (found and found["fpr95"]) == expected


# Whether it is the published network


@pytest.fixture
def findings_of(tmp_path, write_cache, v1_head):
    """findings_of(rows, ...): what is found in a cache that claims to be V1's, with these ID
    activations."""

    def findings(rows, **keywords):
        sets = {"id": rows, "SUN": v1_like(5, 9)}
        folder = write_cache(tmp_path / "c", sets, *v1_head, network=V1, **keywords)
        return identify.findings(cache.open_set(folder, "id"), *v1_head)

    return findings


@pytest.fixture
def evidence(monkeypatch):
    """What identify.diagnose is given, in place of its judgement."""
    given = []
    monkeypatch.setattr(identify, "diagnose", lambda *arguments: given.append(arguments) or ["it"])
    return given


def test_findings_are_from_a_sample_of_the_rows(
    findings_of, v1_head, monkeypatch, evidence, tmp_path
):
    monkeypatch.setattr(identify, "SAMPLE_ROWS", 20)
    rows = v1_like(61)
    rows[::7] *= 2
    right = logits_of(rows, *v1_head).argmax(axis=1)
    labels = [int(label) if i % 3 else (int(label) + 1) % 1000 for i, label in enumerate(right)]
    assert findings_of(rows, labels={"id": labels}, accuracy=12.5) == ["it"]
    ((network, preprocessing, statistics, top1, counted),) = evidence
    assert network.weights == "IMAGENET1K_V1"
    assert (network.classes, network.channels) == (1000, 2048)
    assert preprocessing.to_json() == {"resize": 256, "crop": 224, "interpolation": "bilinear"}
    chosen = cache.open_set(tmp_path / "c", "id").sample(20)[1]
    sample = rows[chosen].astype(np.float64)
    assert statistics.images == 20
    assert statistics.mean == pytest.approx(sample.mean(), rel=1e-6)
    below = {t: 100 * (sample < t).mean() for t in (LOW, 1.0, HIGH)}
    assert statistics.percentiles == pytest.approx(below)
    assert statistics.spread == pytest.approx(sample.mean(axis=0).std(), rel=1e-6)
    assert top1 == identify.Top1(12.5, 61, len(set(labels)))
    some = {labels[i] for i in chosen}
    assert counted == identify.Top1(100 * sum(i % 3 > 0 for i in chosen) / 20, 20, len(some))


@pytest.mark.parametrize(
    ("images", "accuracy", "expected"),
    [(61, 75.0, (75.0, 61, 61)), (1001, 75.0, (75.0, 1001, 1000)), (61, None, None)],
)
def test_without_labels_the_recorded_accuracy_is_all_there_is(
    findings_of, evidence, images, accuracy, expected
):
    """Of as many classes as there can be: ImageNet has 1,000."""
    findings_of(v1_like(images), accuracy=accuracy)
    assert evidence[0][3:] == (expected and identify.Top1(*expected), None)


# Refusals; test_cache.py and test_eval.py have those of damaged caches


@pytest.mark.parametrize(
    ("dataset", "changed", "names"),
    [
        ("SUN", {"network": {"sha256": "1" * 64}}, "sha256"),
        ("calibration", {"network": {"arch": "resnet34"}}, "resnet34"),
        ("SUN", {"preprocessing": {"resize": 232, "crop": 224}}, "resize"),
        ("calibration", {"precision": "fp16"}, "fp16"),
    ],
)
def test_sets_of_different_origin(
    folder, write_cache, small_sets, small_head, dataset, changed, names
):
    write_cache(folder, {dataset: small_sets[dataset]}, *small_head, **changed)
    words = rf"{dataset}\.npy is of something else than the ID set .*{names}.*get_activation\.py"
    with pytest.raises(cache.BadCache, match=words):
        cache.open_cache(folder, OOD)


def test_no_ood_set(tmp_path, write_cache, small_sets, small_head):
    folder = write_cache(tmp_path / "c", {"id": small_sets["id"]}, *small_head)
    with pytest.raises(cache.BadCache, match=r"has no OOD set; complete it with get_activation"):
        cache.open_cache(folder, OOD)


def test_scores_that_are_not_finite(folder, monkeypatch):
    monkeypatch.setitem(SCORES, "log", Score(lambda logits: logits.amin(dim=1).log()))
    message = r"log on iNaturalist: id_scores must be finite, got \d+ NaN"
    with pytest.raises(BadMethod, match=message):
        result_of(folder, "log")


@pytest.mark.parametrize(
    ("sets", "changed", "words"),
    [
        ([], {}, "needs activations of perturbed images: run"),
        (["id", *OOD], {"fingerprint": "others"}, "other files"),
        (["id", *OOD], {"network": {"sha256": "1" * 64}}, "something else"),
        (["id", *OOD], {"precision": "bf16"}, "something else"),
        # The last set counts like the first.
        (["Textures"], {"fingerprint": "others"}, "Textures"),
        (None, {}, "Textures"),
    ],
)
def test_odins_cache_is_of_the_same_images_and_network(
    folder, write_cache, small_sets, small_head, sets, changed, words
):
    """Else it is refused, and `--methods all` goes on without ODIN."""
    if changed or sets is None:
        write_cache(folder / "odin", small_sets, *small_head)
    if sets is None:
        (folder / "odin" / "Textures.json").unlink()
    else:
        others = {name: small_sets[name] for name in sets}
        write_cache(folder / "odin", others, *small_head, **changed)
    with pytest.raises(BadMethod, match="again with --odin") as refusal:
        scored(folder, "odin")
    assert words in str(refusal.value)
    found = scored(folder, "odin", "msp", leave_out=True)
    assert [method.name for method in found.methods] == ["msp"]
    assert found.left_out == {"odin": str(refusal.value)}


def test_leave_out_keeps_the_rest(folder):
    names = ("odin", "lhact", "knn", "msp")
    found = scored(folder, *names, settings=["knn.k=41"], leave_out=True)
    assert [method.name for method in found.methods] == ["lhact", "msp"]
    assert list(found.left_out) == ["odin", "knn"]
    for scores, expected in zip(found.scores, scored(folder, "lhact", "msp").scores, strict=True):
        np.testing.assert_array_equal(scores["SUN"], expected["SUN"])


# Accuracy


@pytest.mark.parametrize("rows", [1, 10, 512])
def test_accuracy_is_top1_over_the_given_labels(folder, small_sets, small_head, monkeypatch, rows):
    monkeypatch.setattr(identify, "ROWS", rows)
    best = logits_of(small_sets["id"], *small_head).argmax(axis=1)
    right = (best == np.arange(61) % 5).sum()
    assert 0 < right < 61
    head = [*map(torch.from_numpy, small_head)]
    found = identify.accuracy(cache.open_set(folder, "id"), *head)
    assert found == pytest.approx(100 * right / 61)
    assert identify.accuracy(cache.open_set(folder, "SUN"), *head) is None
