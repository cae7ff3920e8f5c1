"""Fitting: what a fit is handed, what a fitted method shows and computes, what it refuses."""

import numpy as np
import pytest
import torch
from fitted import logits_of
from scipy.special import logsumexp

from lhact.methods.compose import (
    BadMethod,
    known_methods,
    parse,
    parse_setting,
    variants,
)
from lhact.methods.entries import Count, Percentile, Rectifier, Score, parameter_range
from lhact.methods.fit import Calibration, Head, fit, fit_all
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

LOW, HIGH = 0.21940805315971373, 1.3520756840705868


@pytest.fixture
def head(small_head):
    return Head(*map(torch.from_numpy, small_head))


@pytest.fixture
def calibration(small_sets):
    batches = torch.from_numpy(small_sets["calibration"]).split(16)
    return Calibration(batches, torch.arange(40) % 5)


def percentile(small_sets, percent):
    return np.percentile(small_sets["calibration"].astype(np.float64), percent)


def test_a_fitted_method_shows_thresholds_beside_their_percentiles(calibration, head, small_sets):
    """Which are those of plain activations, whatever stands before."""
    fitted = fit(parse("react+lhact"), calibration, head)
    wanted = {
        "react.high": percentile(small_sets, 90),
        "react.high_percentile": 90,
        "low": percentile(small_sets, 33.7),
        "low_percentile": 33.7,
        "lhact.high": percentile(small_sets, 95.5),
        "lhact.high_percentile": 95.5,
        "order": 2,
    }
    assert fitted.parameters == pytest.approx(wanted, rel=1e-12)
    assert list(fitted.parameters) == list(wanted)
    published = fit(parse("lhact", published=True), calibration, head)
    assert published.parameters == {"low": LOW, "high": HIGH, "order": 2}


def test_the_parameters_shown_are_those_used(calibration, head):
    """Never `dim 0`, never a bank of 12,812 over 40 rows."""
    assert fit(parse("vim"), calibration, head).parameters == {"dim": 6}
    assert fit(parse("nnguide"), calibration, head).parameters == {"k": 10, "bank": 40}
    assert fit(parse("knn"), calibration, head).parameters == {"k": 10}


def test_methods_that_begin_alike_hold_the_same_steps(calibration, head):
    names = ["lhact", "lhact+msp", "lhact+react", "react"]
    first, second, third, other = fit_all([parse(name) for name in names], calibration, head)
    assert first.rectifiers == second.rectifiers
    assert third.rectifiers[0] is first.rectifiers[0]
    assert third.rectifiers[1] is not other.rectifiers[0], "fitted behind another rectifier"


def test_settings_of_a_sweep_are_fitted_apart(calibration, head, small_sets, small_head):
    sweeps = [
        [parse_setting(f"react.high={value}") for value in (0.5, 1.5)],
        [parse_setting(f"energy.temperature={value}") for value in (1, 4)],
    ]
    fitted = fit_all(variants(["react+energy"], [], sweeps, False), calibration, head)
    rows = small_sets["id"].astype(np.float64)
    capped = [logits_of(np.minimum(rows, high), *small_head) for high in (0.5, 1.5)]
    wanted = [t * logsumexp(logits / t, axis=1) for logits in capped for t in (1, 4)]
    found = [method(torch.from_numpy(small_sets["id"])).numpy() for method in fitted]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_fit_is_handed_what_it_names_once(calibration, head, monkeypatch):
    seen = []

    def fit_own(calibration, labels, bias, shift):
        seen.append((len(list(calibration)), len(list(calibration)), len(labels), shift))
        return {"mean": torch.tensor(2.0)}

    def function(activations, logits, bias, mean, shift=0.0):
        return activations.sum(dim=1) * mean + shift + logits.sum(dim=1) + bias.sum()

    monkeypatch.setitem(SCORES, "own", Score(function, {"shift": 10}, fit_own))
    fitted = fit(parse("own"), calibration, head)
    assert fitted.score.inputs == ("activations", "logits")
    rows = torch.rand(3, 12)
    logits = rows @ head.weight.T + head.bias
    wanted = rows.sum(dim=1) * 2 + 10 + logits.sum(dim=1) + head.bias.sum()
    for _ in range(2):
        torch.testing.assert_close(fitted(rows), wanted)
    assert seen == [(3, 3, 40, 10)]


def test_what_lacks_labels_is_told_before_any_work(head, calibration):
    """The eigenvectors of vim take seconds; that mahalanobis has no labels is known at once."""
    told = []

    class Read:
        def __iter__(self):
            told.append("read")
            return iter(calibration.batches)

    methods = [parse(name) for name in ("vim", "mahalanobis", "msp")]
    fitted = fit_all(methods, Calibration(Read()), head, lambda m, e: told.append(m.name))
    assert told[0] == "mahalanobis"
    assert [method.name for method in fitted] == ["vim", "msp"]
    with pytest.raises(BadMethod, match="mahalanobis: needs labels"):
        fit(parse("mahalanobis"), Calibration(calibration.batches), head)


def test_a_generator_is_refused(head, calibration):
    with pytest.raises(ValueError, match="calibration is read several times"):
        fit(parse("vim"), Calibration(iter(calibration.batches)), head)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("lhact", "lhact.high=0.001", "lies above high"),
        ("bfact", "bfact.high=0", "bfact: high must be above 0"),
        # On sparse activations a low percentile is 0.
        ("bfact", "bfact.high_percentile=10", "bfact: high must be above 0"),
        ("knn", "knn.k=41", "knn: .*1 to 40"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(name, setting, message, calibration, head):
    (method,) = variants([name], [parse_setting(setting)], [], False)
    with pytest.raises(BadMethod, match=message):
        fit(method, calibration, head)


def test_ranges_stand_in_signatures():
    def function(activations, share: float, k: Count, plain: int):
        return activations

    entry = Rectifier(function, {"share": 0.5, "k": 3, "plain": 1})
    assert parameter_range(entry, "share").wanted == "a finite number"
    assert parameter_range(entry, "k").wanted == parameter_range(entry, "plain").wanted
    assert not parameter_range(entry, "plain").holds(1.5)
    with pytest.raises(KeyError):
        parameter_range(entry, "nowhere")
    with pytest.raises(ValueError, match="between 0 and 100, got 101"):
        Percentile(101)


def test_a_new_rectifier_is_a_function_and_an_entry(
    monkeypatch, calibration, head, small_sets, small_head
):
    """A few lines make a method: alone and composed, with settings, calibrated and published."""

    def cut(activations, high, share=0.5):
        return torch.where(activations > high, share * activations, activations)

    entry = Rectifier(cut, {"high": Percentile(80), "share": 0.5}, {"high": 1.25})
    monkeypatch.setitem(RECTIFIERS, "cut", entry)
    assert "cut" in known_methods()
    assert parse("cut", published=True).parameters() == {"high": 1.25, "share": 0.5}
    methods = variants(["cut", "cut+maxlogit"], [parse_setting("cut.share=0.25")], [], False)
    alone, composed = fit_all(methods, calibration, head)
    high = percentile(small_sets, 80)
    rows = small_sets["SUN"].astype(np.float64)
    logits = logits_of(np.where(rows > high, 0.25 * rows, rows), *small_head)
    found = torch.from_numpy(small_sets["SUN"])
    np.testing.assert_allclose(alone(found), logsumexp(logits, axis=1), rtol=1e-5)
    np.testing.assert_allclose(composed(found), logits.max(axis=1), rtol=1e-5, atol=1e-6)
    assert alone.parameters["high"] == pytest.approx(high, rel=1e-12)
