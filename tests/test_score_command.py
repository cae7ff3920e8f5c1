"""python -m lhact.score: a line for each image, whatever becomes of the others."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from helpers import ARCH, Run, write_images
from PIL import Image
from torch import nn
from torchvision import transforms

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


@pytest.fixture
def judged(model, checkpoint, capsys):
    """judged(*arguments, status=0): what is printed of those images, in lines."""

    def judge(*arguments: object, status: int = 0) -> list[str]:
        given = [*arguments, "--model", model, "--checkpoint", checkpoint]
        assert score.main([str(part) for part in given]) == status
        return capsys.readouterr().out.splitlines()

    return judge


@pytest.fixture
def photos(data_root):
    return data_root / "ood_data" / "SUN" / "images"


def test_gives_what_the_network_and_the_cache_say(model, network, data_root, judged):
    folder = data_root / "id_data" / "ILSVRC-2012" / "val"
    found = [json.loads(line) for line in judged(folder, "--json")]
    paths = sorted(str(path) for path in folder.glob("*/*"))
    assert [row["path"] for row in found] == paths
    saved = read(model)
    steps = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()]
    steps += [transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    by_torchvision = transforms.Compose(steps)
    for row in found:
        image = by_torchvision(Image.open(row["path"]).convert("RGB"))
        logits = network(image[None])
        assert row["class"] == int(logits.argmax())
        assert row["class_name"].startswith(("n0", "n1"))
        assert row["threshold"] == pytest.approx(saved.threshold)
        assert row["distance"] == pytest.approx(row["score"] - saved.threshold, abs=1e-5)
        assert row["verdict"] == ("ID" if row["score"] > saved.threshold else "OOD")


def test_names_broken_images_and_goes_on(photos, judged, tmp_path):
    good = next(photos.glob("*.jpg"))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    hostile = tmp_path / "a\nb.jpg"
    hostile.write_bytes(good.read_bytes())
    images = [tmp_path / "broken.jpg", good, tmp_path / "gone.jpg", hostile, tmp_path / ("x" * 300)]
    printed = judged(*images, status=1)
    readable = [False, True, False, True, False]
    assert [" score " in line for line in printed] == readable
    assert ["unreadable: " not in line for line in printed] == readable
    assert "a\\nb.jpg" in printed[3]
    rows = [json.loads(line) for line in judged(*images, "--json", status=1)]
    assert ["error" not in row for row in rows] == readable


def test_what_cannot_be_read_in_a_folder_gets_its_line(
    model, checkpoint, photos, tmp_path, unprivileged, public_folder
):
    place, shut = tmp_path / "mixed", public_folder / "shut"
    image = next(photos.glob("*.jpg")).read_bytes()
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


def test_the_run_ends_with_1_for_an_empty_folder(photos, judged, tmp_path):
    (tmp_path / "empty").mkdir()
    first, *others = judged(tmp_path / "empty", photos, status=1)
    assert first.endswith("unreadable: it holds no images, such as .jpg or .png")
    assert [" score " in line for line in others] == [True] * len(list(photos.iterdir()))


@pytest.mark.parametrize(
    ("settings", "arguments", "head"),
    [
        (None, {}, None),
        ({"features given as": "activations"}, {}, None),
        ({"width": "2", "head": "fc"}, {"width": 2}, "fc"),
        ({"norm_layer": "<class 'X'>"}, None, None),
    ],
)
def test_the_network_is_the_one_that_the_detector_was_fitted_on(model, settings, arguments, head):
    saved = read(model)
    known = dataclasses.replace(saved.network, settings=settings)
    saved = dataclasses.replace(saved, network=known)
    job = score.parse_job(["--model", "m", "--checkpoint", "c.pth"])
    if arguments is None:
        with pytest.raises(ValueError, match=r"built with .*norm_layer.*, which no file can give"):
            score.network_spec(job, saved)
        return
    spec = score.network_spec(job, saved)
    assert (spec.arch, str(spec.checkpoint)) == (ARCH, "c.pth")
    assert (spec.arguments, spec.head) == (arguments, head)


def test_reads_paths_from_standard_input(photos, judged, monkeypatch):
    paths = [str(path) for path in photos.glob("*.jpg")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\r\n".join(paths) + "\n\n"))
    assert [line.partition("  ")[0] for line in judged()] == paths


@pytest.mark.parametrize(
    ("stream", "places", "message"),
    [("stdin", [], "input is closed"), ("stdout", ["x.jpg"], "standard output")],
)
def test_says_that_a_stream_is_closed(stream, places, message, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(f"sys.{stream}", None)
        assert score.main([*places, "--model", "m"]) == 1
    assert message in capsys.readouterr().err


def refusal(capsys, status, *arguments) -> str:
    assert score.main(["x.jpg", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_says_what_is_not_right(model, checkpoint, network, tmp_path, capsys):
    (tmp_path / "no.safetensors").write_text("x")
    tensors = network.state_dict()
    state = {key: t * 1.001 if t.is_floating_point() else t for key, t in tensors.items()}
    torch.save(state, tmp_path / "other.pth")
    given = ["--model", model, "--checkpoint", checkpoint]
    fitted_on = f"fitted on {ARCH} with the weights in small.pth; give it with --checkpoint FILE"
    for status, arguments, message in (
        (1, given[:2], fitted_on),
        (1, ["--model", tmp_path / "gone"], "there is no file"),
        (1, ["--model", tmp_path / "no.safetensors"], "is no detector that can be read"),
        (1, [*given, "--arch", "resnet51"], "unknown architecture 'resnet51'"),
        (2, [*given, "--device", "gpu"], "a device must be"),
        (1, [*given[:3], tmp_path / "other.pth"], "the network is not the one of"),
    ):
        assert message in refusal(capsys, status, *arguments)


def of_16_pixels() -> nn.Module:
    """A network that takes images of one size alone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 3))


def test_the_network_takes_images_of_the_size_that_the_file_says(tmp_path, run_eval, capsys):
    torch.manual_seed(0)
    network, checkpoint = of_16_pixels(), tmp_path / "small.pth"
    torch.save(network.state_dict(), checkpoint)
    for name in ("id", "ood"):
        write_images(tmp_path / name, [f"{name}{number}.png" for number in range(4)])
    given = ["--arch", f"{__name__}:of_16_pixels", "--checkpoint", checkpoint]
    given += ["--resize", 16, "--crop", 16, "--cache-dir", tmp_path, "--name", "small"]
    given += ["--id", tmp_path / "id", "--ood", f"other={tmp_path / 'ood'}", "--workers", 0]
    assert get_activation.main([str(part) for part in given]) == 0
    model, given = tmp_path / "model", ["--cache-dir", tmp_path, "--name", "small"]
    assert run_eval(*given, "--methods", "energy", "--save-detector", model)[0] == 0
    given = [tmp_path / "id", "--model", model, "--checkpoint", checkpoint, "--json"]
    assert score.main([str(part) for part in given]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    z = torch.from_numpy(np.load(tmp_path / "imagenet" / "small" / "id.npy"))
    wanted = network[3](z).logsumexp(dim=1).tolist()
    assert [row["score"] for row in rows] == pytest.approx(wanted, abs=1e-5)


def test_a_detector_of_features_from_elsewhere_says_what_it_lacks(tmp_path, run_eval, capsys):
    torch.manual_seed(0)
    head = nn.Linear(6, 4)
    sets = {name: torch.rand(20, 6) for name in ("id", "other")}
    write_cache(tmp_path / "own" / "mine", sets, (head.weight, head.bias))
    model, given = tmp_path / "model", ["--benchmark", "own", "--name", "mine"]
    given += ["--methods", "energy", "--cache-dir", tmp_path, "--save-detector", model]
    assert run_eval(*given)[0] == 0
    torch.save(networks.build("resnet10", classes=4).state_dict(), tmp_path / "other.pth")
    given = ["--model", model, "--checkpoint", tmp_path / "other.pth"]
    assert "does not know its network by name; give --arch" in refusal(capsys, 1, *given)
    assert "the network is not the one of" in refusal(capsys, 1, *given, "--arch", "resnet10")
