"""Which setting a method gets when it is chosen on a held-out set, against a brute-force search."""

import numpy as np
import pytest
import torch

from lhact.cache import BadCache, open_cache
from lhact.evaluation import select
from lhact.evaluation.score import fit_methods
from lhact.methods.compose import BadMethod, parse_sweep, variants

CPU = torch.device("cpu")
OOD = ["iNaturalist", "SUN", "Places", "Textures"]
CAPS = (0.1, 0.4, 0.8, 1.2, 2.5)


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


def choose(opened, on, methods):
    """The settings chosen on that set of the cache, and the cache that is left to test on."""
    selection = select.hold_out(opened, on)
    return select.select(selection, fit_methods(opened, methods, CPU), CPU), selection.cache


def react_fpr95(id_rows, ood_rows, weight, bias, cap):
    """FPR95 of ReAct at a cap, ID positive, in float64 by its definition."""

    def energies(rows):
        logits = np.minimum(rows.astype(np.float64), cap) @ weight.astype(np.float64).T + bias
        return np.log(np.exp(logits).sum(axis=1))

    id_scores = sorted(energies(id_rows))
    return np.mean(
        [score > id_scores[round(0.05 * len(id_scores))] for score in energies(ood_rows)]
    )


@pytest.mark.parametrize("held_out", OOD)
def test_the_setting_is_the_best_on_calibration_images_against_the_held_out_set(
    opened, small_sets, small_head, held_out
):
    sweep = parse_sweep(f"react.high={','.join(map(str, CAPS))}")
    chosen, left = choose(opened, held_out, variants(["react"], [], [sweep], False))
    found = [
        react_fpr95(small_sets["calibration"], small_sets[held_out], *small_head, cap)
        for cap in CAPS
    ]
    assert len(chosen) == 1
    assert found[CAPS.index(chosen[0].parameters["high"])] == min(found) < max(found)
    assert left.ood == [name for name in OOD if name != held_out]


def test_the_test_sets_have_no_say(tmp_path, write_cache, small_sets, small_head):
    sweep = [
        parse_sweep("react.high=0.1,0.4,0.8,1.2,2.5"),
        parse_sweep("react.high=2.5,1.2,0.8,0.4,0.1"),
    ]
    others = {
        name: rows if name in ("calibration", "SUN") else np.ascontiguousarray(3 - rows)
        for name, rows in small_sets.items()
    }
    choices = []
    for number, sets in enumerate((small_sets, others)):
        opened = open_cache(write_cache(tmp_path / str(number), sets, *small_head), OOD)
        methods = variants(["react"], [], [sweep[0]], False)
        choices.append(choose(opened, "SUN", methods)[0][0].parameters)
    assert choices[0] == choices[1]


def test_each_method_is_chosen_for_itself(opened):
    methods = variants(
        ["react", "energy", "lhact"],
        [],
        [parse_sweep("react.high=0.4,2.5"), parse_sweep("lhact.order=1,2,4")],
        False,
    )
    assert len(methods) == 6
    chosen, _ = choose(opened, "SUN", methods)
    assert [method.name for method in chosen] == ["react", "energy", "lhact"]


def test_a_set_of_another_cache(opened, tmp_path, write_cache, small_sets, small_head):
    other = write_cache(
        tmp_path / "other", {"id": small_sets["id"], "noise": small_sets["SUN"][:7]}, *small_head
    )
    on = select.hold_out(opened, f"noise={other}")
    assert on.cache.ood == OOD, "its name may also be that of a set of this cache"
    assert on.chosen_on.images == 7


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("Mars", r"no such OOD set; it has iNaturalist, SUN"),
        ("id=other", "id is none"),
        ("calibration", "calibration is none"),
    ],
)
def test_no_such_set(opened, choice, message):
    with pytest.raises(BadMethod, match=message):
        select.hold_out(opened, choice)


def test_nothing_left_to_test_on(tmp_path, write_cache, small_sets, small_head):
    sets = {"id": small_sets["id"], "SUN": small_sets["SUN"]}
    with pytest.raises(BadMethod, match="no other OOD set would be left"):
        select.hold_out(open_cache(write_cache(tmp_path / "net", sets, *small_head), OOD), "SUN")


def test_a_set_of_another_network(opened, tmp_path, write_cache, small_sets, small_head):
    sets = {"id": small_sets["id"], "noise": small_sets["SUN"]}
    other = write_cache(tmp_path / "other", sets, *small_head, network={"sha256": "1" * 64})
    with pytest.raises(BadCache, match="sha256"):
        select.hold_out(opened, f"noise={other}")
    with pytest.raises(BadCache, match=r"Mars\.json is missing"):
        select.hold_out(opened, f"Mars={other}")


def test_on_id_alone_it_is_the_strongest_cap_that_costs_at_most_a_point(
    tmp_path, write_cache, small_sets, small_head
):
    """Brute force in float64: labels are the plain predictions, so that each setting's cost is its
    share of changed predictions."""
    weight, bias = small_head
    rows = small_sets["calibration"].astype(np.float64)

    def logits(cap):
        return np.minimum(rows, cap) @ weight.astype(np.float64).T + bias

    def energies(cap):
        return np.log(np.exp(logits(cap)).sum(axis=1))

    plain = logits(np.inf).argmax(axis=1)
    labels = {"calibration": plain.tolist()}
    opened = open_cache(write_cache(tmp_path / "net", small_sets, *small_head, labels=labels), OOD)
    caps = [0.3, 0.6, 0.9, 1.0, 1.1, 1.2, 1.3, 2.0]
    costs = [100 * np.mean(logits(cap).argmax(axis=1) != plain) for cap in caps]
    changes = [np.mean(np.abs(energies(cap) - energies(np.inf))) for cap in caps]
    allowed = [cap for cap, cost in zip(caps, costs, strict=True) if cost <= 1]
    wanted = max(allowed, key=lambda cap: changes[caps.index(cap)])
    assert 1 < len(allowed) < len(caps)
    sweep = parse_sweep(f"react.high={','.join(map(str, caps))}")
    ((chosen,), left) = choose(opened, "id", variants(["react"], [], [sweep], False))
    assert chosen.parameters == {"high": wanted}
    assert left.ood == OOD


def test_on_id_alone_labels_are_needed(opened):
    with pytest.raises(BadMethod, match="needs calibration images with labels"):
        choose(opened, "id", variants(["react"], [], [parse_sweep("react.high=1,2")], False))


def test_gaussian_noise_is_no_test_set(opened, write_cache, small_sets, small_head):
    write_cache(opened.folder / "selection", {"gaussian": small_sets["SUN"][:9]}, *small_head)
    on = select.hold_out(opened, "gaussian")
    assert on.cache.ood == OOD
    assert on.chosen_on.images == 9


def test_without_gaussian_noise_the_command_is_named(opened):
    with pytest.raises(BadMethod, match=r"get_activation\.py again with --gaussian"):
        select.hold_out(opened, "gaussian")


def test_the_first_of_equals_is_chosen_then_the_higher_auroc(opened, monkeypatch):
    """Two orders that do the same, and two caps that FPR95 cannot tell apart."""
    equal = variants(["react"], [], [parse_sweep("react.high=50,60")], False)
    ((chosen,), _) = choose(opened, "SUN", equal)
    assert chosen.parameters == {"high": 50}
    aurocs = iter([80.0, 90.0, 85.0])
    monkeypatch.setattr(select, "fpr95", lambda *_: 7.0)
    monkeypatch.setattr(select, "auroc", lambda *_: next(aurocs))
    ((chosen,), _) = choose(
        opened, "SUN", variants(["react"], [], [parse_sweep("react.high=1,2,3")], False)
    )
    assert chosen.parameters == {"high": 2}


def test_constant_scores_are_never_chosen(opened):
    """A cap of 0 makes all activations and scores the same: strictly above them lies no image."""
    ((chosen,), _) = choose(
        opened, "SUN", variants(["react"], [], [parse_sweep("react.high=0,2.5")], False)
    )
    assert chosen.parameters == {"high": 2.5}
