"""What a user hands to a detector: networks however they are wrapped, loaders, images, arguments;
what is not right is one clear ValueError."""

import numpy as np
import pytest
import torch
from helpers import make_network
from torch import nn
from torch.nn import functional

from lhact import Detector, load_network

SIDE = 8


def own_network() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


@pytest.fixture(scope="module")
def known() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images with the classes that the network takes them for."""
    images = torch.randn(80, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return [(part, own_network()(part).argmax(dim=1)) for part in images.split(32)]


def refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_learns_the_size_of_images_anew_with_each_fit():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)).eval()
    detector = Detector(network, "energy", input_size=SIDE)
    small, large = torch.rand(9, 3, 8, 8), torch.rand(9, 3, 9, 9)
    with pytest.raises(ValueError, match=r"must be \(3, 9, 9\) as .* got \(3, 8, 8\)"):
        detector.fit([large, small])
    with pytest.raises(ValueError, match=r"must be \(3, 8, 8\) as .* got \(3, 9, 9\)"):
        detector.fit([small], held_out=[large])
    assert detector.fit([small]).shape == (3, 8, 8)
    assert detector.fit([large]).shape == (3, 9, 9)


@pytest.mark.filterwarnings("error")
def test_reads_activations_that_cannot_be_written_to(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).random((20, 16), np.float32))
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert Detector(own_network(), "energy", input_size=SIDE).fit_features(rows).offset_ > 0


class Headed(nn.Module):
    """The network with what `forward` makes of its body and its head, which is there twice."""

    def __init__(self, forward):
        super().__init__()
        self.body, self.fc, self.made = own_network()[:6], own_network()[6], forward
        self.classifier = self.fc
        self.eval()

    def forward(self, images):
        return self.made(self, self.body(images))


class UnitLinear(nn.Linear):
    def forward(self, features):
        return functional.linear(features, functional.normalize(self.weight), self.bias)


def with_head(wrap) -> nn.Module:
    network = own_network()
    network[6] = wrap(network[6])
    return network.eval()


def damaged(network: nn.Module) -> nn.Module:
    nn.init.constant_(network[0].weight, float("nan"))
    return network


def hooked(network: nn.Module) -> nn.Module:
    network[6].register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.DataParallel(own_network()).eval(),
        lambda: nn.Sequential(own_network(), nn.Identity()).eval(),
        lambda: with_head(nn.utils.weight_norm),
        lambda: with_head(nn.utils.parametrizations.weight_norm),
        lambda: with_head(nn.utils.parametrizations.spectral_norm),
        lambda: torch.fx.symbolic_trace(own_network()).eval(),
        lambda: nn.Sequential(torch.jit.script(own_network()[:6]), own_network()[6]).eval(),
        lambda: Headed(lambda net, features: net.classifier(features)),
        lambda: Headed(lambda net, features: (net.fc(features), features)),
        lambda: own_network().bfloat16(),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*torch.jit.*")
def test_takes_networks_however_they_are_wrapped(known, build):
    network = build()
    dtype = next(network.parameters()).dtype
    learnt, images = (known[number][0].to(dtype) for number in (0, 1))
    wanted = network(images)
    wanted = (wanted if isinstance(wanted, torch.Tensor) else wanted[0]).detach().double()
    size = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    logits, scores = Detector(network, "energy", input_size=SIDE).fit(learnt)(images)
    torch.testing.assert_close(logits.double(), wanted, **size)
    torch.testing.assert_close(scores.double(), wanted.logsumexp(dim=1), **size)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Headed(lambda net, z: functional.dropout(net.fc(z), 0.5)), "other logits each"),
        (lambda: Headed(lambda net, z: net.fc(functional.dropout(z, 0.5))), "other logits each"),
        (lambda: Headed(lambda net, z: net.fc(z) + net.fc(z.flip(1))), "not the output of one"),
        (lambda: Headed(lambda net, z: functional.linear(z, net.fc.weight)), "does not end in a l"),
        (lambda: Headed(lambda net, z, mask: net.fc(z)), "required positional argument: 'mask'"),
        (lambda: Headed(lambda net, z: {"scores": net.fc(z)}), "must return logits .* got dict"),
        (lambda: with_head(lambda _: UnitLinear(16, 5)), "does more than its linear layer"),
        (lambda: hooked(own_network()), "does more than its linear layer"),
        (lambda: torch.jit.script(own_network()), "compiled already"),
        (lambda: own_network().to("meta"), "on the meta device"),
        (lambda: damaged(own_network()), "NaN or infinite logits"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_refuses_networks_whose_scores_would_not_be_their_own(build, message):
    refused(message, lambda: Detector(build(), input_size=SIDE))


class Deep(nn.Sequential):
    """Says the same of all noise of one contrast, as deep networks without training nearly do."""

    def forward(self, images):
        level = images.std(dim=(1, 2, 3), keepdim=True)
        level = (10 * level).round() / 10
        steps = torch.linspace(0, 1, 8) + 0.1 * (images[:, 0, 0, :1] > 0) * torch.tensor(
            [1, -1] * 4
        )
        return super().forward(level.flatten(1) * nn.functional.normalize(steps, dim=1))


def test_tells_noise_from_features_of_one_length():
    network = Deep(nn.Identity(), nn.Linear(8, 3)).eval()
    assert Detector(network, input_size=SIDE).info.channels == 8


class Grey(nn.Sequential):
    """Takes images of one channel and returns what transformers' classifiers return."""

    def forward(self, images):
        return {"logits": super().forward(images)}


def test_takes_other_shapes_and_batches_by_name():
    network = Grey(nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).eval()
    images = torch.rand(40, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    batches = [{"pixel_values": images, "labels": labels}]
    detector = Detector(network, "mahalanobis", input_size=(1, 4, 6)).fit(batches)
    assert detector.score_samples(images).shape == (40,)
    assert detector.score_samples(images[:0]).shape == (0,)
    with pytest.raises(ValueError, match="must have 'images' or 'pixel_values', got \\['x'\\]"):
        detector.fit([{"x": images}])


@pytest.fixture(scope="module")
def plain(known):
    return Detector(own_network(), input_size=SIDE).fit(known)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 9, 9), r"must be \(3, 8, 8\) as those .* got \(3, 9, 9\)"),
        (torch.zeros(3, 8, 8), r"must be \(n, channels, height, width\) tensors, got \(3, 8, 8\)"),
        (np.zeros((1, 3, 8, 8)), "tensors, got ndarray"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point, .* got torch.uint8"),
        (torch.full((1, 3, 8, 8), 255.0), "values up to 255, as of pixels from 0 to 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "must be finite"),
    ],
)
def test_refuses_images_that_the_network_was_not_made_for(plain, images, message):
    for call in (plain.predict, plain.score_samples, plain.decision_function):
        with pytest.raises(ValueError, match=message):
            call(images)
    if not isinstance(images, np.ndarray) and images.shape[1:] != (3, 9, 9):
        with pytest.raises(ValueError, match=message):
            Detector(own_network(), input_size=SIDE).fit([images])


def test_refuses_what_cannot_be_learnt_from(known):
    images = [images for images, _ in known]
    make = lambda method="lhact", **given: Detector(own_network(), method, input_size=SIDE, **given)  # noqa: E731
    refused("call fit with ID images first", lambda: make().predict(images[0]))
    refused("call fit with ID images first", lambda: make().offset_)
    refused("the loader is empty", lambda: make().fit([]))
    refused("the loader is empty", lambda: make().fit([images[0][:0]]))
    refused("mahalanobis: needs labels", lambda: make("mahalanobis").fit(images))
    refused("she: needs labels", lambda: make("she").fit([known[0], images[1]]))
    refused(
        r"labels must be 32 class numbers, got \(32, 5\)",
        lambda: make("she").fit([(images[0], functional.one_hot(known[0][1], 5))]),
    )
    refused(
        "labels must be from 0 to 4, got 9",
        lambda: make("she").fit([(images[0], known[0][1] * 0 + 9)]),
    )
    refused("between 0 and 1, such as 0.95, got 95", lambda: make().fit(images, keep=95))
    refused(
        r"\(n, 16\), what enters the head, got \(4, 7\)",
        lambda: make().fit_features(np.ones((4, 7))),
    )
    refused("activations must be finite", lambda: make().fit_features(np.full((4, 16), np.nan)))
    refused(
        "labels must be 4 class numbers",
        lambda: make("she").fit_features(np.ones((4, 16)), np.ones(3)),
    )
    refused("odin scores perturbed images", lambda: make("odin").fit_features(np.ones((4, 16))))
    refused("which stands for several", lambda: make("table6"))
    refused("did you mean 'lhact'", lambda: make("lhakt"))
    refused("no parameter 'x'", lambda: make(settings={"lhact.x": 1}))
    refused(
        "percentiles need at least one activation, got none, with 0 of the 1 images",
        lambda: make("react+dice").fit(images[0][:1]),
    )
    refused(
        "with 4 of the 5 images",
        lambda: make("knn", settings={"knn.k": 5}).fit_features(torch.rand(5, 16)),
    )


def test_refuses_networks_that_cannot_be_split(known):
    refused("must be a torch.nn.Module, got int", lambda: Detector(3))
    refused("training mode", lambda: Detector(own_network().train()))
    refused(
        "does not end in a linear layer",
        lambda: Detector(own_network()[:4].eval(), input_size=SIDE),
    )
    refused(
        "does not run on images of shape",
        lambda: Detector(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).eval()),
    )
    refused("no linear layer 'fc'; it has: 4, 6", lambda: Detector(own_network(), head="fc"))
    refused("compiled already", lambda: Detector(torch.compile(own_network())))
    detector = Detector(own_network(), input_size=SIDE).fit(known)
    detector.body[1].train()
    refused("training mode", lambda: detector.predict(torch.zeros(1, 3, SIDE, SIDE)))


IMAGES = torch.zeros(2, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: made().fit(3), "give batches of ID images, .* got int"),
        (lambda made: made().fit(None), "give batches of ID images, .* got NoneType"),
        (
            lambda made: made().fit(["a"]),
            r"must be \(n, channels, height, width\) tensors, got str",
        ),
        (lambda made: made().fit([[]]), "tensors, got list; give batches, one image as image"),
        (lambda made: made().fit([IMAGES.to("meta")]), "images must be a dense tensor"),
        (lambda made: made().fit([IMAGES[:, :1]]), "does not run on images of shape .1, 8, 8. "),
        (lambda made: made().fit(IMAGES, keep=1.5), "keep must be a share .* got 1.5"),
        (lambda made: made().fit(IMAGES, keep="a"), "keep must be a share .* got 'a'"),
        (lambda made: made().fit_features(3), r"must be \(n, 16\), .* got \(\)"),
        (lambda made: made().fit_features([[1, 2], [3]]), r"tensor or array \(n, 16\), got list"),
        (lambda made: made().fit_features(IMAGES.to_sparse()), "activations must be a dense"),
        (lambda made: made("she").fit_features(torch.ones(2, 16), "x"), "numbers, got str"),
        (lambda made: made("she").fit_features(torch.ones(2, 16)), "she: needs labels"),
        (lambda made: made("she").fit_features(torch.ones(2, 16), [0.0, 1.0]), "got .2,. torch.fl"),
        (lambda made: made("she").fit_features(torch.ones(2, 16), [True, False]), "torch.bool"),
        (lambda made: made(3), "method must be a name such as 'lhact' .* got 3"),
        (lambda made: made(settings=[1]), "settings must be numbers by name"),
        (lambda made: made(head=["fc"]), "head must be the name of a linear layer"),
        (lambda made: made(input_size=8.0), "input_size must be a number of pixels .* got 8.0"),
        (lambda made: made(input_size=(8, 8)), r"input_size must be .* got \(8, 8\)"),
    ],
)
def test_wrong_arguments_are_one_clear_error(call, message):
    made = lambda *given, **named: Detector(  # noqa: E731
        own_network(), *given, **{"input_size": SIDE, **named}
    )
    refused(message, lambda: call(made))


def test_a_wrapper_leaves_no_trace_in_the_file(known, tmp_path):
    detector = Detector(nn.DataParallel(own_network()).eval(), input_size=SIDE).fit(known)
    detector.save(tmp_path / "wrapped")
    assert Detector.load(tmp_path / "wrapped", own_network()).offset_ == detector.offset_


def test_says_which_size_of_images_is_missing():
    detector = Detector(own_network(), input_size=SIDE).fit_features(torch.rand(20, 16))
    refused(r"does not run on images of shape \(1, 8, 8\)", lambda: detector.predict(IMAGES[:, :1]))
    listed = Detector(own_network(), input_size=SIDE).fit_features(torch.ones(4, 16).tolist())
    assert listed.shape is None


def test_takes_no_head_beside_what_load_network_found(tmp_path):
    torch.save(make_network("shufflenet_v2_x0_5").state_dict(), tmp_path / "own.pth")
    network = load_network("shufflenet_v2_x0_5", checkpoint=tmp_path / "own.pth")
    refused("give the name of the head to load_network", lambda: Detector(network, head="fc"))
