"""What a user hands to a detector: networks however they are wrapped, loaders, images, arguments;
what is not right is one clear ValueError."""

import numpy as np
import pytest
import torch
from helpers import small_classifier
from torch import nn
from torch.nn import functional

from lhact import Detector

SIDE = 8
IMAGES = torch.zeros(2, 3, SIDE, SIDE)


def make(method: str = "lhact", network: nn.Module | None = None, **given) -> Detector:
    return Detector(network or small_classifier(), method, **{"input_size": SIDE, **given})


@pytest.fixture(scope="module")
def known() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images with the classes that the network takes them for."""
    images = torch.randn(80, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return [(part, small_classifier()(part).argmax(dim=1)) for part in images.split(32)]


def test_learns_the_size_of_images_anew_with_each_fit():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)).eval()
    detector = make("energy", network)
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
    assert make("energy").fit_features(rows).offset_ > 0


class Headed(nn.Module):
    """The network with what `forward` makes of its body and its head, which is there twice."""

    def __init__(self, forward):
        super().__init__()
        self.body, self.fc, self.made = small_classifier()[:6], small_classifier()[6], forward
        self.classifier = self.fc
        self.eval()

    def forward(self, images):
        return self.made(self, self.body(images))


class UnitLinear(nn.Linear):
    def forward(self, features):
        return functional.linear(features, functional.normalize(self.weight), self.bias)


def with_head(wrap) -> nn.Module:
    network = small_classifier()
    network[6] = wrap(network[6])
    return network.eval()


def damaged() -> nn.Module:
    network = small_classifier()
    nn.init.constant_(network[0].weight, float("nan"))
    return network


def hooked() -> nn.Module:
    network = small_classifier()
    network[6].register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.DataParallel(small_classifier()).eval(),
        lambda: nn.Sequential(small_classifier(), nn.Identity()).eval(),
        lambda: with_head(nn.utils.weight_norm),
        lambda: with_head(nn.utils.parametrizations.weight_norm),
        lambda: with_head(nn.utils.parametrizations.spectral_norm),
        lambda: torch.fx.symbolic_trace(small_classifier()).eval(),
        lambda: nn.Sequential(torch.jit.script(small_classifier()[:6]), nn.Linear(16, 5)).eval(),
        lambda: Headed(lambda net, features: net.classifier(features)),
        lambda: Headed(lambda net, features: (net.fc(features), features)),
        lambda: small_classifier().bfloat16(),
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
    logits, scores = make("energy", network).fit(learnt)(images)
    torch.testing.assert_close(logits.double(), wanted, **size)
    torch.testing.assert_close(scores.double(), wanted.logsumexp(dim=1), **size)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Headed(lambda net, z: functional.dropout(net.fc(z), 0.5)), "other logits each"),
        (lambda: Headed(lambda net, z: net.fc(functional.dropout(z, 0.5))), "other logits each"),
        (lambda: Headed(lambda net, z: net.fc(z) + net.fc(z.flip(1))), "not the output of one"),
        (lambda: Headed(lambda net, z, mask: net.fc(z)), "required positional argument: 'mask'"),
        (lambda: Headed(lambda net, z: {"scores": net.fc(z)}), "must return logits .* got dict"),
        (lambda: with_head(lambda _: UnitLinear(16, 5)), "does more than its linear layer"),
        (hooked, "does more than its linear layer"),
        (lambda: torch.jit.script(small_classifier()), "compiled already"),
        (lambda: torch.compile(small_classifier()), "compiled already"),
        (lambda: 3, "must be a torch.nn.Module, got int"),
        (lambda: small_classifier().train(), "training mode"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).eval(), "does not run on images of"),
        (lambda: small_classifier().to("meta"), "on the meta device"),
        (damaged, "NaN or infinite logits"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_refuses_networks_whose_scores_would_not_be_their_own(build, message):
    with pytest.raises(ValueError, match=message):
        make(network=build())


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
    return make().fit(known)


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
            make().fit([images])


@pytest.mark.parametrize(
    ("method", "call", "message"),
    [
        ("lhact", lambda made: made.predict(IMAGES), "call fit with ID images first"),
        ("lhact", lambda made: made.offset_, "call fit with ID images first"),
        ("lhact", lambda made: made.fit([]), "the loader is empty"),
        ("lhact", lambda made: made.fit([IMAGES[:0]]), "the loader is empty"),
        ("lhact", lambda made: made.fit(3), "give batches of ID images, .* got int"),
        ("lhact", lambda made: made.fit(None), "give batches of ID images, .* got NoneType"),
        ("lhact", lambda made: made.fit(["a"]), "channels, height, width. tensors, got str"),
        ("lhact", lambda made: made.fit([[]]), "tensors, got list; give batches, one image as im"),
        ("lhact", lambda made: made.fit([IMAGES.to("meta")]), "images must be a dense tensor"),
        ("lhact", lambda made: made.fit([IMAGES[:, :1]]), "not run on images of shape .1, 8, 8. "),
        ("lhact", lambda made: made.fit(IMAGES, keep=95), "between 0 and 1, such as 0.95, got 95"),
        ("lhact", lambda made: made.fit(IMAGES, keep="a"), "keep must be a share .* got 'a'"),
        ("mahalanobis", lambda made: made.fit([IMAGES]), "mahalanobis: needs labels"),
        ("she", lambda made: made.fit([(IMAGES, [1, 2]), IMAGES]), "she: needs labels"),
        ("she", lambda made: made.fit([(IMAGES, [1, 9])]), "from 0 to 4, got 1 to 9"),
        ("she", lambda made: made.fit([(IMAGES, torch.eye(2, 5))]), r"2 class .* got \(2, 5\)"),
        ("react+dice", lambda made: made.fit(IMAGES[:1]), "percentiles .* with 0 of the 1 images"),
        ("lhact", lambda made: made.fit_features(np.ones((4, 7))), "enters the head, got .4, 7."),
        ("lhact", lambda made: made.fit_features(3), r"must be \(n, 16\), .* got \(\)"),
        ("lhact", lambda made: made.fit_features([[1, 2], [3]]), r"array \(n, 16\), got list"),
        (
            "lhact",
            lambda made: made.fit_features(IMAGES.to_sparse()),
            "activations must be a dense",
        ),
        ("lhact", lambda made: made.fit_features(np.full((4, 16), np.nan)), "must be finite"),
        ("odin", lambda made: made.fit_features(np.ones((4, 16))), "odin scores perturbed images"),
        ("she", lambda made: made.fit_features(np.ones((4, 16))), "she: needs labels"),
        ("she", lambda made: made.fit_features(np.ones((4, 16)), np.ones(3)), "4 class numbers"),
        ("she", lambda made: made.fit_features(np.ones((2, 16)), "x"), "numbers, got str"),
        ("she", lambda made: made.fit_features(np.ones((2, 16)), [0.0, 1.0]), "got .2,. torch.fl"),
        ("she", lambda made: made.fit_features(np.ones((2, 16)), [True, False]), "torch.bool"),
    ],
)
def test_refuses_what_cannot_be_learnt_from(method, call, message):
    made = make(method)
    with pytest.raises(ValueError, match=message):
        call(made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "table6"}, "which stands for several"),
        ({"method": "lhakt"}, "did you mean 'lhact'"),
        ({"method": 3}, "method must be a name such as 'lhact' .* got 3"),
        ({"settings": {"lhact.x": 1}}, "no parameter 'x'"),
        ({"settings": [1]}, "settings must be numbers by name"),
        ({"head": "fc"}, "no linear layer 'fc'; it has: 4, 6"),
        ({"head": ["fc"]}, "head must be the name of a linear layer"),
        ({"input_size": 8.0}, "input_size must be a number of pixels .* got 8.0"),
        ({"input_size": (8, 8)}, r"input_size must be .* got \(8, 8\)"),
    ],
)
def test_wrong_arguments_are_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_says_that_the_threshold_needs_more_images():
    with pytest.raises(ValueError, match="with 4 of the 5 images"):
        make("knn", settings={"knn.k": 5}).fit_features(torch.rand(5, 16))


def test_refuses_a_network_that_is_in_training_mode_again(known):
    detector = make().fit(known)
    detector.body[1].train()
    for call in (detector.predict, detector.fit):
        with pytest.raises(ValueError, match="training mode"):
            call(IMAGES)


def test_a_wrapper_leaves_no_trace_in_the_file(known, tmp_path):
    detector = make(network=nn.DataParallel(small_classifier()).eval()).fit(known)
    detector.save(tmp_path / "wrapped")
    assert Detector.load(tmp_path / "wrapped", small_classifier()).offset_ == detector.offset_


def test_says_which_size_of_images_is_missing():
    detector = make().fit_features(torch.ones(4, 16).tolist())
    assert detector.shape is None
    with pytest.raises(ValueError, match=r"does not run on images of shape \(1, 8, 8\)"):
        detector.predict(IMAGES[:, :1])
