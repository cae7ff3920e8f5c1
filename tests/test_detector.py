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
from helpers import make_network, small_classifier
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

import get_activation
from lhact import Detector, FeatureSet, Origin, load_network, write_cache
from lhact.cache import BadCache, open_cache
from lhact.detector_file import BadDetector
from lhact.evaluation.score import fit_methods, score
from lhact.methods.compose import known_methods, parse

SIDE = 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
METHODS = [*known_methods(), "lhact+scale", "react+dice", "lhact+knn", "lhact+odin"]


def pixels(count: int, seed: int, spread: int) -> np.ndarray:
    """(count, SIDE, SIDE, 3) uint8: blocks of 4 x 4 pixels, with noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, spread, (count, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    noise = rng.integers(0, 256 - spread, (count, SIDE, SIDE, 3))
    return (coarse + noise).astype(np.uint8)


def normalised(values: np.ndarray) -> torch.Tensor:
    """By torchvision's own functions."""
    images = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255
    return torchvision.transforms.functional.normalize(images, list(MEAN), list(STD))


def make(method: str = "lhact", network: nn.Module | None = None, **given) -> Detector:
    return Detector(network or small_classifier(), method, input_size=SIDE, **given)


def changed(*names: str) -> nn.Module:
    """The network with a hair's change in the tensors of those names."""
    network = small_classifier()
    with torch.no_grad():
        for name in names:
            network.get_parameter(name).view(-1)[0] += 1e-6
    return network


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images in arrays, and the cache that get_activation.py makes of them."""
    folder = tmp_path_factory.mktemp("detector")
    for name, count, seed, spread in (("id", 90, 1, 200), ("cal", 80, 2, 200), ("ood", 40, 3, 2)):
        images = pixels(count, seed, spread)
        labels = small_classifier()(normalised(images)).argmax(dim=1).numpy()
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    given = ["--arch", "helpers:small_classifier", "--name", "own", "--odin", "--device", "cpu"]
    given += ["--cache-dir", folder / "cache", "--workers", 0, "--calibration-per-class", "all"]
    given += ["--resize", 0, "--crop", SIDE, "--mean", *MEAN, "--std", *STD]
    given += ["--id", folder / "id.npz", "--calibration", folder / "cal.npz"]
    given += ["--ood", f"other={folder / 'ood.npz'}"]
    assert get_activation.main([str(part) for part in given]) == 0
    return folder


@pytest.fixture(scope="module")
def cached(place):
    return place / "cache" / "imagenet" / "own"


@pytest.fixture(scope="module")
def known(place) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The calibration images and their labels in batches."""
    content = np.load(place / "cal.npz")
    images, labels = normalised(content["images"]), torch.from_numpy(content["labels"])
    return list(zip(images.split(32), labels.split(32), strict=True))


@pytest.fixture(scope="module")
def images(place) -> torch.Tensor:
    """Those of the OOD set."""
    return normalised(np.load(place / "ood.npz")["images"])


@pytest.fixture(scope="module")
def evaluated(cached):
    """Method -> the scores of the OOD set by the cached path."""
    opened, device = open_cache(cached), torch.device("cpu")
    fitted = fit_methods(opened, [parse(name) for name in METHODS], device)
    return {part.fitted.name: part.scores for part in score(opened, fitted, device)}


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_cached_path(known, images, cached, evaluated, method):
    """Fitted to the same calibration images, and from the cache; whatever the batch."""
    wanted = torch.from_numpy(evaluated[method]["other"])
    # Some are differences of numbers that are nearly equal.
    size = {"rtol": 1e-4 if method in ("klm", "residual", "vim") else 1e-5, "atol": 1e-5}
    fitted = make(method).fit(known)
    from_cache = Detector.from_cache(cached, small_classifier(), method)
    for detector in (fitted, from_cache):
        torch.testing.assert_close(detector.score_samples(images), wanted, **size)
        one_by_one = torch.cat([detector.score_samples(image) for image in images[:5].split(1)])
        torch.testing.assert_close(one_by_one, wanted[:5], **size)
    # The threshold of the table: images of the ID set above it, by the definition of FPR95.
    id_scores = np.sort(evaluated[method]["id"])
    assert from_cache.offset_ == pytest.approx(id_scores[round(0.05 * 90)], rel=1e-6)


def test_follows_the_conventions_of_scikit_learn(known, images):
    network = small_classifier()
    detector = make("energy", network).fit(known, keep=0.8)
    energies = torch.logsumexp(network(images).detach().double(), dim=1)
    torch.testing.assert_close(detector.score_samples(images).double(), energies)
    learnt = torch.cat([images for images, _ in known])
    sorted_energies = torch.logsumexp(network(learnt).detach().double(), dim=1).sort().values
    assert detector.offset_ == pytest.approx(float(sorted_energies[16]), rel=1e-6)
    decisions = detector.decision_function(images)
    torch.testing.assert_close(decisions.double(), energies - detector.offset_, rtol=0, atol=1e-5)
    assert torch.equal(detector.predict(images), torch.where(decisions > 0, 1, -1))
    assert {-1, 1} == set(detector.predict(torch.cat([images, learnt])).tolist())
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


def test_leaves_the_network_and_its_hooks_as_they_are(known, images):
    network = small_classifier()
    calls: list[str] = []
    network[5].register_forward_hook(lambda *_: calls.append("inner"))
    network.register_forward_hook(lambda *_: calls.append("outer"))
    before, modules = copy.deepcopy(network.state_dict()), list(network.modules())
    wanted = network(images)
    detector = make("odin", network).fit(known)
    calls.clear()
    with torch.inference_mode():
        detector(images.clone())
    assert {"inner", "outer"} == set(calls)
    assert list(network.modules()) == modules
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(network(images), wanted)
    assert next(detector.body.parameters()) is next(network.parameters()), "nothing is copied"


def test_runs_under_autocast_and_compile(cached, images):
    detector = Detector.from_cache(cached, small_classifier(), "lhact+scale")
    logits, scores = detector(images)
    with torch.autocast("cpu", torch.bfloat16):
        half_logits, half_scores = detector(images)
    assert half_scores.dtype == half_logits.dtype == torch.float32
    assert not torch.equal(half_scores, scores)
    torch.testing.assert_close(half_scores, scores, rtol=0.03, atol=0.03)
    compiled = torch.compile(detector, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), (logits, scores))


@pytest.mark.parametrize("method", ["lhact", "knn", "odin"])
def test_learns_in_float32_under_autocast(known, images, method):
    wanted = make(method).fit(known)
    features = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = make(method).fit(known)
        if method != "odin":
            offset = make(method).fit_features(features).offset_
    torch.testing.assert_close(found(images)[1], wanted(images)[1], rtol=0.03, atol=0.03)
    assert found.offset_ == pytest.approx(wanted.offset_, rel=0.03)
    assert method == "odin" or make(method).fit_features(features).offset_ == offset


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_it_learnt_stays_float32_in_a_network_of_another_precision(cached, images, dtype):
    detector = Detector.from_cache(cached, small_classifier(), "knn")
    offset, before = detector.offset_, [buffer.clone() for buffer in detector.scoring.buffers()]
    detector.to(dtype)
    assert (detector.head.weight.dtype, detector.offset_) == (dtype, offset)
    assert before
    torch.testing.assert_close(list(detector.scoring.buffers()), before, rtol=0, atol=0)
    assert detector.predict(images.to(dtype)).shape == (len(images),)
    with pytest.raises(ValueError, match=f"must be {dtype} .* got torch.float32"):
        detector.predict(images)
    with torch.autocast("cpu", torch.bfloat16):  # makes all images and weights alike
        assert detector.float().predict(images.bfloat16()).shape == (len(images),)


@pytest.mark.parametrize("method", ["lhact", "knn"])
def test_state_dict_is_the_networks_alone(known, method):
    """A threshold of one fit beside statistics of another would score wrongly, and say nothing."""
    network = small_classifier()
    state = make(method, network).fit(known).state_dict()
    values = {value.data_ptr() for value in state.values()}
    assert values == {value.data_ptr() for value in network.state_dict().values()}
    make(method).load_state_dict(state)


@pytest.mark.parametrize("method", ["lhact", "knn", "react+dice", "ras+vim", "cadref", "odin"])
def test_saves_and_loads(known, images, tmp_path, method):
    settings = {"react.high": 0.5} if method == "react+dice" else None
    detector = make(method, settings=settings).fit(known)
    detector.class_names = ("a", "b", "c", "d", "é")
    detector.save(tmp_path / "own.safetensors")
    loaded = Detector.load(tmp_path / "own.safetensors", small_classifier())
    assert torch.equal(loaded.score_samples(images), detector.score_samples(images))
    for name in ("offset_", "parameters_used", "keep", "shape", "class_names", "perturbation"):
        assert getattr(loaded, name) == getattr(detector, name)
    if settings:
        assert loaded.parameters_used["high"] == 0.5
    with pytest.raises(ValueError, match="came fitted; make a new one"):
        loaded.fit(known)
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture(scope="module")
def saved(known, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "own.safetensors"
    make().fit(known).save(path)
    return path


def longer() -> nn.Module:
    network = nn.Sequential(*small_classifier(), nn.Identity()).eval()
    network[1] = nn.PReLU(init=0.0).eval()
    return network


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: changed("4.weight"), r"is not the one of .*own\.safetensors: 4\.weight differs"),
        (lambda: changed("4.weight", "4.bias"), r"4\.weight \(and 1 more\) differs"),
        (lambda: small_classifier(classes=4), "has 4 classes of 16 channels, not 5 classes"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), small_classifier()[6]).eval(),
            r"0\.weight \(and 3 more\) is missing",
        ),
        (longer, r"1\.weight is not known there"),
    ],
)
def test_refuses_a_network_of_other_weights(saved, build, message):
    with pytest.raises(BadDetector, match=message):
        Detector.load(saved, build())


@pytest.mark.parametrize("name", ["4.weight", "6.bias"])
def test_refuses_a_network_that_is_not_the_one_of_the_cache(cached, name):
    with pytest.raises(BadDetector, match="is not the one of the cache"):
        Detector.from_cache(cached, changed(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format=2, version="9.9"), "format 2, written by lhact 9.9"),
        (lambda content: content.pop("threshold"), "no detector that can be read"),
        (lambda content: content.update(threshold=float("nan")), "its threshold is nan"),
        (lambda content: content["steps"][0].update(name="new"), "rectifier or score 'new'"),
        (lambda content: content["steps"][0]["tensors"].append("x"), "no detector that can be r"),
        (lambda content: content["network"].pop("classes"), "no detector that can be read"),
    ],
)
def test_refuses_files_whose_metadata_are_not_right(saved, tmp_path, change, message):
    with safe_open(saved, framework="pt") as file:
        content = json.loads(file.metadata()["lhact"])
    change(content)
    save_file(load_file(saved), tmp_path / "other", {"lhact": json.dumps(content)})
    with pytest.raises(BadDetector, match=message):
        Detector.load(tmp_path / "other", small_classifier())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (save({"x": torch.zeros(1)}), "holds no detector of lhact, only tensors"),
        (b"", "no detector that can be read"),
        (b"nothing of the kind", "no detector that can be read"),
        (pickle.dumps({"x": 1}), "no detector that can be read"),
        (None, "there is no file"),
    ],
)
def test_refuses_files_that_are_no_detectors(tmp_path, content, message):
    path = tmp_path / "own.safetensors"
    if content is not None:
        path.write_bytes(content)
    for wrong in (path, tmp_path) if content is None else (path,):
        with pytest.raises(BadDetector, match=message):
            Detector.load(wrong, small_classifier())


def test_what_eval_saves_is_what_the_table_measured(place, images, tmp_path, run_eval):
    path, given = tmp_path / "saved.safetensors", ["--cache-dir", place / "cache", "--name", "own"]
    methods = ["--methods", "react", "lhact", "--format", "json"]
    status, out, err = run_eval(*given, *methods, "--save-detector", path)
    assert status == 0
    assert f"react saved to {path}" in err
    row = json.loads(out)["results"][0]
    detector = Detector.load(path, small_classifier())
    assert detector.offset_ == row["threshold"]
    passed = 100 * (detector.predict(images) > 0).double().mean().item()
    assert passed == pytest.approx(row["fpr95"])
    assert detector.preprocessing.crop == SIDE
    assert detector.shape == (3, SIDE, SIDE)
    status, _, err = run_eval(*given, "--save-detector", tmp_path)
    assert status == 1
    assert "give --save-detector a place that can be written to" in err


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
    body, head = small_classifier()[:6], small_classifier()[6]
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
def test_runs_what_was_measured_on_features_from_elsewhere(
    place, images, given, tmp_path, method, run_eval
):
    path, name = tmp_path / "saved.safetensors", "features"
    arguments = ["--benchmark", "own", "--cache-dir", place / "cache", "--name", name]
    arguments += ["--methods", method, "--scores-dir", tmp_path, "--save-detector", path]
    status, _, err = run_eval(*arguments)
    assert status == 0
    assert "a network is compared by its head alone" in err
    with open(tmp_path / method / "other.csv", newline="") as file:
        wanted = torch.tensor([float(row["score"]) for row in csv.DictReader(file)])
    for detector in (
        Detector.from_cache(given / name, small_classifier(), method, input_size=SIDE),
        Detector.load(path, small_classifier(), input_size=SIDE),
    ):
        torch.testing.assert_close(detector.score_samples(images), wanted, rtol=1e-5, atol=1e-5)


def test_refuses_caches_from_elsewhere_of_other_networks_and_of_logits(place, given, run_eval):
    wrong = {
        r"its head has 5 classes of 12 channels, not 5": small_classifier(channels=12),
        r"head\.weight differs": changed("6.weight"),
        r"head\.bias differs": changed("6.bias"),
    }
    for message, network in wrong.items():
        with pytest.raises(BadDetector, match=f"not the one of the cache .*features: {message}"):
            Detector.from_cache(given / "features", network, input_size=SIDE)
    with pytest.raises(BadCache, match="logits holds logits, and a detector reads"):
        Detector.from_cache(given / "logits", small_classifier(), "energy")
    with pytest.raises(ValueError, match="needs penultimate activations; this cache holds logits"):
        Detector.from_cache(given / "logits", small_classifier())
    arguments = ["--benchmark", "own", "--cache-dir", place / "cache", "--name", "logits"]
    arguments += ["--methods", "energy", "--save-detector", place / "logits.safetensors"]
    status, _, err = run_eval(*arguments)
    assert status == 1
    assert "holds logits, and a detector reads the activations" in err
    assert not (place / "logits.safetensors").exists()


def test_a_file_is_of_the_weights_that_the_detector_was_fitted_on(known, tmp_path):
    network = small_classifier()
    detector = make("energy", network).fit(known)
    network[4].weight.data += 1e-6
    (tmp_path / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    detector.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink(), "a link stays one"
    assert Detector.load(tmp_path / "kept", small_classifier()).offset_ == detector.offset_
    with pytest.raises(BadDetector, match=r"4\.weight differs"):
        Detector.load(tmp_path / "kept", network)
    with pytest.raises(OSError, match="gone/d") as found:
        detector.save(tmp_path / "gone" / "d")
    assert found.value.filename == str(tmp_path / "gone" / "d")


@pytest.mark.parametrize("method", ["lhact", "knn", "odin"])
def test_copies_threads_and_inference_mode_change_nothing(known, images, method, tmp_path):
    network = small_classifier()
    detector = make(method, network).fit(known)
    wanted = detector.score_samples(images)
    with torch.inference_mode():
        learnt = make(method, network).fit(known)
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
    with pytest.raises(ValueError, match="give the name of the head to load_network"):
        Detector(network, head="fc")
