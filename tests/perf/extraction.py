"""How fast images become activations on this machine: loader, network and both together, each as a
share of its limit.

    python tests/perf/extraction.py [--device auto] [--precisions fp32] [--arch resnet50]
                                    [--batch-size 64] [--workers N] [--images FOLDER] [--count N]
                                    [--compile]

loader    images.load on one core, against decoding alone by torchvision.io, and against
          torchvision's own pipeline on PIL images (Resize, CenterCrop, PILToTensor; and the whole
          of the weights' transforms, which normalise as well).
network   extract's own forward, against what the device can do: on a CPU the faster of torch's and
          oneDNN's float32 matrix products for the network's operations, beside the network as
          torchvision runs it (eager), on a GPU the replay of the same network as one CUDA graph in
          the same precision. --compile measures what torch.compile makes of it with frozen weights,
          in the same way, beside it; on a CPU it needs a C++ compiler.
whole     extract.extract from files to rows, against the slower of the loader alone (all workers)
          and the network alone.

Without --images it makes photographs of some 500 x 375 pixels of the two that scikit-learn ships.
The weights are random: the speed does not depend on them. Prints a table and, last, one line of
JSON. On a GPU give --precisions fp32 tf32 bf16 fp16.

--count is at least 512 images and four batches for each worker by default: with fewer, some workers
would have nothing to read.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from bench import medians, options, packed_products, report
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from lhact.devices import PRECISIONS, gpu_arithmetic, pick_device
from lhact.extraction import extract, networks
from lhact.extraction.extract import default_workers
from lhact.extraction.head import split
from lhact.extraction.image_sets import Images
from lhact.extraction.sources import open_folder
from lhact.records import NetworkInfo, Preprocessing

# Photographs that are made; more are links to them, since writing takes longer than reading.
DISTINCT = 512


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Adds the options of the scripts that extract. Those that depend on the device may be None:
    see `complete`."""
    add = parser.add_argument
    add("--workers", type=int)
    add("--images", type=Path)
    add("--count", type=int)
    return parser.parse_args(argv)


def complete(args: argparse.Namespace, device: torch.device) -> None:
    """Sets what is not given: a worker for each core, and images enough for every worker to have
    four batches to read."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs, streams and events are made on the current one
    if args.workers is None:
        args.workers = default_workers(device)
    if args.count is None:
        args.count = max(512, 4 * args.workers * args.batch_size)


@contextmanager
def photographs(args: argparse.Namespace) -> Iterator[Images]:
    """The first `count` of those of the user, or as many that are made."""
    with tempfile.TemporaryDirectory() as place:
        folder = args.images or Path(place, "photographs")
        if args.images is None:
            write_photographs(folder, args.count)
        listed = open_folder(folder)
        yield listed.select(range(min(args.count, len(listed.paths))))


def write_photographs(folder: Path, count: int) -> None:
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    draw = np.random.default_rng(0)
    folder.mkdir()
    for number in range(min(count, DISTINCT)):
        width, height = [(500, 375), (500, 333), (375, 500)][number % 3]
        left, top = draw.integers(0, 100), draw.integers(0, 60)
        box = (left, top, left + 500, top + 360)
        photographs[number % 2].crop(box).resize((width, height)).save(
            folder / f"{number:06}.jpg", quality=92
        )
    for number in range(DISTINCT, count):
        os.link(folder / f"{number % DISTINCT:06}.jpg", folder / f"{number:06}.jpg")


def fastest(*works: Callable[[], object]) -> Callable[[], object]:
    """The one that takes least time on the CPU, by the medians."""
    taken = medians(*works)
    return works[taken.index(min(taken))]


def loader(listed: Images) -> dict[str, float]:
    """On one core, images a second."""
    files = [str(Path(listed.origin, path)) for path in listed.paths[:128]]
    pixels = listed.pixels(Preprocessing())
    theirs = Compose([Resize(256), CenterCrop(224), PILToTensor()])
    transforms = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()

    def opened(file: str) -> Image.Image:
        with Image.open(file) as image:
            return image.convert("RGB")

    def decode(file: str) -> torch.Tensor:
        return decode_jpeg(torch.from_numpy(np.fromfile(file, np.uint8)), mode=ImageReadMode.RGB)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = medians(
        lambda: [decode(file) for file in files],
        lambda: [theirs(opened(file)) for file in files],
        lambda: [transforms(opened(file)) for file in files],
        lambda: [pixels[i] for i in range(len(files))],
    )
    torch.set_num_threads(threads)
    limit, uint8, whole, ours = (len(files) / t for t in times)
    assert all(
        np.array_equal(pixels[i][0], theirs(opened(file)).permute(1, 2, 0).numpy())
        for i, file in enumerate(files)
    )
    return {
        "decode_per_s": limit,
        "torchvision_uint8_per_s": uint8,
        "torchvision_transforms_per_s": whole,
        "load_per_s": ours,
        "load_share_of_decode": ours / limit,
        "load_vs_torchvision_uint8": ours / uint8,
        "load_vs_torchvision_transforms": ours / whole,
    }


# Of 2048 x 2048 float32 matrices, which fit a CPU's caches.
PRODUCT_OPERATIONS = 2 * 2048**3


def matrix_products(count: int) -> Callable[[], None]:
    a, b, c = (torch.rand(2048, 2048) for _ in range(3))

    def run() -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)

    return run


def graph_replays(forward: Callable, inputs: torch.Tensor, count: int) -> Callable[[], None]:
    """Replays of one captured forward pass. inputs: not zeros, which draw less power and let the
    GPU run faster."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(inputs)

    def run() -> None:
        for _ in range(count):
            graph.replay()

    return run


def compiled(
    body: torch.nn.Module, images_at_once: int, device: torch.device, precision: str
) -> Callable:
    """The body by torch.compile with frozen weights, for one thread, as `extract` calls it: under
    autocast too, for whose state torch.compile would else compile again, without freezing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    function = torch.compile(body, dynamic=False)
    crop = Preprocessing().crop
    batch = torch.zeros(images_at_once, 3, crop, crop, device=device).contiguous(
        memory_format=torch.channels_last
    )
    with torch._inductor.config.patch(freezing=True), torch.no_grad(), autocast(device, precision):
        function(batch)
    torch.set_num_threads(threads)
    return function


def autocast(device: torch.device, precision: str, **settings: bool) -> torch.autocast:
    kind = PRECISIONS[precision].autocast
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None, **settings)


class Ready:
    """The same pixels for every image: a loader that costs nothing."""

    def __init__(self, count: int, crop: int) -> None:
        self.count = count
        self.pixels = np.random.default_rng(0).integers(0, 256, (crop, crop, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[np.ndarray, bytes]:
        return self.pixels, bytes(16)


def random_network(arch: str, crop: int) -> tuple[torch.nn.Module, networks.Network]:
    """(the whole module, the same as `extract` takes it), with random weights, on the CPU."""
    whole = networks.build(arch).eval().requires_grad_(False)
    parts = split(whole, arch, (3, crop, crop))
    info = NetworkInfo(arch, None, None, None, *parts.head.weight.shape)
    return whole, networks.Network(parts.body, parts.head.weight, parts.head.bias, None, info)


def network(
    args: argparse.Namespace, device: torch.device, precision: str, listed: Images
) -> dict[str, float]:
    preprocessing = Preprocessing()
    whole, loaded_network = random_network(args.arch, preprocessing.crop)
    body = loaded_network.body
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        body(torch.zeros(1, 3, preprocessing.crop, preprocessing.crop))
    whole.to(device)
    start = time.perf_counter()
    forward, _ = extract.forward_on(device, loaded_network, preprocessing, precision)
    normalise = extract.normaliser(preprocessing, device)
    prepared = time.perf_counter() - start
    count = len(listed.paths)
    rows = extract.batches(count, args.batch_size)

    def extracted(forward: Callable, pixels: object, workers: int) -> None:
        compute = extract.computation(forward, normalise, None, device, precision)
        for _ in extract.extract(compute, pixels, rows, device, workers):
            pass

    def loaded() -> None:
        pixels = listed.pixels(preprocessing)
        for _ in DataLoader(
            pixels, batch_sampler=rows, num_workers=args.workers, collate_fn=extract._collate
        ):
            pass

    ready = Ready(count, preprocessing.crop)
    if device.type == "cuda":
        images = np.stack([ready[row][0] for row in range(args.batch_size)])
        batch = normalise(torch.from_numpy(images).to(device))

        def run(inputs: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), autocast(device, precision, cache_enabled=False):
                return forward(inputs)

        limit, limit_images = graph_replays(run, batch, len(rows)), args.batch_size * len(rows)
    else:
        # As long as the network takes, since a short product is done before the processor slows
        # down.
        products = math.ceil(count * counter.get_total_flops() / PRODUCT_OPERATIONS)
        pieces = torch.rand(2048, 2048).split(512)
        limit = fastest(
            matrix_products(products), packed_products(torch.rand(2048, 2048), pieces * products)
        )
        limit_images = products * PRODUCT_OPERATIONS / counter.get_total_flops()
    candidates = {"network": forward}
    pixels = torch.from_numpy(np.stack([ready[row][0] for row in range(args.batch_size)]))

    def eager() -> None:
        """The ordinary way: the network as torchvision builds it, a batch at a time."""
        with torch.no_grad(), autocast(device, precision):
            for _ in rows:
                whole(normalise(pixels.to(device)))

    if args.compile:
        at_once = args.batch_size if device.type == "cuda" else extract.IMAGES_PER_THREAD
        candidates["compiled"] = compiled(body, at_once, device, precision)
    bare, usual, load, both, *alone = medians(
        limit,
        eager,
        loaded,
        lambda: extracted(forward, listed.pixels(preprocessing), args.workers),
        *(partial(extracted, candidate, ready, 0) for candidate in candidates.values()),
        device=device,
    )
    limit_per_s = limit_images / bare
    figures = {
        "precision": precision,
        "gflop_per_image": counter.get_total_flops() / 1e9,
        "prepare_s": prepared,
        "network_limit_per_s": limit_per_s,
        "eager_per_s": args.batch_size * len(rows) / usual,
    }
    for name, taken in zip(candidates, alone, strict=True):
        figures[f"{name}_per_s"] = count / taken
        figures[f"{name}_share_of_limit"] = count / taken / limit_per_s
    return figures | {
        "loader_per_s": count / load,
        "whole_per_s": count / both,
        "whole_share_of_slower": max(alone[0], load) / both,
    }


def main() -> None:
    parser = options(__doc__, device="auto", arch="resnet50", batch_size=64)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--compile", action="store_true")
    args = parse_arguments(parser)
    device = pick_device(args.device)
    complete(args, device)
    is_gpu, cpu = device.type == "cuda", torch.backends.cpu
    hardware = torch.cuda.get_device_name(device) if is_gpu else cpu.get_cpu_capability()
    figures: dict[str, object] = {"device": f"{device.type}: {hardware}", "cores": os.cpu_count()}
    figures |= {"threads": torch.get_num_threads(), "workers": args.workers}
    with photographs(args) as listed:
        figures |= {"batch_size": args.batch_size, "images": len(listed.paths), **loader(listed)}
        runs = []
        for precision in args.precisions:
            with gpu_arithmetic(PRECISIONS[precision].tf32):
                runs.append(network(args, device, precision, listed))
    report(figures, *runs)


if __name__ == "__main__":
    main()
