"""Images in, cached penultimate activations out: of the ID test images, of calibration images and of the OOD sets."""

import argparse
import functools
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

import lhact
from lhact import cache, imagenet, published
from lhact.benchmarks import builtin as benchmarks
from lhact.benchmarks import digits
from lhact.devices import PRECISIONS, gpu_arithmetic, pick_device
from lhact.evaluation import score as evaluate
from lhact.extraction import extract, images, networks
from lhact.extraction.ranks import RankFailed, Ranks, collect, first_before_others, join, on_first, one_voice, share, together

FEWER_WORKERS = "often the machine is out of memory: give fewer --workers"
ODIN = {"temperature": 1000.0, "epsilon": 0.005}


class BadArguments(Exception):
    """Arguments that do not go together, or not with this machine."""


EXPECTED = (
    BadArguments,
    benchmarks.MissingData,
    cache.BadCache,
    extract.ExtractionFailed,
    images.BadImages,
    networks.BadNetwork,
    RankFailed,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--benchmark", choices=benchmarks.BENCHMARKS, default="imagenet", help="which image sets")
    parser.add_argument("--data-root", type=Path, default=Path("datasets"), help="where the benchmark's folders lie")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="where the activations go")
    parser.add_argument("--name", help="the name to cache them under (default: the architecture)")
    network = parser.add_argument_group("network (default: the benchmark's)")
    network.add_argument("--arch", help="a torchvision classification network that ends in a linear layer")
    network.add_argument("--weights", help="torchvision weights by name, such as IMAGENET1K_V1")
    network.add_argument("--checkpoint", type=Path, metavar="FILE", help="a state dict, instead of --weights")
    own = parser.add_argument_group("own images (they replace the benchmark's)")
    own.add_argument("--id-dir", type=Path, metavar="DIR", help="ID test images, flat or in class folders")
    own.add_argument("--calibration-dir", type=Path, metavar="DIR", help="further ID images, for thresholds and statistics")
    own.add_argument("--ood", action="append", default=[], metavar="NAME=DIR", help="an OOD set; repeatable")
    parser.add_argument(
        "--calibration-per-class", default="10", metavar="N|all|0", help="the first N calibration images of each class folder"
    )
    parser.add_argument("--odin", action="store_true", help="also cache the activations of ODIN's perturbed images")
    parser.add_argument("--odin-temperature", type=float, default=ODIN["temperature"], help="divides the logits ODIN perturbs by")
    parser.add_argument("--odin-epsilon", type=float, default=ODIN["epsilon"], help="ODIN's step, in normalised input space")
    parser.add_argument(
        "--gaussian",
        type=int,
        default=0,
        metavar="N",
        help="also cache N images of noise, for eval.py --select-on gaussian",
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=min(16, _cores()), help="processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--overwrite", action="store_true", help="replace what is cached under that name")
    return parser.parse_args(argv)


def _cores() -> int:
    """How many this process may use: a batch system, a container or taskset may allow it fewer than the machine has, and the
    processes that torchrun starts on one machine share them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@one_voice()
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        own_folders = _own_folders(args)
        per_class = _per_class(args.calibration_per_class)
        if per_class == 0 and args.calibration_dir:
            raise BadArguments("--calibration-dir is not read with --calibration-per-class 0; give one of them")
        if per_class not in (10, 0) and args.id_dir and not args.calibration_dir:
            raise BadArguments("--calibration-per-class is about --calibration-dir, which does not come by itself with --id-dir")
        if args.batch_size < 1 or args.workers < 0:
            raise BadArguments("--batch-size must be at least 1 and --workers at least 0")
        if args.gaussian < 0:
            raise BadArguments(f"--gaussian must be at least 0, got {args.gaussian}")
        if args.weights is not None and args.checkpoint:
            raise BadArguments("give --weights or --checkpoint, not both")
        networks.check_names(_arch(args), args.weights)
        if not 0 < args.odin_temperature < math.inf:
            raise BadArguments(f"--odin-temperature must be a number above 0, got {args.odin_temperature}")
        if not 0 <= args.odin_epsilon < math.inf:
            raise BadArguments(f"--odin-epsilon must be a number from 0 on, got {args.odin_epsilon}")
        if not args.odin and (args.odin_temperature, args.odin_epsilon) != (ODIN["temperature"], ODIN["epsilon"]):
            raise BadArguments("--odin-temperature and --odin-epsilon change nothing without --odin; give it too")
        pick_device(args.device)
    except (BadArguments, networks.BadNetwork, ValueError) as error:
        return _fail(error, 2)
    try:
        gpus = args.device != "cpu" and torch.cuda.is_available()
        with join(gpus, lambda error: _expected_message(error, args)) as ranks, warnings.catch_warnings():
            # More workers than cores may well be right: they wait for the disk.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            try:
                _run(args, own_folders, per_class, ranks)
            except Exception as error:
                message = _expected_message(error, args)
                if message is None:
                    raise
                return _fail(message, 1)
    except RankFailed as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it stopped", 130)
    return 0


def _expected_message(error: Exception, args: argparse.Namespace) -> str | None:
    """What to say of an error that the input, the disk or another process can cause; None for any other."""
    # A worker that ends is told of wherever the run then is: by torch's signal handler, or by a connection that breaks.
    if isinstance(error, ConnectionError | EOFError) or (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)):
        return f"a worker process that reads images ended ({_first_line(error)}); {FEWER_WORKERS}"
    if isinstance(error, OSError):
        return f"{error.filename or args.cache_dir}: {error.strerror or error}"
    return str(error) if isinstance(error, EXPECTED) else None


def _run(args: argparse.Namespace, own_folders: dict[str, Path], per_class: int | None, ranks: Ranks) -> None:
    device = together(ranks, lambda: _own_device(args.device, ranks))
    if args.benchmark == "digits":
        on_first(ranks, lambda: digits.prepare(args.data_root, _training_bar))
    folders = on_first(ranks, lambda: _folders(args, own_folders))
    network = first_before_others(ranks, lambda: _load_network(args))
    cache_folder = cache.cache_folder(args.cache_dir, args.benchmark, args.name or network.description["arch"])
    with ExitStack() as held:
        # All that takes no time comes before the images are listed: that takes minutes where they are many.
        on_first(ranks, lambda: held.enter_context(cache.lock(cache_folder)))
        found = on_first(ranks, lambda: _list_images(folders, per_class))
        lists = {name: images.ImageList(Path(folder), paths, sizes) for name, (folder, paths, sizes) in found.items()}
        _extract_all(args, cache_folder, lists, network, device, ranks)


def _own_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank: of the GPUs of a machine, each of its ranks takes its own. Raises BadArguments if there is none."""
    if ranks.size > 1 and name.startswith("cuda:"):
        raise BadArguments(f"--device {name} is one GPU for {ranks.size} processes; give --device cuda, and each takes its own")
    try:
        device = pick_device(f"cuda:{ranks.local}" if name in ("auto", "cuda") and torch.cuda.is_available() else name)
    except ValueError as error:
        raise BadArguments(f"{error}; one process for each GPU: torchrun --nproc-per-node {torch.cuda.device_count()}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _training_bar(epochs: Iterable[int]) -> Iterable[int]:
    return tqdm(epochs, unit="epoch", delay=1, leave=False, desc="training the network of the digits")


def _own_folders(args: argparse.Namespace) -> dict[str, Path]:
    """Image set name -> the folder given for it. Raises BadArguments for a name that is malformed, reserved or given twice."""
    folders = {name: folder for name, folder in (("id", args.id_dir), ("calibration", args.calibration_dir)) if folder}
    for text in args.ood:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise BadArguments(f"--ood must be NAME=DIR, got {text!r}")
        if name in (*folders, "id", "calibration", "average"):
            raise BadArguments(f"--ood {name}: that name is taken; give another")
        folders[name] = Path(folder)
    try:
        for name in (*folders, *([] if args.name is None else [args.name])):
            cache.check_name(name, "a name")
    except cache.BadCache as error:
        raise BadArguments(str(error)) from error
    return folders


def _per_class(text: str) -> int | None:
    """None stands for all. Raises BadArguments for anything but a count or `all`."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise BadArguments(f"--calibration-per-class must be a number, 'all' or 0, got {text!r}")
    return int(text)


def _arch(args: argparse.Namespace) -> str:
    return benchmarks.BENCHMARKS[args.benchmark].arch if args.arch is None else args.arch


def _load_network(args: argparse.Namespace) -> networks.Network:
    benchmark = benchmarks.BENCHMARKS[args.benchmark]
    arch = _arch(args)
    if args.weights or args.checkpoint:
        return networks.load(arch, args.weights, args.checkpoint, benchmark.preprocessing)
    if benchmark.checkpoint and arch == benchmark.arch:
        return networks.load(arch, None, args.data_root / benchmark.checkpoint, benchmark.preprocessing)
    return networks.load(arch, benchmarks.DEFAULT_WEIGHTS)


def _folders(args: argparse.Namespace, own_folders: dict[str, Path]) -> dict[str, str]:
    """Image set name -> its folder."""
    return {name: str(folder) for name, folder in benchmarks.locate(args.benchmark, args.data_root, own_folders).items()}


def _list_images(folders: dict[str, str], per_class: int | None) -> dict[str, tuple[str, list[str], list[int]]]:
    """The folder, paths and sizes of the images of each set; of the calibration set, of the chosen ones."""
    if per_class == 0:
        folders = {name: folder for name, folder in folders.items() if name != "calibration"}
    lists = {}
    for name, folder in folders.items():
        with tqdm(unit="file", delay=1, leave=False, desc=f"listing {name}") as bar:
            lists[name] = images.list_images(folder, bar.update)
    if "calibration" in lists and per_class is not None:
        calibration = lists["calibration"]
        lists["calibration"] = calibration.select(images.first_per_class(calibration.paths, per_class))
    return {name: (str(listed.folder), listed.paths, listed.sizes) for name, listed in lists.items()}


def _metadata(
    args: argparse.Namespace, network: networks.Network, dataset: str, image_list: images.ImageList, device: torch.device
) -> dict[str, Any]:
    """All of a set's .json but its results."""
    classes = network.description["classes"]
    preprocessing = images.Preprocessing(**network.preprocessing)
    return {
        "network": network.description,
        # Lists, as they come back from JSON.
        "preprocessing": {**preprocessing._asdict(), "mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        "precision": args.precision,
        "odin": None,
        "images": len(image_list.paths),
        "channels": network.description["channels"],
        "fingerprint": image_list.fingerprint(),
        "batch_size": args.batch_size,
        "device": _device_name(device),
        "versions": {
            "lhact": lhact.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
        # An OOD image has no right class, whatever its folder is called.
        "labels": images.labels(image_list.paths, classes, imagenet.wnids()) if dataset in ("id", "calibration") else None,
        "paths": image_list.paths,
    }


def _device_name(device: torch.device) -> str:
    """A GPU's model; of a CPU the instructions that torch uses there, such as AVX2: the last bits depend on them."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def _check_cached(folder: Path, wanted: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the wanted sets that are complete already. Raises BadCache for any set there that is of something else."""
    complete = []
    for path in sorted(folder.glob("*.json")):
        found = cache.open_activations(folder, path.stem).metadata
        shared = {key: next(iter(wanted.values()))[key] for key in ("network", "preprocessing", "precision")}
        lines = cache.differences(found, wanted.get(path.stem, shared))
        if lines:
            raise cache.BadCache(
                f"{path.with_suffix('.npy')} is of something else: {'; '.join(lines)}; give --overwrite to replace what is "
                "cached under this name, or another --name"
            )
        if path.stem in wanted:
            complete.append(path.stem)
    return complete


def _extract_all(
    args: argparse.Namespace,
    folder: Path,
    lists: dict[str, images.ImageList],
    network: networks.Network,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """folder: of the cache, which this run holds."""
    wanted = {folder: {dataset: _metadata(args, network, dataset, image_list, device) for dataset, image_list in lists.items()}}
    if args.odin:
        odin = {"temperature": args.odin_temperature, "epsilon": args.odin_epsilon}
        tested = {dataset: metadata for dataset, metadata in wanted[folder].items() if dataset != "calibration"}
        wanted[folder / "odin"] = {dataset: {**metadata, "odin": odin} for dataset, metadata in tested.items()}
    if args.gaussian:
        lists = {**lists, "gaussian": images.gaussian_list(args.gaussian)}
        wanted[folder / "selection"] = {"gaussian": _metadata(args, network, "gaussian", lists["gaussian"], device)}
    precision = PRECISIONS[args.precision]
    with gpu_arithmetic(precision.tf32):
        forward = extract.forward_on(device, network.body, images.Preprocessing(**network.preprocessing).crop, precision.autocast)
        complete = on_first(ranks, lambda: _prepare_cache(folder, wanted, network, args.overwrite))
        for place, sets in wanted.items():
            for dataset, metadata in sets.items():
                label = f"{dataset} (ODIN)" if metadata["odin"] else dataset
                if [str(place), dataset] not in complete:
                    _extract_set(args, place, dataset, label, metadata, lists[dataset], network, forward, device, ranks)
                else:
                    _remark(f"{label}: {metadata['images']:,} images, cached already")
    _remark(f"done: {folder}")


def _prepare_cache(
    folder: Path, wanted: dict[Path, dict[str, dict[str, Any]]], network: networks.Network, overwrite: bool
) -> list[list[str]]:
    """[folder, dataset] of the sets that are complete already; the others are marked as begun. Raises BadCache before any change
    if the folder holds something else."""
    complete = []
    if overwrite:
        # Those of perturbed images and of noise too, also when they are not made anew: they are of the network that goes.
        cache.clear(folder / "odin")
        cache.clear(folder / "selection")
        cache.clear(folder)
    for place, sets in wanted.items():
        place.mkdir(exist_ok=True)
        complete += [[str(place), dataset] for dataset in _check_cached(place, sets)]
    for place, sets in wanted.items():
        cache.begin(place, sets)
    cache.save_head(folder, network.weight.numpy(), network.bias.numpy())
    return complete


def _extract_set(
    args: argparse.Namespace,
    folder: Path,
    dataset: str,
    label: str,
    metadata: dict[str, Any],
    image_list: images.ImageList,
    network: networks.Network,
    forward: Callable[[Tensor], Tensor],
    device: torch.device,
    ranks: Ranks,
) -> None:
    preprocessing = images.Preprocessing(**network.preprocessing)
    perturb = None
    if metadata["odin"]:
        head = (network.weight.to(device), network.bias.to(device))
        perturb = functools.partial(extract.odin_perturb, network.body, *head, **metadata["odin"])
    held = ExitStack()
    with held:
        # Only the first rank has a writer; the others learn from it where to begin.
        writers = []
        on_first(ranks, lambda: writers.append(held.enter_context(cache.Writer(folder, dataset, metadata))))
        start = on_first(ranks, lambda: writers[0].rows)
        rows = extract.batches(metadata["images"], args.batch_size, start)
        own = extract.extract(
            forward,
            (images.GaussianNoise if folder.name == "selection" else images.Pixels)(image_list, preprocessing),
            share(ranks, rows),
            preprocessing.mean,
            preprocessing.std,
            device,
            args.workers,
            PRECISIONS[args.precision].autocast,
            perturb,
        )
        total = metadata["images"]
        with tqdm(total=total, initial=start, unit="image", delay=1, leave=False, desc=label) as bar:

            def write(batch: numpy.ndarray) -> None:
                writers[0].write(batch)
                bar.update(len(batch))

            collect(ranks, own, [len(batch) for batch in rows], metadata["channels"], device, write)

        def finish() -> None:
            activations = writers[0].activations()
            accuracy = evaluate.accuracy(activations, network.weight, network.bias)
            known, lines = None, []
            if dataset == "id" and args.benchmark == "imagenet" and not args.id_dir and not metadata["odin"]:
                known, lines = _compare(activations._replace(metadata={**metadata, "accuracy": accuracy}), network)
            writers[0].finish(accuracy=accuracy)
            top1 = "" if accuracy is None else f", top-1 {accuracy:.2f} %" + (f" (published: {known:.2f} %)" if known else "")
            _remark(f"{label}: {total:,} images from {image_list.folder}{top1}")
            for line in lines:
                _remark(f"{label}: {line}")

        on_first(ranks, finish)


def _compare(activations: cache.Activations, network: networks.Network) -> tuple[float | None, list[str]]:
    """(the top-1 accuracy that torchvision publishes for these weights, what the ImageNet activations say against their being the
    published network). The first is None for weights of one's own."""
    weights, metadata = network.description["weights"], activations.metadata
    known = networks.published_top1(network.description["arch"], weights)
    lines = evaluate.findings("imagenet", activations, network.weight.numpy(), network.bias.numpy())
    if known is not None and metadata["accuracy"] is not None and not published.is_v1(network.description):
        found = published.Top1(metadata["accuracy"], activations.images, len(set(metadata["labels"])))
        # V1's is among the findings already.
        lines = [*lines, *filter(None, [published.top1_disagreement(found, known)])]
    return known, lines


def _remark(text: object) -> None:
    tqdm.write(str(text).encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].strip()


def _fail(error: object, status: int) -> int:
    _remark(f"get_activation.py: {error}")
    return status


if __name__ == "__main__":
    sys.exit(main())
