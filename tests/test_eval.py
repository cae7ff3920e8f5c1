"""eval.py from the command line to its output: what it prints where, its exit status, and one clear
line for every wrong input."""

import csv
import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fork, v1_like, wait

import eval as script
from lhact import identify
from lhact.devices import device_line, pick_device
from lhact.evaluation import evaluate
from lhact.evaluation.metrics import METRICS
from lhact.messages import shown
from lhact.methods.compose import TABLE6, known_methods

ROOT = Path(__file__).resolve().parents[1]
OOD = ["iNaturalist", "SUN", "Places", "Textures"]
V1 = {"arch": "resnet50", "weights": "IMAGENET1K_V1", "checkpoint": None}
V1_CONSTANTS = {"low": 0.21940805315971373, "high": 1.3520756840705868, "order": 2}
FITTED = ["--set", "knn.k=4", "--set", "vim.dim=4", "--set", "residual.dim=4"]


@pytest.fixture
def folder(tmp_path, write_cache, small_sets, small_head):
    """A cache of a network that is not V1, under the default name."""
    labels = {name: [i % 5 for i in range(len(small_sets[name]))] for name in ("id", "calibration")}
    place = tmp_path / "cache" / "imagenet" / "resnet50"
    return write_cache(place, small_sets, *small_head, labels=labels)


@pytest.fixture
def cache_dir(folder):
    return folder.parents[1]


@pytest.fixture
def odin(folder, write_cache, small_sets, small_head):
    """Beside it what --odin makes: all sets but the calibration set."""
    del small_sets["calibration"]
    write_cache(folder / "odin", small_sets, *small_head)


@pytest.fixture
def v1_cache_dir(tmp_path, write_cache, v1_sets, v1_head):
    write_cache(tmp_path / "v1" / "imagenet" / "resnet50", v1_sets, *v1_head, network=V1)
    return tmp_path / "v1"


@pytest.fixture
def run(run_eval):
    """run(cache_dir, *arguments) -> (status, stdout, stderr)"""
    return lambda cache_dir, *arguments: run_eval("--cache-dir", cache_dir, *arguments)


def as_json(run, cache_dir, *arguments):
    status, out, _ = run(cache_dir, "--format", "json", *arguments)
    assert status == 0
    return json.loads(out)


# What is printed


def test_default_run(run, cache_dir):
    """LHAct with calibrated thresholds, beside plain energy: results on stdout, remarks on
    stderr."""
    status, out, err = run(cache_dir)
    assert status == 0
    rows = {line.split()[0]: line for line in out.split("\n\n")[1].splitlines() if line}
    assert rows["method"].split() == ["method", *OOD, "average"]
    assert rows["lhact"].count("/") == rows["energy"].count("/") == 5
    assert "lhact against plain energy on average" in out
    assert "thresholds: percentiles of the calibration activations (40 images)" in err
    assert "thresholds:" not in out
    assert "published" not in out


def test_default_run_for_v1(run, v1_cache_dir):
    status, out, err = run(v1_cache_dir)
    assert status == 0
    assert "published constants" in err
    lines = {line.split()[0]: line.split()[1:] for line in reversed(out.splitlines()) if line}
    table6 = "11.07 / 97.86 16.87 / 96.18 25.68 / 93.87 33.79 / 93.78 21.85 / 95.42"
    assert lines["published"] == table6.split()
    assert all(cell[0] in "+-/" for cell in lines["difference"])
    assert "lhact: low 0.219408, high 1.35208, order 2" in out
    assert "energy" in lines


def test_json_is_the_contract(run, v1_cache_dir):
    """The schema that other tools read."""
    result = as_json(run, v1_cache_dir, "--methods", "lhact", "bats")
    assert {"benchmark", "name", "network", "id", "results"} <= set(result)
    assert (result["benchmark"], result["name"]) == ("imagenet", "resnet50")
    assert result["id"] == {"images": 61, "accuracy": None}
    assert [(row["method"], row["dataset"]) for row in result["results"]] == [
        (m, d) for m in ("lhact", "bats") for d in (*OOD, "average")
    ]
    first = result["results"][0]
    assert first["parameters"] == V1_CONSTANTS
    assert first["images"] == 30
    assert set(first["published"]) == {"fpr95", "auroc", "source"}
    assert (first["published"]["fpr95"], first["published"]["auroc"]) == (11.07, 97.86)
    assert {"fpr95", "auroc", "threshold"} <= set(first)


def test_numbers_follow_from_the_scores_written(run, cache_dir, tmp_path):
    """--scores-dir holds each image's path and score; the metrics of what is written are the
    metrics that are printed."""
    given = ("--methods", "lhact", "msp", "--scores-dir", tmp_path / "scores")
    result = as_json(run, cache_dir, *given)
    for method in ("lhact", "msp"):
        read = {}
        for dataset in ("id", *OOD):
            with open(tmp_path / "scores" / method / f"{dataset}.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            assert [row["path"] for row in rows] == [
                f"{dataset.lower()}/{i:04}.jpg" for i in range(len(rows))
            ]
            read[dataset] = np.array([float(row["score"]) for row in rows], np.float32)
        for row in result["results"]:
            if row["method"] == method and row["dataset"] != "average":
                assert {name: row[name] for name in METRICS} == {
                    name: metric(read["id"], read[row["dataset"]])
                    for name, metric in METRICS.items()
                }


@pytest.mark.parametrize("format_", ["table", "markdown", "latex", "csv", "json"])
def test_output_is_what_stdout_would_have_been(run, cache_dir, tmp_path, format_):
    _, printed, _ = run(cache_dir, "--format", format_)
    assert len(printed) > 200
    status, out, _ = run(cache_dir, "--format", format_, "--output", tmp_path / "result.txt")
    assert (status, out) == (0, "")
    assert (tmp_path / "result.txt").read_text() == printed


def test_metrics_chosen(run, v1_cache_dir):
    status, out, _ = run(v1_cache_dir, "--metrics", "fpr95_ood_positive", "aupr_id")
    assert status == 0
    assert "FPR95 (OOD positive) / AUPR (ID positive)" in out
    assert "11.07" not in out


# Methods and parameters


def methods_of(out):
    return list(dict.fromkeys(line["method"] for line in csv.DictReader(out.splitlines())))


@pytest.mark.usefixtures("odin")
@pytest.mark.parametrize(
    ("arguments", "methods"),
    [
        (["--methods", "table6"], list(TABLE6)),
        # ODIN, which is not swept, needs no calibration set of perturbed images.
        (["--methods", "table6", "--select-on", "SUN", "--sweep", "lhact.order=1,2"], list(TABLE6)),
        (["--methods", "all", *FITTED], known_methods()),
    ],
    ids=["table6", "selected", "all"],
)
def test_groups_of_methods(run, cache_dir, arguments, methods):
    status, out, err = run(cache_dir, "--format", "csv", *arguments)
    assert status == 0
    assert methods_of(out) == methods
    assert "left out" not in err


def test_all_says_what_it_leaves_out(run, cache_dir):
    status, out, err = run(cache_dir, "--methods", "all", "--format", "csv")
    assert status == 0
    listed = methods_of(out)
    left_out = [line for line in err.splitlines() if line.startswith("left out: ")]
    missing = [name for name in known_methods() if name not in listed]
    assert "odin" in missing
    assert "knn" in listed
    assert len(left_out) == len(missing)
    assert all(any(f"left out: {name} (" in line for line in left_out) for name in missing)


def test_set_and_sweep(run, cache_dir):
    sweeps = ["--sweep", "lhact.low=0.1,0.2", "--sweep", "lhact.high=1,2"]
    given = ["--methods", "lhact+msp", "--set", "lhact.order=3", *sweeps]
    rows = as_json(run, cache_dir, *given)["results"]
    found = [row["parameters"] for row in rows if row["dataset"] == "average"]
    assert found == [
        {"low": low, "high": high, "order": 3} for low in (0.1, 0.2) for high in (1, 2)
    ]
    assert len({row["auroc"] for row in rows if row["dataset"] == "SUN"}) == 4


def test_percentiles_of_the_calibration_set_are_told(run, cache_dir, small_sets):
    low, high = np.percentile(small_sets["calibration"].astype(np.float64), [20, 95.5])
    result = as_json(run, cache_dir, "--set", "lhact.low_percentile=20")
    expected = {"low": low, "low_percentile": 20, "high": high, "high_percentile": 95.5, "order": 2}
    assert result["results"][0]["parameters"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--methods", "lhact", "lhact+energy"],
        ["--methods", "lhact", "energy", "--sweep", "lhact.order=2,2"],
        ["--methods", "react", "react+energy", "lhact+energy"],
    ],
    ids=" ".join,
)
def test_the_same_method_twice(run, cache_dir, tmp_path, arguments):
    """Once or twice in the table, but each time a whole line of its own."""
    given = (*arguments, "--format", "markdown", "--scores-dir", tmp_path / "scores")
    status, out, _ = run(cache_dir, *given)
    assert status == 0
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {2 + len(OOD) + 1}


def remove(folder, name):
    for suffix in ("json", "npy"):
        (folder / f"{name}.{suffix}").unlink()


def test_without_calibration(run, cache_dir, folder):
    remove(folder, "calibration")
    status, out, err = run(cache_dir)
    assert status == 0
    assert "ID TEST activations (61 images)" in err
    assert "lhact" in out


# Selecting and reproducing


def test_selecting_on_a_set_keeps_it_out_of_the_test(run, cache_dir):
    given = ("--select-on", "SUN", "--sweep", "lhact.order=1,2,3", "--format", "json")
    status, out, err = run(cache_dir, *given)
    assert status == 0
    result = json.loads(out)
    assert result["selected_on"] == "SUN"
    rows = [row for row in result["results"] if row["method"] == "lhact"]
    assert [(row["method"], row["dataset"]) for row in rows] == [
        ("lhact", dataset) for dataset in ("iNaturalist", "Places", "Textures", "average")
    ]
    assert rows[-1]["auroc"] == pytest.approx(sum(row["auroc"] for row in rows[:3]) / 3)
    assert "4 settings considered" in err, "three of lhact, one of energy"
    assert "chosen on SUN, without the test sets" in err


def test_selecting_on_another_caches_set_of_the_only_name(
    run, cache_dir, folder, tmp_path, write_cache, small_sets, small_head
):
    """Nothing is left to test on, or the cache's own set is: either way no traceback."""
    write_cache(tmp_path / "other", {"SUN": small_sets["Places"]}, *small_head)
    for name in ("iNaturalist", "Places", "Textures"):
        remove(folder, name)
    given = ("--select-on", f"SUN={tmp_path / 'other'}", "--sweep", "lhact.order=1,2")
    status, out, err = run(cache_dir, *given)
    assert (status == 0 and "SUN" in out) or (status in (1, 2) and "--select-on" in err)


@pytest.mark.parametrize(
    "arguments",
    ["--select-on SUN", "--sweep lhact.order=1,2", "--set lhact.order=3", "--methods energy"]
    + [f"{option} x" for option in ("--scores-dir", "--plots", "--report", "--save-detector")]
    + ["--bootstrap 100", "--digits 3", "--name a b", "--format csv"],
)
def test_reproduce_ignores_nothing_silently(run, cache_dir, arguments):
    """It searches settings of its own: these belong to another question."""
    status, out, err = run(cache_dir, "--reproduce", *arguments.split())
    assert (status, out) == (2, "")
    given = {"--name a b": "several names", "--format csv": "--format csv"}
    named = given.get(arguments, arguments.split()[0])
    assert err.endswith(f"error: --reproduce does not go together with {named}\n")


def test_reproduce(run, cache_dir):
    status, out, err = run(cache_dir, "--reproduce", "--format", "json")
    assert status == 0
    rows = json.loads(out)["reproduce"]
    assert [row["method"] for row in rows] == ["react", "react", "bfact", "bats", "lhact"]
    assert all(row["distance"] <= row["default"]["distance"] for row in rows)
    assert "not the network of the published rows" in err


# Wrong command lines: status 2


GIVEN_TWICE = "lhact.low is given twice"
WRONG = {
    "--methods nonsense": ["unknown method 'nonsense'", *known_methods()],
    "--methods msp+lhact": ["a score comes last and once"],
    "--set lhact.nonsense=1": ["lhact has no parameter 'nonsense'", "high_percentile, order"],
    "--set lhact.low": ["METHOD.PARAMETER=NUMBER", "'lhact.low'"],
    "--set lhact.low=nan": ["METHOD.PARAMETER=NUMBER"],
    "--set lhact.order=0": ["lhact.order must be a number above 0, got 0"],
    "--set react.high=1": ["react.high=1 is about none of the methods asked for: lhact"],
    "--set lhact.low=2 --set lhact.high=1": ["low 2 lies above high 1"],
    "--sweep lhact.low=0.1,,0.2": ["METHOD.PARAMETER=NUMBER"],
    "--sweep lhact.high_percentile=90,101": ["between 0 and 100, got 101"],
    "--set lhact.low=1 --set lhact.low=2": [
        f"{GIVEN_TWICE}; give one value, or a sweep of several"
    ],
    "--set lhact.low=1 --set lhact.low_percentile=3": [GIVEN_TWICE],
    "--set lhact.low=1 --sweep lhact.low=1,2": [GIVEN_TWICE],
    "--sweep lhact.low=0,1 --sweep lhact.low=2,3": [GIVEN_TWICE],
    "--metrics fpr80": ["fpr80", *METRICS],
    "--format html": ["html", "table", "markdown", "latex", "csv", "json"],
    "--benchmark cifar": ["cifar", "imagenet", "digits"],
    "--report x --output x": ["--report and --output both name x; give them two files"],
    "--device tpu": ["auto, cuda, cuda:N or cpu, got 'tpu'"],
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_command_line(run, cache_dir, command):
    status, out, err = run(cache_dir, *command.split())
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert all(word in err for word in WRONG[command])


def test_wrong_command_line_is_told_before_the_cache_is_looked_for(run, tmp_path):
    assert run(tmp_path, "--methods", "nonsense")[0] == 2


def fails_with(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line(run, cache_dir, monkeypatch, error):
    monkeypatch.setattr(evaluate, "fit_methods", fails_with(error))
    status, out, err = run(cache_dir)
    assert (status, out) == (1, "")
    assert "eval.py: the device has too little memory; give another" in err.splitlines()[-1]


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ZeroDivisionError("1")])
def test_a_bug_keeps_its_traceback(run, cache_dir, monkeypatch, error):
    monkeypatch.setattr(evaluate, "score", fails_with(error))
    with pytest.raises(type(error), match=str(error)):
        run(cache_dir)


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_no_such_gpu(run, cache_dir, device):
    """Never another device instead."""
    status, out, err = run(cache_dir, "--device", device)
    assert (status, out) == (2, "")
    assert f"device {device}: torch " in err
    assert "cpu" in err


# Wrong input: status 1 and one line


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], ""),
        (["--benchmark", "digits"], " --benchmark digits"),
        (["--name", "it is"], " --name 'it is'"),
    ],
)
def test_no_cache_names_the_very_command(run, tmp_path, monkeypatch, arguments, command):
    """Plain get_activation.py would make another one."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run("cache", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("eval.py: there is no cache cache/")
    assert err.endswith(f"; make it with: python get_activation.py{command}\n")
    (tmp_path / "cache" / "imagenet" / "mine").mkdir(parents=True)
    assert ("; there are: mine;" in run("cache", *arguments)[2]) == ("digits" not in arguments)


REFUSED = {
    "--methods table6": "get_activation.py again with --odin",
    "--methods bfact --set bfact.high=0": "high must be above 0",
    "--methods bfact --set bfact.high_percentile=5": "high must be above 0",
    "--methods lhact-high --set lhact-high.high=-1": "high must be above 0",
    "--set lhact.low=3": "lies above high",
    "--set lhact.low_percentile=99": "lies above high",
    "--methods knn --set knn.k=1000": "--set knn.k=",
    # Another cache's ID images must not take the place of this one's.
    "--select-on id={folder} --sweep lhact.order=1,2": "--select-on",
    "--select-on calibration={folder} --sweep lhact.order=1,2": "--select-on",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_this_cache_cannot_serve(run, cache_dir, folder, command):
    status, out, err = run(cache_dir, *command.format(folder=folder).split())
    assert status in (1, 2)
    assert out == ""
    assert REFUSED[command] in err


PLACES = [
    ("file/inside", ["--output", "--scores-dir"], "Not a directory"),
    ("nowhere/inside", ["--output"], "No such file or directory"),
    ("folder", ["--output", "--report"], "Is a directory"),
    ("file", ["--scores-dir"], "Not a directory"),
    ("closed/inside", ["--output", "--scores-dir"], "Permission denied"),
    ("closed", ["--scores-dir"], "Permission denied"),
    ("x" * 300, ["--output", "--scores-dir"], "File name too long"),
]


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [(option, name, reason) for name, options, reason in PLACES for option in options],
)
def test_output_that_cannot_be_written(
    run, cache_dir, public_folder, unprivileged, monkeypatch, option, name, reason
):
    """It is told before any image is scored."""
    shutil.copytree(cache_dir, public_folder / "cache")
    (public_folder / "file").write_text("")
    (public_folder / "folder").mkdir()
    (public_folder / "closed").mkdir(mode=0o555)
    monkeypatch.setattr(identify, "thresholds", lambda *_: pytest.fail("the work began"))
    place = public_folder / name
    unprivileged()
    status, out, err = run(public_folder / "cache", option, place)
    assert (status, out) == (1, "")
    mend = f"give {option} a place that can be written to"
    assert err == f"eval.py: {place}: {reason}; {mend}\n"


def test_looking_for_the_place_leaves_it_as_it_is(run, cache_dir, tmp_path, monkeypatch):
    (tmp_path / "old.txt").write_text("an older table")

    monkeypatch.setattr(evaluate, "score", fails_with(KeyboardInterrupt()))
    for name in ("old.txt", "new.txt"):
        assert run(cache_dir, "--output", tmp_path / name)[0] == 130
    assert (tmp_path / "old.txt").read_text() == "an older table"
    assert not (tmp_path / "new.txt").exists()


def test_output_to_a_pipe(run, cache_dir, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = fork(lambda: int("lhact" not in (tmp_path / "pipe").read_text()))
    writer = fork(lambda: run(cache_dir, "--output", tmp_path / "pipe")[0], seconds=20)
    assert wait(reader) == 0
    assert wait(writer) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_standard_output_on_a_full_disk(cache_dir, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess_run([ROOT / "eval.py", "--cache-dir", cache_dir], tmp_path, stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "eval.py: standard output: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_on_a_full_disk(run, cache_dir):
    """The system names no file then; the line does."""
    status, _, err = run(cache_dir, "--output", "/dev/full")
    assert status == 1
    assert err.splitlines()[-1].startswith("eval.py: /dev/full: ")


def test_checkpoint_whose_name_is_not_utf8(run, tmp_path, write_cache, small_sets, small_head):
    """Such names reach the sidecar as lone surrogates; the report shows them with escapes."""
    checkpoint = b"mod\xe9le.pth".decode("utf-8", "surrogateescape")
    place = tmp_path / "cache" / "imagenet" / "resnet50"
    write_cache(place, small_sets, *small_head, network={"checkpoint": checkpoint})
    status, _, _ = run(tmp_path / "cache", "--output", tmp_path / "table.txt")
    assert status == 0
    assert f"resnet18 {shown(checkpoint)}" in (tmp_path / "table.txt").read_text()


def cut_short(folder):
    (folder / "SUN.npy").write_bytes((folder / "SUN.npy").read_bytes()[:-4])


def one_nan(folder):
    rows = np.load(folder / "SUN.npy")
    rows[7, 3] = np.nan
    np.save(folder / "SUN.npy", rows)


def pickled(folder):
    np.save(folder / "SUN.npy", np.array([{"not": "numbers"}], dtype=object), allow_pickle=True)


def newer(folder):
    content = json.loads((folder / "SUN.json").read_text())
    (folder / "SUN.json").write_text(json.dumps({**content, "format": 2}))


def other_network(folder):
    text = (folder / "SUN.json").read_text()
    (folder / "SUN.json").write_text(text.replace("0" * 64, "1" * 64))


def unfinished(folder):
    (folder / "Places.rows").write_text("{}")
    (folder / "Places.json").unlink()


# One of each kind; test_cache.py has the others.
DAMAGES = {
    "cut short": (cut_short, "SUN.npy"),
    "nan": (one_nan, "SUN.npy"),
    "pickled": (pickled, "SUN.npy"),
    "no JSON": (lambda folder: (folder / "SUN.json").write_text("{"), "SUN.json"),
    "newer format": (newer, "SUN.json has format 2"),
    "other network": (other_network, "SUN.npy is of something else"),
    "no sidecar": (lambda folder: (folder / "id.json").unlink(), "id.npy has no .json"),
    "no ID set": (lambda folder: remove(folder, "id"), "ID set"),
    "unfinished": (unfinished, "Places"),
    "no head": (lambda folder: (folder / "head.npz").unlink(), "head.npz"),
    "damaged head": (lambda folder: (folder / "head.npz").write_bytes(b"PK\x03\x04"), "head.npz"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_cache(run, cache_dir, folder, kind):
    damage, words = DAMAGES[kind]
    damage(folder)
    status, out, err = run(cache_dir)
    assert (status, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith("eval.py: ")
    assert words in line
    assert "get_activation.py" in line or "update this program" in line
    assert len(err.splitlines()) <= 3  # with the device and the remark on thresholds at most


SIDECAR = re.findall(
    r"\S+",
    """format network preprocessing precision odin images channels fingerprint versions labels paths
    accuracy network.arch network.weights network.checkpoint network.sha256 network.classes
    network.channels""",
)
VALUES = ["missing", None, "text", -1, [1], {"a": 1}]


@pytest.mark.parametrize("key", SIDECAR)
def test_edited_sidecars(run, cache_dir, folder, key):
    """An entry gone or of another kind, in all of them alike: an answer or one clear line, never a
    traceback."""
    originals = {path: path.read_text() for path in folder.glob("*.json")}
    failures = []
    for value in VALUES:
        for path, text in originals.items():
            content = json.loads(text)
            *outer, last = key.split(".")
            place = content[outer[0]] if outer else content
            place[last] = value
            if value == "missing":
                del place[last]
            path.write_text(json.dumps(content))
        status, out, err = run(cache_dir, "--methods", "msp")
        clear = err.splitlines()[-1].startswith("eval.py: ") and "get_activation.py" in err
        if not (status == 0 or (status == 1 and clear and not out)):
            failures.append((value, status, err))
    assert not failures


# The script as a process


def subprocess_run(arguments, cwd, stdout=subprocess.PIPE):
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True, "timeout": 120}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **settings}, **pipes)


def test_as_a_process(cache_dir, tmp_path):
    """From any folder: results and nothing else on stdout, remarks on stderr."""
    given = [ROOT / "eval.py", "--cache-dir", cache_dir, "--format", "json"]
    done = subprocess_run(given, tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["results"][0]["method"] == "lhact"
    device, thresholds = done.stderr.splitlines()
    assert device == device_line("auto", pick_device("auto"))
    assert thresholds == "thresholds: percentiles of the calibration activations (40 images)"


@pytest.mark.parametrize(("arguments", "status"), [([], 1), (["--methods", "nonsense"], 2)])
def test_exit_status_is_mains(monkeypatch, tmp_path, capsys, arguments, status):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--cache-dir", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert end.value.code == status
    assert capsys.readouterr().out == ""


IMPORTS = """
import os, pkgutil, random, sys
import numpy, torch
def state():
    devices = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    randomness = torch.get_rng_state().tolist(), repr(numpy.random.get_state()), random.getstate()
    modes = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    return devices, randomness, modes, os.getcwd(), dict(os.environ), sys.argv
sys.path.insert(0, {root!r})
sys.argv = ["program", "--nonsense"]
before = state()
import eval
assert state() == before, "importing eval.py does something"
sys.argv = before[-1]
status = eval.main(["--cache-dir", {cache!r}, "--output", os.devnull, "--device", "cpu"])
assert status == 0, status
assert "torchvision" not in sys.modules, "eval.py imports torchvision"
assert "lhact.extraction.networks" not in sys.modules
assert "lhact.extraction.build" not in sys.modules
before = state()
import lhact
for module in pkgutil.iter_modules(lhact.__path__):
    __import__("lhact." + module.name)
import get_activation
assert state() == before, "importing a module does something"
assert not os.listdir("."), os.listdir(".")
print("fine")
"""


def test_importing_does_nothing_and_eval_needs_no_torchvision(cache_dir, tmp_path):
    """No argument parsing, no seeding, no device choice on import; eval.py never builds a
    network."""
    (tmp_path / "empty").mkdir()
    code = IMPORTS.format(root=str(ROOT), cache=str(cache_dir))
    done = subprocess_run(["-B", "-c", code], tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


@pytest.mark.parametrize(("weights", "expected"), [("IMAGENET1K_V1", True), (None, False)])
def test_other_lists_are_named_beside_published_numbers(
    run, tmp_path, write_cache, v1_sets, v1_head, weights, expected
):
    network = {"arch": "resnet50", "weights": weights}
    write_cache(tmp_path / "imagenet" / "resnet50", v1_sets, *v1_head, network=network)
    status, out, err = run(tmp_path)
    assert status == 0
    words = (
        "id has 61 images, the published 50,000; iNaturalist has 30 images, the published 10,000"
    )
    assert (words in err) == expected
    assert ("difference" in out) == expected


def test_lists_larger_than_the_published_ones_are_named_and_equal_ones_are_not(
    run, v1_cache_dir, monkeypatch
):
    known = script.open_benchmark("imagenet")
    counts = {"iNaturalist": 30, "SUN": 24, "Places": 20, "Textures": 15}
    sets = known.ood
    ood = {name: dataclasses.replace(sets[name], images=n) for name, n in counts.items()}
    changed = dataclasses.replace(known, id=dataclasses.replace(known.id, images=61), ood=ood)
    monkeypatch.setattr(script, "open_benchmark", lambda *_: changed)
    err = run(v1_cache_dir)[2]
    assert "differences mean little: SUN has 25 images, the published 24\n" in err


# Whether it is the published network


UNEQUAL_CHANNELS = np.resize(np.float32([0.6, 1.4]), 2048)


@pytest.fixture
def claim(tmp_path, write_cache, v1_sets, v1_head):
    """claim(change, ...): a cache by the name of the published network, its 300 ID activations
    changed."""

    def claim(change=lambda rows: rows, weights="IMAGENET1K_V1", **fields):
        sets = {**v1_sets, "id": change(v1_like(300))}
        place = tmp_path / "claim" / "imagenet" / "resnet50"
        write_cache(place, sets, *v1_head, network={**V1, "weights": weights}, **fields)
        return tmp_path / "claim"

    return claim


def times(factor):
    return lambda rows: rows * np.float32(factor)


FINDINGS = {
    "recorded": (
        {"preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]}},
        ["no normalisation: mean [0.0, 0.0, 0.0]"],
    ),
    "squashed, recorded": (
        {"preprocessing": {"squash": True}},
        ["other preprocessing: squash True instead of False"],
    ),
    "by the activations": (
        {"change": lambda rows: rows * UNEQUAL_CHANNELS * np.float32(0.92)},
        ["the mean activation is", "as without normalisation"],
    ),
    "by top-1": (
        {"accuracy": 60.0},
        ["top-1 is 60.00 % on 300 images, published is 76.13 %", "without the resize"],
    ),
    "by name": (
        {"weights": "IMAGENET1K_V2"},
        ["these are IMAGENET1K_V2 weights", "constants are of IMAGENET1K_V1"],
    ),
}


@pytest.mark.parametrize("defect", FINDINGS)
def test_what_is_not_the_published_network_is_said_above_the_table(run, claim, defect):
    """Also on stderr and in the JSON. The published numbers stay, since the cache goes by the
    network's name, but for V2."""
    settings, names = FINDINGS[defect]
    compared = "weights" not in settings
    cache_dir = claim(**settings)
    status, out, err = run(cache_dir)
    assert status == 0
    for text in (out.partition("method  ")[0], err):
        assert "not comparable with the published numbers: " in text
        assert all(name in text for name in names), text
    assert ("11.07" in out) == ("difference" in out) == compared
    result = as_json(run, cache_dir)
    assert all(any(name in finding for finding in result["findings"]) for name in names)
    assert all(f"published numbers: {finding}\n" in err for finding in result["findings"])
    assert all(bool(row["published"]) == compared for row in result["results"])


@pytest.mark.parametrize("accuracy", [None, 76.13, 72.0])
def test_the_published_network_is_compared_and_nothing_is_said(run, claim, accuracy):
    status, out, err = run(claim(accuracy=accuracy))
    assert status == 0
    assert "11.07" in out
    assert "not comparable" not in out + err


def test_reproduce_compares_with_the_default_that_this_network_gets(run, claim):
    """The paper's constants where the activations are V1's, whatever the weights are called."""
    status, out, _ = run(claim(weights=None), "--reproduce", "--format", "json")
    assert status == 0
    defaults = {row["method"]: row["default"]["parameters"] for row in json.loads(out)["reproduce"]}
    assert defaults["lhact"] == V1_CONSTANTS
    assert defaults["react"] == {"high": 1}


def test_reproducing_rows_with_another_network_says_so(run, claim):
    status, _, err = run(claim(lambda rows: rows * 4), "--reproduce")
    assert status == 0
    assert "not comparable with the published numbers: " in err
    assert "as with inputs normalised twice" in err
    assert "not comparable" not in run(claim(), "--reproduce")[2]
