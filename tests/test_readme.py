"""Every command in the README runs, in order, in a folder laid out as the README says."""

import ast
import copy
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import write_image
from PIL import Image

import eval as eval_script
import get_activation
import lhact
from lhact import data, score
from lhact.extraction import networks
from lhact.methods.compose import known_methods, parse
from lhact.methods.entries import Percentile, Rectifier, Threshold
from lhact.methods.fit import fit
from lhact.methods.rectify import RECTIFIERS

README = Path(__file__).parents[1] / "README.md"
METHODS = README.parent / "lhact" / "methods" / "README.md"
MAINS = {"get_activation.py": get_activation.main, "eval.py": eval_script.main}


def commands():
    """The lines of README's code blocks that start with `python `."""
    found, inside = [], False
    for line in map(str.strip, README.read_text().splitlines()):
        if line.startswith("```"):
            inside = not inside
        elif inside and line.startswith("python "):
            found.append(line)
    return found


def options(parser_help):
    return set(re.findall(r"--[a-z][a-z-]+", parser_help))


@pytest.fixture
def workplace(tmp_path, monkeypatch, data_root, write_images, network, checkpoint):
    """The folders and files that the commands name; every network is the small one, so that nothing
    is fetched."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "my"
    for folder in ("test", "train", "birds", "noise"):
        write_images(own / folder, ["a/1.jpg", "a/2.jpg", "b/3.png"])
    (tmp_path / "my-weights.pth").write_bytes(checkpoint.read_bytes())
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1

    def built(spec, *sizes):
        return networks.Built(copy.deepcopy(network), weights.name, networks._preset(weights))

    monkeypatch.setitem(networks.KINDS, "", built)
    return tmp_path


def test_every_command_runs(workplace, capsys):
    ran = []
    for command in commands():
        _, script, *arguments = shlex.split(command)
        if script == "-m":
            assert arguments[0] in ("lhact.data", "lhact.score"), command
            continue
        workers = ["--workers", "0"] if script == "get_activation.py" else []
        status = MAINS[script]([*arguments, "--device", "cpu", *workers])
        assert status == 0, f"{command}\n{capsys.readouterr().err}"
        ran.append(script)
    assert {"get_activation.py", "eval.py"} == set(ran)


@pytest.mark.parametrize("main", [get_activation.main, eval_script.main, data.main, score.main])
def test_every_option_is_in_the_readme(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    missing = options(capsys.readouterr().out) - options(README.read_text()) - {"--help"}
    assert not missing


def test_two_commands_set_everything_up():
    lines = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    digits = "get_activation.py --benchmark digits && .venv/bin/python eval.py --benchmark digits"
    assert digits in lines[0]
    assert ".venv/bin/python -m pytest" in lines[1]


def test_every_test_that_is_named_is_there():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (README.parent / "tests/README.md").read_text())
    assert len(named) >= 10
    for file, name in named:
        source = ast.parse((README.parent / "tests" / file).read_text())
        functions = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


def python_blocks(file):
    return re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL)


BLOCKS = python_blocks(README)


def test_the_first_lines_say_whether_an_image_is_out_of_distribution(tmp_path, monkeypatch):
    """The live detector, in at most eight lines, and a file as a browser sends it."""
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS[0].splitlines()) <= 8
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)]
    network = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 4)).eval()
    loader = [(torch.rand(30, 3, 24, 24), torch.zeros(30, dtype=torch.long))]
    names = {"network": network, "id_loader": loader, "images": torch.rand(2, 3, 24, 24)}
    exec(BLOCKS[0], names)
    assert set(names["verdicts"].tolist()) <= {-1, 1}
    assert (tmp_path / "detector.safetensors").exists()
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize((24, 24)), torchvision.transforms.ToTensor()]
    )
    names |= {"io": io, "Image": Image, "transform": transform}
    exec(BLOCKS[1], names)
    assert len(BLOCKS[1].splitlines()) <= 10
    write_image(tmp_path / "photo.jpg")
    content = (tmp_path / "photo.jpg").read_bytes()
    image = transform(Image.open(tmp_path / "photo.jpg"))[None]
    distance = float(names["detector"].decision_function(image))
    kind = "in" if distance > 0 else "out of"
    assert names["verdict"](content) == f"{kind} distribution ({distance:+.2f})"


def test_the_lines_for_a_notebook_run(tmp_path, monkeypatch, write_cache, small_sets, small_head):
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "cache" / "imagenet" / "resnet50", small_sets, *small_head)
    names = {}
    exec(BLOCKS[2], names)
    assert set(names["frame"]["method"]) == {"lhact", "energy"}


def test_the_lines_of_python_run_and_print_scores(monkeypatch):
    """The methods' example of a fitted method, and their rectifier of one's own."""
    fitted_method, own_rectifier = python_blocks(METHODS)
    torch.manual_seed(0)
    names = {"id_activations": torch.rand(50, 8), "activations": torch.rand(3, 8)}
    names |= {"weight": torch.randn(4, 8), "bias": torch.zeros(4)}
    exec(fitted_method, names)
    assert names["scores"].shape == (3,)
    registry = dict(RECTIFIERS)
    own = {"torch": torch, "Tensor": torch.Tensor, "Threshold": Threshold}
    own |= {"Rectifier": Rectifier, "Percentile": Percentile, "RECTIFIERS": registry}
    exec(own_rectifier, own)
    monkeypatch.setitem(RECTIFIERS, "soft-cap", registry["soft-cap"])
    fitted = fit(parse("soft-cap"), names["calibration"], names["head"])
    capped = names["activations"]
    high = fitted.parameters["high"]
    logits = high * torch.tanh(capped / high) @ names["weight"].T
    torch.testing.assert_close(fitted(capped), torch.logsumexp(logits, dim=1))


def test_every_method_is_described():
    described = METHODS.read_text()
    missing = [name for name in known_methods() if f"`{name}`" not in described]
    assert not missing
    assert set(known_methods()) <= set(re.findall(r"[a-z0-9-]+", README.read_text()))


def test_there_is_one_version():
    root = README.parent
    assert f"\nversion: {lhact.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {lhact.__version__}\n" in (root / "CHANGELOG.md").read_text()
