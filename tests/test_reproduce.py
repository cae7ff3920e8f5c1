"""The search for published settings, on rows whose setting is known because the test made them."""

import dataclasses

import numpy as np
import pytest
import torch
from fitted import energies_of, fpr95_of
from helpers import OOD
from sklearn.metrics import roc_auc_score

from lhact import published
from lhact.cache import open_cache
from lhact.evaluation import reproduce
from lhact.methods.compose import BadMethod

CPU = torch.device("cpu")
MEANS = {"id": 0.8, "iNaturalist": 0.2, "SUN": 0.3, "Places": 0.4, "Textures": 0.1}


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return {
        name: np.maximum(rng.normal(mean, 1, (300, 12)), 0).astype(np.float32)
        for name, mean in MEANS.items()
    }


@pytest.fixture
def closest(tmp_path, write_cache, sets, small_head):
    """closest(): what is found for each published row."""
    folder = write_cache(tmp_path / "net", sets, *small_head)

    def run():
        found = reproduce.reproduce(open_cache(folder, OOD), CPU, with_constants=True)
        return [row.to_json() for row in found]

    return run


def row_of(cap, sets, weight, bias):
    """A row with the (FPR95, AUROC) of ReAct at that cap, in float64."""
    capped = {name: np.minimum(rows.astype(np.float64), cap) for name, rows in sets.items()}
    energies = {name: energies_of(rows, weight, bias) for name, rows in capped.items()}
    is_id = np.arange(600) < 300
    values = {
        name: (
            fpr95_of(energies["id"], energies[name]),
            100 * roc_auc_score(is_id, np.concatenate([energies["id"], energies[name]])),
        )
        for name in OOD
    }
    return published.Row("react", "made here", values)


def test_it_finds_the_setting_that_made_a_row(closest, sets, small_head, monkeypatch):
    """A cap of 0.65 lies on the refined grid, between two points of the first one."""
    monkeypatch.setattr(published, "ROWS", [row_of(0.65, sets, *small_head)])
    (found,) = closest()
    assert (found["method"], found["source"]) == ("react", "made here")
    assert found["parameters"]["high"] == pytest.approx(0.65)
    assert found["distance"] == pytest.approx(0, abs=1e-3)
    assert np.abs(list(found["differences"].values())).max() < 1e-3
    assert found["default"]["parameters"] == {"high": 1.0}
    assert found["default"]["distance"] > 0.1


def test_differences_are_ours_minus_published(closest, sets, small_head, monkeypatch):
    exact = row_of(0.6, sets, *small_head)
    lower = {name: (fpr95 - 0.25, auroc + 0.5) for name, (fpr95, auroc) in exact.values.items()}
    monkeypatch.setattr(published, "ROWS", [dataclasses.replace(exact, values=lower)])
    monkeypatch.setattr(reproduce, "AXES", {"react": {"high": [0.6, 0.6]}})
    (found,) = closest()
    for difference in found["differences"].values():
        assert difference == pytest.approx([0.25, -0.5], abs=1e-3)
    assert found["distance"] == pytest.approx(np.sqrt((0.25**2 + 0.5**2) / 2), abs=1e-3)


def test_every_confirmed_row_of_the_four_methods_is_searched_for(closest, monkeypatch):
    small = {"low": [0.1, 0.2], "high": [1.0, 1.5], "order": [1, 2], "lambda": [1.0, 1.5]}
    axes = {name: {axis: small[axis] for axis in axes} for name, axes in reproduce.AXES.items()}
    monkeypatch.setattr(reproduce, "AXES", axes)
    found = closest()
    assert [row["method"] for row in found] == ["react", "react", "bfact", "bats", "lhact"]
    assert len({row["source"] for row in found if row["method"] == "react"}) == 2
    assert all(row["distance"] <= row["default"]["distance"] for row in found)


def test_without_any_published_set(tmp_path, write_cache, small_sets, small_head):
    sets = {"id": small_sets["id"], "birds": small_sets["SUN"]}
    opened = open_cache(write_cache(tmp_path / "net", sets, *small_head), OOD)
    with pytest.raises(BadMethod, match="iNaturalist, SUN, Places, Textures"):
        reproduce.reproduce(opened, CPU, True)
