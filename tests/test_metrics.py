"""Every metric against its literal definition, scikit-learn, and cases that tell signs apart."""

import math
from fractions import Fraction

import numpy as np
import pytest
from fitted import auroc_of, fpr95_of
from sklearn.metrics import average_precision_score, roc_auc_score

from lhact.evaluation.metrics import METRICS, all_metrics, fpr95, threshold95, tied_share


def average_precision_by_steps(positives, negatives):
    """Sum over thresholds, from the highest score down, of (recall gained) * precision."""
    area, recall = 0.0, 0.0
    for threshold in sorted({*positives, *negatives}, reverse=True):
        hits = sum(score >= threshold for score in positives)
        false_alarms = sum(score >= threshold for score in negatives)
        area += (hits / len(positives) - recall) * hits / (hits + false_alarms)
        recall = hits / len(positives)
    return 100 * area


def fpr95_ood_positive_by_definition(id_scores, ood_scores):
    """The share of ID at or below the lowest threshold that has 95 % of OOD at or below it."""
    for threshold in sorted(ood_scores):
        caught = sum(score <= threshold for score in ood_scores)
        if Fraction(caught, len(ood_scores)) >= Fraction(95, 100):
            return 100 * sum(score <= threshold for score in id_scores) / len(id_scores)
    raise AssertionError("the highest threshold catches all of OOD")


ORACLES = {
    "fpr95": fpr95_of,
    "auroc": auroc_of,
    "aupr_id": average_precision_by_steps,
    "aupr_ood": lambda i, o: average_precision_by_steps([-s for s in o], [-s for s in i]),
    "fpr95_ood_positive": fpr95_ood_positive_by_definition,
}
# round(0.05 n) falls on each side of a half, and on one at 10, 30, 50 and 70.
SIZES = [(1, 1), (1, 7), (9, 1), (10, 20), (11, 19), (20, 21), (29, 40), (30, 12), (31, 100)]
SIZES += [(50, 60), (70, 3), (137, 101)]
every_metric = pytest.mark.parametrize("name", ORACLES)
KINDS = {
    "no ties": lambda scores: scores,
    "ties": np.round,
    # In the last bits of float32, of which a sigmoid in float32 would make more ties.
    "energies": lambda scores: np.float32(20 + 1e-6 * np.round(40 * scores)),
}


def agrees(name, id_scores, ood_scores):
    found = METRICS[name](id_scores, ood_scores)
    assert type(found) is float
    assert found == pytest.approx(ORACLES[name](list(id_scores), list(ood_scores)), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
@every_metric
def test_metric_is_its_definition(name, sizes, kind):
    generator = np.random.default_rng(sizes)
    pairs = zip((1, 0), (1, 1.5), sizes, strict=True)
    id_scores, ood_scores = (KINDS[kind](generator.normal(*pair)) for pair in pairs)
    copies = id_scores.copy(), ood_scores.copy()
    agrees(name, id_scores, ood_scores)
    np.testing.assert_array_equal(np.hstack([id_scores, ood_scores]), np.hstack(copies))


SCIKIT_LEARN = {
    "auroc": lambda is_id, scores: roc_auc_score(is_id, scores),
    "aupr_id": lambda is_id, scores: average_precision_score(is_id, scores),
    "aupr_ood": lambda is_id, scores: average_precision_score(~is_id, -scores),
}


@pytest.mark.parametrize("decimals", [1, 8], ids=["many ties", "few ties"])
@pytest.mark.parametrize("name", SCIKIT_LEARN)
def test_scikit_learn_agrees_at_the_sizes_of_the_benchmark(name, decimals):
    """float32 scores, too many to be summed in float32."""
    generator, parts = np.random.default_rng(0), ((1, 50_000), (0, 10_000))
    scores = [np.float32(generator.normal(mean, 1, n).round(decimals)) for mean, n in parts]
    is_id = np.arange(60_000) < 50_000
    expected = 100 * SCIKIT_LEARN[name](is_id, np.concatenate(scores))
    assert METRICS[name](*scores) == pytest.approx(expected, abs=1e-9)


# In the order of ORACLES: fpr95, auroc, aupr_id, aupr_ood, fpr95_ood_positive. All by hand.
BY_HAND = {
    # Exchanged classes, a flipped sign or >= for > would give other numbers. The threshold is 2;
    # 3 and 4 of OOD are above it. 2 beats two of OOD, the others all four: 14 of 16 pairs. From
    # above: 7, 6, 5 with precision 1, then 4 and 3 of OOD, then 2 with precision 4/6. From below:
    # 0 and 1 with precision 1, then 2 of ID, then 3 with precision 3/4 and 4 with 4/5. All of OOD
    # is at or below 4, and so is 2 of ID.
    "orientation": ([2, 5, 6, 7], [0, 1, 3, 4], [50, 87.5, 275 / 3, 88.75, 25]),
    # No OOD score is above the threshold. All pairs are ties. Precision is the positive share.
    "all equal": ([3.25] * 40, [3.25] * 10, [0, 50, 80, 20, 100]),
    "tied in pairs": (range(100), range(100), [94, 50, 50, 50, 95]),
    "one image each, right": ([2.0], [1.0], [0, 100, 100, 100, 0]),
    "one image each, wrong": ([1.0], [2.0], [100, 0, 50, 50, 100]),
    "separated": (range(100, 130), range(20), [0, 100, 100, 100, 0]),
    # Six OOD images above all of ID cost one FPR95 everything, the other next to nothing.
    "94 below": (range(100), [-1] * 94 + [999] * 6, [6, 94, None, None, 100]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    id_scores, ood_scores, expected = BY_HAND[case]
    found = all_metrics(id_scores, ood_scores)
    assert list(found) == list(METRICS) == list(ORACLES)
    for value, wanted in zip(found.values(), expected, strict=True):
        assert wanted is None or value == pytest.approx(wanted)


# The threshold; a half goes to the even neighbour, as in Python.
RANKS = [(1, 0), (9, 0), (10, 0), (11, 1), (30, 2), (50, 2), (70, 4), (100, 5), (1000, 50)]


@pytest.mark.parametrize(("n", "rank"), RANKS)
def test_rank_of_the_threshold(n, rank):
    id_scores = np.random.default_rng(n).permutation(n).astype(float)
    assert threshold95(id_scores) == rank
    assert fpr95(id_scores, [rank - 0.5, rank, rank + 0.5, rank + 0.75]) == 50


@pytest.mark.parametrize(("dtype", "equal"), [(np.float32, False), (np.float64, True)])
def test_the_threshold_is_compared_to_the_last_bit(dtype, equal):
    threshold = 20 - 1e-9  # in float32 it is 20, and so above itself
    scores = np.array([threshold, 19], dtype)
    assert fpr95([threshold] * 3, scores) == (0 if equal else 50)
    assert tied_share(scores, threshold) == (50 if equal else 0)
    assert type(threshold95(scores)) is float
    assert threshold95(scores[:1]) == scores[0]


def test_tied_share_counts_equal_scores_alone():
    assert tied_share([1, 2, 2, 3], 2) == 50
    assert tied_share([1, 2, 2, 3], 2.5) == 0
    assert type(tied_share(np.ones(4, np.float32), 1.0)) is float


# Input


@every_metric
def test_integers_lists_and_tuples(name):
    agrees(name, [3, 5, 5, 9, 200], (0, 3, 5))
    agrees(name, np.array([3, 5, 5, 9, 200], np.int32), [0, 3, 5])


BAD = [[], [[1.0, 2.0]], 1.0, [1.0, math.nan], [math.inf, 1.0], [1.0, -math.inf]]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refusals_name_the_argument(bad):
    calls = [("id_scores", threshold95, (bad,)), ("scores", tied_share, (bad, 1.0))]
    for metric in METRICS.values():
        calls += [("id_scores", metric, (bad, [1.0])), ("ood_scores", metric, ([1.0], bad))]
    for name, function, arguments in calls:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got"):
            function(*arguments)
