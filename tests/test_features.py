"""lhact.features and write_cache: features, logits and heads from elsewhere, in any usual file,
give the cache and the numbers that the same arrays in a cache of get_activation.py's format give;
one clear line for every wrong input, and nothing left behind."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import eval as evaluate
from lhact import features as script
from lhact import from_arrays
from lhact.cache import BadCache, open_cache
from lhact.from_arrays import BadFeatures, FeatureSet, Origin, write_cache
from lhact.methods.scores import SCORES
from lhact.records import RecordedPreprocessing

OOD = ["iNaturalist", "SUN", "Places", "Textures"]
LABELS = {"id": [i % 5 for i in range(61)], "calibration": [i % 5 for i in range(40)]}
# Scores whose function reads an image's logits alone, written down by hand: a new score belongs
# here only if its fit makes nothing but logits of the head and the calibration activations.
OF_LOGITS = ["msp", "energy", "maxlogit", "gen", "entropy", "klm"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def arrays(small_sets, small_head):
    """File name -> array, as numpy.save has them in the current folder."""
    found = {"z": small_sets["id"], "zc": small_sets["calibration"]}
    found |= {name: small_sets[name] for name in OOD}
    found |= {"W": small_head[0], "b": small_head[1]}
    found |= {"y": np.array(LABELS["id"]), "yc": np.array(LABELS["calibration"])}
    for name, values in found.items():
        np.save(f"{name}.npy", values)
    return found


def save_npz(name, **members):
    np.savez(name, **members)


def arguments(**changed):
    """The command line for `arrays`; None leaves an option out."""
    options = {"name": "mine", "id": "z.npy", "id_labels": "y.npy", "calibration": "zc.npy"}
    options |= {"calibration_labels": "yc.npy", "head": ["W.npy", "b.npy"]}
    options |= {"ood": [f"{name}={name}.npy" for name in OOD], **changed}
    line = []
    for option, value in options.items():
        flag = "--" + option.replace("_", "-")
        if option == "ood":
            line += [part for text in value for part in (flag, text)]
        elif value is not None:
            line += [flag, *([value] if isinstance(value, str) else value)]
    return line


@pytest.fixture
def run(capsys):
    def run(*line):
        try:
            status = script.main(list(line))
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert out == ""
        return status, err

    return run


@pytest.fixture
def results(capsys):
    """results(folder, methods): the rows that eval.py prints, without the order of the sets."""

    def results(benchmark, name, *methods):
        line = ["--benchmark", benchmark, "--name", name, "--format", "json", "--device", "cpu"]
        assert evaluate.main([*line, "--methods", *methods]) == 0
        rows = json.loads(capsys.readouterr().out)["results"]
        for row in rows:
            assert (row.pop("benchmark"), row.pop("name")) == (benchmark, name)
            del row["network"], row["weights"]
        return sorted(rows, key=lambda row: (row["method"], row["dataset"]))

    return results


def refusal(run, *line, status=1):
    """The one line said, where nothing is left behind."""
    before = sorted(Path().rglob("*"))
    found, err = run(*line)
    assert found == status, err
    assert sorted(Path().rglob("*")) == before
    last = err.splitlines()[-1]
    assert "lhact.features: " in last
    if status == 1:
        assert err.splitlines() == [last]
    return last


# What is written


def test_cache_says_what_the_arrays_are_and_where_they_come_from(run, arrays, small_sets):
    status, err = run(*arguments(arch="resnet18", weights="IMAGENET1K_V1"))
    assert status == 0
    assert err.splitlines()[-1] == "done: cache/own/mine"
    folder = Path("cache/own/mine")
    for name, rows in small_sets.items():
        assert np.load(folder / f"{name}.npy").tobytes() == rows.tobytes()
        content = json.loads((folder / f"{name}.json").read_text())
        file = {"id": "z", "calibration": "zc"}.get(name, name)
        assert content["paths"] == [f"{file}.npy/{i}" for i in range(len(rows))]
        assert content["labels"] == LABELS.get(name)
        assert (content["precision"], content["preprocessing"]) == ("fp32", {})
        assert content["network"]["settings"] == {"features given as": "activations"}
        network = {key: content["network"][key] for key in ("arch", "weights", "checkpoint")}
        claimed = {"arch": "resnet18", "weights": "IMAGENET1K_V1", "checkpoint": "W.npy"}
        assert network == claimed
    right = (arrays["z"] @ arrays["W"].T + arrays["b"]).argmax(axis=1) == arrays["y"]
    accuracy = json.loads((folder / "id.json").read_text())["accuracy"]
    assert accuracy == pytest.approx(100 * right.mean())
    assert f"id: 61 images from z.npy, top-1 {accuracy:.2f} %" in err
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".json", ".npz", ""}


def test_eval_serves_all_of_it(run, arrays, results, write_cache, small_sets, small_head):
    """To the digit as it does the same arrays in a cache written by numpy and json alone."""
    write_cache(Path("cache/own/plain"), small_sets, *small_head, labels=LABELS)
    assert run(*arguments())[0] == 0
    methods = ("all", "react+vim", "--set", "knn.k=4", "--set", "vim.dim=4")
    methods = (*methods, "--set", "residual.dim=4")
    assert results("own", "mine", *methods) == results("own", "plain", *methods)


NCHW = {"axes-of-1": lambda z: torch.from_numpy(z)[:, :, None, None].clone()}
FILES = {
    "fortran": ("svhn.npy", lambda z: np.save("svhn.npy", np.asfortranarray(z))),
    "big-endian": ("svhn.npy", lambda z: np.save("svhn.npy", z.astype(">f4"))),
    "float64": ("svhn.npy", lambda z: np.save("svhn.npy", z.astype(np.float64))),
    "axes-of-1": ("svhn.npy", lambda z: np.save("svhn.npy", z[:, :, None, None])),
    "npz": ("svhn.npz", lambda z: save_npz("svhn.npz", x=z[:1], features=z)),
    "npz-only": ("svhn.npz", lambda z: save_npz("svhn.npz", whatever=z)),
    "npz-named": ("svhn.npz:x", lambda z: save_npz("svhn.npz", x=z, features=z[:1])),
    "npz-packed": ("svhn.npz", lambda z: np.savez_compressed("svhn.npz", activations=z)),
    "pt": ("svhn.pt", lambda z: torch.save(torch.from_numpy(z)[..., None, None], "svhn.pt")),
    "pt-dict": ("svhn.PTH", lambda z: torch.save({"features": torch.tensor(z)}, "svhn.PTH")),
    "pt-named": ("a:b.pt:x", lambda z: torch.save({"x": torch.tensor(z), "y": 1}, "a:b.pt")),
    "colon": ("a.npz:b.npy", lambda z: np.save("a.npz:b.npy", z)),
    "safetensors": (
        "svhn.safetensors",
        lambda z: safetensors.torch.save_file(
            {"activations": torch.tensor(z), "logits": torch.zeros(1)}, "svhn.safetensors"
        ),
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_files(file, run, arrays):
    text, save = FILES[file]
    save(arrays["SUN"])
    status, err = run(*arguments(ood=[f"SVHN={text}"]))
    assert status == 0, err
    assert np.load("cache/own/mine/SVHN.npy").tobytes() == arrays["SUN"].tobytes()


def test_float16_is_kept_to_the_bit_and_said(run, arrays):
    for name in ("z", "zc", *OOD):
        np.save(f"{name}.npy", arrays[name].astype(np.float16))
    assert run(*arguments())[0] == 0
    opened = open_cache(Path("cache/own/mine"))
    assert opened.info.precision == "fp16"
    wanted = arrays["z"].astype(np.float16).astype(np.float32)
    assert np.load(opened.id.path).tobytes() == wanted.tobytes()


def test_more_rows_than_are_in_memory_at_a_time(run, arrays, monkeypatch):
    monkeypatch.setattr(from_arrays, "ROWS", 7)
    assert run(*arguments())[0] == 0
    assert np.load("cache/own/mine/id.npy").tobytes() == arrays["z"].tobytes()
    rows = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in arrays["z"]]
    content = json.loads(Path("cache/own/mine/id.json").read_text())["content"]
    assert content == hashlib.sha256(b"".join(rows)).hexdigest()
    np.save("SUN.npy", with_value(arrays["SUN"], (17, 3), np.nan))
    assert "SUN (SUN.npy) holds NaN or infinite values in row 17" in run(*arguments())[1]


def state_dict(arrays, prefix="", **others):
    parts = {"fc.weight": torch.tensor(arrays["W"]), "fc.bias": torch.tensor(arrays["b"]), **others}
    return {prefix + key: value for key, value in parts.items()}


def save_head(kind, arrays):
    """The options for a head that was saved in this way."""
    if kind == "npz":
        save_npz("head.npz", weight=arrays["W"], bias=arrays["b"])
        return {"head": "head.npz"}
    if kind == "layer":
        torch.save(
            {"weight": torch.tensor(arrays["W"]), "bias": torch.tensor(arrays["b"])}, "fc.pt"
        )
        return {"head": "fc.pt"}
    if kind == "convolution":
        np.save("conv.npy", arrays["W"][:, :, None, None])
        return {"head": ["conv.npy", "b.npy"]}
    nested = {
        "bare": state_dict(arrays),
        "wrapped": {"epoch": 3, "model": state_dict(arrays, "module.")},
        "auxiliary": state_dict(arrays, **{"aux.fc.weight": torch.zeros(5, 12)}),
    }
    torch.save(nested[kind], "net.pth")
    return {"checkpoint": "net.pth", "head": "fc"}


@pytest.mark.parametrize("kind", ["npz", "layer", "convolution", "bare", "wrapped", "auxiliary"])
def test_heads(kind, run, arrays):
    status, err = run(*arguments(**save_head(kind, arrays)))
    assert status == 0, err
    assert "zeros" not in err
    with np.load("cache/own/mine/head.npz") as head:
        assert head["weight"].tobytes() == arrays["W"].tobytes()
        assert head["bias"].tobytes() == arrays["b"].tobytes()


@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_head_without_bias_has_zeros_and_that_is_said(kind, run, arrays):
    torch.save({"module.fc.weight": torch.tensor(arrays["W"])}, "net.pth")
    options = {"head": "W.npy"} if kind == "file" else {"checkpoint": "net.pth", "head": "fc"}
    status, err = run(*arguments(**options))
    assert status == 0
    assert "no bias, so zeros are taken" in err
    with np.load("cache/own/mine/head.npz") as head:
        assert head["bias"].tolist() == [0] * 5


def test_wrong_labels_are_suspected(run, arrays):
    rows = np.tile(arrays["z"], (20, 1))
    worst = (rows @ arrays["W"].T + arrays["b"]).argmin(axis=1)
    np.save("z.npy", rows)
    np.save("y.npy", worst)
    status, err = run(*arguments())
    assert status == 0
    assert "id: that is no better than guessing" in err


# A cache that is there already


def test_same_command_again_changes_nothing_and_a_set_can_be_added(run, arrays):
    run(*arguments(ood=["SUN=SUN.npy"]))
    before = {path: path.read_bytes() for path in Path("cache/own/mine").glob("[!.]*")}
    status, err = run(*arguments(ood=["SUN=SUN.npy", "Places=Places.npy"]))
    assert status == 0
    assert "SUN: 25 images, cached already" in err
    assert open_cache(Path("cache/own/mine")).ood == ["Places", "SUN"]
    assert all(path.read_bytes() == content for path, content in before.items())


CHANGES = {
    "features": ("SUN", lambda z: z + 1, "SUN.npy is of something else: other features or labels"),
    "fewer": ("SUN", lambda z: z[:-1], "SUN.npy is of something else: other files: 1 gone"),
    "labels": ("y", lambda y: y[::-1], "id.npy is of something else: other features or labels"),
    "head": ("b", lambda b: b + 1, ".npy is of something else: network sha256"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_replaces_a_set_with_overwrite_alone(change, run, arrays):
    assert run(*arguments())[0] == 0
    name, function, wanted = CHANGES[change]
    changed = function(arrays[name])
    np.save(f"{name}.npy", changed)
    before = {path: path.read_bytes() for path in Path("cache/own/mine").glob("[!.]*")}
    status, err = run(*arguments())
    assert status == 1
    assert wanted in err
    assert "--overwrite" in err
    after = {path: path.read_bytes() for path in Path("cache/own/mine").glob("[!.]*")}
    assert after == before
    assert run(*arguments(), "--overwrite")[0] == 0
    opened = open_cache(Path("cache/own/mine"))
    found = {"SUN": np.load("cache/own/mine/SUN.npy"), "y": opened.info.labels, "b": opened.bias}
    assert np.array_equal(found[name], changed)


def test_overwrite_leaves_no_set_of_another_head(run, arrays):
    run(*arguments())
    np.save("b.npy", arrays["b"] + 1)
    status, err = run(*arguments(ood=["SUN=SUN.npy"]), "--overwrite")
    assert status == 1
    assert "this run does not make it anew; ask for that set too" in err


def test_ended_half_way_it_is_no_cache_until_the_same_command_has_been_given(
    run, arrays, monkeypatch
):
    writes = []

    def write(self, first, rows, digests):
        writes.append(first)
        if len(writes) == 3:
            raise OSError(28, "No space left on device", str(self.part))
        own(self, first, rows, digests)

    own = from_arrays.SetWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(from_arrays.SetWriter, "write", write)
        status, err = run(*arguments())
    assert status == 1
    assert err.splitlines()[-1].endswith("iNaturalist.npy.part: No space left on device")
    with pytest.raises(BadCache, match="is unfinished: Places, SUN, Textures, iNaturalist"):
        open_cache(Path("cache/own/mine"))
    assert run(*arguments())[0] == 0
    assert len(open_cache(Path("cache/own/mine")).sets) == 6


def test_interrupted(run, arrays, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write_cache", interrupt)
    assert run(*arguments()) == (130, "lhact.features: interrupted; give the same command again\n")


# Published constants, and what is claimed


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V1"])
def test_published_constants_only_for_features_like_v1s(scale, weights, v1_sets, v1_head, capsys):
    """A name is a claim: the features decide."""
    folder = Path("cache/imagenet/claim")
    sets = {name: rows * np.float32(scale) for name, rows in v1_sets.items()}
    write_cache(folder, sets, v1_head, Origin("resnet50", weights))
    assert evaluate.main(["--name", "claim", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert ("thresholds: the published constants, since" in err) is (scale == 1)
    assert ("published" in out) is (weights is not None)
    if weights and scale == 3:
        assert "as with inputs normalised twice" in err


# Logits


@pytest.fixture
def logits(arrays):
    """The same as `arrays`, with logits for features, in float64."""
    names = {"z": "id", "zc": "calibration", **{name: name for name in OOD}}
    weight, bias = arrays["W"].astype(np.float64), arrays["b"].astype(np.float64)
    found = {name: arrays[name] @ weight.T + bias for name in names}
    for name, values in found.items():
        np.savez(f"{name}.npz", features=arrays[name], logits=values)
    return found


def of_logits(**changed):
    ood = [f"{name}={name}.npz" for name in OOD]
    options = {"name": "logits", "id": "z.npz", "calibration": "zc.npz", "ood": ood, "head": None}
    return [*arguments(**{**options, **changed}), "--logits"]


def test_logits_serve_the_methods_of_logits(run, logits, results, capsys):
    assert run(*of_logits())[0] == 0
    assert run(*arguments())[0] == 0
    found, wanted = (results("own", name, *OF_LOGITS) for name in ("logits", "mine"))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["method"] == theirs["method"]
        for metric in ("fpr95", "auroc"):
            assert mine[metric] == theirs[metric]
        assert mine["threshold"] == pytest.approx(theirs["threshold"], rel=1e-4)


def test_logits_serve_no_other_method(run, logits, results, capsys):
    run(*of_logits())
    assert {row["method"] for row in results("own", "logits", "all")} == set(OF_LOGITS)
    line = ["--benchmark", "own", "--name", "logits", "--device", "cpu"]
    assert evaluate.main([*line, "--methods", "all"]) == 0
    err = capsys.readouterr().err
    assert "thresholds: none, since this cache holds logits" in err
    for name in SCORES.keys() - {*OF_LOGITS, "odin"}:
        assert f"left out: {name} ({name} needs penultimate activations; this cache holds" in err
    assert "left out: odin (odin needs images to perturb; this cache was made without them" in err
    for method in ("lhact", "react+msp", "knn"):
        assert evaluate.main([*line, "--methods", method]) == 1
        err = capsys.readouterr().err
        assert f"eval.py: {method} needs penultimate activations; this cache holds logits" in err


def test_too_many_classes_of_logits(run, logits, monkeypatch):
    monkeypatch.setattr(from_arrays, "MOST_CLASSES_OF_LOGITS", 4)
    assert "logits of 5 classes are too many, 4 at most" in refusal(run, *of_logits())


# eval.py and benchmarks that are not known


@pytest.mark.parametrize(
    ("line", "status", "wanted"),
    [
        (["--benchmark", "own"], 2, "the benchmark own has no network of its own; give --name"),
        (["--benchmark", "owm", "--name", "mine"], 2, "'owm' is no benchmark"),
        (
            ["--benchmark", "own", "--name", "other"],
            1,
            "there are: mine; make it with: python -m lhact.features --benchmark own --name other",
        ),
    ],
    ids=["no-name", "no-benchmark", "no-cache"],
)
def test_eval_of_what_is_not_there(line, status, wanted, run, arrays, capsys):
    run(*arguments())
    try:
        found = evaluate.main([*line, "--device", "cpu"])
    except SystemExit as end:  # argparse
        found = end.code
    assert found == status
    assert wanted in capsys.readouterr().err


# In Python


def test_write_cache_takes_arrays_and_tensors(arrays):
    weight = torch.tensor(arrays["W"], dtype=torch.float64, requires_grad=True)
    sets = {
        "id": FeatureSet(torch.tensor(arrays["z"], requires_grad=True), torch.tensor(LABELS["id"])),
        "calibration": FeatureSet(arrays["zc"], LABELS["calibration"]),
        "SUN": FeatureSet(arrays["SUN"].astype(np.float64), paths=[f"{i}.jpg" for i in range(25)]),
        "Places": arrays["Places"],
    }
    given = RecordedPreprocessing(resize=256, crop=224)
    write_cache("cache/own/mine", sets, (weight, None), Origin(preprocessing=given))
    opened = open_cache(Path("cache/own/mine"))
    for name, file in (("id", "z"), ("calibration", "zc"), ("SUN", "SUN"), ("Places", "Places")):
        assert np.load(opened.sets[name].path).tobytes() == arrays[file].tobytes()
    assert opened.weight.tobytes() == arrays["W"].tobytes()
    assert opened.info.labels == tuple(LABELS["id"])
    assert opened.info.preprocessing.to_json() == {"resize": 256, "crop": 224}
    assert opened.info.paths[7] == "id/7"
    assert opened.sets["SUN"].info.paths[7] == "7.jpg"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_write_cache_of_half_precision(dtype, arrays):
    sets = {
        name: torch.tensor(arrays[file], dtype=dtype)
        for name, file in (("id", "z"), ("SUN", "SUN"))
    }
    write_cache("cache/own/mine", sets, (arrays["W"], arrays["b"]))
    assert np.array_equal(np.load("cache/own/mine/id.npy"), sets["id"].float().numpy())
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert open_cache(Path("cache/own/mine")).info.precision == precision


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_write_cache_of_tensors_on_a_gpu(arrays):
    sets = {name: torch.tensor(arrays[file]).cuda() for name, file in (("id", "z"), ("SUN", "SUN"))}
    head = (torch.tensor(arrays["W"]).cuda(), torch.tensor(arrays["b"]).cuda())
    write_cache("cache/own/mine", sets, head)
    assert np.load("cache/own/mine/id.npy").tobytes() == arrays["z"].tobytes()


Z, X = np.ones((4, 3), np.float32), np.ones((2, 3), np.float32)
HEAD = (np.ones((5, 3), np.float32), np.ones(5, np.float32))
BAD_CALLS = {
    "no-id": ({"SUN": X}, {}, "a cache has a set 'id' and at least one OOD set"),
    "no-ood": ({"id": Z, "calibration": Z}, {}, "a cache has a set 'id' and at least one OOD set"),
    "reserved": ({"id": Z, "average": X}, {}, "an OOD set cannot be called 'average'"),
    "reserved-case": ({"id": Z, "Average": X}, {}, "an OOD set cannot be called 'Average'"),
    "list": ({"id": Z, "SUN": [[1.0]]}, {}, "SUN: wanted a NumPy array or a dense torch tensor"),
    "sparse": ({"id": Z, "SUN": torch.eye(3).to_sparse()}, {}, "dense torch tensor, got Tensor"),
    "paths": ({"id": Z, "SUN": FeatureSet(X, paths=["a"])}, {}, "SUN: its 'paths' is missing"),
    "text": ({"id": Z, "SUN": FeatureSet(X, paths=["a", 1])}, {}, "SUN: its 'paths' is missing"),
    "claim": (
        {"id": Z, "SUN": X},
        {"head": None, "origin": Origin("resnet50", "IMAGENET1K_V1")},
        "that logits are of IMAGENET1K_V1 cannot be checked",
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_write_cache_refuses(call):
    sets, changed, wanted = BAD_CALLS[call]
    with pytest.raises((BadFeatures, BadCache), match=wanted):
        write_cache("cache/own/mine", sets, **{"head": HEAD, **changed})
    assert not Path("cache").exists()


def test_write_cache_refuses_what_is_no_file_name():
    with pytest.raises(BadCache, match="the name of an image set must be made of letters"):
        write_cache("cache/own/mine", {"id": Z, "../SUN": X}, HEAD)
    assert not Path("cache").exists()


def test_names_that_differ_by_letter_case_alone_are_refused():
    """Also where one of them is in the cache already: on some systems both have the same files."""
    with pytest.raises(BadCache, match="SUN and sun differ by letter case alone"):
        write_cache("cache/own/mine", {"id": Z, "sun": X, "SUN": X}, HEAD)
    assert not Path("cache").exists()
    write_cache("cache/own/mine", {"id": Z, "SUN": X}, HEAD)
    before = {path.name: path.read_bytes() for path in Path("cache/own/mine").glob("[!.]*")}
    with pytest.raises(BadCache, match="SUN and sun differ by letter case alone"):
        write_cache("cache/own/mine", {"id": Z, "sun": X}, HEAD, overwrite=True)
    assert {path.name: path.read_bytes() for path in Path("cache/own/mine").glob("[!.]*")} == before


# Wrong input: one line each


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def with_value(values, place, value):
    changed = values.astype(np.float64)
    changed[place] = value
    return changed


BAD_ARRAYS = {
    "1-d": (
        "SUN",
        lambda z: z[0],
        "SUN (SUN.npy): wanted the shape (images, channels) with at least one of each, got (12,)",
    ),
    "3-d": ("SUN", lambda z: z[:, :, None] * np.ones(2, np.float32), "got (25, 12, 2)"),
    "empty": ("SUN", lambda z: z[:0], "SUN.npy"),
    "integers": (
        "SUN",
        lambda z: z.astype(np.int64),
        "SUN (SUN.npy): wanted float16, bfloat16, float32, float64, got int64",
    ),
    "complex": ("SUN", lambda z: z.astype(np.complex64), "got complex64"),
    "objects": (
        "SUN",
        lambda z: z.astype(object),
        "SUN.npy cannot be read: Array can't be memory-mapped",
    ),
    "width": (
        "SUN",
        lambda z: z[:, :11],
        "SUN has 11 channels, id 12; give features of the same layer",
    ),
    "precision": (
        "SUN",
        lambda z: z.astype(np.float16),
        "SUN is float16, id float32: rounding alone could tell them apart",
    ),
    "nan": (
        "SUN",
        lambda z: with_value(z, (17, 3), np.nan),
        "SUN (SUN.npy) holds NaN or infinite values in row 17",
    ),
    "inf": (
        "z",
        lambda z: with_value(z, (60, 0), -np.inf),
        "id (z.npy) holds NaN or infinite values in row 60",
    ),
    "too-large": (
        "zc",
        lambda z: with_value(z, (0, 11), 1e300),
        "calibration (zc.npy) holds NaN or infinite values in row 0 (as float32)",
    ),
    "labels-high": (
        "y",
        lambda y: with_value(y, 3, 5),
        "the labels of id (z.npy): wanted whole numbers from 0 to 4, got 5.0 in row 3",
    ),
    "labels-negative": (
        "yc",
        lambda y: y - 1,
        "the labels of calibration (zc.npy): wanted whole numbers from 0 to 4, got -1 in row 0",
    ),
    "labels-half": ("y", lambda y: with_value(y, 9, 1.5), "got 1.5 in row 9"),
    "labels-nan": ("y", lambda y: with_value(y, 9, np.nan), "got nan in row 9"),
    "labels-few": (
        "y",
        lambda y: y[:-1],
        "the labels of id (z.npy): wanted 61 class numbers, got int64 of shape (60,)",
    ),
    "labels-one-hot": (
        "y",
        lambda y: np.eye(5)[y],
        "wanted 61 class numbers, got float64 of shape (61, 5)",
    ),
    "labels-bool": ("y", lambda y: y > 2, "wanted 61 class numbers, got bool of shape (61,)"),
    "head-width": (
        "W",
        lambda w: w[:, 1:],
        "the head's weight is (5, 11), the features have 12 channels, so (classes, 12) is wanted; ",
    ),
    "head-turned": ("W", lambda w: w.T, "(classes, 12) is wanted; transpose it"),
    "head-1-d": ("W", lambda w: w[0], "the head's weight: wanted the shape (classes, channels)"),
    "head-nan": (
        "W",
        lambda w: with_value(w, (0, 0), np.nan),
        "the head's weight holds NaN or infinite values",
    ),
    "bias-length": ("b", lambda b: b[1:], "the head's bias is (4,), its weight (5, 12)"),
    "bias-2-d": ("b", lambda b: np.stack([b, b]), "the head's bias: wanted the shape (classes)"),
    "bias-inf": (
        "b",
        lambda b: with_value(b, 0, np.inf),
        "the head's bias holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, run, arrays):
    name, change, wanted = BAD_ARRAYS[case]
    np.save(f"{name}.npy", change(arrays[name]), allow_pickle=True)
    # The rows that a turned head has are as many as there are channels.
    line = arguments(head="W.npy") if case == "head-turned" else arguments()
    found = run(*line)
    assert found[0] == 1
    assert wanted in found[1].splitlines()[-1]
    assert "Traceback" not in found[1]
    assert not Path("cache").exists()


BAD_FILES = {
    "unknown": (
        "svhn.csv",
        lambda z: np.savetxt("svhn.csv", z),
        "svhn.csv: wanted a file .npy, .npz, .pt, .pth, .safetensors, got .csv",
    ),
    "no-extension": ("svhn", lambda z: None, "got no extension"),
    "absent": ("svhn.npy", lambda z: None, "there is no file svhn.npy"),
    "folder": ("svhn.npy", lambda z: os.mkdir("svhn.npy"), "there is no file svhn.npy"),
    "pipe": ("svhn.npy", lambda z: os.mkfifo("svhn.npy"), "there is no file svhn.npy"),
    "text": (
        "svhn.npy",
        lambda z: Path("svhn.npy").write_text("x" * 99),
        "svhn.npy cannot be read: ",
    ),
    "cut": (
        "svhn.npy",
        lambda z: Path("svhn.npy").write_bytes(Path("SUN.npy").read_bytes()[:-4]),
        "svhn.npy cannot be read: ",
    ),
    "npy-named": (
        "SUN.npy:x",
        lambda z: None,
        "SUN.npy holds no array 'x', but one without a name",
    ),
    "npz-text": (
        "svhn.npz",
        lambda z: Path("svhn.npz").write_text("x" * 99),
        "svhn.npz cannot be read: File is not a zip file",
    ),
    "npz-many": (
        "svhn.npz",
        lambda z: save_npz("svhn.npz", a=z, b=z),
        "svhn.npz holds no array 'features' or 'activations', but a, b; name the one as FILE:NAME",
    ),
    "npz-absent": (
        "svhn.npz:c",
        lambda z: save_npz("svhn.npz", a=z),
        "svhn.npz holds no array 'c', but a;",
    ),
    "npz-objects": (
        "svhn.npz",
        lambda z: save_npz("svhn.npz", a=z.astype(object)),
        "svhn.npz cannot be read: 'a' should be object",
    ),
    "pt-objects": (
        "svhn.pt",
        lambda z: torch.save([Hostile()], "svhn.pt"),
        "svhn.pt cannot be read: Trying to load unsupported GLOBAL",
    ),
    "pt-list": (
        "svhn.pt",
        lambda z: torch.save([torch.tensor(z)], "svhn.pt"),
        "svhn.pt cannot be read: wanted an array of numbers, got list",
    ),
    "pt-number": (
        "svhn.pt",
        lambda z: torch.save({"features": 3}, "svhn.pt"),
        "wanted an array of numbers, got int",
    ),
    "pt-expanded": (
        "svhn.pt",
        lambda z: torch.save(torch.ones(1).expand(99, 12), "svhn.pt"),
        "wanted an array of numbers, got Tensor",
    ),
    "pt-empty": (
        "svhn.pt",
        lambda z: torch.save({}, "svhn.pt"),
        "holds no array 'features' or 'activations', but nothing",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, run, arrays):
    text, save, wanted = BAD_FILES[case]
    save(arrays["SUN"])
    assert wanted in refusal(run, *arguments(ood=[f"SVHN={text}"]))
    assert not Path("ran").exists()


def test_too_large_an_array_in_a_compressed_file(run, arrays, monkeypatch):
    monkeypatch.setattr(script, "MOST_UNPACKED", 100)
    np.savez_compressed("svhn.npz", features=arrays["SUN"])
    line = refusal(run, *arguments(ood=["SVHN=svhn.npz"]))
    assert "its compressed values would take 1,200 bytes of memory" in line


BAD_LAYERS = {
    "none": (
        "head",
        "net.pth holds no layer 'head'; --head is one of its linear layers, such as a.fc, b.fc",
    ),
    "several": (
        "fc",
        "net.pth holds several layers 'fc'; --head is one of its linear layers, such as a.fc, b.fc",
    ),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layers(case, run, arrays):
    layer, wanted = BAD_LAYERS[case]
    weight = torch.tensor(arrays["W"])
    torch.save({"a.fc.weight": weight, "b.fc.weight": weight, "norm.weight": weight[0]}, "net.pth")
    assert wanted in refusal(run, *arguments(checkpoint="net.pth", head=layer))


def test_bad_checkpoint(run, arrays):
    line = refusal(run, *arguments(checkpoint="absent.pth", head="fc"))
    assert "no checkpoint at absent.pth" in line


def test_folder_that_cannot_be_made(run, arrays):
    Path("cache").write_text("a file")
    assert "cache" in refusal(run, *arguments())


BAD_LINES = {
    "head-3": ({"head": ["W.npy", "b.npy", "c.npy"]}, "--head takes one or two files"),
    "no-head": ({"head": None}, "give --head, or --logits for logits"),
    "checkpoint": ({"checkpoint": "net.pth"}, "--head NAME is one layer of --checkpoint"),
    "logits-head": ({"logits": []}, "--logits goes without --head and --checkpoint"),
    "logits-weights": (
        {"logits": [], "head": None, "arch": "resnet50", "weights": "IMAGENET1K_V1"},
        "--logits goes without --weights",
    ),
    "weights": ({"weights": "IMAGENET1K_V1"}, "--weights goes with --arch"),
    "labels": ({"calibration": None}, "--calibration-labels goes with --calibration"),
    "ood": ({"ood": ["SUN.npy"]}, "--ood: must be NAME=SOURCE, got 'SUN.npy'"),
    "twice": ({"ood": ["SUN=SUN.npy", "SUN=z.npy"]}, "--ood SUN: that name is taken"),
    "case": ({"ood": ["SUN=SUN.npy", "sun=z.npy"]}, "SUN and sun differ by letter case alone"),
    "reserved": ({"ood": ["id=SUN.npy"]}, "--ood id: that name is taken"),
    "name": ({"name": "../mine"}, "a name must be made of letters"),
    "benchmark": ({"benchmark": "a/b"}, "a name must be made of letters"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_command_lines(case, run, arrays):
    changed, wanted = BAD_LINES[case]
    assert wanted in refusal(run, *arguments(**changed), status=2)
