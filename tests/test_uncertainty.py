"""The bootstrap against slow ones written from the definition, and DeLong's variance."""

import csv
import io
import json
import statistics

import numpy as np
import pytest

import eval as script
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
    found = []
    for number in range(methods):
        scores = {
            name: values + rng.normal(0, 0.2 * number, len(values)) for name, values in own.items()
        }
        if kind == "ties":  # a handful of values
            scores = {name: np.round(values) for name, values in scores.items()}
        if kind == "constant":
            scores = {name: np.zeros(len(values)) for name, values in scores.items()}
        found.append({name: values.astype(np.float32) for name, values in scores.items()})
    return found


def images_drawn(sizes, seed, draw):
    """dataset -> the images that the draw takes, as often as it takes them."""
    counts = uncertainty._counts(sizes, seed, draw)
    drawn = {
        name: [i for i in range(n) for _ in range(counts[name][i])] for name, n in sizes.items()
    }
    assert {name: len(images) for name, images in drawn.items()} == sizes
    return drawn


def fpr95_of(id_scores, ood_scores):
    threshold = sorted(id_scores)[round(0.05 * len(id_scores))]
    return 100 * sum(score > threshold for score in ood_scores) / len(ood_scores)


def auroc_of(id_scores, ood_scores):
    points = sum((x > y) + (x == y) / 2 for x in id_scores for y in ood_scores)
    return 100 * points / (len(id_scores) * len(ood_scores))


@pytest.mark.parametrize("kind", ["continuous", "ties", "constant"])
def test_each_resample_is_measured_as_the_images_drawn(kind):
    """Exactly, by loops over the images that the draw takes."""
    scores = scores_of(kind)
    found = resample(scores, Bootstrap(100, seed=7))
    for draw in (0, 1, 99):
        drawn = images_drawn(SIZES, 7, draw)
        for number, method in enumerate(scores):
            taken = {name: method[name][drawn[name]].tolist() for name in SIZES}
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
    alone = resample(scores_of("continuous", {"id": 83, "far": 60}, 1), Bootstrap(100))
    scores = scores_of("continuous", {"id": 83, "far": 60}, 1)[0]
    company = [{"id": scores["id"], "near": np.zeros(9, np.float32), "far": scores["far"]}] * 2
    for method in resample(company, Bootstrap(100)):
        np.testing.assert_array_equal(method["far"], alone[0]["far"])


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
    with pytest.raises(
        ValueError, match=r"scores of the same images: .*'far': 60.* got .*'far': 59"
    ):
        resample(scores, Bootstrap(100))


@pytest.mark.parametrize("resamples", [99, 1, -5])
def test_too_few_resamples_are_refused(resamples):
    with pytest.raises(ValueError, match=f"at least 100 resamples, got {resamples}; 1000"):
        Bootstrap(resamples)


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


def test_paired_differences_agree_with_a_slow_bootstrap_of_its_own():
    """Other draws, by Python's random numbers and whole arrays: the same ends, up to chance. Not
    paired, the interval would be several times as wide."""
    scores = scores_of("continuous", {"id": 100, "far": 80}, 2)
    found = resample(scores, Bootstrap(2000))
    rng = np.random.default_rng(99)
    slow = []
    for _ in range(2000):
        taken = {name: rng.choice(n, n) for name, n in (("id", 100), ("far", 80))}
        pair = [
            (fpr95_of(s["id"][taken["id"]], s["far"][taken["far"]]), fast_auroc(s, taken))
            for s in scores
        ]
        slow.append(np.subtract(pair[1], pair[0]))
    for metric in (0, 1):
        ours = found[1]["far"][metric] - found[0]["far"][metric]
        theirs = np.array(slow)[:, metric]
        spread = theirs.std()
        assert ours.std() == pytest.approx(spread, rel=0.08)
        np.testing.assert_allclose(
            interval(ours), np.quantile(theirs, (0.025, 0.975)), atol=0.35 * spread
        )
    unpaired = found[1]["far"][1] - np.roll(found[0]["far"][1], 1)
    assert unpaired.std() > 3 * spread


def fast_auroc(scores, taken):
    id_scores, ood_scores = (scores[name][taken[name]] for name in ("id", "far"))
    return 100 * np.mean(id_scores[:, None] > ood_scores)


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
    bootstrap = Bootstrap(200, 5)
    draws = resample(scores, bootstrap)
    result = summarised(scores, bootstrap, {"both average": ("near", "far")})
    for number, method in enumerate(result.methods):
        averages = [np.mean([part["near"], part["far"]], axis=0) for part in draws]
        expected = {
            "near": (draws[number]["near"], draws[0]["near"]),
            "far": (draws[number]["far"], draws[0]["far"]),
            "both average": (averages[number], averages[0]),
            "average": (averages[number], averages[0]),
        }
        assert [row.dataset for row in method.rows] == list(expected)
        for row, first in zip(method.rows, result.methods[0].rows, strict=True):
            ours, reference = expected[row.dataset]
            for place, metric in enumerate(("fpr95", "auroc")):
                ends = np.percentile(ours[place], [2.5, 97.5])
                assert row.uncertainty.intervals[metric] == tuple(ends)
                if number == 0:
                    assert row.uncertainty.differences == {}
                    assert row.uncertainty.difference_intervals == {}
                    continue
                gap = row.metrics[metric] - first.metrics[metric]
                assert row.uncertainty.differences[metric] == gap
                ends = np.percentile(ours[place] - reference[place], [2.5, 97.5])
                assert row.uncertainty.difference_intervals[metric] == tuple(ends)


def test_a_baseline_is_compared_with_the_first_method():
    scores = scores_of("continuous")
    along = MethodScores(fitted("gen"), scores[2])
    result = summarised(scores[:1], Bootstrap(100), baseline=along)
    ours = summarised([scores[0], scores[2]], Bootstrap(100))
    assert [row.uncertainty for row in result.baseline.rows] == [
        row.uncertainty for row in ours.methods[1].rows
    ]


def test_sets_too_small_for_an_interval_have_none_and_averages_over_them_neither():
    scores = scores_of("continuous", {"id": 40, "near": 20, "far": 19})
    groups = {"near average": ("near",), "far average": ("far",)}
    result = summarised(scores, Bootstrap(100), groups)
    assert result.too_small == ["far"]
    for method in result.methods:
        assert [row.dataset for row in method.rows if row.uncertainty] == ["near", "near average"]
    rows = json.loads(json.dumps(result.to_json()))["results"]
    assert [row["fpr95_ci"] is None for row in rows[:5]] == [False, True, False, True, True]


def test_an_id_set_too_small_leaves_no_interval():
    result = summarised(scores_of("continuous", {"id": 19, "near": 20}), Bootstrap(100))
    assert result.too_small == ["ID"]
    assert not any(row.uncertainty for method in result.methods for row in method.rows)


def test_without_a_bootstrap_nothing_is_added():
    content = summarised(scores_of("continuous")).to_json()
    assert "bootstrap" not in content
    assert not any("ci" in key or "difference" in key for key in content["results"][0])
    assert summarised(scores_of("continuous", {"id": 5, "near": 5})).too_small == []


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


# On the command line


@pytest.fixture
def run(capsys, tmp_path, write_cache, small_sets, small_head):
    """run(*arguments) -> (status, stdout, stderr), on sets of 61 to 15 images."""
    write_cache(tmp_path / "cache" / "imagenet" / "resnet50", small_sets, *small_head)

    def run(*arguments):
        try:
            status = script.main(
                ["--cache-dir", str(tmp_path / "cache"), "--device", "cpu", *arguments]
            )
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_a_run_with_a_bootstrap(run):
    """The set of 15 images, and the average over it, have no interval and a remark."""
    status, out, err = run("--bootstrap", "100", "--methods", "lhact", "msp", "--format", "json")
    assert status == 0
    assert "too small for an interval, with fewer than 20 images: Textures" in err
    content = json.loads(out)
    assert content["bootstrap"] == {"resamples": 100, "seed": 0}
    rows = content["results"] + content["baseline"]
    assert [row["method"] for row in rows[::5]] == ["lhact", "msp", "energy"]
    for row in rows:
        small = row["dataset"] in ("Textures", "average")
        assert (row["fpr95_ci"] is None) == (row["auroc_ci"] is None) == small
        first = row["method"] == "lhact"
        assert (row["auroc_difference_ci"] is None) == (small or first)
        if not small:
            assert row["fpr95_ci"][0] <= row["fpr95"] <= row["fpr95_ci"][1]
    again = run("--bootstrap", "100", "--methods", "lhact", "msp", "--format", "json")
    assert again[1] == out


def test_csv_is_json(run):
    arguments = ("--bootstrap", "100", "--methods", "msp", "energy", "--format")
    rows = json.loads(run(*arguments, "json")[1])["results"]
    lines = list(csv.DictReader(io.StringIO(run(*arguments, "csv")[1])))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        for metric in ("fpr95", "auroc"):
            for key in (f"{metric}_ci", f"{metric}_difference_ci"):
                ends = [line[f"{key}_low"], line[f"{key}_high"]]
                assert ends == (["", ""] if row[key] is None else [*map(repr, row[key])])
            gap = row[f"{metric}_difference"]
            assert line[f"{metric}_difference"] == ("" if gap is None else repr(gap))


@pytest.mark.parametrize("form", ["table", "markdown", "latex", "csv", "json"])
def test_no_bootstrap_is_none_asked_for(run, form):
    assert run("--format", form, "--bootstrap", "0") == run("--format", form)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--bootstrap", "99"], "at least 100 resamples, got 99"),
        (["--bootstrap", "-1"], "at least 100 resamples, got -1"),
        (["--digits", "auto"], "--digits auto follows the intervals: give --bootstrap N as well"),
        (["--digits", "few"], "must be auto or 0 to 9, got 'few'"),
        (["--digits", "10"], "must be auto or 0 to 9, got '10'"),
        (["--digits", "3", "--reproduce"], "--reproduce does not go together with --digits"),
        (["--seeds"], "--seeds is over several names: give --name at least two"),
        (["--seeds", "--name", "a"], "--seeds is over several names: give --name at least two"),
        (["--name", "a", "b", "a"], "--name: a is given twice"),
        (
            ["--name", "a", "b", "--reproduce"],
            "--reproduce does not go together with several names",
        ),
        (["--bootstrap", "many"], "invalid int value: 'many'"),
        (
            ["--bootstrap", "100", "--reproduce"],
            "--reproduce does not go together with --bootstrap",
        ),
    ],
    ids=str,
)
def test_wrong_command_line(run, arguments, told):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert told in err


def test_digits(run):
    """Of a table; what is for other programs is never rounded."""
    table = run("--methods", "energy", "--digits", "4")[1]
    (row,) = json.loads(run("--methods", "energy", "--format", "json")[1])["results"][:1]
    assert f"{row['fpr95']:.4f} / {row['auroc']:.4f}" in table
    plain = run("--methods", "energy", "--format", "csv")
    assert run("--methods", "energy", "--format", "csv", "--digits", "4") == plain
    arguments = ("--methods", "energy", "--bootstrap", "100")
    automatic = run(*arguments, "--digits", "auto")[1]
    # Sets of 15 to 30 images: no decimal is known.
    assert f"{row['fpr95']:.0f} / {row['auroc']:.0f}" in automatic
    assert automatic != run(*arguments)[1]


# Several names


@pytest.fixture
def two_names(run, tmp_path, write_cache, small_sets, small_head):
    """The options for the cache of `run` and another one."""
    folder = tmp_path / "cache" / "imagenet" / "other"
    weight, bias = small_head
    write_cache(folder, small_sets, weight[::-1] * 2, bias)
    return ("--name", "resnet50", "other")


def test_each_name_is_evaluated_as_by_itself(run, two_names, tmp_path):
    options = ("--bootstrap", "100", "--methods", "lhact", "msp", "--format", "json")
    status, out, err = run(*two_names, *options, "--scores-dir", str(tmp_path / "scores"))
    assert status == 0
    assert [json.loads(run("--name", name, *options)[1]) for name in two_names[1:]] == json.loads(
        out
    )
    assert "resnet50:\n" in err
    assert "other:\n" in err
    for name in two_names[1:]:
        assert (tmp_path / "scores" / name / "msp" / "SUN.csv").is_file()


def test_seeds(run, two_names):
    options = ("--methods", "msp", "energy", "--format", "json")
    first, second, mean, std = json.loads(run(*two_names, *options, "--seeds")[1])
    assert (mean["name"], std["name"]) == ("mean", "std")
    for a, b, m, s in zip(*(part["results"] for part in (first, second, mean, std)), strict=True):
        assert m["auroc"] == pytest.approx((a["auroc"] + b["auroc"]) / 2)
        assert s["auroc"] == pytest.approx(abs(a["auroc"] - b["auroc"]) / 2**0.5)
        assert (m["dataset"], m["name"], s["name"]) == (a["dataset"], "mean", "std")


def test_a_mistyped_name_lists_those_there_are(run, two_names):
    status, out, err = run("--name", "resnet50", "othr")
    assert (status, out) == (1, "")
    assert "othr; there are: other, resnet50; make it with: " in err
    assert err.endswith("--name othr\n")
