"""The search for published settings, on rows whose setting is known because the test made them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lhact import published
from lhact.cache import open_cache
from lhact.evaluation import reproduce
from lhact.methods.compose import BadMethod

CPU = torch.device("cpu")
OOD = list(published.DATASETS)


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    shapes = {
        "id": (400, 0.8),
        "iNaturalist": (300, 0.2),
        "SUN": (300, 0.3),
        "Places": (300, 0.4),
        "Textures": (300, 0.1),
    }
    return {
        name: np.maximum(rng.normal(mean, 1, (rows, 12)), 0).astype(np.float32)
        for name, (rows, mean) in shapes.items()
    }


@pytest.fixture
def folder(tmp_path, write_cache, sets, small_head):
    return write_cache(
        tmp_path / "net",
        sets,
        *small_head,
        network={"arch": "resnet50", "weights": "IMAGENET1K_V1"},
    )


def row_of(rectified, sets, weight, bias):
    """dataset -> (FPR95, AUROC) of a rectifier with the energy score, in float64."""
    energies = {}
    for name, rows in sets.items():
        logits = rectified(rows.astype(np.float64)) @ weight.astype(np.float64).T + bias
        energies[name] = np.log(np.exp(logits).sum(axis=1))
    threshold = sorted(energies["id"])[round(0.05 * len(energies["id"]))]
    is_id = [1] * len(energies["id"])
    return {
        name: (
            100 * np.mean(energies[name] > threshold),
            100
            * roc_auc_score(
                is_id + [0] * len(energies[name]), np.concatenate([energies["id"], energies[name]])
            ),
        )
        for name in OOD
    }


def test_it_finds_the_setting_that_made_a_row(folder, sets, small_head, monkeypatch):
    """A cap of 0.65 lies on the refined grid, between two points of the first one."""
    row = published.Row(
        "react", "made here", row_of(lambda z: np.minimum(z, 0.65), sets, *small_head)
    )
    monkeypatch.setattr(published, "ROWS", [row])
    (closest,) = reproduce.reproduce(open_cache(folder, OOD), CPU, with_constants=True)
    found = closest.to_json()
    assert found["method"] == "react"
    assert found["source"] == "made here"
    assert found["parameters"]["high"] == pytest.approx(0.65)
    assert found["distance"] == pytest.approx(0, abs=1e-3)
    assert np.abs(list(found["differences"].values())).max() < 1e-3
    assert found["default"]["parameters"] == {"high": 1.0}
    assert found["default"]["distance"] > 0.1


def test_differences_are_ours_minus_published(folder, sets, small_head, monkeypatch):
    exact = row_of(lambda z: np.minimum(z, 0.6), sets, *small_head)
    lower = {name: (fpr95 - 0.25, auroc + 0.5) for name, (fpr95, auroc) in exact.items()}
    monkeypatch.setattr(published, "ROWS", [published.Row("react", "made here", lower)])
    monkeypatch.setattr(reproduce, "AXES", {"react": {"high": [0.6, 0.6]}})
    (closest,) = reproduce.reproduce(open_cache(folder, OOD), CPU, with_constants=True)
    found = closest.to_json()
    for difference in found["differences"].values():
        assert difference == pytest.approx([0.25, -0.5], abs=1e-3)
    assert found["distance"] == pytest.approx(np.sqrt((0.25**2 + 0.5**2) / 2), abs=1e-3)


def test_every_confirmed_row_of_the_four_methods_is_searched_for(folder, monkeypatch):
    small = {"low": [0.1, 0.2], "high": [1.0, 1.5], "order": [1, 2], "lambda": [1.0, 1.5]}
    axes = {name: {axis: small[axis] for axis in axes} for name, axes in reproduce.AXES.items()}
    monkeypatch.setattr(reproduce, "AXES", axes)
    closest = reproduce.reproduce(open_cache(folder, OOD), CPU, with_constants=True)
    found = [row.to_json() for row in closest]
    assert [row["method"] for row in found] == ["react", "react", "bfact", "bats", "lhact"]
    assert len({row["source"] for row in found if row["method"] == "react"}) == 2
    assert all(row["distance"] <= row["default"]["distance"] for row in found)


def test_without_any_published_set(tmp_path, write_cache, small_sets, small_head):
    sets = {"id": small_sets["id"], "birds": small_sets["SUN"]}
    with pytest.raises(BadMethod, match="iNaturalist, SUN, Places, Textures"):
        reproduce.reproduce(
            open_cache(write_cache(tmp_path / "net", sets, *small_head), OOD), CPU, True
        )
