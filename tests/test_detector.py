"""The live detector: the same scores as the cached path, scikit-learn's conventions, its files, and
what it refuses."""

import copy
import csv
import json
import pickle
import threading

import numpy as np
import pytest
import torch
import torchvision
from helpers import make_network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import eval as eval_script
import get_activation
from lhact import Detector, FeatureSet, Origin, detector_file, load_network, write_cache
from lhact.cache import BadCache, open_cache
from lhact.detector_file import BadDetector
from lhact.evaluation.score import fit_methods, score
from lhact.methods.compose import known_methods, parse

SIDE = 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MODULE = """
import torch
from torch import nn

def network(classes=5, channels=16):
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    layers += [nn.Linear(32, channels), nn.ReLU(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers).eval()
"""


def pixels(count: int, seed: int, spread: int) -> np.ndarray:
    """(count, SIDE, SIDE, 3) uint8: blocks of 4 x 4 pixels, with noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, spread, (count, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    noise = rng.integers(0, 256 - spread, (count, SIDE, SIDE, 3))
    return (coarse + noise).astype(np.uint8)


def normalised(values: np.ndarray) -> torch.Tensor:
    """By torchvision's own functions."""
    transform = torchvision.transforms.functional
    images = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255
    return transform.normalize(images, list(MEAN), list(STD))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network of the user's own, images in arrays, and the cache that
    get_activation.py makes of them."""
    folder = tmp_path_factory.mktemp("detector")
    (folder / "own_detector_net.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        whole = own_network()
        for name, count, seed, spread in (
            ("id", 90, 1, 200),
            ("cal", 80, 2, 200),
            ("ood", 40, 3, 2),
        ):
            images = pixels(count, seed, spread)
            labels = whole(normalised(images)).argmax(dim=1).numpy()
            np.savez(folder / f"{name}.npz", images=images, labels=labels)
        given = ["--arch", "own_detector_net:network", "--name", "own", "--odin", "--device", "cpu"]
        given += ["--cache-dir", folder / "cache", "--workers", 0, "--calibration-per-class", "all"]
        given += ["--resize", 0, "--crop", SIDE, "--mean", *MEAN, "--std", *STD]
        given += ["--id", folder / "id.npz", "--calibration", folder / "cal.npz"]
        given += ["--ood", f"other={folder / 'ood.npz'}"]
        assert get_activation.main([str(part) for part in given]) == 0
        yield folder


def own_network(**arguments) -> nn.Module:
    import own_detector_net

    return own_detector_net.network(**arguments)


@pytest.fixture
def cached(place):
    return place / "cache" / "imagenet" / "own"


def batches(place, name: str, size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    content = np.load(place / f"{name}.npz")
    images, labels = normalised(content["images"]), torch.from_numpy(content["labels"])
    return list(zip(images.split(size), labels.split(size), strict=True))


METHODS = [*known_methods(), "lhact+scale", "react+dice", "lhact+knn", "lhact+odin"]


@pytest.fixture(scope="module")
def evaluated(place):
    """Method -> the scores of the OOD set by the cached path."""
    opened = open_cache(place / "cache" / "imagenet" / "own")
    device = torch.device("cpu")
    fitted = fit_methods(opened, [parse(name) for name in METHODS], device)
    scored = score(opened, fitted, device)
    return {part.fitted.name: part.scores for part in scored}


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_cached_path(place, cached, evaluated, method):
    """Fitted to the same calibration images, and from the cache; whatever the batch."""
    images = normalised(np.load(place / "ood.npz")["images"])
    wanted = torch.from_numpy(evaluated[method]["other"])
    size = {"rtol": 1e-5, "atol": 1e-5}
    if method in ("klm", "residual", "vim"):  # differences of numbers that are nearly equal
        size = {"rtol": 1e-4, "atol": 1e-5}
    fitted = Detector(own_network(), method, input_size=SIDE).fit(batches(place, "cal"))
    from_cache = Detector.from_cache(cached, own_network(), method)
    for detector in (fitted, from_cache):
        torch.testing.assert_close(detector.score_samples(images), wanted, **size)
        one_by_one = torch.cat([detector.score_samples(image) for image in images[:5].split(1)])
        torch.testing.assert_close(one_by_one, wanted[:5], **size)
    # The threshold of the table: images of the ID set above it, by the definition of FPR95.
    id_scores = np.sort(evaluated[method]["id"])
    assert from_cache.offset_ == pytest.approx(id_scores[round(0.05 * 90)], rel=1e-6)


def test_follows_the_conventions_of_scikit_learn(place):
    network = own_network()
    images = torch.cat([images for images, _ in batches(place, "ood")])
    detector = Detector(network, "energy", input_size=SIDE).fit(batches(place, "cal"), keep=0.8)
    energies = torch.logsumexp(network(images).detach().double(), dim=1)
    torch.testing.assert_close(detector.score_samples(images).double(), energies)
    known = torch.cat([images for images, _ in batches(place, "cal")])
    sorted_energies = torch.logsumexp(network(known).detach().double(), dim=1).sort().values
    assert detector.offset_ == pytest.approx(float(sorted_energies[16]), rel=1e-6)
    decisions = detector.decision_function(images)
    torch.testing.assert_close(decisions.double(), energies - detector.offset_, rtol=0, atol=1e-5)
    assert torch.equal(detector.predict(images), torch.where(decisions > 0, 1, -1))
    assert {-1, 1} == set(detector.predict(torch.cat([images, known])).tolist())
    logits, scores = detector(images)
    assert torch.equal(logits, network(images).detach())
    assert torch.equal(scores, detector.score_samples(images))


@pytest.mark.parametrize("method", ["lhact", "mahalanobis", "knn", "vim", "react+dice"])
@pytest.mark.parametrize("keep", [0.95, 0.8])
def test_keeps_the_share_of_new_id_images(method, keep):
    """Within sampling error, also where a method knows the images that it learnt from."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(12, 5)).eval()
    detector = Detector(network, method, input_size=2)
    kept = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(5, (2200,), generator=generator)
        features = torch.randn(2200, 12, generator=generator).add(2 * labels[:, None] % 3).relu()
        detector.fit_features(features[:200], labels[:200], keep=keep)
        scores = detector.score_samples(features[200:].view(-1, 3, 2, 2))
        kept.append((scores > detector.offset_).double().mean().item())
        held_out = features[1200:]
        detector.fit_features(features[:200], labels[:200], held_out, keep)
        fresh = detector.predict(features[200:1200].view(-1, 3, 2, 2)) > 0
        assert fresh.double().mean().item() == pytest.approx(keep, abs=0.05)
    # Four sets of 200: standard error of the share below 0.015 each.
    assert np.mean(kept) == pytest.approx(keep, abs=0.035)


def test_leaves_the_network_and_its_hooks_as_they_are(place):
    network = own_network()
    calls: list[str] = []
    network[5].register_forward_hook(lambda *_: calls.append("inner"))
    network.register_forward_hook(lambda *_: calls.append("outer"))
    before, modules = copy.deepcopy(network.state_dict()), list(network.modules())
    images = batches(place, "ood")[0][0]
    wanted = network(images)
    detector = Detector(network, "odin", input_size=SIDE).fit(batches(place, "cal"))
    calls.clear()
    with torch.inference_mode():
        detector(images.clone())
    assert "inner" in calls
    assert "outer" in calls
    assert list(network.modules()) == modules
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(network(images), wanted)
    assert next(detector.body.parameters()) is next(network.parameters()), "nothing is copied"


def test_runs_under_autocast_and_compile(place, cached):
    images = batches(place, "ood")[0][0]
    detector = Detector.from_cache(cached, own_network(), "lhact+scale")
    logits, scores = detector(images)
    with torch.autocast("cpu", torch.bfloat16):
        half_logits, half_scores = detector(images)
    assert half_scores.dtype == half_logits.dtype == torch.float32
    assert not torch.equal(half_scores, scores)
    torch.testing.assert_close(half_scores, scores, rtol=0.03, atol=0.03)
    compiled = torch.compile(detector, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), (logits, scores))
    precise = copy.deepcopy(detector).double()
    assert {buffer.dtype for buffer in precise.scoring.buffers()} <= {torch.float32}


@pytest.mark.parametrize("method", ["lhact", "knn", "odin"])
def test_learns_in_float32_under_autocast(place, method):
    known, images = batches(place, "cal"), batches(place, "ood")[0][0]
    wanted = Detector(own_network(), method, input_size=SIDE).fit(known)
    with torch.autocast("cpu", torch.bfloat16):
        found = Detector(own_network(), method, input_size=SIDE).fit(known)
        if method != "odin":
            features = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
            found_of_features = copy.deepcopy(found).fit_features(features).offset_
            wanted_of_features = copy.deepcopy(wanted).fit_features(features).offset_
            assert found_of_features == wanted_of_features
    torch.testing.assert_close(found(images)[1], wanted(images)[1], rtol=0.03, atol=0.03)
    assert found.offset_ == pytest.approx(wanted.offset_, rel=0.03)


def test_keeps_its_threshold_in_float32(place):
    detector = Detector(own_network(), input_size=SIDE).fit(batches(place, "cal"))
    offset = detector.offset_
    images = batches(place, "ood")[0][0]
    assert detector.bfloat16().offset_ == offset
    assert detector.predict(images.bfloat16()).shape == (len(images),)
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 .* got torch.float32"):
        detector.predict(images)
    with torch.autocast("cpu", torch.bfloat16):  # makes all images and weights alike
        assert detector.float().predict(images.bfloat16()).shape == (len(images),)


def test_state_dict_is_the_networks_alone(place):
    """A threshold of one fit beside statistics of another would score wrongly, and say nothing."""
    network, known = own_network(), batches(place, "cal")
    for method in ("lhact", "knn"):
        state = Detector(network, method, input_size=SIDE).fit(known).state_dict()
        values = {value.data_ptr() for value in state.values()}
        assert values == {value.data_ptr() for value in network.state_dict().values()}
        Detector(own_network(), method, input_size=SIDE).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_it_learnt_stays_float32_in_a_network_of_another_precision(dtype, place, cached):
    detector = Detector.from_cache(cached, own_network(), "knn")
    before = {name: buffer.clone() for name, buffer in detector.scoring.named_buffers()}
    detector.to(dtype)
    assert detector.head.weight.dtype == dtype
    assert before
    for name, buffer in detector.scoring.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("method", ["lhact", "knn", "react+dice", "ras+vim", "cadref", "odin"])
def test_saves_and_loads(place, cached, tmp_path, method):
    images = batches(place, "ood")[0][0]
    settings = {"react.high": 0.5} if method == "react+dice" else None
    detector = Detector(own_network(), method, settings=settings, input_size=SIDE)
    detector.fit(batches(place, "cal"))
    detector.class_names = ("a", "b", "c", "d", "é")
    detector.save(tmp_path / "own.safetensors")
    loaded = Detector.load(tmp_path / "own.safetensors", own_network())
    assert torch.equal(loaded.score_samples(images), detector.score_samples(images))
    for name in ("offset_", "parameters_used", "keep", "shape", "class_names", "perturbation"):
        assert getattr(loaded, name) == getattr(detector, name)
    if settings:
        assert loaded.parameters_used["high"] == 0.5
    with pytest.raises(ValueError, match="came fitted; make a new one"):
        loaded.fit(batches(place, "cal"))
    assert not list(tmp_path.glob("*.part"))


def changed(network: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        network.get_parameter(name).view(-1)[0] += 1e-6
    return network


def test_refuses_a_network_of_other_weights(place, cached, tmp_path):
    path = tmp_path / "own.safetensors"
    Detector(own_network(), input_size=SIDE).fit(batches(place, "cal")).save(path)
    with pytest.raises(
        BadDetector, match=r"is not the one of .*own\.safetensors: 4\.weight differs"
    ):
        Detector.load(path, changed(own_network(), "4.weight"))
    with pytest.raises(BadDetector, match=r"4\.weight \(and 1 more\) differs"):
        Detector.load(path, changed(changed(own_network(), "4.weight"), "4.bias"))
    with pytest.raises(BadDetector, match="its head has 4 classes of 16 channels, not 5 classes"):
        Detector.load(path, own_network(classes=4))
    with pytest.raises(BadDetector, match=r"0\.weight \(and 3 more\) is missing"):
        Detector.load(
            path, nn.Sequential(nn.Flatten(), nn.Linear(192, 16), own_network()[6]).eval()
        )
    longer = nn.Sequential(*own_network(), nn.Identity()).eval()
    longer[1] = nn.PReLU(init=0.0).eval()
    with pytest.raises(BadDetector, match=r"1\.weight is not known there"):
        Detector.load(path, longer)
    for name in ("4.weight", "6.bias"):
        with pytest.raises(BadDetector, match="is not the one of the cache"):
            Detector.from_cache(cached, changed(own_network(), name))


def rewritten(path, change) -> None:
    """The file with other metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["lhact"])
    change(content)
    save_file(tensors, path, {"lhact": json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format=2, version="9.9"), "format 2, written by lhact 9.9"),
        (lambda content: content.pop("threshold"), "no detector that can be read"),
        (lambda content: content.update(threshold=float("nan")), "its threshold is nan"),
        (
            lambda content: content["steps"][0].update(name="new"),
            "unknown rectifier or score 'new'",
        ),
        (
            lambda content: content["steps"][0]["tensors"].append("x"),
            "no detector that can be read",
        ),
        (lambda content: content["network"].pop("classes"), "no detector that can be read"),
    ],
)
def test_refuses_files_that_are_no_detectors(place, tmp_path, change, message):
    path = tmp_path / "own.safetensors"
    Detector(own_network(), input_size=SIDE).fit(batches(place, "cal")).save(path)
    rewritten(path, change)
    with pytest.raises(BadDetector, match=message):
        Detector.load(path, own_network())
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(BadDetector, match="holds no detector of lhact, only tensors"):
        detector_file.read(path)
    for content in (b"", b"nothing of the kind", pickle.dumps({"x": 1})):
        path.write_bytes(content)
        with pytest.raises(BadDetector, match="no detector that can be read"):
            detector_file.read(path)
    for wrong in (tmp_path, tmp_path / "gone"):
        with pytest.raises(BadDetector, match="there is no file"):
            detector_file.read(wrong)


def test_what_eval_saves_is_what_the_table_measured(place, tmp_path, capsys):
    path, scores = tmp_path / "saved.safetensors", tmp_path / "scores"
    given = ["--cache-dir", place / "cache", "--name", "own", "--save-detector", path]
    given += ["--methods", "react", "lhact", "--scores-dir", scores, "--format", "json"]
    assert eval_script.main([str(part) for part in given]) == 0
    captured = capsys.readouterr()
    assert f"react saved to {path}" in captured.err
    row = json.loads(captured.out)["results"][0]
    detector = Detector.load(path, own_network())
    assert detector.offset_ == row["threshold"]
    images = torch.cat([images for images, _ in batches(place, "ood")])
    passed = 100 * (detector.predict(images) > 0).double().mean().item()
    assert passed == pytest.approx(row["fpr95"])
    assert detector.preprocessing.crop == SIDE
    assert detector.shape == (3, SIDE, SIDE)
    assert eval_script.main([*map(str, given[:4]), "--save-detector", str(tmp_path)]) == 1
    assert "give --save-detector a place that can be written to" in capsys.readouterr().err


def test_published_constants_hold_for_the_published_network_alone(v1_sets, v1_head):
    network = torchvision.models.resnet50(weights=None).eval()
    other = torchvision.models.resnet101(weights=None).eval()
    constants = {"low": 0.21940805315971373, "high": 1.3520756840705868, "order": 2}
    detector = Detector(network, input_size=64).fit_features(v1_sets["calibration"])
    assert detector.parameters_used == constants
    for whole, scale in ((network, 2), (other, 1)):
        detector = Detector(whole, input_size=64).fit_features(scale * v1_sets["calibration"])
        percentiles = np.percentile(scale * v1_sets["calibration"].astype(np.float64), [33.7, 95.5])
        used = detector.parameters_used
        assert [used["low"], used["high"]] == pytest.approx(percentiles, rel=1e-4)


@pytest.fixture(scope="module")
def given(place):
    """The folder of caches of features and of logits that another program has written."""
    body, head = own_network()[:6], own_network()[6]
    features, logits = {}, {}
    for name, dataset in (("id", "id"), ("cal", "calibration"), ("ood", "other")):
        content = np.load(place / f"{name}.npz")
        rows = body(normalised(content["images"])).detach()
        features[dataset] = FeatureSet(rows, content["labels"])
        logits[dataset] = FeatureSet(head(rows), content["labels"])
    folder = place / "cache" / "own"
    write_cache(folder / "features", features, (head.weight, head.bias), Origin(checkpoint="x.pt"))
    write_cache(folder / "logits", logits, None)
    return folder


@pytest.mark.parametrize("method", ["lhact", "knn", "mahalanobis", "react+dice"])
def test_runs_what_was_measured_on_features_from_elsewhere(place, given, tmp_path, method, capsys):
    path, name = tmp_path / "saved.safetensors", "features"
    arguments = ["--benchmark", "own", "--cache-dir", place / "cache", "--name", name, "--methods"]
    arguments += [
        method,
        "--scores-dir",
        tmp_path,
        "--save-detector",
        path,
        "--output",
        "/dev/null",
    ]
    assert eval_script.main([str(part) for part in arguments]) == 0
    assert "a network is compared by its head alone" in capsys.readouterr().err
    with open(tmp_path / method / "other.csv", newline="") as file:
        wanted = torch.tensor([float(row["score"]) for row in csv.DictReader(file)])
    images = normalised(np.load(place / "ood.npz")["images"])
    for detector in (
        Detector.from_cache(given / name, own_network(), method, input_size=SIDE),
        Detector.load(path, own_network(), input_size=SIDE),
    ):
        torch.testing.assert_close(detector.score_samples(images), wanted, rtol=1e-5, atol=1e-5)


def test_refuses_caches_from_elsewhere_of_other_networks_and_of_logits(place, given, capsys):
    wrong = {
        r"its head has 5 classes of 12 channels, not 5": own_network(channels=12),
        r"head\.weight differs": changed(own_network(), "6.weight"),
        r"head\.bias differs": changed(own_network(), "6.bias"),
    }
    for message, network in wrong.items():
        with pytest.raises(BadDetector, match=f"not the one of the cache .*features: {message}"):
            Detector.from_cache(given / "features", network, input_size=SIDE)
    with pytest.raises(BadCache, match="logits holds logits, and a detector reads"):
        Detector.from_cache(given / "logits", own_network(), "energy")
    with pytest.raises(ValueError, match="needs penultimate activations; this cache holds logits"):
        Detector.from_cache(given / "logits", own_network())
    arguments = ["--benchmark", "own", "--cache-dir", place / "cache", "--name", "logits"]
    arguments += ["--methods", "energy", "--save-detector", place / "logits.safetensors"]
    assert eval_script.main([str(part) for part in arguments]) == 1
    assert "holds logits, and a detector reads the activations" in capsys.readouterr().err
    assert not (place / "logits.safetensors").exists()


def test_a_file_is_of_the_weights_that_the_detector_was_fitted_on(place, tmp_path):
    network = own_network()
    detector = Detector(network, "energy", input_size=SIDE).fit(batches(place, "cal"))
    changed(network, "4.weight")
    (tmp_path / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    detector.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink(), "a link stays one"
    assert Detector.load(tmp_path / "kept", own_network()).offset_ == detector.offset_
    with pytest.raises(BadDetector, match=r"4\.weight differs"):
        Detector.load(tmp_path / "kept", network)
    with pytest.raises(OSError, match="gone/d") as found:
        detector.save(tmp_path / "gone" / "d")
    assert found.value.filename == str(tmp_path / "gone" / "d")


@pytest.mark.parametrize("method", ["lhact", "knn", "odin"])
def test_copies_threads_and_inference_mode_change_nothing(place, method, tmp_path):
    known, images = batches(place, "cal"), batches(place, "ood")[0][0]
    network = own_network()
    detector = Detector(network, method, input_size=SIDE).fit(known)
    wanted = detector.score_samples(images)
    with torch.inference_mode():
        learnt = Detector(network, method, input_size=SIDE).fit(known)
    learnt.save(tmp_path / "d")
    copies = [copy.deepcopy(learnt), pickle.loads(pickle.dumps(learnt))]
    copies += [Detector.load(tmp_path / "d", network), detector.fit(iter(known))]
    for other in copies:
        assert torch.equal(other.score_samples(images), wanted)
        assert other.offset_ == detector.offset_
    found = []
    work = lambda: found.append(detector.score_samples(images))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(scores, wanted) for scores in found] == [True] * 4


def test_takes_what_load_network_gives(tmp_path):
    whole = make_network("shufflenet_v2_x0_5", num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "own.pth")
    network = load_network("shufflenet_v2_x0_5", checkpoint=tmp_path / "own.pth")
    images = torch.randn(30, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector = Detector(network, "maxlogit").fit(images)
    wanted = whole(images).detach().amax(dim=1)
    torch.testing.assert_close(detector.score_samples(images), wanted)
    detector.save(tmp_path / "d.safetensors")
    loaded = Detector.load(tmp_path / "d.safetensors", whole)  # the same weights another way
    assert loaded.offset_ == detector.offset_
    assert loaded.info.arch == "shufflenet_v2_x0_5"
