"""lhact.models against torchvision's own networks, transforms and forward passes."""

import hashlib
import pickle
import re
import urllib.error
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from helpers import ARCH, make_network
from PIL import Image
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights, MobileNet_V2_Weights, ShuffleNet_V2_X0_5_Weights

from lhact.extraction import images, networks
from lhact.extraction.extract import normalise
from lhact.extraction.networks import BadNetwork

# architecture -> (the last linear layer's name, how many values enter it), read off torchvision's source
HEADS = {
    "resnet18": ("fc", 512),
    "mobilenet_v2": ("classifier.1", 1280),
    "densenet121": ("classifier", 1024),
    "efficientnet_b0": ("classifier.1", 1280),
    "convnext_tiny": ("classifier.2", 768),
    "vit_b_16": ("heads.head", 768),
    "vgg11": ("classifier.6", 4096),
}


def inputs(count: int = 2, side: int = 224) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def entering(network: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What torchvision's own forward hands to the layer, and its output."""
    seen = []
    hook = network.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        logits = network(x)
    hook.remove()
    return seen[0], logits


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


# ---- the body and the head are torchvision's network ----


@pytest.mark.parametrize("arch", [arch for arch in HEADS if arch != "vgg11"])
def test_body_and_head_are_torchvisions_network(arch, tmp_path):
    layer, channels = HEADS[arch]
    theirs = make_network(arch)
    x = inputs(1 if arch == "vit_b_16" else 2)
    activations, logits = entering(theirs.eval(), layer, x)
    theirs.train()  # what is saved does not know its mode
    loaded = networks.load(arch, checkpoint=save(theirs.state_dict(), tmp_path / "state.pth"))
    assert not any(module.training for module in loaded.body.modules() if not isinstance(module, nn.Identity))
    assert not any(parameter.requires_grad for parameter in loaded.body.parameters())
    with torch.inference_mode():
        z = loaded.body(x)
    assert z.shape == (len(x), channels)
    torch.testing.assert_close(z, activations, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z @ loaded.weight.T + loaded.bias, logits, rtol=1e-5, atol=1e-5)
    assert (loaded.weight.shape, loaded.bias.shape) == ((1000, channels), (1000,))
    assert loaded.weight.dtype == loaded.bias.dtype == torch.float32
    assert (loaded.description["classes"], loaded.description["channels"]) == (1000, channels)
    assert loaded.description["arch"] == arch
    assert loaded.description["weights"] is None
    assert loaded.description["checkpoint"] == "state.pth"
    assert logits.std() > 0.1, "a network that says the same of everything proves nothing"


def test_a_head_without_bias(tmp_path):
    theirs = make_network("maxvit_t", side=224)
    activations, logits = entering(theirs, "classifier.5", inputs(1))
    loaded = networks.load("maxvit_t", checkpoint=save(theirs.state_dict(), tmp_path / "maxvit.pth"))
    with torch.inference_mode():
        z = loaded.body(inputs(1))
    torch.testing.assert_close(z, activations, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z @ loaded.weight.T, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(loaded.bias, torch.zeros(1000))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_number_of_classes_is_read_off_the_head(classes, tmp_path):
    theirs = make_network(ARCH, num_classes=classes)
    loaded = networks.load(ARCH, checkpoint=save(theirs.state_dict(), tmp_path / "state.pth"))
    assert loaded.description["classes"] == classes
    with torch.inference_mode():
        torch.testing.assert_close(loaded.body(inputs()) @ loaded.weight.T + loaded.bias, theirs(inputs()), rtol=1e-5, atol=1e-5)


def test_half_precision_weights_give_a_single_precision_head(state, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    loaded = networks.load(ARCH, checkpoint=save(half, tmp_path / "half.pth"))
    assert loaded.weight.dtype == torch.float32
    assert torch.equal(loaded.weight, half["fc.weight"].float())
    with torch.inference_mode():
        assert loaded.body(inputs()).dtype == torch.float32


# ---- wrappings ----

WRAPPINGS: dict[str, Callable[[dict], Any]] = {
    "bare": lambda state: state,
    "ordered": OrderedDict,
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 7, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"epoch": 1, "model": state},
    "state_dict-module": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "model-module": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts_are_the_same_network(wrapping, state, checkpoint, tmp_path):
    plain = networks.load(ARCH, checkpoint=checkpoint)
    loaded = networks.load(ARCH, checkpoint=save(WRAPPINGS[wrapping](state), tmp_path / "wrapped.pth"))
    assert loaded.description["sha256"] == plain.description["sha256"]
    for key, value in plain.body.state_dict().items():
        assert torch.equal(loaded.body.state_dict()[key], value)
    assert torch.equal(loaded.weight, state["fc.weight"])
    assert torch.equal(loaded.bias, state["fc.bias"])


def test_sha256_knows_every_value_name_dtype_and_shape():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    sha256 = networks.state_dict_sha256(base)
    assert sha256 == networks.state_dict_sha256({"b": torch.tensor(3), "a": torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]})
    others = [
        {"a": torch.tensor([1.0, 2.0000002]), "b": torch.tensor(3)},
        {"a": torch.tensor([1.0, 2.0]), "c": torch.tensor(3)},
        {"a": torch.tensor([1.0, 2.0]).double(), "b": torch.tensor(3)},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3)},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32), "b": torch.tensor(3)},
        {"a": torch.tensor([1.0, 2.0])},
    ]
    assert len({sha256, *map(networks.state_dict_sha256, others)}) == len(others) + 1


# ---- strictness: each refusal names the file and what is wrong ----


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


STATES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "missing": (
        lambda s: without(s, "conv1.0.weight"),
        r"not a checkpoint of shufflenet_v2_x0_5: missing conv1\.0\.weight; give its",
    ),
    "missing-buffer": (lambda s: without(s, "conv1.1.running_mean"), r"missing conv1\.1\.running_mean"),
    "unexpected": (lambda s: {**s, "extra.weight": torch.zeros(3)}, r"unexpected extra\.weight; give its own --arch"),
    "shape": (
        lambda s: {**s, "conv1.0.weight": torch.zeros(24, 3, 5, 5)},
        r"conv1\.0\.weight is \(24, 3, 5, 5\), wanted \(24, 3, 3, 3\)",
    ),
    "head-too-narrow": (
        lambda s: {**s, "fc.weight": torch.zeros(1000, 512)},
        r"fc\.weight is \(1000, 512\), wanted \(1000, 1024\)",
    ),
    "head-without-bias": (lambda s: without(s, "fc.bias"), r"missing fc\.bias"),
    "bias-of-another-head": (lambda s: {**s, "fc.bias": torch.zeros(10)}, r"fc\.bias is \(10,\), wanted \(1000,\)"),
    "no-head": (lambda s: without(s, "fc.weight"), r"it has no matrix fc\.weight.*; give its own --arch"),
    "head-a-vector": (lambda s: {**s, "fc.weight": torch.zeros(1000)}, r"it has no matrix fc\.weight"),
    "nan": (
        lambda s: {**s, "fc.weight": s["fc.weight"].clone().fill_(float("nan"))},
        r"fc\.weight holds NaN or infinite values; .*damaged",
    ),
    "infinite-statistics": (
        lambda s: {**s, "conv1.1.running_var": torch.full((24,), float("inf"))},
        r"conv1\.1\.running_var holds NaN",
    ),
    "two-prefixes": (lambda s: {("module." if i % 2 else "") + k: v for i, (k, v) in enumerate(s.items())}, r"(missing|no matrix)"),
    "keys-that-are-numbers": (lambda s: dict(enumerate(s.values())), r"(holds no state dict|no matrix fc\.weight)"),
    "one-key-a-number": (lambda s: {**s, 7: torch.zeros(1)}, r"(holds no state dict|unexpected 7)"),
    "sparse": (lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()}, r"(holds no state dict|fc\.weight)"),
    "meta": (lambda s: {**s, "fc.weight": s["fc.weight"].to("meta")}, r"(holds no state dict|fc\.weight)"),
    "complex": (lambda s: {**s, "fc.weight": s["fc.weight"].to(torch.complex64) * 1j}, r"(holds no state dict|fc\.weight)"),
    "wide-and-thin": (
        lambda s: {**s, "fc.weight": torch.zeros(10**6, 1)},
        r"fc\.weight is \(1000000, 1\), wanted \(1000, 1024\)",
    ),
    "expanded": (
        lambda s: {**s, "fc.weight": torch.zeros(1).expand(10**12, 1024), "fc.bias": torch.zeros(1).expand(10**12)},
        r"holds no state dict .*fc\.weight is not one",
    ),
    "8-bit-floats": (
        lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.float8_e4m3fn)},
        r"holds no state dict .*fc\.bias is not one",
    ),
    "bits": (lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.int8).view(torch.bits8)}, r"fc\.bias is not one"),
    "truth-values": (lambda s: {**s, "fc.bias": s["fc.bias"] > 0}, r"fc\.bias is not one"),
    "integers": (lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.int8)}, r"fc\.bias is torch\.int8, wanted torch\.float32"),
    "quantised": (lambda s: {**s, "fc.bias": torch.quantize_per_tensor(s["fc.bias"], 0.1, 0, torch.qint8)}, r"fc\.bias is not one"),
    "nested-tensors": (lambda s: {**s, "fc.bias": torch.nested.nested_tensor([torch.zeros(9)])}, r"fc\.bias is not one"),
    "beyond-single-precision": (
        lambda s: {**s, "fc.bias": torch.full((1000,), 1e300, dtype=torch.float64)},
        r"fc\.bias holds NaN or infinite",
    ),
    "key-with-newline": (lambda s: {**s, "a\nb\x1b[31m": torch.zeros(1)}, r"unexpected a\\nb\\x1b\[31m; give its own --arch"),
    "key-without-end": (lambda s: {**s, "a" * 10_000: torch.zeros(1)}, r"unexpected a{120}; give its own --arch"),
    "no-classes": (lambda s: {**s, "fc.weight": torch.zeros(0, 1024), "fc.bias": torch.zeros(0)}, r"fc\.weight"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STATES)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(kind, state, tmp_path):
    change, message = STATES[kind]
    path = save(change(state), tmp_path / "odd.pth")
    with pytest.raises(BadNetwork, match=message) as refusal:
        networks.load(ARCH, checkpoint=path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_checkpoint_of_another_architecture_is_refused_in_one_short_line(checkpoint):
    with pytest.raises(
        BadNetwork, match=r"small\.pth is not a checkpoint of resnet18: missing .* and \d+ more; give its own --arch"
    ) as refusal:
        networks.load("resnet18", checkpoint=checkpoint)
    assert len(str(refusal.value)) < 600


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.folder,)


def _cut(path: Path, state: dict) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100_000])


def _compressed(path: Path, state: dict) -> None:
    """A thousandth of what it takes in memory."""
    torch.save({"fc.weight": torch.zeros(10**7)}, path)
    members = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


FILES: dict[str, tuple[Callable[[Path, dict], object], str]] = {
    "missing": (lambda path, _: None, "no checkpoint at .*; give the file of a state dict"),
    "folder": (lambda path, _: path.mkdir(), "not a checkpoint that can be loaded safely"),
    "empty": (lambda path, _: path.touch(), "not a checkpoint that can be loaded safely"),
    "text": (lambda path, _: path.write_text("not a checkpoint\n" * 30), "not a checkpoint that can be loaded safely"),
    "image": (lambda path, _: Image.new("RGB", (9, 9)).save(path, "JPEG"), "not a checkpoint that can be loaded safely"),
    "cut": (_cut, "not a checkpoint that can be loaded safely"),
    "npz": (lambda path, _: np.savez(path.open("wb"), a=np.zeros(3)), "not a checkpoint that can be loaded safely"),
    "plain-pickle": (lambda path, _: path.write_bytes(pickle.dumps({"a": 1})), "(loaded safely|holds no state dict)"),
    "whole-network": (lambda path, _: torch.save(nn.Linear(2, 2), path), "not a checkpoint that can be loaded safely"),
    "tensor": (lambda path, _: torch.save(torch.zeros(3), path), "holds no state dict"),
    "compressed": (_compressed, "it is compressed, from 4000"),
    "torchscript": (lambda path, _: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "TorchScript"),
    "with-an-optimizer": (
        lambda path, s: torch.save({"model": s, "o": torch.optim.SGD([s["fc.bias"]], 0.1)}, path),
        "torch.optim.sgd",
    ),
    "list": (lambda path, _: torch.save([torch.zeros(3)], path), "holds no state dict"),
    "none": (lambda path, _: torch.save(None, path), "holds no state dict"),
    "empty-dict": (lambda path, _: torch.save({}, path), "holds no state dict"),
    "empty-state_dict": (lambda path, _: torch.save({"state_dict": {}}, path), "holds no state dict"),
    "numbers": (lambda path, _: torch.save({"fc.weight": 3.0}, path), "holds no state dict"),
    "optimizer": (lambda path, s: torch.save({**s, "optimizer": {"lr": 1}}, path), "holds no state dict"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(kind, state, tmp_path):
    make, message = FILES[kind]
    path = tmp_path / "odd.pth"
    make(path, state)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(BadNetwork, match=message) as refusal:
            networks.load(ARCH, checkpoint=path)
    assert not said, "a library's own warning beside the line"
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_heads_for_training_alone_make_no_difference(arch, tmp_path):
    """torchvision saves googlenet and inception_v3 with them; a network trained or exported without has none."""
    theirs = torchvision.models.get_model(arch, weights=None, init_weights=False)
    with_them = networks.load(arch, checkpoint=save(theirs.state_dict(), tmp_path / "with.pth"))
    bare = {key: value for key, value in theirs.state_dict().items() if not key.lower().startswith("aux")}
    assert len(bare) < len(theirs.state_dict())
    without_them = networks.load(arch, checkpoint=save(bare, tmp_path / "without.pth"))
    assert with_them.description["sha256"] == without_them.description["sha256"] == networks.state_dict_sha256(bare)
    activations, _ = entering(theirs.eval(), "fc", inputs(1))
    for loaded in (with_them, without_them):
        with torch.inference_mode():
            torch.testing.assert_close(loaded.body(inputs(1)), activations, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadNetwork, match=r"unexpected aux1\.conv"):
        networks.load(
            "resnet10", checkpoint=save({**networks.build("resnet10").state_dict(), "aux1.conv": bare["fc.bias"]}, tmp_path / "a")
        )


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "nested"])
def test_a_checkpoint_that_would_run_code_does_not_run_it(how, state, tmp_path):
    path, made = tmp_path / "hostile.pth", tmp_path / "made"
    content = {**state, "fc.bias": Hostile(made)} if how == "nested" else Hostile(made)
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(BadNetwork, match=r"hostile\.pth is not a checkpoint that can be loaded safely"):
        networks.load(ARCH, checkpoint=path)
    assert not made.exists()
    with path.open("rb") as file:  # the trap works: a plain unpickling does run it
        if how == "pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert made.exists()


def test_a_weight_that_changed_on_disk_is_refused(state, tmp_path):
    path = save(state, tmp_path / "changed.pth")
    content = bytearray(path.read_bytes())
    place = content.index(state["fc.bias"].numpy().tobytes())
    content[place + 2] ^= 1  # a little in the value, nothing anywhere else
    path.write_bytes(content)
    with pytest.raises(BadNetwork, match=r"changed\.pth .* it is damaged: the checksum of its member changed/data/\d+ is another"):
        networks.load(ARCH, checkpoint=path)


def test_damaged_checkpoints_are_refused(tmp_path):
    whole = save({"fc.bias": torch.arange(40.0), "fc.weight": torch.ones(40, 3)}, tmp_path / "whole.pth").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    for case in range(40):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 1 + case % 3):
            content[place] ^= int(rng.integers(1, 256))
        if case % 5 == 0:
            del content[int(rng.integers(0, len(whole))) :]
        path.write_bytes(content)
        with pytest.raises(BadNetwork, match=r"damaged\.pth") as refusal:  # also undamaged it is no resnet10
            networks.load("resnet10", checkpoint=path)
        assert len(str(refusal.value).splitlines()) == 1


# ---- unknown names ----


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(BadNetwork, match="unknown architecture 'resnet51'; known: ") as refusal:
        networks.build("resnet51")
    known = set(re.split(r"[:,] ", str(refusal.value)))
    assert {"resnet50", "vit_b_16", "convnext_tiny", "densenet121"} <= known
    assert known.isdisjoint({"raft_large", "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn", "quantized_resnet50"})


@pytest.mark.parametrize("arch", ["squeezenet1_0", "squeezenet1_1"])
def test_a_network_without_a_linear_layer_is_refused(arch, tmp_path):
    path = save(torchvision.models.get_model(arch, weights=None).state_dict(), tmp_path / "squeeze.pth")
    with pytest.raises(BadNetwork, match=f"{arch} does not end in a linear layer.*take another --arch"):
        networks.load(arch, checkpoint=path)


FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_y_400mf resnet10 resnet18 resnext50_32x4d shufflenet_v2_x0_5 swin_t swin_v2_t vgg11 vgg11_bn "
    "vit_b_16 wide_resnet50_2"
)


@pytest.mark.parametrize("arch", FAMILIES.split())
def test_every_family_ends_in_its_head(arch):
    # Shapes alone, no values: quick. regnet computes its widths with tensors.
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):
        network = networks.build(arch, classes=7).eval()
        x = torch.empty(1, 3, 299, 299) if arch == "inception_v3" else torch.empty(1, 3, 224, 224)
    name = networks.head_name(network, arch)
    assert name == HEADS.get(arch, (name, 0))[0]
    out = []
    network.get_submodule(name).register_forward_hook(lambda *args: out.append(args[2]))
    result = network(x)
    assert len(out) == 1
    assert result is out[0], "the network goes on after that layer"
    assert result.shape == (1, 7)


@pytest.mark.parametrize("both", [False, True])
def test_weights_or_a_checkpoint_not_both_not_neither(both, checkpoint):
    with pytest.raises(BadNetwork, match="either the name of torchvision weights or a checkpoint"):
        networks.load(ARCH, *(("IMAGENET1K_V1", checkpoint) if both else ()))


def test_unknown_weights_list_the_known_ones():
    with pytest.raises(BadNetwork, match="resnet50 has no weights 'IMAGENET1K_V3'; known: IMAGENET1K_V1, IMAGENET1K_V2"):
        networks.load("resnet50", "IMAGENET1K_V3")
    with pytest.raises(BadNetwork, match="give --checkpoint"):
        networks.load("resnet10", "IMAGENET1K_V1")


# ---- torchvision's weights by name, without a network connection ----


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub folder, and no way to fetch anything."""

    def no_connection(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no connection")

    folder = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    return folder / "checkpoints"


def publish(weights: Any, state: dict, hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `state` the published file of those weights: its hash in its name, as torchvision does it."""
    path = save(state, hub.parent.parent / "published.pth")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"{weights.url.rpartition('/')[2].rpartition('-')[0]}-{sha256[:8]}.pth"
    monkeypatch.setattr(weights.value, "url", f"https://download.example/models/{name}")
    hub.mkdir(parents=True, exist_ok=True)
    return path.rename(hub / name)


def test_weights_that_cannot_be_fetched_say_what_to_do_by_hand(hub):
    url = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
    file = hub / url.rpartition("/")[2]
    with pytest.raises(BadNetwork, match="no connection") as refusal:
        networks.load(ARCH, "IMAGENET1K_V1")
    for part in ("IMAGENET1K_V1 of shufflenet_v2_x0_5 could not be fetched", f"fetch {url} by hand", str(file)):
        assert part in str(refusal.value)
    assert not file.exists()


def test_a_file_in_the_published_ones_place_is_checked(state, hub):
    hub.mkdir(parents=True)
    path = save(state, hub / ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    with pytest.raises(
        BadNetwork, match=r"is not the file that torchvision publishes as IMAGENET1K_V1 .*sha256.*; delete it"
    ) as refusal:
        networks.load(ARCH, "IMAGENET1K_V1")
    assert str(path) in str(refusal.value)


def test_published_weights_by_name_and_as_a_checkpoint_are_the_same(network, state, hub, monkeypatch):
    path = publish(ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1, state, hub, monkeypatch)
    by_name = networks.load(ARCH, "IMAGENET1K_V1")
    as_file = networks.load(ARCH, checkpoint=path, preprocessing={"resize": 32, "crop": 32})
    activations, _ = entering(network, "fc", inputs())
    for loaded in (by_name, as_file):
        with torch.inference_mode():
            torch.testing.assert_close(loaded.body(inputs()), activations, rtol=1e-5, atol=1e-5)
        assert loaded.description["weights"] == "IMAGENET1K_V1"
        assert loaded.preprocessing == by_name.preprocessing
        assert images.Preprocessing(**loaded.preprocessing) == images.Preprocessing()
    assert by_name.description["sha256"] == as_file.description["sha256"]


@pytest.mark.parametrize(
    ("arch", "name", "top1"),
    [
        ("resnet50", "IMAGENET1K_V1", 76.13),
        ("resnet50", "IMAGENET1K_V2", 80.858),
        ("resnet18", "IMAGENET1K_V1", 69.758),
        ("resnet50", None, None),
        ("resnet50", "DEFAULT", None),
        ("resnet10", "IMAGENET1K_V1", None),
    ],
)
def test_published_top1_is_torchvisions(arch, name, top1):
    assert networks.published_top1(arch, name) == top1


def test_weights_without_published_metrics(monkeypatch):
    """Where torchvision's description has them is private to it."""
    for meta in ({}, {"_metrics": {"ImageNet-Real": {"acc@1": 80.0}}}, {"_metrics": {"ImageNet-1K": {}}}):
        weights = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
        monkeypatch.setattr(weights.value, "meta", meta)
        assert networks.published_top1(ARCH, weights.name) is None


def test_the_preprocessing_of_any_other_checkpoint_is_what_was_asked_for(checkpoint):
    assert images.Preprocessing(**networks.load(ARCH, checkpoint=checkpoint).preprocessing) == images.Preprocessing()
    asked = {"resize": 32, "crop": 28}
    assert networks.load(ARCH, checkpoint=checkpoint, preprocessing=asked).preprocessing == asked


# resize to 256 and 232 bilinear, and 256 bicubic
@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("mobilenet_v2", MobileNet_V2_Weights.IMAGENET1K_V1),
        ("mobilenet_v2", MobileNet_V2_Weights.IMAGENET1K_V2),
        ("efficientnet_b0", EfficientNet_B0_Weights.IMAGENET1K_V1),
    ],
)
def test_load_and_normalise_are_the_weights_own_transforms(arch, weights, hub, monkeypatch, tmp_path):
    theirs = make_network(arch)
    publish(weights, theirs.state_dict(), hub, monkeypatch)
    loaded = networks.load(arch, weights.name)
    preprocessing = images.Preprocessing(**loaded.preprocessing)
    for i, size in enumerate([(500, 375), (240, 333), (224, 224)]):
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.png")
        pixels = images.load(tmp_path / "a.png", preprocessing.resize, preprocessing.crop, preprocessing.interpolation)
        found = normalise(torch.from_numpy(pixels[None].copy()), preprocessing.mean, preprocessing.std)[0]
        torch.testing.assert_close(found, weights.transforms()(Image.fromarray(noise)), rtol=0, atol=1e-6)
