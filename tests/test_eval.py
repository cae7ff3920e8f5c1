"""eval.py from the command line to its output: what it prints where, its exit status, and one clear
line for every wrong input."""

import csv
import dataclasses
import json
import os
import runpy
import subprocess
import sys
import zipfile
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
FITTED = ["--set", "knn.k=4", "--set", "vim.dim=4", "--set", "residual.dim=4"]


@pytest.fixture
def cache_dir(tmp_path, write_cache, small_sets, small_head):
    """A cache of a network that is not V1, under the default name."""
    labels = {name: [i % 5 for i in range(len(small_sets[name]))] for name in ("id", "calibration")}
    write_cache(
        tmp_path / "cache" / "imagenet" / "resnet50", small_sets, *small_head, labels=labels
    )
    return tmp_path / "cache"


@pytest.fixture
def v1_cache_dir(tmp_path, write_cache, v1_sets, v1_head):
    write_cache(tmp_path / "v1" / "imagenet" / "resnet50", v1_sets, *v1_head, network=V1)
    return tmp_path / "v1"


@pytest.fixture
def run(capsys):
    """run(cache_dir, *arguments) -> (status, stdout, stderr)"""

    def run(cache_dir, *arguments):
        try:
            status = script.main(
                ["--cache-dir", str(cache_dir), "--device", "cpu", *map(str, arguments)]
            )
        except SystemExit as end:  # argparse
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def as_json(run, cache_dir, *arguments):
    status, out, _ = run(cache_dir, "--format", "json", *arguments)
    assert status == 0
    return json.loads(out)


# What is printed


def test_the_device_is_said_first(run, cache_dir):
    _, _, err = run(cache_dir)
    assert err.startswith(f"device: cpu ({torch.backends.cpu.get_cpu_capability()})\n")


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
    rows = [line.split() for line in out.splitlines() if line]
    lines = {row[0]: row[1:] for row in reversed(rows)}
    assert (
        " ".join(lines["published"])
        == "11.07 / 97.86 16.87 / 96.18 25.68 / 93.87 33.79 / 93.78 21.85 / 95.42"
    )
    assert all(cell[0] in "+-/" for cell in lines["difference"])
    assert "lhact: low 0.219408, high 1.35208, order 2" in out
    assert "energy" in lines


def test_json_is_the_contract(run, v1_cache_dir):
    """The schema that other tools read."""
    result = as_json(run, v1_cache_dir, "--methods", "lhact", "bats")
    assert {"benchmark", "name", "network", "id", "results"} <= set(result)
    assert (result["benchmark"], result["name"], result["id"]) == (
        "imagenet",
        "resnet50",
        {"images": 61, "accuracy": None},
    )
    assert [(row["method"], row["dataset"]) for row in result["results"]] == [
        (m, d) for m in ("lhact", "bats") for d in (*OOD, "average")
    ]
    first = result["results"][0]
    assert {"method", "parameters", "dataset", "images", "fpr95", "auroc", "published"} <= set(
        first
    )
    assert first["parameters"] == {
        "low": 0.21940805315971373,
        "high": 1.3520756840705868,
        "order": 2,
    }
    assert first["images"] == 30
    assert set(first["published"]) == {"fpr95", "auroc", "source"}
    assert (first["published"]["fpr95"], first["published"]["auroc"]) == (11.07, 97.86)


def test_numbers_follow_from_the_scores_written(run, cache_dir, tmp_path):
    """--scores-dir holds each image's path and score; the metrics of what is written are the
    metrics that are printed."""
    result = as_json(
        run, cache_dir, "--methods", "lhact", "msp", "--scores-dir", tmp_path / "scores"
    )
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


def test_table6(run, cache_dir, write_cache, small_sets, small_head):
    folder = cache_dir / "imagenet" / "resnet50" / "odin"
    write_cache(
        folder,
        {name: rows for name, rows in small_sets.items() if name != "calibration"},
        *small_head,
    )
    result = as_json(run, cache_dir, "--methods", "table6")
    assert list(dict.fromkeys(row["method"] for row in result["results"])) == list(TABLE6)


def test_table6_without_odins_cache(run, cache_dir):
    status, out, err = run(cache_dir, "--methods", "table6")
    assert (status, out) == (1, "")
    assert "get_activation.py again with --odin" in err


def test_all_says_what_it_leaves_out(run, cache_dir):
    status, out, err = run(cache_dir, "--methods", "all", "--format", "csv")
    assert status == 0
    listed = list(dict.fromkeys(line["method"] for line in csv.DictReader(out.splitlines())))
    left_out = [line for line in err.splitlines() if line.startswith("left out: ")]
    missing = [name for name in known_methods() if name not in listed]
    assert "odin" in missing
    assert "knn" in listed
    assert len(left_out) == len(missing)
    assert all(any(f"left out: {name} (" in line for line in left_out) for name in missing)


def test_all_without_anything_left_out(run, cache_dir, write_cache, small_sets, small_head):
    folder = cache_dir / "imagenet" / "resnet50" / "odin"
    write_cache(
        folder,
        {name: rows for name, rows in small_sets.items() if name != "calibration"},
        *small_head,
    )
    status, out, err = run(cache_dir, "--methods", "all", "--format", "csv", *FITTED)
    assert status == 0
    assert (
        list(dict.fromkeys(line["method"] for line in csv.DictReader(out.splitlines())))
        == known_methods()
    )
    assert "left out" not in err


def test_set_and_sweep(run, cache_dir):
    arguments = [
        "--methods",
        "lhact+msp",
        "--set",
        "lhact.order=3",
        "--sweep",
        "lhact.low=0.1,0.2",
        "--sweep",
        "lhact.high=1,2",
    ]
    rows = as_json(run, cache_dir, *arguments)["results"]
    found = [row["parameters"] for row in rows if row["dataset"] == "average"]
    assert found == [
        {"low": low, "high": high, "order": 3} for low in (0.1, 0.2) for high in (1, 2)
    ]
    assert len({row["auroc"] for row in rows if row["dataset"] == "SUN"}) == 4


def test_sweep_in_a_table_has_a_line_for_each(run, cache_dir):
    status, out, _ = run(
        cache_dir,
        "--methods",
        "lhact",
        "energy",
        "--sweep",
        "lhact.high_percentile=90,95,99",
        "--format",
        "markdown",
    )
    assert status == 0
    labels = [
        line.split("|")[1].strip().removesuffix(" *")
        for line in out.splitlines()
        if line.startswith("|")
    ][2:]
    assert labels == [
        "lhact high_percentile=90",
        "lhact high_percentile=95",
        "lhact high_percentile=99",
        "energy",
    ]


def test_percentiles_of_the_calibration_set_are_told(run, cache_dir, small_sets):
    low, high = np.percentile(small_sets["calibration"].astype(np.float64), [20, 95.5])
    parameters = as_json(run, cache_dir, "--set", "lhact.low_percentile=20")["results"][0][
        "parameters"
    ]
    expected = {"low": low, "low_percentile": 20, "high": high, "high_percentile": 95.5, "order": 2}
    assert parameters == pytest.approx(expected, rel=1e-12)


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
    status, out, _ = run(
        cache_dir, *arguments, "--format", "markdown", "--scores-dir", tmp_path / "scores"
    )
    assert status == 0
    assert {line.count("|") for line in out.splitlines() if line.startswith("|")} == {
        2 + len(OOD) + 1
    }


def test_baseline_scores_can_be_written(run, cache_dir, tmp_path):
    status, _, _ = run(cache_dir, "--scores-dir", tmp_path / "scores")
    assert status == 0
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"lhact", "energy"}


def test_without_calibration(run, cache_dir):
    for suffix in ("json", "npy"):
        (cache_dir / "imagenet" / "resnet50" / f"calibration.{suffix}").unlink()
    status, out, err = run(cache_dir)
    assert status == 0
    assert "ID TEST activations (61 images)" in err
    assert "lhact" in out


# Selecting and reproducing


def test_selecting_on_a_set_keeps_it_out_of_the_test(run, cache_dir):
    status, out, err = run(
        cache_dir, "--select-on", "SUN", "--sweep", "lhact.order=1,2,3", "--format", "json"
    )
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


@pytest.mark.parametrize("name", ["id", "calibration"])
def test_selecting_on_what_is_no_ood_set(run, cache_dir, name):
    """Another cache's ID images must not take the place of this one's."""
    other = cache_dir / "imagenet" / "resnet50"
    status, out, err = run(
        cache_dir, "--select-on", f"{name}={other}", "--sweep", "lhact.order=1,2"
    )
    assert status in (1, 2)
    assert out == ""
    assert "--select-on" in err


def test_selecting_on_another_caches_set_of_the_only_name(
    run, cache_dir, tmp_path, write_cache, small_sets, small_head
):
    """Nothing is left to test on, or the cache's own set is: either way no traceback."""
    write_cache(tmp_path / "other", {"SUN": small_sets["Places"]}, *small_head)
    for name in ("iNaturalist", "Places", "Textures"):
        for suffix in ("json", "npy"):
            (cache_dir / "imagenet" / "resnet50" / f"{name}.{suffix}").unlink()
    status, out, err = run(
        cache_dir, "--select-on", f"SUN={tmp_path / 'other'}", "--sweep", "lhact.order=1,2"
    )
    assert (status == 0 and "SUN" in out) or (status in (1, 2) and "--select-on" in err)


def test_selecting_beside_odin(run, cache_dir, write_cache, small_sets, small_head):
    """get_activation.py --odin makes no calibration set of perturbed images; ODIN, which is not
    swept, needs none."""
    folder = cache_dir / "imagenet" / "resnet50" / "odin"
    write_cache(
        folder,
        {name: rows for name, rows in small_sets.items() if name != "calibration"},
        *small_head,
    )
    status, out, _ = run(
        cache_dir,
        "--methods",
        "table6",
        "--select-on",
        "SUN",
        "--sweep",
        "lhact.order=1,2",
        "--format",
        "csv",
    )
    assert status == 0
    assert list(dict.fromkeys(line["method"] for line in csv.DictReader(out.splitlines()))) == list(
        TABLE6
    )


@pytest.mark.parametrize(
    "arguments",
    [["--select-on", "SUN"], ["--sweep", "lhact.order=1,2"], ["--set", "lhact.order=3"]],
    ids=" ".join,
)
def test_reproduce_ignores_nothing_silently(run, cache_dir, arguments):
    """It searches settings of its own: these belong to another question."""
    status, out, err = run(cache_dir, "--reproduce", *arguments)
    assert (status, out) == (2, "")
    assert "--reproduce" in err


def test_reproduce(run, cache_dir):
    status, out, err = run(cache_dir, "--reproduce", "--format", "json")
    assert status == 0
    rows = json.loads(out)["reproduce"]
    assert [row["method"] for row in rows] == ["react", "react", "bfact", "bats", "lhact"]
    assert all(row["distance"] <= row["default"]["distance"] for row in rows)
    assert "not the network of the published rows" in err


# Wrong command lines: status 2


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--methods", "nonsense"], ["unknown method 'nonsense'", *known_methods()]),
        (["--methods", "msp+lhact"], ["a score comes last and once"]),
        (
            ["--set", "lhact.nonsense=1"],
            [
                "lhact has no parameter 'nonsense'",
                "low, low_percentile, high, high_percentile, order",
            ],
        ),
        (["--set", "lhact.low"], ["METHOD.PARAMETER=NUMBER", "'lhact.low'"]),
        (["--set", "lhact.order=0"], ["lhact.order must be a number above 0, got 0"]),
        (["--set", "react.high=1"], ["react.high=1 is about none of the methods asked for: lhact"]),
        (["--sweep", "lhact.low=0.1,,0.2"], ["METHOD.PARAMETER=NUMBER"]),
        (["--sweep", "lhact.high_percentile=90,101"], ["between 0 and 100, got 101"]),
        (
            ["--set", "lhact.low=0.1", "--set", "lhact.low=0.2"],
            ["lhact.low is given twice; give one value, or a sweep of several"],
        ),
        (
            ["--set", "lhact.low=0.1", "--set", "lhact.low_percentile=30"],
            ["lhact.low is given twice"],
        ),
        (["--set", "lhact.low=0.1", "--sweep", "lhact.low=0.1,0.2"], ["lhact.low is given twice"]),
        (
            ["--sweep", "lhact.low=0,0.1", "--sweep", "lhact.low=0.2,0.3"],
            ["lhact.low is given twice"],
        ),
        (["--set", "lhact.low_percentile=-1"], ["between 0 and 100, got -1"]),
        (["--set", "lhact.low=nan"], ["METHOD.PARAMETER=NUMBER"]),
        (["--set", "lhact.low=2", "--set", "lhact.high=1"], ["low 2 lies above high 1"]),
        (["--metrics", "fpr80"], ["fpr80", *METRICS]),
        (["--format", "html"], ["html", "table", "markdown", "latex", "csv", "json"]),
        (["--benchmark", "cifar"], ["cifar", "imagenet", "digits"]),
        (["--device", "tpu"], ["auto, cuda, cuda:N or cpu, got 'tpu'"]),
    ],
    ids=lambda value: (
        " ".join(value) if isinstance(value, list) and value[0].startswith("--") else ""
    ),
)
def test_wrong_command_line(run, cache_dir, arguments, names):
    status, out, err = run(cache_dir, *arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert all(name in err for name in names)


def test_wrong_command_line_is_told_before_the_cache_is_looked_for(run, tmp_path):
    assert run(tmp_path, "--methods", "nonsense")[0] == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line(run, cache_dir, monkeypatch, error):
    def exhausted(*_: object) -> None:
        raise error

    monkeypatch.setattr(evaluate, "fit_methods", exhausted)
    status, out, err = run(cache_dir)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "eval.py: cpu has too little memory; give --device cpu"


def test_another_error_of_torch_keeps_its_traceback(run, cache_dir, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(evaluate, "fit_methods", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
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


def test_no_cache(run, tmp_path):
    status, out, err = run(tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert str(tmp_path / "nowhere" / "imagenet" / "resnet50") in err
    assert "get_activation.py" in err


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--benchmark", "digits"], "get_activation.py --benchmark digits"),
        (["--name", "mine"], "--name mine"),
    ],
)
def test_no_cache_names_the_very_command(run, tmp_path, arguments, command):
    """Plain get_activation.py would make another one."""
    status, _, err = run(tmp_path, *arguments)
    assert status == 1
    assert command in err


@pytest.mark.parametrize(
    "setting", ["bfact.high=0", "bfact.high_percentile=5", "lhact-high.high=-1"]
)
def test_thresholds_that_make_no_filter(run, cache_dir, setting):
    status, out, err = run(cache_dir, "--methods", setting.split(".")[0], "--set", setting)
    assert status in (1, 2)
    assert out == ""
    assert "high must be above 0" in err


@pytest.mark.parametrize("setting", ["lhact.low=3", "lhact.low_percentile=99"])
def test_low_above_high(run, cache_dir, setting):
    status, out, err = run(cache_dir, "--set", setting)
    assert status in (1, 2)
    assert out == ""
    assert "lies above high" in err


def test_method_that_the_cache_cannot_serve(run, cache_dir):
    status, out, err = run(cache_dir, "--methods", "knn", "--set", "knn.k=1000")
    assert (status, out) == (1, "")
    assert "knn.k" in err
    assert "--set knn.k=" in err


PLACES = {
    "in-a-file": ("file/inside", ["--output", "--scores-dir"], "Not a directory"),
    "in-no-folder": ("nowhere/inside", ["--output"], "No such file or directory"),
    "a-folder": ("folder", ["--output"], "Is a directory"),
    "a-file": ("file", ["--scores-dir"], "Not a directory"),
    "closed": ("closed/inside", ["--output", "--scores-dir"], "Permission denied"),
    "a-closed-folder": ("closed", ["--scores-dir"], "Permission denied"),
    "name-too-long": ("x" * 300, ["--output", "--scores-dir"], "File name too long"),
}


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, option) for kind in PLACES for option in PLACES[kind][1]]
)
def test_output_that_cannot_be_written(
    run,
    tmp_path,
    write_cache,
    small_sets,
    small_head,
    public_folder,
    unprivileged,
    monkeypatch,
    kind,
    option,
):
    """It is told before any image is scored."""
    write_cache(public_folder / "cache" / "imagenet" / "resnet50", small_sets, *small_head)
    (public_folder / "file").write_text("")
    (public_folder / "folder").mkdir()
    (public_folder / "closed").mkdir(mode=0o555)
    monkeypatch.setattr(identify, "thresholds", lambda *_: pytest.fail("the work began"))
    place, _, reason = PLACES[kind]
    unprivileged()
    status, out, err = run(public_folder / "cache", option, public_folder / place)
    assert (status, out) == (1, "")
    assert (
        err
        == f"eval.py: {public_folder / place}: {reason}; give {option} a place that can be written to\n"
    )


def test_looking_for_the_place_leaves_it_as_it_is(run, cache_dir, tmp_path, monkeypatch):
    (tmp_path / "old.txt").write_text("an older table")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "score", stopped)
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


def test_a_bug_in_the_program_keeps_its_traceback(cache_dir, monkeypatch):
    monkeypatch.setattr(evaluate, "score", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        script.main(["--cache-dir", str(cache_dir), "--device", "cpu"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_on_a_full_disk(run, cache_dir):
    """The system names no file then; the line does."""
    status, _, err = run(cache_dir, "--output", "/dev/full")
    assert status == 1
    assert err.splitlines()[-1].startswith("eval.py: /dev/full: ")


def test_checkpoint_whose_name_is_not_utf8(run, tmp_path, write_cache, small_sets, small_head):
    """Such names reach the sidecar as lone surrogates; the report shows them with escapes."""
    checkpoint = b"mod\xe9le.pth".decode("utf-8", "surrogateescape")
    write_cache(
        tmp_path / "cache" / "imagenet" / "resnet50",
        small_sets,
        *small_head,
        network={"checkpoint": checkpoint},
    )
    status, _, _ = run(tmp_path / "cache", "--output", tmp_path / "table.txt")
    assert status == 0
    assert f"resnet18 {shown(checkpoint)}" in (tmp_path / "table.txt").read_text()


def truncate(folder):
    path = folder / "SUN.npy"
    path.write_bytes(path.read_bytes()[:-4])


def header_alone(folder):
    path = folder / "SUN.npy"
    path.write_bytes(path.read_bytes()[:100])


def nan(folder):
    rows = np.load(folder / "SUN.npy")
    rows[7, 3] = np.nan
    np.save(folder / "SUN.npy", rows)


def infinite(folder):
    rows = np.load(folder / "SUN.npy")
    rows[7, 3] = -np.inf
    np.save(folder / "SUN.npy", rows)


def version_3(folder):
    rows = np.load(folder / "SUN.npy")
    with open(folder / "SUN.npy", "wb") as file:
        np.lib.format.write_array(file, rows, (3, 0))


def edit(folder, **changes):
    content = json.loads((folder / "SUN.json").read_text())
    (folder / "SUN.json").write_text(json.dumps({**content, **changes}))


def newer(folder):
    edit(folder, format=2)


def other_paths(folder):
    edit(folder, paths=["a.jpg"])


def half_a_surrogate(folder):
    edit(folder, paths=["\ud800"] * 25)


def other_network(folder):
    network = json.loads((folder / "SUN.json").read_text())["network"]
    edit(folder, network={**network, "sha256": "1" * 64})


def other_type(folder):
    np.save(folder / "SUN.npy", np.load(folder / "SUN.npy").astype(np.float64))


def other_order(folder):
    np.save(folder / "SUN.npy", np.asfortranarray(np.load(folder / "SUN.npy")))


def fewer_rows(folder):
    np.save(folder / "SUN.npy", np.load(folder / "SUN.npy")[:-1])


def pickled(folder):
    np.save(folder / "SUN.npy", np.array([{"not": "numbers"}], dtype=object), allow_pickle=True)


def other_head(folder):
    np.savez(
        folder / "head.npz", weight=np.zeros((5, 11), np.float32), bias=np.zeros(5, np.float32)
    )


def damaged_head(folder):
    (folder / "head.npz").write_bytes(b"PK\x03\x04 and no more")


def object_head(folder):
    np.savez(folder / "head.npz", weight=np.full((5, 12), None), bias=np.zeros(5, np.float32))


def bomb_head(folder):
    with zipfile.ZipFile(folder / "head.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("weight.npy", bytes(10**7))
        archive.writestr("bias.npy", b"")


def head_with_nan(folder):
    np.savez(
        folder / "head.npz",
        weight=np.full((5, 12), np.nan, np.float32),
        bias=np.zeros(5, np.float32),
    )


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (truncate, "SUN.npy"),
        (header_alone, "SUN.npy"),
        (nan, "SUN.npy"),
        (other_type, "SUN.npy"),
        (other_order, "SUN.npy"),
        (fewer_rows, "SUN.npy"),
        (pickled, "SUN.npy"),
        (lambda folder: (folder / "SUN.npy").unlink(), "SUN.npy"),
        (lambda folder: (folder / "SUN.npy").write_bytes(b""), "SUN.npy"),
        (lambda folder: (folder / "SUN.json").write_text("{"), "SUN.json"),
        (lambda folder: (folder / "SUN.json").write_text("[]"), "SUN.json"),
        (lambda folder: (folder / "SUN.json").write_bytes(b"\xff\xfe"), "SUN.json"),
        (lambda folder: (folder / "id.json").unlink(), "id.npy has no .json"),
        (
            lambda folder: [(folder / f"id.{suffix}").unlink() for suffix in ("json", "npy")],
            "ID set",
        ),
        (lambda folder: (folder / "SUN.json").unlink(), "SUN.npy has no .json"),
        (infinite, "SUN.npy"),
        (version_3, "SUN.npy"),
        (newer, "SUN.json has format 2"),
        (other_paths, "SUN.json is damaged: its 'paths'"),
        (half_a_surrogate, "SUN.json is damaged: its 'paths'"),
        (other_network, "SUN.npy is of something else"),
        (object_head, "head.npz"),
        (bomb_head, "head.npz is damaged (1000"),
        (
            lambda folder: (
                (folder / "Places.rows").write_text("{}") and (folder / "Places.json").unlink()
            ),
            "Places",
        ),
        (lambda folder: (folder / "head.npz").unlink(), "head.npz"),
        (other_head, "head.npz"),
        (damaged_head, "head.npz"),
        (head_with_nan, "head.npz"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_cache(run, cache_dir, damage, file):
    damage(cache_dir / "imagenet" / "resnet50")
    status, out, err = run(cache_dir)
    assert (status, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith("eval.py: ")
    assert file in line
    assert "get_activation.py" in line or "update this program" in line
    assert len(err.splitlines()) <= 3  # with the device and the remark on thresholds at most


SIDECAR = [
    "format",
    "network",
    "preprocessing",
    "precision",
    "odin",
    "images",
    "channels",
    "fingerprint",
    "versions",
    "labels",
    "paths",
]
SIDECAR += [
    "accuracy",
    "network.arch",
    "network.weights",
    "network.checkpoint",
    "network.sha256",
    "network.classes",
    "network.channels",
]
VALUES = ["missing", None, "text", -1, [1], {"a": 1}]


@pytest.mark.parametrize("key", SIDECAR)
def test_edited_sidecars(run, cache_dir, key):
    """An entry gone or of another kind, in all of them alike: an answer or one clear line, never a
    traceback."""
    folder = cache_dir / "imagenet" / "resnet50"
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
        try:
            status, out, err = run(cache_dir, "--methods", "msp")
        except Exception as error:
            failures.append((value, repr(error)))
            continue
        wrong = (
            out
            or not err.splitlines()[-1].startswith("eval.py: ")
            or "get_activation.py" not in err
        )
        if status not in (0, 1) or (status == 1 and wrong):
            failures.append((value, status, err))
    assert not failures


# The script as a process


def subprocess_run(arguments, cwd, stdout=subprocess.PIPE):
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )


def test_as_a_process(cache_dir, tmp_path):
    """From any folder: results and nothing else on stdout, remarks on stderr."""
    done = subprocess_run(
        [ROOT / "eval.py", "--cache-dir", cache_dir, "--format", "json"], tmp_path
    )
    assert done.returncode == 0
    device = device_line("auto", pick_device("auto"))
    assert json.loads(done.stdout)["results"][0]["method"] == "lhact"
    assert done.stderr.splitlines() == [
        device,
        "thresholds: percentiles of the calibration activations (40 images)",
    ]


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
    devices = torch.get_default_dtype(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    randomness = torch.get_rng_state().tolist(), repr(numpy.random.get_state()), random.getstate()
    return devices, torch.is_grad_enabled(), torch.get_num_threads(), randomness, os.getcwd(), dict(os.environ), sys.argv
sys.path.insert(0, {root!r})
sys.argv = ["program", "--nonsense"]
before = state()
import eval
assert state() == before, "importing eval.py does something"
sys.argv = before[-1]
status = eval.main(["--cache-dir", {cache!r}, "--output", os.devnull, "--device", "cpu"])
assert status == 0, status
assert "torchvision" not in sys.modules, "eval.py imports torchvision"
assert not [name for name in ("lhact.extraction.networks", "lhact.extraction.build") if name in sys.modules]
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
    assert (
        "id has 61 images, the published 50,000; iNaturalist has 30 images, the published 10,000"
        in err
    ) == expected
    assert ("difference" in out) == expected


def test_lists_larger_than_the_published_ones_are_named_and_equal_ones_are_not(
    run, v1_cache_dir, monkeypatch
):
    known = script.open_benchmark("imagenet")
    counts = {"iNaturalist": 30, "SUN": 24, "Places": 20, "Textures": 15}
    ood = {
        name: dataclasses.replace(known.ood[name], images=count) for name, count in counts.items()
    }
    changed = dataclasses.replace(known, id=dataclasses.replace(known.id, images=61), ood=ood)
    monkeypatch.setattr(script, "open_benchmark", lambda *_: changed)
    err = run(v1_cache_dir)[2]
    assert "differences mean little: SUN has 25 images, the published 24\n" in err


# Whether it is the published network


NOT_NORMALISED = {"mean": [0, 0, 0], "std": [1, 1, 1]}
UNEQUAL_CHANNELS = np.resize(np.float32([0.6, 1.4]), 2048)


@pytest.fixture
def claim(tmp_path, write_cache, v1_sets, v1_head):
    """claim(change, ...): a cache by the name of the published network, its 300 ID activations
    changed."""

    def claim(change=lambda rows: rows, weights="IMAGENET1K_V1", **fields):
        sets = {**v1_sets, "id": change(v1_like(300))}
        network = {"arch": "resnet50", "weights": weights, "checkpoint": None}
        write_cache(
            tmp_path / "claim" / "imagenet" / "resnet50", sets, *v1_head, network=network, **fields
        )
        return tmp_path / "claim"

    return claim


FINDINGS = {
    "no normalisation, recorded": (
        {"preprocessing": NOT_NORMALISED},
        ["no normalisation: mean [0.0, 0.0, 0.0]"],
    ),
    "no resize, recorded": (
        {"preprocessing": {"resize": None}},
        ["no resize: resize 0 instead of 256"],
    ),
    "another crop, recorded": (
        {"preprocessing": {"crop": 256}},
        ["other preprocessing: crop 256 instead of 224"],
    ),
    "squashed, recorded": (
        {"preprocessing": {"squash": True}},
        ["other preprocessing: squash True instead of False"],
    ),
    "inputs not normalised": (
        {"change": lambda rows: rows * UNEQUAL_CHANNELS * np.float32(0.92)},
        ["the mean activation is", "as without normalisation"],
    ),
    "inputs normalised twice": (
        {"change": lambda rows: rows * 4},
        ["as with inputs normalised twice"],
    ),
    "inputs to 255": ({"change": lambda rows: rows * 200}, ["as with inputs from 0 to 255"]),
    "a larger crop": (
        {"change": lambda rows: rows * np.float32(0.9)},
        ["as with a larger crop, or with other weights, such as IMAGENET1K_V2"],
    ),
    "no resize, by top-1": (
        {"accuracy": 60.0},
        ["top-1 is 60.00 % on 300 images, published is 76.13 %", "without the resize"],
    ),
    "V2, by top-1": (
        {"change": lambda rows: rows * np.float32(0.5), "accuracy": 90.0},
        ["top-1 is 90.00 %", "as with newer weights, such as IMAGENET1K_V2"],
    ),
    "V2, by name": (
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
    for kind in ("table", "markdown", "latex"):
        status, out, err = run(cache_dir, "--format", kind)
        assert status == 0
        above = out.partition("method  ")[0] if kind == "table" else out
        for text in (above, err):
            assert "not comparable with the published numbers: " in text
            assert all(name in text for name in names), text
        assert ("11.07" in out) == compared
        assert ("difference" in out) == compared
    result = as_json(run, cache_dir)
    assert all(any(name in finding for finding in result["findings"]) for name in names)
    assert all(f"published numbers: {finding}\n" in err for finding in result["findings"])
    assert all(bool(row["published"]) == compared for row in result["results"])
    status, out, err = run(cache_dir, "--format", "csv")
    assert "not comparable" in err


@pytest.mark.parametrize("accuracy", [None, 76.13, 72.0])
def test_the_published_network_is_compared_and_nothing_is_said(run, claim, accuracy):
    status, out, err = run(claim(accuracy=accuracy))
    assert status == 0
    assert "11.07" in out
    assert "not comparable" not in out + err
    assert as_json(run, claim(accuracy=accuracy))["findings"] == []


def test_reproduce_compares_with_the_default_that_this_network_gets(run, claim):
    """The paper's constants where the activations are V1's, whatever the weights are called."""
    status, out, _ = run(claim(weights=None), "--reproduce", "--format", "json")
    assert status == 0
    defaults = {row["method"]: row["default"]["parameters"] for row in json.loads(out)["reproduce"]}
    assert defaults["lhact"] == {"low": 0.21940805315971373, "high": 1.3520756840705868, "order": 2}
    assert defaults["react"] == {"high": 1}


def test_reproducing_rows_with_another_network_says_so(run, claim):
    status, _, err = run(claim(lambda rows: rows * 4), "--reproduce")
    assert status == 0
    assert "not comparable with the published numbers: " in err
    assert "as with inputs normalised twice" in err
    assert "not comparable" not in run(claim(), "--reproduce")[2]
