"""The script for the first GPU, as far as a machine without one can try it."""

import dataclasses
import json

import pytest
import torch
from perf import gpu

from lhact.methods.scores import SCORES

CPU = torch.device("cpu")
RUN = {
    "precision": "tf32",
    "network_limit_per_s": 2000.0,
    "network_per_s": 1940.4,
    "network_share_of_limit": 0.9702,
    "loader_per_s": 5123.4,
    "whole_per_s": 1800.0,
    "whole_share_of_slower": 0.9276,
    "peak_gib": 1.234,
    "gflop_per_image": 8.2,
}


def test_the_plain_command_measures_every_precision():
    args = gpu.parse_arguments([])
    assert (args.device, args.precisions) == ("cuda", ["fp32", "tf32", "bf16", "fp16"])
    assert args.minutes < 8
    with pytest.raises(SystemExit):
        gpu.parse_arguments(["--precisions", "fp8"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert gpu.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gpu.py: no GPU to check: ")
    assert err.count("\n") == 1
    assert gpu.main(["--device", "tpu"]) == 1


def test_table_and_targets():
    title, rule, row = gpu.table([RUN]).splitlines()
    assert title.count("|") == rule.count("|") == row.count("|") == 9
    assert row == "| tf32 | 2,000 | 1,940 | 0.97 | 5,123 | 1,800 | 0.93 | 1.23 |"
    network, whole = gpu.check_speed([RUN])
    assert (network.passed, whole.passed) == (True, False)
    assert whole.detail == "0.93 of 0.95"


def test_methods_are_compared(tmp_path, monkeypatch):
    """A score that is off by a thousandth, and one that fails, on the second of the two devices."""
    calls = []

    def off(logits):
        calls.append(len(logits))
        return logits.amax(dim=1) * (1.001 if len(calls) > 2 else 1)

    def fails(logits):
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setitem(SCORES, "maxlogit", dataclasses.replace(SCORES["maxlogit"], function=off))
    monkeypatch.setitem(SCORES, "msp", dataclasses.replace(SCORES["msp"], function=fails))
    right, wrong, failed = gpu.check_methods(CPU, tmp_path, ["knn", "maxlogit", "msp"])
    assert right == ("knn", True, "scores differ by 0.0e+00")
    assert calls == [300, 150] * 2
    assert (wrong.passed, wrong.detail) == (False, "scores differ by 1.0e-03")
    assert failed == ("msp", False, "RuntimeError: no kernel")


def test_activations_are_compared(monkeypatch):
    checks = gpu.check_extraction(CPU, "shufflenet_v2_x0_5", 64, ["fp32", "bf16"])
    assert [check.passed for check in checks] == [True] * 4
    assert checks[0].detail == "activations differ by 0.0e+00"
    assert checks[1].detail == "100.00 % of the pixels are moved in the same direction"
    assert "differ by 0.0e+00" not in checks[2].detail, "bf16 is another arithmetic"
    monkeypatch.setitem(gpu.TOLERANCES, "bf16", 1e-5)
    monkeypatch.setitem(gpu.SAME_DIRECTION, "bf16", 1.0)
    checks = gpu.check_extraction(CPU, "shufflenet_v2_x0_5", 64, ["bf16"])
    assert [check.passed for check in checks] == [False] * 2


@pytest.mark.parametrize("failing", [False, True])
def test_the_last_line_names_what_failed(failing, monkeypatch, capsys):
    checks = [gpu.Check("lhact", True, "fine"), gpu.Check("knn", not failing, "so so")]
    monkeypatch.setattr(gpu, "check_methods", lambda *_: checks)
    monkeypatch.setattr(gpu, "check_extraction", lambda *_: [])
    assert gpu.main(["--device", "cpu"]) == int(failing)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["PASS lhact: fine", f"{'FAIL' if failing else 'PASS'} knn: so so"]
    assert json.loads(lines[-1])["failed"] == (["knn"] if failing else [])


def test_a_precision_for_which_no_time_is_left_is_named(monkeypatch, capsys, tmp_path):
    """The first is always measured; the others while as much time is left as the last took."""
    left = iter([100.0, 100.0, -1.0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(gpu.extraction, "network", lambda a, d, p, listed: {"precision": p})
    args = gpu.parse_arguments(["--precisions", "fp32", "tf32", "bf16", "--count", "1"])
    runs = gpu.measure(args, CPU, lambda: next(left))
    assert runs == [{"precision": p, "peak_gib": 1.0} for p in ("fp32", "tf32")]
    assert capsys.readouterr().out.startswith("SKIP bf16: no time left; ")
