"""python -m lhact.score: a line for each image, whatever becomes of the others."""

import importlib
import io
import json

import numpy as np
import pytest
import torch
from helpers import ARCH, Run, write_images
from PIL import Image

import eval as eval_script
import get_activation
from lhact import score, write_cache
from lhact.detector_file import read
from lhact.extraction import networks


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    """A detector that eval.py saved, of a cache that get_activation.py made."""
    place = tmp_path_factory.mktemp("model")
    run = Run(place, place, place)
    run.has(reference)
    path = place / "model.safetensors"
    given = ["--cache-dir", run.caches, "--name", ARCH, "--save-detector", path]
    assert eval_script.main([str(part) for part in given]) == 0
    return path


def lines(capsys, *arguments) -> list[str]:
    capsys.readouterr()
    score.main([str(part) for part in arguments])
    return capsys.readouterr().out.splitlines()


def test_gives_what_the_network_and_the_cache_say(model, network, checkpoint, data_root, capsys):
    folder = data_root / "id_data" / "ILSVRC-2012" / "val"
    given = [folder, "--model", model, "--checkpoint", checkpoint]
    assert score.main([str(part) for part in given]) == 0
    found = [json.loads(line) for line in lines(capsys, *given, "--json")]
    paths = sorted(str(path) for path in folder.glob("*/*"))
    assert [row["path"] for row in found] == paths
    saved = read(model)
    for row in found:
        # torchvision's resize and crop are those of the extraction, which has its own tests.
        image = Image.open(row["path"]).convert("RGB")
        short = min(image.size)
        image = image.resize([int(36 * n / short) for n in image.size], Image.Resampling.BILINEAR)
        left, top = (round((n - 32) / 2) for n in image.size)
        values = torch.tensor(list(image.crop((left, top, left + 32, top + 32)).tobytes()))
        values = values.view(32, 32, 3).permute(2, 0, 1)[None] / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        logits = network((values - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert row["class"] == int(logits.argmax())
        assert row["class_name"].startswith(("n0", "n1"))
        assert row["threshold"] == pytest.approx(saved.threshold)
        assert row["distance"] == pytest.approx(row["score"] - saved.threshold, abs=1e-5)
        assert row["verdict"] == ("ID" if row["score"] > saved.threshold else "OOD")


def test_names_broken_images_and_goes_on(model, checkpoint, data_root, tmp_path, capsys):
    good = next((data_root / "ood_data" / "SUN" / "images").glob("*.jpg"))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    hostile = tmp_path / "a\nb.jpg"
    hostile.write_bytes(good.read_bytes())
    images = [tmp_path / "broken.jpg", good, tmp_path / "gone.jpg", hostile]
    given = [*images, "--model", model, "--checkpoint", checkpoint]
    assert score.main([str(part) for part in given]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [("unreadable:" in line, " score " in line) for line in printed] == [
        (True, False),
        (False, True),
        (True, False),
        (False, True),
    ]
    assert "a\\nb.jpg" in printed[3]
    errors = [json.loads(line).get("error") for line in lines(capsys, *given, "--json")]
    assert [error is None for error in errors] == [False, True, False, True]


def test_reads_paths_from_standard_input(model, checkpoint, data_root, monkeypatch, capsys):
    paths = [str(path) for path in (data_root / "ood_data" / "SUN" / "images").glob("*.jpg")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\r\n".join(paths) + "\n\n"))
    found = lines(capsys, "--model", model, "--checkpoint", checkpoint)
    assert [line.partition("  ")[0] for line in found] == paths


def test_says_that_a_stream_is_closed(model, checkpoint, tmp_path, monkeypatch, capsys):
    given = ["--model", str(model), "--checkpoint", str(checkpoint)]
    (long,) = lines(capsys, tmp_path / ("x" * 300), *given)
    assert "unreadable: " in long
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", None)
        assert score.main(given) == 1
    assert "input is closed" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        assert score.main(["x.jpg", *given]) == 1
    assert "standard output" in capsys.readouterr().err


def refusal(capsys, status, *arguments) -> str:
    assert score.main([str(part) for part in arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_says_what_is_not_right(model, checkpoint, network, tmp_path, capsys):
    say = refusal(capsys, 1, "x.jpg", "--model", model)
    assert f"fitted on {ARCH} with the weights in small.pth; give it with --checkpoint FILE" in say
    assert "No such file" in refusal(capsys, 1, "x.jpg", "--model", tmp_path / "gone")
    (tmp_path / "no.safetensors").write_text("x")
    assert "is no detector that can be read" in refusal(
        capsys, 1, "x.jpg", "--model", tmp_path / "no.safetensors"
    )
    given = ["x.jpg", "--model", model, "--checkpoint", checkpoint]
    assert "unknown architecture 'resnet51'" in refusal(capsys, 1, *given, "--arch", "resnet51")
    assert "a device must be" in refusal(capsys, 2, *given, "--device", "gpu")
    (tmp_path / "empty").mkdir()
    assert "no images" in refusal(capsys, 1, tmp_path / "empty", *given[1:])
    state = {
        key: value * 1.001 if value.is_floating_point() else value
        for key, value in network.state_dict().items()
    }
    torch.save(state, tmp_path / "other.pth")
    other = refusal(capsys, 1, "x.jpg", "--model", model, "--checkpoint", tmp_path / "other.pth")
    assert "the network is not the one of" in other


def test_a_network_that_takes_images_of_one_size_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "of_16_pixels.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    network = importlib.import_module("of_16_pixels").build()
    torch.save(network.state_dict(), tmp_path / "small.pth")
    for name in ("id", "ood"):
        write_images(tmp_path / name, [f"{name}{number}.png" for number in range(4)])
    given = ["--arch", "of_16_pixels:build", "--checkpoint", tmp_path / "small.pth"]
    given += ["--resize", 16, "--crop", 16, "--cache-dir", tmp_path, "--name", "small"]
    given += ["--id", tmp_path / "id", "--ood", f"other={tmp_path / 'ood'}", "--workers", 0]
    assert get_activation.main([str(part) for part in given]) == 0
    model = tmp_path / "model.safetensors"
    given = ["--cache-dir", tmp_path, "--name", "small", "--save-detector", model]
    given += ["--methods", "energy"]
    assert eval_script.main([str(part) for part in given]) == 0
    given = [tmp_path / "id", "--model", model, "--checkpoint", tmp_path / "small.pth", "--json"]
    rows = [json.loads(line) for line in lines(capsys, *given)]
    z = torch.from_numpy(np.load(tmp_path / "imagenet" / "small" / "id.npy"))
    wanted = network[3](z).logsumexp(dim=1).tolist()
    assert [row["score"] for row in rows] == pytest.approx(wanted, abs=1e-5)


def test_a_detector_of_features_from_elsewhere_says_what_it_lacks(tmp_path, capsys):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 4)
    sets = {name: torch.rand(20, 6) for name in ("id", "other")}
    write_cache(tmp_path / "own" / "mine", sets, (head.weight, head.bias))
    model = tmp_path / "model.safetensors"
    given = ["--cache-dir", tmp_path, "--benchmark", "own", "--name", "mine", "--methods", "energy"]
    assert eval_script.main([str(part) for part in [*given, "--save-detector", model]]) == 0
    capsys.readouterr()
    torch.save(networks.build("resnet10", classes=4).state_dict(), tmp_path / "other.pth")
    given = ["x.jpg", "--model", model, "--checkpoint", tmp_path / "other.pth"]
    assert "does not know its network by name; give --arch" in refusal(capsys, 1, *given)
    assert "the network is not the one of" in refusal(capsys, 1, *given, "--arch", "resnet10")
