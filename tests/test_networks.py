"""lhact.extraction.networks against torchvision's own networks, transforms and forward passes."""

import dataclasses
import hashlib
import importlib
import pickle
import re
import sys
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
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import (
    EfficientNet_B0_Weights,
    MobileNet_V2_Weights,
    ShuffleNet_V2_X0_5_Weights,
)

import get_activation
from lhact.extraction import checkpoints, images, networks
from lhact.extraction.extract import normaliser
from lhact.extraction.head import find, split
from lhact.extraction.networks import NetworkSpec
from lhact.extraction.weights import BadNetwork, state_dict_sha256
from lhact.records import BadRecord, Preprocessing, RecordedPreprocessing

# architecture -> (the last linear layer's name, how many values enter it), read off torchvision's
# source
HEADS = {
    "resnet18": ("fc", 512),
    "mobilenet_v2": ("classifier.1", 1280),
    "densenet121": ("classifier", 1024),
    "efficientnet_b0": ("classifier.1", 1280),
    "convnext_tiny": ("classifier.2", 768),
    "vit_b_16": ("heads.head", 768),
    "vgg11": ("classifier.6", 4096),
}


def check_names(arch: str, weights: str | None = None) -> None:
    networks.check_names(NetworkSpec(arch, weights))


def load(arch: str, weights: str | None = None, checkpoint: Path | None = None) -> networks.Network:
    return networks.load(NetworkSpec(arch, weights, checkpoint))


def inputs(count: int = 2, side: int = 224) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def entering(network: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What torchvision's own forward hands to the layer, and its output."""
    seen = []
    hook = network.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
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
    loaded = load(arch, checkpoint=save(theirs.state_dict(), tmp_path / "state.pth"))
    assert not any(
        module.training for module in loaded.body.modules() if not isinstance(module, nn.Identity)
    )
    assert not any(parameter.requires_grad for parameter in loaded.body.parameters())
    with torch.inference_mode():
        z = loaded.body(x)
    assert z.shape == (len(x), channels)
    torch.testing.assert_close(z, activations, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z @ loaded.weight.T + loaded.bias, logits, rtol=1e-5, atol=1e-5)
    assert (loaded.weight.shape, loaded.bias.shape) == ((1000, channels), (1000,))
    assert loaded.weight.dtype == loaded.bias.dtype == torch.float32
    assert (loaded.info.classes, loaded.info.channels) == (1000, channels)
    assert loaded.info.arch == arch
    assert loaded.info.weights is None
    assert loaded.info.checkpoint == "state.pth"
    assert logits.std() > 0.1, "a network that says the same of everything proves nothing"


def test_a_head_without_bias(tmp_path):
    theirs = make_network("maxvit_t", side=224)
    activations, logits = entering(theirs, "classifier.5", inputs(1))
    loaded = load("maxvit_t", checkpoint=save(theirs.state_dict(), tmp_path / "maxvit.pth"))
    with torch.inference_mode():
        z = loaded.body(inputs(1))
    torch.testing.assert_close(z, activations, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z @ loaded.weight.T, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(loaded.bias, torch.zeros(1000))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_number_of_classes_is_read_off_the_head(classes, tmp_path):
    theirs = make_network(ARCH, num_classes=classes)
    loaded = load(ARCH, checkpoint=save(theirs.state_dict(), tmp_path / "state.pth"))
    assert loaded.info.classes == classes
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.body(inputs()) @ loaded.weight.T + loaded.bias,
            theirs(inputs()),
            rtol=1e-5,
            atol=1e-5,
        )


def test_half_precision_weights_give_a_single_precision_head(state, tmp_path):
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    loaded = load(ARCH, checkpoint=save(half, tmp_path / "half.pth"))
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
    "state_dict-module": lambda state: {
        "state_dict": {f"module.{key}": value for key, value in state.items()}
    },
    "model-module": lambda state: {
        "model": {f"module.{key}": value for key, value in state.items()}
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts_are_the_same_network(wrapping, state, checkpoint, tmp_path):
    plain = load(ARCH, checkpoint=checkpoint)
    loaded = load(ARCH, checkpoint=save(WRAPPINGS[wrapping](state), tmp_path / "wrapped.pth"))
    assert loaded.info.sha256 == plain.info.sha256
    for key, value in plain.body.state_dict().items():
        assert torch.equal(loaded.body.state_dict()[key], value)
    assert torch.equal(loaded.weight, state["fc.weight"])
    assert torch.equal(loaded.bias, state["fc.bias"])


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")],
)
def test_averaged_weights_are_taken_and_it_is_said(plain, averaged, state, tmp_path):
    better = {**state, "fc.weight": state["fc.weight"] + 1}
    path = save({"epoch": 3, plain: state, averaged: better}, tmp_path / "both.pth")
    loaded = load(ARCH, checkpoint=path)
    assert torch.equal(loaded.weight, better["fc.weight"])
    assert f"both.pth: averaged weights taken ({averaged!r}, not {plain!r})" in loaded.remarks


def test_sha256_knows_every_value_name_dtype_and_shape():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    sha256 = state_dict_sha256(base)
    assert sha256 == state_dict_sha256(
        {"b": torch.tensor(3), "a": torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]}
    )
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
        r"not a checkpoint of shufflenet_v2_x0_5: missing conv1\.0\.weight",
    ),
    "missing-buffer": (
        lambda s: without(s, "conv1.1.running_mean"),
        r"missing conv1\.1\.running_mean",
    ),
    "unexpected": (
        lambda s: {**s, "extra.weight": torch.zeros(3)},
        r"unexpected extra\.weight",
    ),
    "shape": (
        lambda s: {**s, "conv1.0.weight": torch.zeros(24, 3, 5, 5)},
        r"conv1\.0\.weight is \(24, 3, 5, 5\), wanted \(24, 3, 3, 3\)",
    ),
    "head-too-narrow": (
        lambda s: {**s, "fc.weight": torch.zeros(1000, 512)},
        r"fc\.weight is \(1000, 512\), wanted \(1000, 1024\)",
    ),
    "bias-of-another-head": (
        lambda s: {**s, "fc.bias": torch.zeros(10)},
        r"fc\.bias is \(10,\), wanted \(1000,\)",
    ),
    "no-head": (
        lambda s: without(s, "fc.weight"),
        r"missing fc\.weight",
    ),
    "head-a-vector": (
        lambda s: {**s, "fc.weight": torch.zeros(1000)},
        r"fc\.weight is \(1000,\), wanted \(1000, 1024\)",
    ),
    "nan": (
        lambda s: {**s, "fc.weight": s["fc.weight"].clone().fill_(float("nan"))},
        r"fc\.weight holds NaN or infinite values; .*damaged",
    ),
    "infinite-statistics": (
        lambda s: {**s, "conv1.1.running_var": torch.full((24,), float("inf"))},
        r"conv1\.1\.running_var holds NaN",
    ),
    "two-prefixes": (
        lambda s: {("module." if i % 2 else "") + k: v for i, (k, v) in enumerate(s.items())},
        r"missing",
    ),
    "keys-that-are-numbers": (
        lambda s: dict(enumerate(s.values())),
        r"holds no state dict",
    ),
    "one-key-a-number": (lambda s: {**s, 7: torch.zeros(1)}, r"(holds no state dict|unexpected 7)"),
    "sparse": (
        lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()},
        r"(holds no state dict|fc\.weight)",
    ),
    "meta": (
        lambda s: {**s, "fc.weight": s["fc.weight"].to("meta")},
        r"(holds no state dict|fc\.weight)",
    ),
    "complex": (
        lambda s: {**s, "fc.weight": s["fc.weight"].to(torch.complex64) * 1j},
        r"(holds no state dict|fc\.weight)",
    ),
    "wide-and-thin": (
        lambda s: {**s, "fc.weight": torch.zeros(10**6, 1)},
        r"fc\.weight is \(1000000, 1\), wanted \(1000, 1024\)",
    ),
    "expanded": (
        lambda s: {
            **s,
            "fc.weight": torch.zeros(1).expand(10**12, 1024),
            "fc.bias": torch.zeros(1).expand(10**12),
        },
        r"holds no state dict .*fc\.weight is no plain tensor",
    ),
    "8-bit-floats": (
        lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.float8_e4m3fn)},
        r"holds no state dict .*fc\.bias is no plain tensor",
    ),
    "bits": (
        lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.int8).view(torch.bits8)},
        r"fc\.bias is no plain tensor",
    ),
    "truth-values": (lambda s: {**s, "fc.bias": s["fc.bias"] > 0}, r"fc\.bias is no plain tensor"),
    "integers": (
        lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.int8)},
        r"fc\.bias is torch\.int8, wanted torch\.float32",
    ),
    "quantised": (
        lambda s: {**s, "fc.bias": torch.quantize_per_tensor(s["fc.bias"], 0.1, 0, torch.qint8)},
        r"fc\.bias is no plain tensor",
    ),
    "nested-tensors": (
        lambda s: {**s, "fc.bias": torch.nested.nested_tensor([torch.zeros(9)])},
        r"fc\.bias is no plain tensor",
    ),
    "beyond-single-precision": (
        lambda s: {**s, "fc.bias": torch.full((1000,), 1e300, dtype=torch.float64)},
        r"fc\.bias holds NaN or infinite",
    ),
    "key-with-newline": (
        lambda s: {**s, "a\nb\x1b[31m": torch.zeros(1)},
        r"unexpected a\\nb\\x1b\[31m",
    ),
    "key-without-end": (
        lambda s: {**s, "a" * 10_000: torch.zeros(1)},
        r"unexpected a{120}\.\.\.",
    ),
    "no-classes": (
        lambda s: {**s, "fc.weight": torch.zeros(0, 1024), "fc.bias": torch.zeros(0)},
        r"fc\.weight",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STATES)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(kind, state, tmp_path):
    change, message = STATES[kind]
    path = save(change(state), tmp_path / "odd.pth")
    with pytest.raises(BadNetwork, match=message) as refusal:
        load(ARCH, checkpoint=path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_checkpoint_of_another_architecture_is_refused_in_one_short_line(checkpoint):
    with pytest.raises(
        BadNetwork,
        match=r"small\.pth is not a checkpoint of resnet18: missing .* and \d+ more",
    ) as refusal:
        load("resnet18", checkpoint=checkpoint)
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
    "text": (
        lambda path, _: path.write_text("not a checkpoint\n" * 30),
        "not a checkpoint that can be loaded safely",
    ),
    "image": (
        lambda path, _: Image.new("RGB", (9, 9)).save(path, "JPEG"),
        "not a checkpoint that can be loaded safely",
    ),
    "cut": (_cut, "not a checkpoint that can be loaded safely"),
    "npz": (
        lambda path, _: np.savez(path.open("wb"), a=np.zeros(3)),
        "not a checkpoint that can be loaded safely",
    ),
    "plain-pickle": (
        lambda path, _: path.write_bytes(pickle.dumps({"a": 1})),
        "(loaded safely|holds no state dict)",
    ),
    "whole-network": (
        lambda path, _: torch.save(nn.Linear(2, 2), path),
        "not a checkpoint that can be loaded safely",
    ),
    "tensor": (lambda path, _: torch.save(torch.zeros(3), path), "holds no state dict"),
    "compressed": (_compressed, "it is compressed, from 4000"),
    "torchscript": (
        lambda path, _: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        "TorchScript",
    ),
    "with-an-optimizer": (
        lambda path, s: torch.save({"model": s, "o": torch.optim.SGD([s["fc.bias"]], 0.1)}, path),
        "torch.optim.sgd",
    ),
    "list": (lambda path, _: torch.save([torch.zeros(3)], path), "holds no state dict"),
    "none": (lambda path, _: torch.save(None, path), "holds no state dict"),
    "empty-dict": (lambda path, _: torch.save({}, path), "holds no state dict"),
    "empty-state_dict": (
        lambda path, _: torch.save({"state_dict": {}}, path),
        "holds no state dict",
    ),
    "numbers": (lambda path, _: torch.save({"fc.weight": 3.0}, path), "holds no state dict"),
    "optimizer": (
        lambda path, s: torch.save({**s, "optimizer": {"lr": 1}}, path),
        "holds no state dict",
    ),
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
            load(ARCH, checkpoint=path)
    assert not said, "a library's own warning beside the line"
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_heads_for_training_alone_make_no_difference(arch, tmp_path):
    """torchvision saves googlenet and inception_v3 with them; a network trained or exported without
    has none."""
    theirs = torchvision.models.get_model(arch, weights=None, init_weights=False)
    with_them = load(arch, checkpoint=save(theirs.state_dict(), tmp_path / "with.pth"))
    bare = {
        key: value
        for key, value in theirs.state_dict().items()
        if not key.lower().startswith("aux")
    }
    assert len(bare) < len(theirs.state_dict())
    without_them = load(arch, checkpoint=save(bare, tmp_path / "without.pth"))
    assert with_them.info.sha256 == without_them.info.sha256 == state_dict_sha256(bare)
    activations, _ = entering(theirs.eval(), "fc", inputs(1))
    for loaded in (with_them, without_them):
        with torch.inference_mode():
            torch.testing.assert_close(loaded.body(inputs(1)), activations, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadNetwork, match=r"unexpected aux1\.conv"):
        load(
            "resnet10",
            checkpoint=save(
                {**networks.build("resnet10").state_dict(), "aux1.conv": bare["fc.bias"]},
                tmp_path / "a",
            ),
        )


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "nested"])
def test_a_checkpoint_that_would_run_code_does_not_run_it(how, state, tmp_path):
    path, made = tmp_path / "hostile.pth", tmp_path / "made"
    content = {**state, "fc.bias": Hostile(made)} if how == "nested" else Hostile(made)
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(
        BadNetwork, match=r"hostile\.pth is not a checkpoint that can be loaded safely"
    ):
        load(ARCH, checkpoint=path)
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
    with pytest.raises(
        BadNetwork,
        match=r"changed\.pth .* damaged: the checksum of its member changed/data/\d+ is another",
    ):
        load(ARCH, checkpoint=path)


def test_damaged_checkpoints_are_refused(tmp_path):
    whole = save(
        {"fc.bias": torch.arange(40.0), "fc.weight": torch.ones(40, 3)}, tmp_path / "whole.pth"
    ).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    for case in range(40):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 1 + case % 3):
            content[place] ^= int(rng.integers(1, 256))
        if case % 5 == 0:
            del content[int(rng.integers(0, len(whole))) :]
        path.write_bytes(content)
        with pytest.raises(
            BadNetwork, match=r"damaged\.pth"
        ) as refusal:  # also undamaged it is no resnet10
            load("resnet10", checkpoint=path)
        assert len(str(refusal.value).splitlines()) == 1


# ---- unknown names ----


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(BadNetwork, match=r"unknown architecture 'resnet51' .*; known: ") as refusal:
        networks.build("resnet51")
    known = set(re.split(r"[:,;] ", str(refusal.value)))
    assert {"resnet50", "vit_b_16", "convnext_tiny", "densenet121"} <= known
    assert known.isdisjoint(
        {"raft_large", "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn", "quantized_resnet50"}
    )


@pytest.mark.parametrize("arch", ["squeezenet1_0", "squeezenet1_1"])
def test_a_network_without_a_linear_layer_is_refused(arch, tmp_path):
    path = save(
        torchvision.models.get_model(arch, weights=None).state_dict(), tmp_path / "squeeze.pth"
    )
    with pytest.raises(BadNetwork, match=f"{arch} does not end in a linear layer"):
        load(arch, checkpoint=path)


FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet10 resnet18 "
    "resnext50_32x4d shufflenet_v2_x0_5 swin_t swin_v2_t vgg11 vgg11_bn "
    "vit_b_16 wide_resnet50_2"
)


@pytest.mark.parametrize("arch", FAMILIES.split())
def test_every_family_ends_in_its_head(arch):
    network = networks.build(arch, classes=7).eval()
    side = 299 if arch == "inception_v3" else 224
    found = find(network, arch, (3, side, side))
    assert found.name == HEADS.get(arch, (found.name, 0))[0]
    assert found.logits.shape == (2, 7)


def test_weights_or_a_checkpoint_not_both_not_neither(checkpoint):
    with pytest.raises(BadNetwork, match="either the name of published weights or a checkpoint"):
        load(ARCH, "IMAGENET1K_V1", checkpoint)
    with pytest.raises(BadNetwork, match="needs weights: give --weights NAME or --checkpoint FILE"):
        load(ARCH)


def test_unknown_weights_list_the_known_ones():
    with pytest.raises(
        BadNetwork,
        match="resnet50 has no weights 'IMAGENET1K_V3'; known: IMAGENET1K_V1, IMAGENET1K_V2",
    ):
        load("resnet50", "IMAGENET1K_V3")
    with pytest.raises(BadNetwork, match="give --checkpoint"):
        load("resnet10", "IMAGENET1K_V1")


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
    """Makes `state` the published file of those weights: its hash in its name, as torchvision does
    it."""
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
        load(ARCH, "IMAGENET1K_V1")
    for part in (
        "IMAGENET1K_V1 of shufflenet_v2_x0_5 could not be fetched",
        f"fetch {url} by hand",
        str(file),
    ):
        assert part in str(refusal.value)
    assert not file.exists()


def test_a_file_in_the_published_ones_place_is_checked(state, hub):
    hub.mkdir(parents=True)
    path = save(state, hub / ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    with pytest.raises(
        BadNetwork,
        match=r"is not the file that torchvision publishes .*sha256.*; move it away",
    ) as refusal:
        load(ARCH, "IMAGENET1K_V1")
    assert str(path) in str(refusal.value)


def test_published_weights_by_name_and_as_a_checkpoint_are_the_same(
    network, state, hub, monkeypatch
):
    path = publish(ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1, state, hub, monkeypatch)
    by_name = load(ARCH, "IMAGENET1K_V1")
    as_file = load(ARCH, checkpoint=path)
    activations, _ = entering(network, "fc", inputs())
    for loaded in (by_name, as_file):
        with torch.inference_mode():
            torch.testing.assert_close(loaded.body(inputs()), activations, rtol=1e-5, atol=1e-5)
        assert loaded.info.weights == "IMAGENET1K_V1"
        assert loaded.preprocessing == by_name.preprocessing
        assert loaded.preprocessing == Preprocessing()
    assert by_name.info.sha256 == as_file.info.sha256


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
    for meta in (
        {},
        {"_metrics": {"ImageNet-Real": {"acc@1": 80.0}}},
        {"_metrics": {"ImageNet-1K": {}}},
    ):
        weights = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
        monkeypatch.setattr(weights.value, "meta", meta)
        assert networks.published_top1(ARCH, weights.name) is None


def test_any_other_checkpoint_says_nothing_of_its_preprocessing(checkpoint):
    assert load(ARCH, checkpoint=checkpoint).preprocessing is None


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_the_input_scaling_that_a_state_dict_does_not_hold(arch, hub, monkeypatch, tmp_path):
    """Published weights take inputs in another scaling; of others nothing is known, and said."""
    weights = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    theirs = make_network(arch, side=96, init_weights=False, aux_logits=False)
    path = publish(weights, theirs.state_dict(), hub, monkeypatch)
    published = load(arch, "IMAGENET1K_V1")
    theirs.transform_input = True
    activations, _ = entering(theirs, "fc", inputs())
    with torch.inference_mode():
        torch.testing.assert_close(published.body(inputs()), activations, rtol=1e-4, atol=1e-4)
    assert load(arch, checkpoint=path).body.transform_input is True
    own = save({**theirs.state_dict(), "fc.bias": torch.ones(1000)}, tmp_path / "own.pth")
    other = load(arch, checkpoint=own)
    assert other.body.transform_input is False
    assert any("--arch-arg transform_input=True" in remark for remark in other.remarks)
    spec = NetworkSpec(arch, checkpoint=own, arguments={"transform_input": True})
    asked = networks.load(spec)
    assert asked.body.transform_input is True
    assert not any("transform_input" in remark for remark in asked.remarks)
    assert asked.info.settings == {"transform_input": "True"}


# resize to 256 and 232 bilinear, and 256 bicubic
@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("mobilenet_v2", MobileNet_V2_Weights.IMAGENET1K_V1),
        ("mobilenet_v2", MobileNet_V2_Weights.IMAGENET1K_V2),
        ("efficientnet_b0", EfficientNet_B0_Weights.IMAGENET1K_V1),
    ],
)
def test_load_and_normalise_are_the_weights_own_transforms(
    arch, weights, hub, monkeypatch, tmp_path
):
    theirs = make_network(arch)
    publish(weights, theirs.state_dict(), hub, monkeypatch)
    loaded = load(arch, weights.name)
    preprocessing = loaded.preprocessing
    normalise = normaliser(preprocessing, torch.device("cpu"))
    for i, size in enumerate([(500, 375), (240, 333), (224, 224)]):
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.png")
        pixels = images.load(tmp_path / "a.png", preprocessing)
        found = normalise(torch.from_numpy(pixels[None].copy()))[0]
        torch.testing.assert_close(
            found, weights.transforms()(Image.fromarray(noise)), rtol=0, atol=1e-6
        )


# ---- networks of the user's own, and timm's ----

OWN = """
import torch
from torch import nn
from torch.nn.functional import normalize


class Net(nn.Module):
    def __init__(self, num_classes=5, bias=True):
        super().__init__()
        self.fc = nn.Linear(16, num_classes, bias=bias)  # before the body, on purpose
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.aux = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.body(x))


class Two(Net):
    def forward(self, x):
        z = self.body(x)
        return self.fc(z), self.aux(z)


class Output:
    def __init__(self, logits):
        self.logits = logits


class Named(Net):
    def forward(self, x):
        self.aux(self.body(x))
        return Output(self.fc(self.body(x)))


class Cosine(Net):
    def forward(self, x):
        return self.fc(7 * normalize(self.body(x) + 0.1))


class Scaled(Net):
    def forward(self, x):
        return 3 * self.fc(self.body(x))


class Average(Net):
    def forward(self, x):
        z = self.body(x)
        return (self.fc(z) + self.aux(z)) / 2


class Functional(Net):
    def forward(self, x):
        return nn.functional.linear(self.body(x), self.fc.weight, self.fc.bias)

class Images(Net):
    def forward(self, x):
        return x


def broken():
    raise KeyError("mine")


def nothing():
    return 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own in the current folder; own(name): a network of it and its file."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(kind: str, **arguments: Any) -> tuple[NetworkSpec, nn.Module]:
        torch.manual_seed(3)
        network = getattr(importlib.import_module(name), kind)(**arguments).eval()
        path = save(network.state_dict(), tmp_path / "own.pth")
        return NetworkSpec(f"{name}:{kind}", checkpoint=path, arguments=arguments), network

    make.module = name
    return make


@pytest.mark.parametrize("kind", ["Net", "Two", "Named"])
@pytest.mark.parametrize("arguments", [{}, {"num_classes": 3}, {"bias": False}], ids=str)
def test_networks_of_ones_own_are_served(own, kind, arguments):
    spec, network = own(kind, **arguments)
    loaded = networks.load(spec)
    x = inputs(3, 32)
    with torch.inference_mode():
        output = network(x)
        output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        found = loaded.body(x) @ loaded.weight.T + loaded.bias
        torch.testing.assert_close(loaded.body(x), network.body(x))
    torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
    assert loaded.info.channels == 16


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Cosine", "scales its features to the length 7 before its layer 'fc'"),
        ("Scaled", "does not end in a linear layer.* are made of 'fc'"),
        ("Average", "does not end in a linear layer.* are made of 'fc' and 'aux'"),
        ("Functional", "its layer 'fc' is never called"),
        ("Images", r"must return logits \(images, classes\)"),
    ],
)
def test_what_is_no_body_and_linear_head_is_refused(own, kind, message):
    with pytest.raises(BadNetwork, match=message):
        networks.load(own(kind)[0])


def test_a_named_head_whose_output_is_changed_afterwards_is_refused(own):
    """Its logits are 3 W z + 3 b, those of the layer with its own input 3 W z + b."""
    with pytest.raises(BadNetwork, match="does more than its linear layer 'fc'"):
        networks.load(dataclasses.replace(own("Scaled")[0], head="fc"))


def test_another_head_can_be_named(own):
    spec, _ = own("Two")
    with pytest.raises(BadNetwork, match="does more than its linear layer 'aux'"):
        networks.load(dataclasses.replace(spec, head="aux"))
    with pytest.raises(BadNetwork, match="has no linear layer 'nowhere'; it has: fc, aux"):
        networks.load(dataclasses.replace(spec, head="nowhere"))


def test_builders_that_cannot_be_used(own):
    own("Net")
    for function, message in {
        "nothing": "must return a torch.nn.Module, got int",
        "Nett": "has no function 'Nett' .did you mean Net",
    }.items():
        with pytest.raises(BadNetwork, match=message):
            networks.load(NetworkSpec(f"{own.module}:{function}"))
    with pytest.raises(BadNetwork, match="there is no module 'no_such_module'"):
        networks.load(NetworkSpec("no_such_module:net"))
    with pytest.raises(KeyError, match="mine"):  # its traceback is the user's
        networks.load(NetworkSpec(f"{own.module}:broken"))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_negative_activations_get_a_remark(share):
    last = nn.ReLU() if share == 0 else nn.Identity()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 8), last, nn.Linear(8, 4)).eval()
    remarks = split(network, "mine", (3, 8, 8)).remarks
    assert any("made for activations behind a ReLU" in remark for remark in remarks) == bool(share)


TIMM = [
    "resnet10t",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mobilenetv3_small_050",
    "regnetx_002",
]


@pytest.mark.parametrize("name", TIMM)
def test_timms_networks_with_their_own_preprocessing(name, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=6).eval()
    nn.init.normal_(network.get_classifier().weight, std=0.1)
    path = save(network.state_dict(), tmp_path / "timm.pth")
    loaded = load(f"timm:{name}", checkpoint=path)
    config = timm.data.resolve_model_data_config(network)
    side = config["input_size"][-1]
    assert loaded.preprocessing.crop == side
    assert loaded.preprocessing.resize == int(side / config["crop_pct"])
    assert loaded.preprocessing.mean == tuple(config["mean"])
    x = inputs(2, side)
    with torch.inference_mode():
        found, wanted = loaded.body(x) @ loaded.weight.T + loaded.bias, network(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_timms_names_and_missing_weights(monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(BadNetwork, match=r"timm .* has no network 'resnet51'.*did you mean"):
        load("timm:resnet51")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadNetwork, match=r"pip install 'lhact\[timm\]'"):
        load("timm:resnet10t")


def test_features_that_have_one_length_by_chance_are_not_refused():
    """Thousands of channels of noise, as of an untrained densenet161."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("mix", torch.randn(192, 4096, generator=generator) / 1e4 + 2e-6)
            self.fc = nn.Linear(4096, 3)

        def forward(self, images):
            return self.fc((1 + images.flatten(1) @ self.mix).relu())

    network = Wide().eval()
    noise = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    lengths = torch.linalg.vector_norm(1 + noise.flatten(1) @ network.mix, dim=1)
    assert (lengths / lengths.mean() - 1).abs().max() < 1e-4
    assert split(network, "wide", (3, 8, 8)).name == "fc"


@pytest.mark.parametrize("pooled", ["before", "behind"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_one_by_one_convolution_is_a_linear_head(pooled, bias):
    torch.manual_seed(0)
    head, pool = nn.Conv2d(8, 5, 1, bias=bias), nn.AdaptiveAvgPool2d(1)
    last = [pool, head] if pooled == "before" else [head, pool]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *last, nn.Flatten()).eval()
    parts = split(network, "mine", (3, 12, 12))
    x = inputs(3, 12)
    with torch.inference_mode():
        z = network[:2](x).mean((2, 3))
        torch.testing.assert_close(parts.body(x), z)
        torch.testing.assert_close(parts.head(z), network(x))
    assert parts.head.weight.tolist() == head.weight[:, :, 0, 0].tolist()
    assert (parts.head.bias is None) is not bias


def test_a_convolution_that_sees_more_than_one_pixel_is_no_head():
    network = nn.Sequential(nn.Conv2d(3, 5, 12), nn.Flatten()).eval()
    with pytest.raises(BadNetwork, match="its logits come from a convolution"):
        split(network, "mine", (3, 12, 12))


@pytest.mark.parametrize(
    "name",
    [
        "dla46_c",  # ends in a 1 x 1 convolution
        "vit_tiny_patch16_384",  # takes images of 384 pixels alone
        "eva02_tiny_patch14_224",  # has no head unless it is asked for one
    ],
)
def test_timms_networks_that_differ_from_most(name, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=6).eval()
    nn.init.normal_(network.get_classifier().weight, std=0.1)
    path = save(network.state_dict(), tmp_path / "timm.pth")
    loaded = load(f"timm:{name}", checkpoint=path)
    x = inputs(2, loaded.preprocessing.crop)
    with torch.inference_mode():
        z = network.forward_head(network.forward_features(x), pre_logits=True)
        torch.testing.assert_close(loaded.body(x), z, rtol=1e-5, atol=1e-5)
        found = z @ loaded.weight.T + loaded.bias
        torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-5)
    assert loaded.info.classes == 6


def test_timms_image_size_is_the_builders_argument(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=6, img_size=96).eval()
    path = save(network.state_dict(), tmp_path / "timm.pth")
    loaded = networks.load(
        NetworkSpec("timm:test_vit", checkpoint=path, arguments={"img_size": 96})
    )
    assert loaded.preprocessing.crop == 96


def test_load_network_takes_the_size_of_the_images(tmp_path, monkeypatch):
    (tmp_path / "of_one_size.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    layers = nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.ReLU(), nn.Linear(4, 3)\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert networks.load_network("of_one_size:build", input_size=8).info.channels == 4
    with pytest.raises(BadNetwork, match=r"does not run on images of shape \(3, 224, 224\)"):
        networks.load_network("of_one_size:build")


def test_timms_squash_is_torchvisions_resize_to_a_square(tmp_path):
    timm = pytest.importorskip("timm")
    overlay = {"pretrained_cfg_overlay": {"crop_mode": "squash", "crop_pct": 0.9}}
    network = timm.create_model("test_resnet", **overlay).eval()
    path = save(network.state_dict(), tmp_path / "timm.pth")
    spec = NetworkSpec("timm:test_resnet", checkpoint=path, arguments=overlay)
    preprocessing = networks.load(spec).preprocessing
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    normalise = normaliser(preprocessing, torch.device("cpu"))
    for size in ((300, 200), (120, 190)):
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.png")
        pixels = images.load(tmp_path / "a.png", preprocessing)
        found = normalise(torch.from_numpy(pixels[None].copy()))[0]
        torch.testing.assert_close(found, transform(Image.fromarray(noise)), rtol=0, atol=1e-6)


def test_squash_is_recorded_where_it_is_so_alone():
    for squash in (True, False):
        recorded = Preprocessing(squash=squash).to_json()
        assert recorded.get("squash", False) is squash
        assert ("squash" in recorded) is squash
        assert RecordedPreprocessing.from_json(recorded) == RecordedPreprocessing(
            **vars(Preprocessing(squash=squash))
        )
    with pytest.raises(BadRecord, match="a squash that is not usable: 1"):
        RecordedPreprocessing.from_json({"squash": 1})


def test_squash_on_the_command_line():
    given = ["--benchmark", "cifar10", "--arch", "resnet10", "--checkpoint", "x"]
    for flags, wanted in {("--squash",): True, ("--no-squash",): False, (): None}.items():
        assert get_activation.parse_job([*given, *flags])[0].preprocessing.squash is wanted


@pytest.mark.parametrize("arch", ["resnet18", "timm:test_resnet", "own"])
def test_arguments_that_a_builder_does_not_take_are_named(arch, own, tmp_path):
    if arch == "own":
        own("Net")
        arch = f"{own.module}:Net"
    elif arch.startswith("timm:"):
        pytest.importorskip("timm")
    path = save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    spec = NetworkSpec(arch, checkpoint=path, arguments={"nonsense": 3})
    with pytest.raises(
        BadNetwork, match=f"{arch} cannot be built with --arch-arg nonsense=3: .*nonsense"
    ):
        networks.load(spec)


class Returned(nn.Module):
    """Two linear layers; what it returns of their outputs is given."""

    def __init__(self, returned: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.fc, self.returned = nn.Linear(3 * 64, 8), nn.Linear(8, 4), returned

    def forward(self, images: Tensor) -> Any:
        features = self.body(images.flatten(1)).relu()
        return self.returned(features, self.fc(features))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda z, logits: logits.softmax(1), "sum to 1; give it without the softmax at its end"),
        (lambda z, logits: logits.log_softmax(1), "sum to 1; give it without the softmax"),
        (lambda z, logits: (z, logits), "layer 'fc' in place 1, .*; return the logits first"),
        (lambda z, logits: logits / 2, "not the output of one linear layer, but are made of 'fc'"),
    ],
)
def test_says_why_logits_are_not_those_of_a_linear_layer(returned, message):
    with pytest.raises(BadNetwork, match=message):
        split(Returned(returned).eval(), "mine", (3, 8, 8))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_network_that_asks_for_the_version_of_its_weights(kind, tmp_path):
    """MNASNet refuses a state dict without one, which prefixes and other formats lose."""
    network = make_network("mnasnet0_5", num_classes=7)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    path = tmp_path / f"own.{kind}"
    if kind == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = load("mnasnet0_5", checkpoint=path)
    x = inputs(2, 64)
    with torch.inference_mode():
        found = loaded.body(x) @ loaded.weight.T + loaded.bias
        torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-5)


def test_names_that_a_part_of_the_network_had_once():
    """torchvision publishes ViTs with `mlp.linear_1`, which its code has called `mlp.0` since."""
    size = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2}
    vit = torchvision.models.VisionTransformer(**size, hidden_dim=8, mlp_dim=16)
    other = torchvision.models.VisionTransformer(**size, hidden_dim=8, mlp_dim=16)
    wanted = vit.state_dict()
    renamed = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in wanted.items()
    }
    assert renamed.keys() != wanted.keys()
    checkpoints.fill(other, checkpoints.StateDict(Path("old.pth"), renamed), "vit")
    for key, value in other.state_dict().items():
        assert torch.equal(value, wanted[key]), key
