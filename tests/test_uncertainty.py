"""The bootstrap against loops over the images drawn, and DeLong's variance."""

import csv
import io
import json
import statistics

import numpy as np
import pytest
from fitted import auroc_of, fpr95_of

from lhact.evaluation import results, uncertainty
from lhact.evaluation.score import MethodScores
from lhact.evaluation.uncertainty import Bootstrap, interval, resample
from lhact.methods.compose import parse
from lhact.methods.fit import FittedMethod, FittedStep
from lhact.records import NetworkInfo, RecordedPreprocessing, SetInfo

SIZES = {"id": 83, "near": 41, "far": 60}


def scores_of(kind, sizes=SIZES, methods=3, seed=0):
    """Scores of several methods of the same images: an image's own share, and the method's."""
    rng = np.random.default_rng(seed)
    own = {name: rng.normal(name == "id", 1, size) for name, size in sizes.items()}
    change = {"continuous": np.copy, "ties": np.round, "constant": np.zeros_like}[kind]
    return [
        {
            name: change(values + rng.normal(0, 0.2 * number, len(values))).astype(np.float32)
            for name, values in own.items()
        }
        for number in range(methods)
    ]


@pytest.mark.parametrize("kind", ["continuous", "ties", "constant"])
def test_each_resample_is_measured_as_the_images_drawn(kind):
    """Exactly, by loops over the images that the draw takes."""
    scores = scores_of(kind)
    found = resample(scores, Bootstrap(100, seed=7))
    for draw in (0, 1, 99):
        counts = uncertainty._counts(SIZES, 7, draw)
        for number, method in enumerate(scores):
            taken = {name: np.repeat(method[name], counts[name]).tolist() for name in SIZES}
            assert {name: len(images) for name, images in taken.items()} == SIZES
            for name in ("near", "far"):
                fpr95, auroc = found[number][name][:, draw]
                assert fpr95 == pytest.approx(fpr95_of(taken["id"], taken[name]), abs=1e-12)
                assert auroc == pytest.approx(auroc_of(taken["id"], taken[name]), abs=1e-12)


def test_draws_are_of_every_image_alike():
    """A resample takes an image Binomial(n, 1/n) times, and no draw is another."""
    counts = np.array([uncertainty._counts({"a": 50}, 0, draw)["a"] for draw in range(2000)])
    assert (counts.sum(axis=1) == 50).all()
    assert np.mean(counts) == 1
    assert np.var(counts) == pytest.approx(1 - 1 / 50, rel=0.03)
    assert np.abs(counts.mean(axis=0) - 1).max() < 4.5 * (1 / 2000) ** 0.5
    assert len({row.tobytes() for row in counts}) == 2000
    assert not np.array_equal(*uncertainty._counts({"a": 50, "b": 50}, 0, 0).values())


def test_a_set_is_drawn_alike_in_any_company():
    (scores,) = scores_of("continuous", {"id": 83, "far": 60}, 1)
    (alone,) = resample([scores], Bootstrap(100))
    for method in resample([{**scores, "near": np.zeros(9, np.float32)}] * 2, Bootstrap(100)):
        np.testing.assert_array_equal(method["far"], alone["far"])


def test_number_of_methods_at_a_time_does_not_matter(monkeypatch):
    scores = scores_of("continuous", methods=5)
    whole = resample(scores, Bootstrap(100))
    monkeypatch.setattr(uncertainty, "METHODS_AT_A_TIME", 2)
    told = []
    for got, wanted in zip(resample(scores, Bootstrap(100), told.append), whole, strict=True):
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert sum(told) == 300


def test_the_seed_alone_decides():
    scores = scores_of("continuous")
    first, again, other = (resample(scores, Bootstrap(100, seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(first[0][name], again[0][name]) for name in first[0])
    assert not np.array_equal(first[0]["far"], other[0]["far"])


def test_methods_of_other_images_are_refused():
    scores = scores_of("continuous")
    scores[1]["far"] = scores[1]["far"][:-1]
    with pytest.raises(ValueError, match=r"the same images: .*'far': 60.* got .*'far': 59"):
        resample(scores, Bootstrap(100))


def test_an_interval_leaves_out_a_fortieth_on_each_side():
    draws = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert interval(draws) == (25.0, 975.0)


def delong_variance(id_scores, ood_scores):
    """Of the AUROC in percent, by DeLong, DeLong and Clarke-Pearson (Biometrics 1988)."""
    psi = [[(x > y) + (x == y) / 2 for y in ood_scores] for x in id_scores]
    by_id = [statistics.fmean(row) for row in psi]
    by_ood = [statistics.fmean(column) for column in zip(*psi, strict=True)]
    share = statistics.variance(by_id) / len(by_id) + statistics.variance(by_ood) / len(by_ood)
    return 100**2 * share


@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_auroc_varies_as_delong_says(kind):
    (scores,) = scores_of(kind, {"id": 150, "far": 120}, 1)
    draws = resample([scores], Bootstrap(4000))[0]["far"][1]
    expected = delong_variance(scores["id"].tolist(), scores["far"].tolist()) ** 0.5
    assert draws.std() == pytest.approx(expected, rel=0.05)
    low, high = interval(draws)
    assert (high - low) / 2 == pytest.approx(1.96 * expected, rel=0.07)
    assert draws.mean() == pytest.approx(auroc_of(scores["id"], scores["far"]), abs=0.1)


# In the result


def summarised(scores, bootstrap=None, groups=(), **keywords):
    info = SetInfo(
        network=NetworkInfo("net", "W", None, "ab", 5, 12),
        preprocessing=RecordedPreprocessing(),
        precision="fp32",
        images=len(scores[0]["id"]),
        fingerprint="",
        paths=(),
        accuracy=None,
    )
    about = results.About("mine", "name", info, groups=dict(groups))
    names = ("energy", "msp", "maxlogit", "gen")
    parts = [MethodScores(fitted(name), part) for name, part in zip(names, scores, strict=False)]
    return results.summarise(about, parts, bootstrap=bootstrap, **keywords)


def fitted(name):
    return FittedMethod(parse(name), (), FittedStep(name, None, (), {}, {}), None)


def test_rows_carry_the_intervals_of_their_draws():
    scores = scores_of("continuous")
    draws = resample(scores, Bootstrap(200, 5))
    for part in draws:
        part["both average"] = part["average"] = np.mean([part["near"], part["far"]], axis=0)
    result = summarised(scores, Bootstrap(200, 5), {"both average": ("near", "far")})
    for number, method in enumerate(result.methods):
        assert [row.dataset for row in method.rows] == ["near", "far", "both average", "average"]
        for row, first in zip(method.rows, result.methods[0].rows, strict=True):
            ours, reference = draws[number][row.dataset], draws[0][row.dataset]
            sure = row.uncertainty
            for place, metric in enumerate(("fpr95", "auroc")):
                assert sure.intervals[metric] == tuple(np.percentile(ours[place], [2.5, 97.5]))
                if number == 0:
                    assert sure.differences == sure.difference_intervals == {}
                    continue
                assert sure.differences[metric] == row.metrics[metric] - first.metrics[metric]
                ends = np.percentile(ours[place] - reference[place], [2.5, 97.5])
                assert sure.difference_intervals[metric] == tuple(ends)


def test_a_baseline_is_compared_with_the_first_method():
    scores = scores_of("continuous")
    along = MethodScores(fitted("gen"), scores[2])
    result = summarised(scores[:1], Bootstrap(100), baseline=along)
    ours = summarised([scores[0], scores[2]], Bootstrap(100)).methods[1]
    found = [row.uncertainty for row in result.baseline.rows]
    assert found == [row.uncertainty for row in ours.rows]


def test_sets_too_small_for_an_interval_have_none_and_averages_over_them_neither():
    scores = scores_of("continuous", {"id": 40, "near": 20, "far": 19})
    groups = {"near average": ("near",), "far average": ("far",)}
    result = summarised(scores, Bootstrap(100), groups)
    assert result.too_small == ["far"]
    for method in result.methods:
        assert [row.dataset for row in method.rows if row.uncertainty] == ["near", "near average"]
    # Nowhere where the ID set is too small.
    result = summarised(scores_of("continuous", {"id": 19, "near": 20}), Bootstrap(100))
    assert result.too_small == ["ID"]
    assert not any(row.uncertainty for method in result.methods for row in method.rows)


def test_json_has_the_intervals_by_name():
    result = summarised(scores_of("continuous"), Bootstrap(100, 6))
    content = result.to_json()
    assert content["bootstrap"] == {"resamples": 100, "seed": 6}
    first, second = content["results"][0], content["results"][3]
    sure = result.methods[1].rows[0].uncertainty
    for metric in ("fpr95", "auroc"):
        assert first[f"{metric}_difference"] is None
        assert first[f"{metric}_difference_ci"] is None
        assert second[f"{metric}_ci"] == sure.intervals[metric]
        assert second[f"{metric}_difference"] == sure.differences[metric]
        assert second[f"{metric}_difference_ci"] == sure.difference_intervals[metric]
    content = summarised(scores_of("continuous", {"id": 5, "near": 5})).to_json()
    assert "bootstrap" not in content
    assert not any("ci" in key or "difference" in key for key in content["results"][0])


# On the command line


@pytest.fixture
def run(run_eval, tmp_path, write_cache, small_sets, small_head):
    """run(*arguments) -> (status, stdout, stderr), on two caches with sets of 61 to 15 images."""
    weight, bias = small_head
    write_cache(tmp_path / "imagenet" / "resnet50", small_sets, weight, bias)
    write_cache(tmp_path / "imagenet" / "other", small_sets, weight[::-1] * 2, bias)
    return lambda *arguments: run_eval("--cache-dir", tmp_path, *arguments)


BOTH = ("--name", "resnet50", "other")
RESAMPLED = ("--bootstrap", "100", "--methods", "lhact", "msp", "--format")


def test_a_run_with_a_bootstrap(run):
    """The set of 15 images, and the average over it, have no interval and a remark; a second run
    prints the same."""
    status, out, err = run(*RESAMPLED, "json")
    assert (status, run(*RESAMPLED, "json")[1]) == (0, out)
    assert "too small for an interval, with fewer than 20 images: Textures" in err
    content = json.loads(out)
    assert content["bootstrap"] == {"resamples": 100, "seed": 0}
    rows = content["results"] + content["baseline"]
    assert [row["method"] for row in rows[::5]] == ["lhact", "msp", "energy"]
    for row in rows:
        small = row["dataset"] in ("Textures", "average")
        assert (row["fpr95_ci"] is None) == (row["auroc_ci"] is None) == small
        assert (row["auroc_difference_ci"] is None) == (small or row["method"] == "lhact")
        assert small or row["fpr95_ci"][0] <= row["fpr95"] <= row["fpr95_ci"][1]


def test_csv_is_json(run):
    content = json.loads(run(*RESAMPLED, "json")[1])
    rows = content["results"] + content["baseline"]
    lines = list(csv.DictReader(io.StringIO(run(*RESAMPLED, "csv")[1])))
    for line, row in zip(lines, rows, strict=True):
        for metric in ("fpr95", "auroc"):
            for key in (f"{metric}_ci", f"{metric}_difference_ci"):
                ends = [line[f"{key}_low"], line[f"{key}_high"]]
                assert ends == (["", ""] if row[key] is None else [*map(repr, row[key])])
            gap = row[f"{metric}_difference"]
            assert line[f"{metric}_difference"] == ("" if gap is None else repr(gap))


REPRODUCE = "--reproduce does not go together with"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--bootstrap 99", "at least 100 resamples, got 99; 1000 are usual"),
        ("--bootstrap -1", "at least 100 resamples, got -1"),
        ("--bootstrap many", "invalid int value: 'many'"),
        ("--bootstrap 100 --reproduce", f"{REPRODUCE} --bootstrap"),
        ("--digits auto", "--digits auto follows the intervals: give --bootstrap N as well"),
        ("--digits few", "must be auto or 0 to 9, got 'few'"),
        ("--digits 10", "must be auto or 0 to 9, got '10'"),
        ("--digits 3 --reproduce", f"{REPRODUCE} --digits"),
        ("--seeds", "--seeds is over several names: give --name at least two"),
        ("--seeds --name a", "--seeds is over several names: give --name at least two"),
        ("--name a b a", "--name: a is given twice"),
        ("--name a b --reproduce", f"{REPRODUCE} several names"),
    ],
)
def test_wrong_command_line(run, arguments, told):
    status, out, err = run(*arguments.split())
    assert (status, out) == (2, "")
    assert told in err


def test_digits(run):
    """Of a table; what is for other programs is never rounded."""
    given = ("--methods", "energy")
    (row,) = json.loads(run(*given, "--format", "json")[1])["results"][:1]
    assert f"{row['fpr95']:.4f} / {row['auroc']:.4f}" in run(*given, "--digits", "4")[1]
    plain = run(*given, "--format", "csv")
    assert run(*given, "--format", "csv", "--digits", "4") == plain
    automatic = run(*given, "--bootstrap", "100", "--digits", "auto")[1]
    # Sets of 15 to 30 images: no decimal is known.
    assert f"{row['fpr95']:.0f} / {row['auroc']:.0f}" in automatic
    assert automatic != run(*given, "--bootstrap", "100")[1]


def test_each_name_is_evaluated_as_by_itself(run, tmp_path):
    status, out, err = run(*BOTH, *RESAMPLED, "json", "--scores-dir", tmp_path / "scores")
    assert status == 0
    alone = [json.loads(run("--name", name, *RESAMPLED, "json")[1]) for name in BOTH[1:]]
    assert alone == json.loads(out)
    for name in BOTH[1:]:
        assert f"{name}:\n" in err
        assert (tmp_path / "scores" / name / "msp" / "SUN.csv").is_file()


def test_seeds(run):
    out = run(*BOTH, "--methods", "msp", "energy", "--format", "json", "--seeds")[1]
    first, second, mean, std = json.loads(out)
    assert (mean["name"], std["name"]) == ("mean", "std")
    for a, b, m, s in zip(*(part["results"] for part in (first, second, mean, std)), strict=True):
        assert m["auroc"] == pytest.approx((a["auroc"] + b["auroc"]) / 2)
        assert s["auroc"] == pytest.approx(abs(a["auroc"] - b["auroc"]) / 2**0.5)
        assert (m["dataset"], m["name"], s["name"]) == (a["dataset"], "mean", "std")


def test_a_mistyped_name_lists_those_there_are(run):
    status, out, err = run("--name", "resnet50", "othr")
    assert (status, out) == (1, "")
    assert "othr; there are: other, resnet50; make it with: " in err
    assert err.endswith("--name othr\n")
