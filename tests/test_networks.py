"""lhact.extraction.networks against torchvision's and timm's own networks, transforms and forward
passes."""

import functools
import hashlib
import importlib
import re
import sys
import urllib.error
import warnings
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
from torch.nn.functional import linear, normalize
from torchvision.models import (
    EfficientNet_B0_Weights,
    MobileNet_V2_Weights,
    ShuffleNet_V2_X0_5_Weights,
    VisionTransformer,
    ViT_B_16_Weights,
)

import get_activation
from lhact.extraction import checkpoints, images, networks
from lhact.extraction.extract import normaliser
from lhact.extraction.head import find, split
from lhact.extraction.networks import NetworkSpec
from lhact.extraction.weights import BadNetwork, state_dict_sha256
from lhact.records import BadRecord, Preprocessing, RecordedPreprocessing

# architecture -> how many values enter its last linear layer, read off torchvision's source
HEADS = {"resnet18": 512, "mobilenet_v2": 1280, "densenet121": 1024, "efficientnet_b0": 1280}
HEADS |= {"convnext_tiny": 768, "vit_b_16": 768}
SIDE = 96  # pixels of an image where no weights say it; enough for every network but ViTs


def load(
    arch: str,
    weights: str | None = None,
    checkpoint: Path | None = None,
    crop: int | None = None,
    **arguments: object,
) -> networks.Network:
    return networks.load(NetworkSpec(arch, weights, checkpoint, arguments), crop, SIDE)


def inputs(count: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def last_linear(network: nn.Module) -> str:
    return [key for key, m in network.named_modules() if isinstance(m, nn.Linear)][-1]


def entering(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What torchvision's own forward hands to the last linear layer, and its output."""
    seen, head = [], network.get_submodule(last_linear(network))
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        logits = network(x)
    hook.remove()
    return seen[0], logits


def agree(loaded: networks.Network, x: Tensor, logits: Tensor, z: Tensor | None = None) -> None:
    """Its body gives these activations, where they are known, and its head these logits of them."""
    with torch.inference_mode():
        found = loaded.body(x)
    assert found.shape == (len(x), loaded.info.channels)
    if z is not None:
        torch.testing.assert_close(found, z, rtol=1e-5, atol=1e-5)
    made = found @ loaded.weight.T + loaded.bias
    torch.testing.assert_close(made, logits, rtol=1e-5, atol=1e-5)


def agree_with(loaded: networks.Network, network: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        agree(loaded, x, network(x))


def same_pixels(preprocessing: Preprocessing, transform: Callable, folder: Path) -> None:
    """Images that are loaded and normalised as it says are those of the library's transform."""
    normalise = normaliser(preprocessing, torch.device("cpu"))
    for i, size in enumerate([(300, 200), (120, 190), (333, 240), (224, 224)]):
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "a.png")
        pixels = images.load(folder / "a.png", preprocessing)
        found = normalise(torch.from_numpy(pixels[None].copy()))[0]
        torch.testing.assert_close(found, transform(Image.fromarray(noise)), rtol=0, atol=1e-6)


def refused(message: str, *given: Any, **arguments: Any) -> str:
    """load(...) is refused in one line."""
    with pytest.raises(BadNetwork, match=message) as refusal:
        load(*given, **arguments)
    assert str(refusal.value).isprintable()
    return str(refusal.value)


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


# ---- the body and the head are torchvision's network ----


@pytest.mark.parametrize("arch", HEADS)
def test_body_and_head_are_torchvisions_network(arch, tmp_path):
    channels, side = HEADS[arch], 224 if arch == "vit_b_16" else SIDE
    theirs = make_network(arch)
    x = inputs(1 if arch == "vit_b_16" else 2, side)
    activations, logits = entering(theirs.eval(), x)
    theirs.train()  # what is saved does not know its mode
    loaded = load(arch, checkpoint=save(theirs.state_dict(), tmp_path / "state.pth"), crop=side)
    assert not any(module.training for module in loaded.body.modules())
    assert not any(parameter.requires_grad for parameter in loaded.body.parameters())
    agree(loaded, x, logits, activations)
    assert (loaded.weight.shape, loaded.bias.shape) == ((1000, channels), (1000,))
    assert loaded.weight.dtype == loaded.bias.dtype == torch.float32
    info = loaded.info
    assert (info.arch, info.classes, info.channels) == (arch, 1000, channels)
    assert (info.weights, info.checkpoint) == (None, "state.pth")
    assert loaded.preprocessing is None, "nothing says it"
    assert logits.std() > 0.1, "a network that says the same of everything proves nothing"


@pytest.mark.parametrize("classes", [2, 10])
def test_the_number_of_classes_is_read_off_the_head(classes, tmp_path):
    theirs = make_network(ARCH, num_classes=classes)
    loaded = load(ARCH, checkpoint=save(theirs.state_dict(), tmp_path / "state.pth"))
    assert loaded.info.classes == classes
    agree_with(loaded, theirs, inputs())


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


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[dict], Any]] = {
    "module": lambda state: behind("module.", state),
    "state_dict": lambda state: {"state_dict": state, "epoch": 7, "optimizer": {"lr": 0.1}},
    "state_dict-module": lambda state: {"state_dict": behind("module.", state)},
    "model-module": lambda state: {"epoch": 1, "model": behind("module.", state)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts_are_the_same_network(wrapping, state, checkpoint, tmp_path):
    plain = load(ARCH, checkpoint=checkpoint)
    loaded = load(ARCH, checkpoint=save(WRAPPINGS[wrapping](state), tmp_path / "wrapped.pth"))
    assert loaded.info.sha256 == plain.info.sha256 == state_dict_sha256(state)
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
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(3)
    sha256 = state_dict_sha256({"a": a, "b": b})
    assert sha256 == state_dict_sha256({"b": b, "a": torch.stack([a, a], 1)[:, 0]})
    changed = [torch.tensor([1.0, 2.0000002]), a.double(), a[None], a.view(torch.int32)]
    others = [*({"a": value, "b": b} for value in changed), {"a": a, "c": b}, {"a": a}]
    assert len({sha256, *map(state_dict_sha256, others)}) == len(others) + 1


# ---- strictness: each refusal names the file and what is wrong ----

# the tensor that is another one, what it is (None: it is not there), what is said of it
TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor] | None, str]] = {
    "missing": ("conv1.0.weight", None, r"not a checkpoint of \w+: missing conv1\.0\.weight"),
    "missing-buffer": ("conv1.1.running_mean", None, r"missing conv1\.1\.running_mean"),
    "unexpected": ("extra.weight", lambda _: torch.zeros(3), r"unexpected extra\.weight"),
    "no-head": ("fc.weight", None, r"missing fc\.weight"),
    "nan": ("fc.bias", lambda bias: bias * torch.nan, r"fc\.bias holds NaN or infinite.*damaged"),
    "infinite-buffer": ("conv1.1.running_var", lambda _: torch.full((24,), torch.inf), "holds NaN"),
    "beyond-single": ("fc.bias", lambda bias: bias.double() + 1e300, "fc.bias holds NaN or inf"),
    "integers": (
        "fc.bias",
        lambda bias: bias.int(),
        "fc.bias is torch.int32, wanted torch.float32",
    ),
    "key-a-number": (7, lambda _: torch.zeros(1), "holds no state dict .*: 7 is no plain tensor"),
    "key-with-newline": ("a\nb\x1b[31m", lambda _: torch.zeros(1), r"unexpected a\\nb\\x1b\[31m"),
    "key-without-end": ("a" * 10_000, lambda _: torch.zeros(1), r"unexpected a{120}\.\.\."),
}
NO_PLAIN_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda bias: bias.to_sparse(),
    "meta": lambda bias: bias.to("meta"),
    "complex": lambda bias: bias.to(torch.complex64) * 1j,
    "expanded": lambda bias: torch.zeros(1).expand(10**12),
    "8-bit-floats": lambda bias: bias.to(torch.float8_e4m3fn),
    "bits": lambda bias: bias.to(torch.int8).view(torch.bits8),
    "truth-values": lambda bias: bias > 0,
    "quantised": lambda bias: torch.quantize_per_tensor(bias, 0.1, 0, torch.qint8),
    "nested": lambda bias: torch.nested.nested_tensor([torch.zeros(9)]),
}
TENSORS |= {
    kind: ("fc.bias", change, r"holds no state dict .*fc\.bias is no plain tensor")
    for kind, change in NO_PLAIN_TENSORS.items()
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(kind, state, tmp_path):
    key, change, message = TENSORS[kind]
    changed = {name: value for name, value in state.items() if name != key}
    if change is not None:
        changed[key] = change(state.get(key))
    path = save(changed, tmp_path / "odd.pth")
    assert str(path) in refused(message, ARCH, checkpoint=path)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("conv1.0.weight", (24, 3, 5, 5)),
        ("fc.weight", (10**6, 1)),
        ("fc.weight", (1000,)),
        ("fc.weight", (0, 1024)),
        ("fc.bias", (10,)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_name(key, shape, state, tmp_path):
    path = save({**state, key: torch.zeros(shape)}, tmp_path / "odd.pth")
    message = f"{key} is {shape}, wanted {tuple(state[key].shape)}; give the --arch"
    refused(re.escape(message), ARCH, checkpoint=path)


def test_a_checkpoint_of_another_architecture_is_refused_in_one_short_line(checkpoint):
    message = r"small\.pth is not a checkpoint of resnet18: missing .* and \d+ more"
    assert len(refused(message, "resnet18", checkpoint=checkpoint)) < 600


UNSAFE = "not a checkpoint that can be loaded safely"
NO_STATE = "holds no state dict"
# what makes the file at the path, from a state dict; what is said of it
FILES: dict[str, tuple[Callable[[Path, dict], object], str]] = {
    "missing": (lambda path, _: None, "no checkpoint at .*; give the file of a state dict"),
    "folder": (lambda path, _: path.mkdir(), UNSAFE),
    "empty": (lambda path, _: path.touch(), UNSAFE),
    "text": (lambda path, _: path.write_text("not a checkpoint\n" * 30), UNSAFE),
    "image": (lambda path, _: Image.new("RGB", (9, 9)).save(path, "JPEG"), UNSAFE),
    "npz": (lambda path, _: np.savez(path.open("wb"), a=np.zeros(3)), UNSAFE),
    "cut": (lambda path, s: path.write_bytes(save(s, path).read_bytes()[:100_000]), UNSAFE),
    "whole-network": (lambda path, _: save(nn.Linear(2, 2), path), UNSAFE),
    "torchscript": (
        lambda path, _: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        "TorchScript",
    ),
    "with-an-optimizer": (
        lambda path, s: save({"model": s, "o": torch.optim.SGD([s["fc.bias"]], 0.1)}, path),
        "torch.optim.sgd",
    ),
    "tensor": (lambda path, _: save(torch.zeros(3), path), NO_STATE),
    "list": (lambda path, _: save([torch.zeros(3)], path), NO_STATE),
    "none": (lambda path, _: save(None, path), NO_STATE),
    "empty-dict": (lambda path, _: save({}, path), NO_STATE),
    "empty-state_dict": (lambda path, _: save({"state_dict": {}}, path), NO_STATE),
    "number": (lambda path, _: save({"fc.weight": 3.0}, path), NO_STATE),
    "optimizer-beside": (lambda path, s: save({**s, "optimizer": {"lr": 1}}, path), NO_STATE),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(kind, state, tmp_path):
    make, message = FILES[kind]
    path = tmp_path / "odd.pth"
    make(path, state)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert str(path) in refused(message, ARCH, checkpoint=path)
    assert not said, "a library's own warning beside the line"


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_heads_for_training_alone_make_no_difference(arch, tmp_path):
    """torchvision saves googlenet and inception_v3 with them; a network trained or exported without
    has none."""
    theirs = torchvision.models.get_model(arch, weights=None, init_weights=False)
    whole = theirs.state_dict()
    bare = {key: value for key, value in whole.items() if not key.lower().startswith("aux")}
    assert len(bare) < len(whole)
    activations, logits = entering(theirs.eval(), inputs(1))
    for number, part in enumerate((whole, bare)):
        loaded = load(arch, checkpoint=save(part, tmp_path / f"{number}.pth"))
        assert loaded.info.sha256 == state_dict_sha256(bare)
        agree(loaded, inputs(1), logits, activations)


def test_a_name_that_begins_as_a_training_head_is_refused_elsewhere(state, tmp_path):
    path = save({**state, "aux1.conv": state["fc.bias"]}, tmp_path / "a")
    refused(r"unexpected aux1\.conv", ARCH, checkpoint=path)


def test_a_weight_that_changed_on_disk_is_refused(state, tmp_path):
    path = save(state, tmp_path / "changed.pth")
    content = bytearray(path.read_bytes())
    place = content.index(state["fc.bias"].numpy().tobytes())
    content[place + 2] ^= 1  # a little in the value, nothing anywhere else
    path.write_bytes(content)
    message = r"changed\.pth .* damaged: the checksum of its member changed/data/\d+ is another"
    refused(message, ARCH, checkpoint=path)


# ---- names ----


def test_an_unknown_architecture_lists_the_known_ones():
    known = set(
        re.split("[:,;] ", refused("unknown architecture 'resnet51' .*; known", "resnet51"))
    )
    assert {"resnet50", "vit_b_16", "convnext_tiny", "densenet121"} <= known
    others = {"raft_large", "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn", "quantized_resnet50"}
    assert known.isdisjoint(others)


@pytest.mark.parametrize("arch", ["squeezenet1_0", "squeezenet1_1"])
def test_a_network_without_a_linear_layer_is_refused(arch, tmp_path):
    path = save(networks.build(arch).state_dict(), tmp_path / "squeeze.pth")
    refused(f"{arch} does not end in a linear layer", arch, checkpoint=path)


FAMILIES = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet10 resnet18 "
    "resnext50_32x4d shufflenet_v2_x0_5 swin_t swin_v2_t vgg11 vit_b_16 wide_resnet50_2"
)


@pytest.mark.parametrize("arch", FAMILIES.split())
def test_every_family_ends_in_its_head(arch):
    network = networks.build(arch, classes=7).eval()
    side = 224 if arch in ("vit_b_16", "maxvit_t") else SIDE
    found = find(network, arch, (3, side, side))
    assert found.name == last_linear(network)
    assert found.logits.shape == (2, 7)


def test_weights_or_a_checkpoint_not_both_not_neither(checkpoint):
    message = "either the name of published weights or a checkpoint"
    refused(message, ARCH, "IMAGENET1K_V1", checkpoint)
    refused("needs weights: give --weights NAME or --checkpoint FILE", ARCH)


def test_unknown_weights_list_the_known_ones():
    message = "resnet50 has no weights 'IMAGENET1K_V3'; known: IMAGENET1K_V1, IMAGENET1K_V2"
    refused(message, "resnet50", "IMAGENET1K_V3")
    refused("give --checkpoint", "resnet10", "IMAGENET1K_V1")


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
    line = refused(
        "IMAGENET1K_V1 of shufflenet_v2_x0_5 could not be .*connection", ARCH, "IMAGENET1K_V1"
    )
    assert f"fetch {url} by hand" in line
    assert str(file) in line
    assert not file.exists()


def test_a_file_in_the_published_ones_place_is_checked(state, hub):
    hub.mkdir(parents=True)
    path = save(state, hub / ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    message = "is not the file that torchvision publishes .*sha256.*; move it away"
    assert str(path) in refused(message, ARCH, "IMAGENET1K_V1")


def test_published_weights_by_name_and_as_a_checkpoint_are_the_same(
    network, state, hub, monkeypatch
):
    path = publish(ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1, state, hub, monkeypatch)
    activations, logits = entering(network, inputs())
    for loaded in (load(ARCH, "IMAGENET1K_V1"), load(ARCH, checkpoint=path)):
        agree(loaded, inputs(), logits, activations)
        assert loaded.info.weights == "IMAGENET1K_V1"
        assert loaded.info.sha256 == state_dict_sha256(state)
        assert loaded.preprocessing == Preprocessing()


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


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_the_input_scaling_that_a_state_dict_does_not_hold(arch, hub, monkeypatch, tmp_path):
    """Published weights take inputs in another scaling; of others nothing is known, and said."""
    weights = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    theirs = make_network(arch, side=96, init_weights=False, aux_logits=False)
    path = publish(weights, theirs.state_dict(), hub, monkeypatch)
    theirs.transform_input = True
    x = inputs(1)
    agree_with(load(arch, "IMAGENET1K_V1", crop=SIDE), theirs, x)
    assert load(arch, checkpoint=path, crop=SIDE).body.transform_input is True
    own = save({**theirs.state_dict(), "fc.bias": torch.ones(1000)}, tmp_path / "own.pth")
    other = load(arch, checkpoint=own)
    assert other.body.transform_input is False
    assert any("--arch-arg transform_input=True" in remark for remark in other.remarks)
    asked = load(arch, checkpoint=own, transform_input=True)
    assert asked.body.transform_input is True
    assert not any("transform_input" in remark for remark in asked.remarks)
    assert asked.info.settings == {"transform_input": "True"}


# resize to 256 and 232 bilinear, and 256 bicubic
@pytest.mark.parametrize(
    "weights",
    [
        MobileNet_V2_Weights.IMAGENET1K_V1,
        MobileNet_V2_Weights.IMAGENET1K_V2,
        EfficientNet_B0_Weights.IMAGENET1K_V1,
    ],
)
def test_load_and_normalise_are_the_weights_own_transforms(weights, tmp_path):
    same_pixels(networks._preset(weights), weights.transforms(), tmp_path)


def test_a_vit_takes_images_of_the_size_of_its_published_weights(hub, monkeypatch):
    """It has a position for each patch, so these weights, for images of 384 pixels, have more."""
    weights = ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    size = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}

    @functools.wraps(torchvision.models.vit_b_16)
    def small(weights: None = None, **settings: int) -> nn.Module:
        return VisionTransformer(**size, **{"image_size": 224, **settings})

    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "vit_b_16", small)
    theirs = small(image_size=384).eval()
    nn.init.normal_(theirs.heads.head.weight)
    path = publish(weights, theirs.state_dict(), hub, monkeypatch)
    for loaded in (load("vit_b_16", weights.name), load("vit_b_16", checkpoint=path)):
        assert loaded.preprocessing.crop == 384
        agree_with(loaded, theirs, inputs(2, 384))


# ---- networks of the user's own ----

OWN = """
from types import SimpleNamespace

from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=5, bias=True, returns="tensor"):
        super().__init__()
        self.fc = nn.Linear(16, num_classes, bias=bias)  # before the body, on purpose
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.aux = nn.Linear(16, num_classes)
        self.returns = returns

    def forward(self, x):
        z = self.body(x)
        logits, other = self.fc(z), self.aux(z)
        if self.returns == "tuple":
            return logits, other
        return SimpleNamespace(logits=logits) if self.returns == "object" else logits


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4), nn.ReLU(), nn.Linear(4, 3))


def broken():
    raise KeyError("mine")


def nothing():
    return 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The name of a module of the user's own, which lies in the current folder."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("returns", ["tensor", "tuple", "object"])
@pytest.mark.parametrize("arguments", [{}, {"num_classes": 3}, {"bias": False}], ids=str)
def test_networks_of_ones_own_are_served(own, returns, arguments, tmp_path):
    torch.manual_seed(3)
    arguments = {**arguments, "returns": returns}
    network = importlib.import_module(own).Net(**arguments).eval()
    path = save(network.state_dict(), tmp_path / "own.pth")
    loaded = load(f"{own}:Net", checkpoint=path, **arguments)
    x = inputs(3, 32)
    with torch.inference_mode():
        z = network.body(x)
        agree(loaded, x, network.fc(z), z)
    assert loaded.info.channels == 16
    assert loaded.bias.any() == ("bias" not in arguments)


def test_builders_that_cannot_be_used(own):
    refused("must return a torch.nn.Module, got int", f"{own}:nothing")
    refused("has no function 'Nett' .did you mean Net", f"{own}:Nett")
    refused("there is no module 'no_such_module'", "no_such_module:net")
    with pytest.raises(KeyError, match="mine"):  # its traceback is the user's
        load(f"{own}:broken")


def test_load_network_takes_the_size_of_the_images(own):
    assert networks.load_network(f"{own}:flat", input_size=8).info.channels == 4
    refused(r"does not run on images of shape \(3, 96, 96\)", f"{own}:flat")


@pytest.mark.parametrize("arch", ["resnet18", "resnet10", "timm:test_resnet", "own"])
def test_arguments_that_a_builder_does_not_take_are_named(arch, own, tmp_path):
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    arch = f"{own}:Net" if arch == "own" else arch
    path = save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    message = f"{arch} cannot be built with --arch-arg nonsense=3: .*nonsense"
    refused(message, arch, checkpoint=path, nonsense=3)


# ---- body and head ----

SHAPE = (3, 8, 8)


class Headed(nn.Module):
    """Two linear layers behind the features z; steps(network, z) is what it returns."""

    def __init__(self, steps: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.fc, self.aux = nn.Linear(3 * 64, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.steps = steps
        self.eval()

    def forward(self, images: Tensor) -> Any:
        return self.steps(self, self.body(images.flatten(1)).relu())


@pytest.mark.parametrize(
    ("steps", "head", "message"),
    [
        (lambda m, z: m.fc(7 * normalize(z + 0.1)), None, "to the length 7 before its layer 'fc'"),
        (lambda m, z: 3 * m.fc(z), None, "not the output of one linear layer, .* made of 'fc';"),
        (lambda m, z: m.fc(z) + m.aux(z), None, "are made of 'fc' and 'aux'"),
        (lambda m, z: linear(z, m.fc.weight, m.fc.bias), None, "its layer 'fc' is never called"),
        (lambda m, z: z[:, :, None, None], None, r"must return logits \(images, classes\)"),
        (lambda m, z: m.fc(z).softmax(1), None, "sum to 1; give it without the softmax at its end"),
        (lambda m, z: m.fc(z).log_softmax(1), None, "sum to 1; give it without the softmax"),
        (lambda m, z: (z, m.fc(z)), None, "layer 'fc' in place 1, .*; return the logits first"),
        # Its logits are 3 W z + 3 b, those of the layer with its own input 3 W z + b.
        (lambda m, z: 3 * m.fc(z), "fc", "does more than its linear layer 'fc'"),
        (lambda m, z: (m.fc(z), m.aux(z)), "aux", "does more than its linear layer 'aux'"),
        (lambda m, z: m.fc(z), "no", "has no linear layer 'no'; it has: body, fc, aux"),
    ],
)
def test_what_is_no_body_and_linear_head_is_refused(steps, head, message):
    with pytest.raises(BadNetwork, match=message):
        split(Headed(steps), "mine", SHAPE, head)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_negative_activations_get_a_remark(share):
    last = nn.ReLU() if share == 0 else nn.Identity()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 8), last, nn.Linear(8, 4)).eval()
    remarks = split(network, "mine", SHAPE).remarks
    assert any("made for activations behind a ReLU" in remark for remark in remarks) == bool(share)


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
    noise = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    lengths = torch.linalg.vector_norm(1 + noise.flatten(1) @ network.mix, dim=1)
    assert (lengths / lengths.mean() - 1).abs().max() < 1e-4
    assert split(network, "wide", SHAPE).name == "fc"


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


# ---- timm's networks ----

TIMM = [
    "resnet10t",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mobilenetv3_small_050",
    "regnetx_002",
    "dla46_c",  # ends in a 1 x 1 convolution
    "vit_tiny_patch16_384",  # takes images of 384 pixels alone
    "eva02_tiny_patch14_224",  # has no head unless it is asked for one
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
        z = network.forward_head(network.forward_features(x), pre_logits=True)
        agree(loaded, x, network(x), z)
    assert loaded.info.classes == 6


def test_timms_names_and_missing_weights(monkeypatch):
    pytest.importorskip("timm")
    refused(r"timm .* has no network 'resnet51'.*did you mean", "timm:resnet51")
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(r"pip install 'lhact\[timm\]'", "timm:resnet10t")


def test_timms_image_size_is_the_builders_argument(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=6, img_size=96)
    path = save(network.state_dict(), tmp_path / "timm.pth")
    assert load("timm:test_vit", checkpoint=path, img_size=96).preprocessing.crop == 96


def test_timms_squash_is_torchvisions_resize_to_a_square(tmp_path):
    timm = pytest.importorskip("timm")
    overlay = {"pretrained_cfg_overlay": {"crop_mode": "squash", "crop_pct": 0.9}}
    network = timm.create_model("test_resnet", **overlay).eval()
    path = save(network.state_dict(), tmp_path / "timm.pth")
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    loaded = load("timm:test_resnet", checkpoint=path, **overlay)
    same_pixels(loaded.preprocessing, transform, tmp_path)


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


# ---- files of other versions ----


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_network_that_asks_for_the_version_of_its_weights(kind, tmp_path):
    """MNASNet refuses a state dict without one, which prefixes and other formats lose."""
    network = make_network("mnasnet0_5", num_classes=7)
    path = tmp_path / f"own.{kind}"
    (save if kind == "pth" else save_file)(behind("module.", network.state_dict()), path)
    agree_with(load("mnasnet0_5", checkpoint=path), network, inputs(2, 64))


def test_names_that_a_part_of_the_network_had_once():
    """torchvision publishes ViTs with `mlp.linear_1`, which its code has called `mlp.0` since."""
    size = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2}
    vit, other = (VisionTransformer(**size, hidden_dim=8, mlp_dim=16) for _ in range(2))
    wanted = vit.state_dict()
    renamed = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in wanted.items()
    }
    assert renamed.keys() != wanted.keys()
    checkpoints.fill(other, checkpoints.StateDict(Path("old.pth"), renamed), "vit")
    for key, value in other.state_dict().items():
        assert torch.equal(value, wanted[key]), key
