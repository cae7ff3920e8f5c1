"""Which setting a method gets when it is chosen on a held-out set, against a brute-force search."""

import numpy as np
import pytest
import torch
from fitted import energies_of, fpr95_of, logits_of
from helpers import OOD

from lhact.cache import BadCache, open_cache
from lhact.evaluation import select
from lhact.evaluation.score import fit_methods
from lhact.methods.compose import BadMethod, parse_sweep, variants

CPU = torch.device("cpu")
CAPS = (0.1, 0.4, 0.8, 1.2, 2.5)
SWEEP = f"react.high={','.join(map(str, CAPS))}"


@pytest.fixture
def small_sets():
    """Sets on which the cap matters: OOD activations are smaller, with rare high ones."""
    rng = np.random.default_rng(5)
    sets = {name: np.abs(rng.normal(0.6, 0.3, (100, 12))) for name in ("id", "calibration")}
    for name, high in zip(OOD, (1.0, 2.0, 3.0, 4.0), strict=True):
        rows = np.abs(rng.normal(0.3, 0.3, (80, 12)))
        sets[name] = np.where(rng.random(rows.shape) < 0.1, rows + high, rows)
    return {name: rows.astype(np.float32) for name, rows in sets.items()}


@pytest.fixture
def small_head(small_head):
    """Weights above 0: more activation is more energy."""
    return np.abs(small_head[0]), small_head[1]


@pytest.fixture
def opened(tmp_path, write_cache, small_sets, small_head):
    return open_cache(write_cache(tmp_path / "net", small_sets, *small_head), OOD)


@pytest.fixture
def other(tmp_path, write_cache, small_sets, small_head):
    """other(folder, ...): another cache of the same network, with seven images of noise."""

    def write(folder="other", **changed):
        sets = {"id": small_sets["id"], "noise": small_sets["SUN"][:7]}
        return write_cache(tmp_path / folder, sets, *small_head, **changed)

    return write


def choose(opened, on, *sweeps, names=("react",)):
    """The settings chosen on that set of the cache, and the cache that is left to test on."""
    selection = select.hold_out(opened, on)
    methods = variants(names, [], [*map(parse_sweep, sweeps)], False)
    return select.select(selection, fit_methods(opened, methods, CPU), CPU), selection.cache


def react_fpr95(id_rows, ood_rows, head, cap):
    """FPR95 of ReAct at a cap, ID positive, in float64 by its definition."""
    return fpr95_of(*(energies_of(np.minimum(rows, cap), *head) for rows in (id_rows, ood_rows)))


@pytest.mark.parametrize("held_out", OOD)
def test_the_setting_is_the_best_on_calibration_images_against_the_held_out_set(
    opened, small_sets, small_head, held_out
):
    (chosen,), left = choose(opened, held_out, SWEEP)
    rows = small_sets["calibration"], small_sets[held_out]
    found = [react_fpr95(*rows, small_head, cap) for cap in CAPS]
    assert found[CAPS.index(chosen.parameters["high"])] == min(found) < max(found)
    assert left.ood == [name for name in OOD if name != held_out]


def test_the_test_sets_have_no_say(tmp_path, opened, write_cache, small_sets, small_head):
    kept = {name: small_sets[name] for name in ("calibration", "SUN")}
    others = {name: np.ascontiguousarray(3 - rows) for name, rows in small_sets.items()}
    folder = write_cache(tmp_path / "others", {**others, **kept}, *small_head)
    caches = opened, open_cache(folder, OOD)
    first, second = (choose(each, "SUN", SWEEP)[0][0].parameters for each in caches)
    assert first == second


def test_each_method_is_chosen_for_itself(opened):
    sweeps = ("react.high=0.4,2.5", "lhact.order=1,2,4")
    chosen, _ = choose(opened, "SUN", *sweeps, names=("react", "energy", "lhact"))
    assert [method.name for method in chosen] == ["react", "energy", "lhact"]


def test_sets_that_are_no_test_sets(opened, other, write_cache, small_sets, small_head):
    """Of another cache, whose name may also be that of a set of this one; and noise."""
    write_cache(opened.folder / "selection", {"gaussian": small_sets["SUN"][:9]}, *small_head)
    for choice, images in ((f"noise={other()}", 7), ("gaussian", 9)):
        on = select.hold_out(opened, choice)
        assert on.cache.ood == list(OOD)
        assert on.chosen_on.images == images


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("Mars", r"no such OOD set; it has iNaturalist, SUN"),
        ("id=other", "id is none"),
        ("calibration", "calibration is none"),
        ("gaussian", r"get_activation\.py again with --gaussian"),
        ("id", "needs calibration images with labels"),
    ],
)
def test_no_such_set(opened, choice, message):
    with pytest.raises(BadMethod, match=message):
        choose(opened, choice, SWEEP)


def test_nothing_left_to_test_on(other):
    with pytest.raises(BadMethod, match="no other OOD set would be left"):
        select.hold_out(open_cache(other(), OOD), "noise")


def test_a_set_of_another_network(opened, other):
    folder = other(network={"sha256": "1" * 64})
    with pytest.raises(BadCache, match="sha256"):
        select.hold_out(opened, f"noise={folder}")
    with pytest.raises(BadCache, match=r"Mars\.json is missing"):
        select.hold_out(opened, f"Mars={folder}")


def test_on_id_alone_it_is_the_strongest_cap_that_costs_at_most_a_point(
    tmp_path, write_cache, small_sets, small_head
):
    """Brute force in float64: labels are the plain predictions, so that each setting's cost is its
    share of changed predictions."""
    caps = (0.3, 0.6, 0.9, 1.0, 1.1, 1.2, 1.3, 2.0)
    capped = {cap: np.minimum(small_sets["calibration"], cap) for cap in (*caps, np.inf)}
    predicted = {c: logits_of(rows, *small_head).argmax(axis=1) for c, rows in capped.items()}
    energies = {cap: energies_of(rows, *small_head) for cap, rows in capped.items()}
    labels = {"calibration": predicted[np.inf].tolist()}
    opened = open_cache(write_cache(tmp_path / "net", small_sets, *small_head, labels=labels), OOD)
    allowed = [c for c in caps if 100 * np.mean(predicted[c] != predicted[np.inf]) <= 1]
    assert 1 < len(allowed) < len(caps)
    wanted = max(allowed, key=lambda cap: np.mean(np.abs(energies[cap] - energies[np.inf])))
    ((chosen,), left) = choose(opened, "id", f"react.high={','.join(map(str, caps))}")
    assert chosen.parameters == {"high": wanted}
    assert left.ood == list(OOD)


def test_the_first_of_equals_is_chosen_then_the_higher_auroc(opened, monkeypatch):
    """Two caps that do the same, and three that FPR95 cannot tell apart."""
    ((chosen,), _) = choose(opened, "SUN", "react.high=50,60")
    assert chosen.parameters == {"high": 50}
    aurocs = iter([80.0, 90.0, 85.0])
    monkeypatch.setattr(select, "fpr95", lambda *_: 7.0)
    monkeypatch.setattr(select, "auroc", lambda *_: next(aurocs))
    ((chosen,), _) = choose(opened, "SUN", "react.high=1,2,3")
    assert chosen.parameters == {"high": 2}


def test_constant_scores_are_never_chosen(opened):
    """A cap of 0 makes all activations and scores the same: strictly above them lies no image."""
    ((chosen,), _) = choose(opened, "SUN", "react.high=0,2.5")
    assert chosen.parameters == {"high": 2.5}
