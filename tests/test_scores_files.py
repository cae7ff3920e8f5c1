"""What --scores-dir writes: each image's score, bit for bit, and what the network says of it, held
to scalar float64 loops."""

import csv
import math

import numpy as np
import pytest
import torch
from helpers import set_info

import eval as script
from lhact.cache import open_cache
from lhact.evaluation.predictions import Predictions, predict
from lhact.evaluation.results import About, MethodResult, Result
from lhact.evaluation.score import MethodScores, fit_methods, score
from lhact.methods.compose import apply, parse, parse_setting
from lhact.reporting import joined

CPU = torch.device("cpu")
HEADER = ["path", "score", "predicted_class", "probability", "label", "rectified_energy", "energy"]


def write_scores(folder, scores, paths, methods=(("lhact", {}),)):
    """Those scores, one mapping by set for each method; what the network says is 0 everywhere."""
    results = tuple(MethodResult(name, parameters, ()) for name, parameters in methods)
    result = Result(About("imagenet", "x", set_info()), results)
    sets = {name: set_info(listed) for name, listed in paths.items()}
    zeros = {name: np.zeros(len(listed), np.float32) for name, listed in paths.items()}
    classes = {name: values.astype(np.int64) for name, values in zeros.items()}
    predictions = Predictions(classes, zeros, zeros, (zeros,) * len(scores))
    joined.write_scores(folder, result, [MethodScores(None, s) for s in scores], predictions, sets)


def read(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *lines = csv.reader(file)
    assert header == HEADER
    return dict(zip(header, map(list, zip(*lines, strict=True)), strict=True))


def test_scores_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 3000, np.uint32).view(np.float32)
    odd = np.float32([0, -0.0, 1e-45, -3e38, 0.1, 20.000002])
    values = np.concatenate([values[np.isfinite(values)], odd])
    paths = [f"{i}.jpg" for i in range(len(values))]
    write_scores(tmp_path / "new" / "folder", [{"SUN": values}], {"SUN": paths})
    found = read(tmp_path / "new" / "folder" / "lhact" / "SUN.csv")
    assert found["path"] == paths
    scores = np.array(found["score"], float).astype(np.float32)
    np.testing.assert_array_equal(scores.view(np.uint32), values.view(np.uint32))


PATHS = ["a,b.jpg", 'quo"ted.jpg', "new\nline.jpg", "carriage\rreturn.jpg", "dos\r\nline.jpg"]
PATHS += ["größe.jpg", " a ", "a;b\t.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape")]
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]


def test_paths_of_every_kind_come_back_and_none_is_a_formula(tmp_path):
    values = np.arange(len(PATHS + FORMULAS), dtype=np.float32)
    write_scores(tmp_path, [{"SUN": values}], {"SUN": PATHS + FORMULAS})
    found = read(tmp_path / "lhact" / "SUN.csv")
    assert found["path"] == [*PATHS, *(f"'{name}" for name in FORMULAS)]
    assert list(map(float, found["score"])) == values.tolist()
    # A path that is not UTF-8 is written as its bytes.
    assert b'"caf\xe9.jpg",8.0,' in (tmp_path / "lhact" / "SUN.csv").read_bytes()


@pytest.mark.parametrize(
    "changed", [({"order": 2}, {"order": 3}), ({"high": 1.3520756}, {"high": 1.3520757})], ids=str
)
def test_every_variant_has_a_folder_of_its_own(tmp_path, changed):
    scores = [{"id": np.float32([number]), "SUN": np.float32([-number])} for number in (1, 2)]
    methods = [("lhact", parameters) for parameters in changed]
    write_scores(tmp_path, scores, {"id": ["i.jpg"], "SUN": ["s.jpg"]}, methods)
    assert len(list(tmp_path.iterdir())) == 2
    found = sorted(read(path)["score"] for path in tmp_path.glob("*/id.csv"))
    assert found == [["1.0"], ["2.0"]]


# What the network says


def logits_of(row, weight, bias):
    return [
        math.fsum(float(w) * float(z) for w, z in zip(line, row, strict=True)) + float(b)
        for line, b in zip(weight, bias, strict=True)
    ]


def logsumexp(logits, temperature=1.0):
    top = max(logits)
    return top + temperature * math.log(
        math.fsum(math.exp((x - top) / temperature) for x in logits)
    )


@pytest.fixture
def folder(tmp_path, write_cache, small_sets, small_head):
    labels = {"id": [i % 5 for i in range(len(small_sets["id"]))]}
    place = tmp_path / "cache" / "imagenet" / "small"
    write_cache(place, small_sets, *small_head, labels=labels)
    perturbed = {name: rows + 1 for name, rows in small_sets.items()}
    odin = {"temperature": 1000, "epsilon": 0.005}
    write_cache(place / "odin", perturbed, *small_head, odin=odin)
    return place


def test_predictions_are_those_of_a_scalar_loop(folder, small_sets, small_head):
    """Also of a method that scores perturbed images: they are of the images as they are."""
    cache = open_cache(folder)
    warm = apply(parse("energy"), parse_setting("energy.temperature=3"))
    fitted = fit_methods(cache, [parse("react+msp"), parse("odin"), parse("msp"), warm], CPU)
    scored = score(cache, fitted, CPU)
    rows = []
    found = predict(cache, scored, CPU, rows.append)
    high = fitted[0].parameters["high"]
    assert sum(rows) == sum(len(part) for name, part in small_sets.items() if name != "calibration")
    assert set(found.classes) == {"id", "iNaturalist", "SUN", "Places", "Textures"}
    for name in found.classes:
        for i, row in enumerate(small_sets[name]):
            logits = logits_of(row, *small_head)
            energy = logsumexp(logits)
            capped = logsumexp(logits_of([min(float(z), high) for z in row], *small_head))
            assert found.classes[name][i] == logits.index(max(logits))
            assert found.probability[name][i] == pytest.approx(math.exp(max(logits) - energy), 1e-5)
            assert found.energy[name][i] == pytest.approx(energy, 1e-5, 1e-5)
            behind = [part[name][i] for part in found.rectified_energy]
            assert behind == pytest.approx(
                [capped, energy, energy, logsumexp(logits, 3)], 1e-5, 1e-5
            )


def test_the_first_of_equal_logits_is_predicted(tmp_path, write_cache):
    sets = {name: np.eye(3, dtype=np.float32) for name in ("id", "SUN")}
    write_cache(tmp_path, sets, np.eye(3, dtype=np.float32)[[0, 1, 1]], np.zeros(3, np.float32))
    cache = open_cache(tmp_path)
    scored = score(cache, fit_methods(cache, [parse("msp")], CPU), CPU)
    assert predict(cache, scored, CPU).classes["id"].tolist() == [0, 1, 0]


def test_files_can_be_joined(folder, small_sets, small_head, tmp_path, capsys):
    """Each column is read under its own name, and the label is empty where it is not known."""
    arguments = ["--cache-dir", folder.parents[1], "--name", "small", "--device", "cpu"]
    arguments += ["--methods", "react+msp", "react", "--scores-dir", tmp_path / "scores"]
    assert script.main(list(map(str, arguments))) == 0
    assert "threshold" in capsys.readouterr().err
    with_msp, alone, plain = (
        read(tmp_path / "scores" / name / "id.csv") for name in ("react+msp", "react", "energy")
    )
    assert with_msp["label"] == [str(i % 5) for i in range(61)]
    assert set(read(tmp_path / "scores" / "react" / "SUN.csv")["label"]) == {""}
    assert with_msp["rectified_energy"] == alone["score"] == alone["rectified_energy"]
    assert plain["score"] == plain["energy"] == with_msp["energy"] != alone["score"]
    assert with_msp["score"] != alone["score"]
    logits = [logits_of(row, *small_head) for row in small_sets["id"]]
    assert with_msp["predicted_class"] == [str(row.index(max(row))) for row in logits]
    shares = [math.exp(max(row) - logsumexp(row)) for row in logits]
    assert list(map(float, with_msp["probability"])) == pytest.approx(shares, 1e-5)
