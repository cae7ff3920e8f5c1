"""Every metric against a literal reading of its definition, and cases in which the wrong class or sign gives another number."""

import math
from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from lhact.evaluation.metrics import METRICS, all_metrics, aupr_id, aupr_ood, auroc, fpr95, fpr95_ood_positive


def fpr95_by_definition(id_scores, ood_scores):
    """The definition: threshold = sorted_ID[round(0.05 n)], FPR95 = mean(OOD > threshold)."""
    threshold = sorted(id_scores)[round(0.05 * len(id_scores))]
    return 100 * sum(score > threshold for score in ood_scores) / len(ood_scores)


def auroc_by_pairs(id_scores, ood_scores):
    """Wins of ID over OOD among all pairs, a tie being half a win."""
    wins = sum(1.0 if i > o else 0.5 if i == o else 0.0 for i in id_scores for o in ood_scores)
    return 100 * wins / (len(id_scores) * len(ood_scores))


def average_precision_by_steps(positives, negatives):
    """Sum over thresholds, from the highest score down, of (recall gained) * (precision there); equal scores come in together."""
    area, recall = 0.0, 0.0
    for threshold in sorted({*positives, *negatives}, reverse=True):
        hits = sum(score >= threshold for score in positives)
        false_alarms = sum(score >= threshold for score in negatives)
        area += (hits / len(positives) - recall) * hits / (hits + false_alarms)
        recall = hits / len(positives)
    return 100 * area


def fpr95_ood_positive_by_definition(id_scores, ood_scores):
    """The lowest threshold at or below which lie 95 % of OOD; the share of ID at or below it."""
    for threshold in sorted({*id_scores, *ood_scores}):
        if Fraction(sum(score <= threshold for score in ood_scores), len(ood_scores)) >= Fraction(95, 100):
            return 100 * sum(score <= threshold for score in id_scores) / len(id_scores)
    raise AssertionError("the highest threshold holds all of OOD")


ORACLES = {
    "fpr95": fpr95_by_definition,
    "auroc": auroc_by_pairs,
    "aupr_id": average_precision_by_steps,
    "aupr_ood": lambda id_scores, ood_scores: average_precision_by_steps([-s for s in ood_scores], [-s for s in id_scores]),
    "fpr95_ood_positive": fpr95_ood_positive_by_definition,
}
# Sizes at which round(0.05 n) falls on each side of a half, and on one: 10, 30, 50 and 70.
SIZES = [(1, 1), (1, 7), (9, 1), (10, 20), (11, 19), (20, 21), (29, 40), (30, 12), (31, 100), (50, 60), (70, 3), (137, 101)]


def drawn(n_id, n_ood, ties):
    generator = np.random.default_rng(1000 * n_id + n_ood)
    id_scores, ood_scores = generator.normal(1, 1, n_id), generator.normal(0, 1.5, n_ood)
    return (np.round(id_scores), np.round(ood_scores)) if ties else (id_scores, ood_scores)


def test_every_metric_has_an_oracle():
    assert list(METRICS) == list(ORACLES)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", METRICS)
def test_metric_is_its_definition(name, sizes, ties):
    id_scores, ood_scores = drawn(*sizes, ties)
    expected = ORACLES[name](id_scores.tolist(), ood_scores.tolist())
    assert METRICS[name](id_scores, ood_scores) == pytest.approx(expected, abs=1e-9)


SCIKIT_LEARN = {
    "auroc": lambda is_id, scores: roc_auc_score(is_id, scores),
    "aupr_id": lambda is_id, scores: average_precision_score(is_id, scores),
    "aupr_ood": lambda is_id, scores: average_precision_score(~is_id, -scores),
}


@pytest.mark.parametrize("digits", [1, 8], ids=["many ties", "few ties"])
@pytest.mark.parametrize("name", SCIKIT_LEARN)
def test_scikit_learn_gives_the_same_at_the_sizes_of_the_benchmark(name, digits):
    generator = np.random.default_rng(0)
    id_scores, ood_scores = (np.float32(generator.normal(mean, 1, n).round(digits)) for mean, n in ((1, 50_000), (0, 10_000)))
    is_id = np.arange(60_000) < 50_000
    expected = 100 * SCIKIT_LEARN[name](is_id, np.concatenate([id_scores, ood_scores]))
    assert METRICS[name](id_scores, ood_scores) == pytest.approx(expected, abs=1e-9)


def test_all_metrics_is_each_of_them_by_name():
    id_scores, ood_scores = drawn(30, 12, ties=False)
    assert all_metrics(id_scores, ood_scores) == {name: metric(id_scores, ood_scores) for name, metric in METRICS.items()}


# Orientation


def test_orientation_by_hand():
    """Four ID and four OOD scores for which every other reading (classes exchanged, sign flipped, >=) gives another number."""
    id_scores, ood_scores = [2.0, 5.0, 6.0, 7.0], [0.0, 1.0, 3.0, 4.0]
    # round(0.2) = 0: the threshold is 2, and 3 and 4 of OOD are above it.
    assert fpr95(id_scores, ood_scores) == 50
    # 2 beats two of OOD, the others all four: 14 of 16 pairs.
    assert auroc(id_scores, ood_scores) == 87.5
    # From above: 7, 6, 5 with precision 1, then 4 and 3 of OOD, then 2 with precision 4/6.
    assert aupr_id(id_scores, ood_scores) == pytest.approx(100 * (3 + 4 / 6) / 4)
    # From below: 0, 1 with precision 1, then 2 of ID, then 3 with precision 3/4 and 4 with precision 4/5.
    assert aupr_ood(id_scores, ood_scores) == pytest.approx(100 * (2 + 3 / 4 + 4 / 5) / 4)
    # All of OOD is at or below 4, and so is 2 of ID.
    assert fpr95_ood_positive(id_scores, ood_scores) == 25


@pytest.mark.parametrize("name", METRICS)
def test_wrong_class_or_sign_gives_another_number(name):
    id_scores, ood_scores = drawn(137, 101, ties=False)
    right = METRICS[name](id_scores, ood_scores)
    assert abs(METRICS[name](ood_scores, id_scores) - right) > 3
    assert abs(METRICS[name](-id_scores, -ood_scores) - right) > 3


@pytest.mark.parametrize("name", METRICS)
def test_perfect_and_inverted_separation(name):
    low, high = np.arange(20.0), np.arange(100.0, 130.0)
    lower_is_better = name.startswith("fpr95")
    assert METRICS[name](high, low) == pytest.approx(0 if lower_is_better else 100)
    inverted = METRICS[name](low, high)
    assert inverted == 100 if lower_is_better else inverted < 50


def test_the_two_fpr95_are_not_each_other():
    """A few OOD images that look like ID cost the OOD-positive convention everything, the ID-positive one next to nothing."""
    id_scores, ood_scores = np.arange(100.0), np.concatenate([np.full(90, -1.0), np.full(10, 1000.0)])
    assert fpr95(id_scores, ood_scores) == 10
    assert fpr95_ood_positive(id_scores, ood_scores) == 100


# Ties, single images, equal scores


def test_an_ood_score_at_the_threshold_does_not_pass():
    id_scores = np.arange(20.0)  # threshold: sorted_ID[1] = 1
    assert fpr95(id_scores, [1.0]) == 0
    assert fpr95(id_scores, [np.nextafter(1.0, 2.0)]) == 100


@pytest.mark.parametrize(("n", "rank"), [(1, 0), (9, 0), (10, 0), (11, 1), (30, 2), (50, 2), (70, 4), (100, 5), (1000, 50)])
def test_rank_of_the_threshold(n, rank):
    """round(0.05 n), a half going to the even neighbour as in Python: exactly the OOD scores above that rank pass."""
    id_scores = np.random.default_rng(n).permutation(n).astype(float)
    assert fpr95(id_scores, [rank - 0.5, rank, rank + 0.5, rank + 0.75]) == 50


def test_all_scores_equal():
    scores = all_metrics(np.full(40, 3.25), np.full(10, 3.25))
    # No OOD score is above the threshold; every pair is a tie; precision is the share of the positive class; all of ID is caught.
    expected = {"fpr95": 0, "auroc": 50, "aupr_id": 80, "aupr_ood": 20, "fpr95_ood_positive": 100}
    assert scores == pytest.approx(expected)


def test_id_and_ood_tied_in_pairs():
    """Points on a straight line of the ROC curve are thresholds too: 95 of 100 OOD images need no more than 95 of ID."""
    scores = np.arange(100.0)
    expected = {"fpr95": 94, "auroc": 50, "aupr_id": 50, "aupr_ood": 50, "fpr95_ood_positive": 95}
    assert all_metrics(scores, scores) == pytest.approx(expected)


def test_one_image_each():
    assert all_metrics([2.0], [1.0]) == {"fpr95": 0, "auroc": 100, "aupr_id": 100, "aupr_ood": 100, "fpr95_ood_positive": 0}
    assert all_metrics([1.0], [2.0]) == {"fpr95": 100, "auroc": 0, "aupr_id": 50, "aupr_ood": 50, "fpr95_ood_positive": 100}


# Input


@pytest.mark.parametrize("name", METRICS)
def test_float32_energies_that_differ_in_the_last_digits(name):
    """A sigmoid or a sum in float32 would make ties of them: 20 + 1e-6 k is two units in the last place at most."""
    generator = np.random.default_rng(7)
    id_scores = (20 + 1e-6 * generator.integers(0, 80, 90)).astype(np.float32)
    ood_scores = (20 + 1e-6 * generator.integers(-40, 60, 70)).astype(np.float32)
    assert len(np.unique(id_scores)) > 20
    expected = ORACLES[name](id_scores.tolist(), ood_scores.tolist())
    assert METRICS[name](id_scores, ood_scores) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_float32_is_not_summed_in_float32(name):
    """Tens of thousands of float32 scores give what the same numbers give as float64."""
    generator = np.random.default_rng(8)
    id_scores, ood_scores = generator.normal(13, 3, 50_000).astype(np.float32), generator.normal(11, 3, 10_000).astype(np.float32)
    exact = METRICS[name](id_scores.astype(np.float64), ood_scores.astype(np.float64))
    assert METRICS[name](id_scores, ood_scores) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_integers_and_lists(name):
    id_scores, ood_scores = [3, 5, 5, 9, 200], [0, 3, 5]
    expected = ORACLES[name](id_scores, ood_scores)
    assert METRICS[name](id_scores, ood_scores) == pytest.approx(expected)
    assert METRICS[name](np.array(id_scores, np.int32), tuple(ood_scores)) == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_order_of_the_images_does_not_matter_and_arguments_stay(name):
    id_scores, ood_scores = drawn(31, 100, ties=True)
    copies = id_scores.copy(), ood_scores.copy()
    first = METRICS[name](id_scores, ood_scores)
    np.testing.assert_array_equal(id_scores, copies[0])
    np.testing.assert_array_equal(ood_scores, copies[1])
    assert METRICS[name](id_scores[::-1], np.sort(ood_scores)) == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_result_is_a_float_in_percent(name):
    value = METRICS[name](*drawn(31, 100, ties=False))
    assert type(value) is float
    assert 1 < value <= 100


@pytest.mark.parametrize("bad", [[], [[1.0, 2.0]], 1.0, [1.0, math.nan], [math.inf, 1.0], [1.0, -math.inf]], ids=str)
@pytest.mark.parametrize("name", METRICS)
def test_refusals_name_the_argument(name, bad):
    with pytest.raises(ValueError, match=r"id_scores must be .*, got"):
        METRICS[name](bad, [1.0])
    with pytest.raises(ValueError, match=r"ood_scores must be .*, got"):
        METRICS[name]([1.0], bad)
