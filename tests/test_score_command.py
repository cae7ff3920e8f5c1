"""python -m lhact.score: a line for each image, whatever becomes of the others."""

import dataclasses
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
from lhact import Detector, load_network, score, write_cache
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


def test_what_cannot_be_read_in_a_folder_gets_its_line(
    model, checkpoint, data_root, tmp_path, unprivileged, public_folder
):
    place, shut = tmp_path / "mixed", public_folder / "shut"
    image = next((data_root / "ood_data" / "SUN" / "images").glob("*.jpg")).read_bytes()
    for name in ("x.jpg", ".hidden/a.jpg", "empty/notes.txt"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(image)
    (place / "gone.jpg").symlink_to(place / "nowhere.jpg")
    (place / "empty" / "again").symlink_to(place)
    shut.mkdir(mode=0o000)
    detector = Detector.load(model, load_network(ARCH, checkpoint=checkpoint))
    found = list(score.judge(detector, [str(place), str(place / "empty"), str(place / "x.jpg")]))
    unprivileged()
    found += score.judge(detector, [str(shut)])
    errors = [
        (f"{place}/gone.jpg", "restore it or leave it out"),
        (f"{place}/x.jpg", None),
        (f"{place}/empty/again/gone.jpg", "restore it or leave it out"),
        (f"{place}/empty/again/x.jpg", None),
        (f"{place}/x.jpg", None),
        (str(shut), "cannot be listed: Permission denied"),
    ]
    assert [verdict.path for verdict in found] == [path for path, _ in errors]
    for verdict, (_, error) in zip(found, errors, strict=True):
        assert (verdict.error is None) == (error is None)
        assert (error or "") in (verdict.error or "")


def test_the_run_ends_with_1_for_an_empty_folder(model, checkpoint, data_root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    good = data_root / "ood_data" / "SUN" / "images"
    given = [tmp_path / "empty", good, "--model", model, "--checkpoint", checkpoint]
    assert score.main([str(part) for part in given]) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first.endswith("unreadable: it holds no images, such as .jpg or .png")
    assert [" score " in line for line in others] == [True] * len(list(good.iterdir()))


@pytest.mark.parametrize(
    ("settings", "arguments", "head"),
    [
        (None, {}, None),
        ({"features given as": "activations"}, {}, None),
        ({"width": "2", "head": "fc"}, {"width": 2}, "fc"),
    ],
)
def test_the_network_is_the_one_that_the_detector_was_fitted_on(model, settings, arguments, head):
    saved = read(model)
    saved = dataclasses.replace(
        saved, network=dataclasses.replace(saved.network, settings=settings)
    )
    job = score.parse_job(["--model", "m", "--checkpoint", "c.pth"])
    spec = score.network_spec(job, saved)
    assert (spec.arch, str(spec.checkpoint)) == (ARCH, "c.pth")
    assert (spec.arguments, spec.head) == (arguments, head)
    network = dataclasses.replace(saved.network, settings={"norm_layer": "<class 'X'>"})
    with pytest.raises(ValueError, match=r"was built with .*norm_layer.*, which no file can give"):
        score.network_spec(job, dataclasses.replace(saved, network=network))


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
    assert "there is no file" in refusal(capsys, 1, "x.jpg", "--model", tmp_path / "gone")
    (tmp_path / "no.safetensors").write_text("x")
    assert "is no detector that can be read" in refusal(
        capsys, 1, "x.jpg", "--model", tmp_path / "no.safetensors"
    )
    given = ["x.jpg", "--model", model, "--checkpoint", checkpoint]
    assert "unknown architecture 'resnet51'" in refusal(capsys, 1, *given, "--arch", "resnet51")
    assert "a device must be" in refusal(capsys, 2, *given, "--device", "gpu")
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
