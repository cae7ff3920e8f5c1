"""How fast a cache becomes a table on this machine, each step as a ratio to a limit measured in the
same run.

    python tests/perf/evaluation.py [--images 85640] [--calibration 8564] [--channels 2048]
                                    [--classes 1000]

limit        the faster of two float32 products of the same shapes, all in memory: one torch.addmm,
             and oneDNN's with the weight packed once, 512 rows at a time, one thread for each core.
             Which it is depends on the processor.
lhact        fitting and scoring from the cached files to the scores, as a share of the limit;
             beside it the ordinary way: the same files by numpy.load, clamp, where, addmm and
             logsumexp, as a script of a few lines does it.
thirteen     the thirteen methods that need nothing but the test activations, in one run, in units
             of thirteen limits.
percentiles  of the calibration set, in units of one reading of its file, and how often it is read.
eval.py      the whole command, in units of the import of torch and scikit-learn plus the limit, and
             its peak memory.

Writes a cache of random activations to a temporary folder (0.8 GB at the default size). Prints a
table and, last, one line of JSON. --calibration 1281167 is all of ImageNet's training set, 10.5 GB.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bench import (
    CPU,
    MAXRSS_PER_MB,
    ROOT,
    ROUNDS,
    medians,
    options,
    packed_products,
    report,
)
from helpers import Writer

from lhact import cache, cache_writer
from lhact.evaluation import score as evaluate
from lhact.methods import calibrate
from lhact.methods import compose as methods
from lhact.methods.rectify import LHACT_HIGH, LHACT_LOW

THIRTEEN = ["msp", "energy", "react", "bfact", "lhact", "maxlogit", "gen", "vra"]
THIRTEEN += ["ash-p", "ash-b", "ash-s", "scale", "lts"]


def write(folder: Path, images: int, calibration: int, channels: int, classes: int) -> None:
    """Activations with a third of them low and a twentieth high, as those of a ResNet-50."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    cache_writer.save_head(
        folder, draw.normal(0, 0.03, (classes, channels)), draw.normal(0, 0.03, classes)
    )
    rows = draw.exponential(0.46, (4096, channels)).astype(np.float32)
    sets = {"calibration": calibration, "id": images * 7 // 12}
    left = images - sets["id"]
    sets |= dict.fromkeys(("iNaturalist", "SUN", "Places"), left // 4)
    sets["Textures"] = left - 3 * (left // 4)
    network = {"arch": "random", "weights": None, "checkpoint": None}
    network |= {"classes": classes, "channels": channels}
    for name, count in sets.items():
        metadata = {"network": network, "preprocessing": {}, "precision": "fp32", "odin": None}
        metadata |= {"images": count, "fingerprint": name, "labels": None}
        if name in ("id", "calibration"):
            metadata["labels"] = [i * classes // count for i in range(count)]
        metadata["paths"] = [f"n{i // 1300:08}/n{i // 1300:08}_{i}.JPEG" for i in range(count)]
        with Writer(folder, name, metadata) as writer:
            for start in range(0, count, len(rows)):
                writer.write(rows[: min(len(rows), count - start)])
            writer.finish(accuracy=None)


def limit(images: int, channels: int, classes: int) -> Callable[[], object]:
    weight, bias = torch.rand(classes, channels), torch.rand(classes)
    rows = torch.rand(images, channels)
    out = torch.empty(images, classes)
    return lambda: torch.addmm(bias, rows, weight.T, out=out)


def ordinary(opened: cache.Cache) -> None:
    """LHAct as the paper's equations read, 512 rows at a time."""
    weight, bias = torch.from_numpy(opened.weight), torch.from_numpy(opened.bias)
    for name in ("id", *opened.ood):
        for rows in np.array_split(np.load(opened.sets[name].path, mmap_mode="r"), 100):
            z = torch.from_numpy(np.array(rows)).clamp(min=LHACT_LOW)
            filtered = z / (1 + (z / LHACT_HIGH) ** 4).sqrt() + LHACT_LOW
            z = torch.where(z < LHACT_HIGH, z, filtered)
            torch.logsumexp(torch.addmm(bias, z, weight.T), dim=1)


def peak_of(command: list[str]) -> int:
    """Peak memory of a command, started by a small process: the system counts what the starting one
    holds towards its child."""
    script = (
        "import resource, subprocess, sys; "
        "subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    starter = [sys.executable, "-c", script, *command]
    done = subprocess.run(starter, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout) // MAXRSS_PER_MB


class Calibration:
    """A set of a cache that counts how often it is read."""

    def __init__(self, activations: cache.Activations) -> None:
        self.activations, self.readings = activations, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.readings += 1
        return map(torch.from_numpy, self.activations.chunks(512))


def read(path: Path) -> None:
    buffer = bytearray(1 << 22)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def main() -> None:
    parser = options(__doc__, images=85_640, calibration=8_564, channels=2048, classes=1000)
    args = parser.parse_args()
    figures = {"images": args.images, "calibration": args.calibration}
    figures["threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place:
        folder = cache.cache_folder(place, "imagenet", "random")
        write(folder, args.images, args.calibration, args.channels, args.classes)
        opened = cache.open_cache(folder)

        def score(*names: str) -> None:
            # The constants: percentiles are measured apart.
            chosen = methods.variants(names, [], [], published=True)
            evaluate.score(opened, evaluate.fit_methods(opened, chosen, CPU), CPU)

        plain, packed, usual, lhact, thirteen = medians(
            limit(args.images, args.channels, args.classes),
            packed_products(
                torch.rand(args.classes, args.channels),
                torch.rand(args.images, args.channels).split(512),
            ),
            lambda: ordinary(opened),
            lambda: score("lhact"),
            lambda: score(*THIRTEEN),
        )
        bare = min(plain, packed)
        figures |= {"addmm_s": plain, "packed_product_s": packed, "ordinary_s": usual}
        figures |= {"ordinary_in_lhact": usual / lhact}
        figures |= {"limit_s": bare, "lhact_s": lhact, "lhact_share_of_limit": bare / lhact}
        figures |= {"thirteen_s": thirteen, "thirteen_in_limits": thirteen / 13 / bare}

        calibration = Calibration(opened.calibration)
        reading, percentiles = medians(
            lambda: read(opened.calibration.path),
            lambda: calibrate.percentiles(calibration, [33.7, 95.5]),
        )
        figures |= {"reading_s": reading, "percentiles_s": percentiles}
        figures["percentiles_in_readings"] = percentiles / reading
        figures["percentiles_readings"] = calibration.readings / (ROUNDS + 1)
        # In a process of its own, less what the imports take.
        alone = "import sys, pathlib; sys.path.insert(0, 'tests/perf')\n"
        alone += "import evaluation as e; import torch\n"
        work = "opened = e.cache.open_cache(pathlib.Path(sys.argv[1]))\n"
        work += "e.calibrate.percentiles(e.Calibration(opened.calibration), [33.7, 95.5])"
        with_work, without = (
            peak_of([sys.executable, "-c", code, str(folder)]) for code in (alone + work, alone)
        )
        figures["percentiles_peak_mb"] = with_work - without

        command = [sys.executable, "eval.py", "--cache-dir", place, "--name", "random"]
        command += ["--device", "cpu"]
        imports = [sys.executable, "-c", "import torch, sklearn.metrics"]
        quiet = {"check": True, "capture_output": True, "cwd": ROOT}
        importing, bare, whole = medians(
            lambda: subprocess.run(imports, **quiet),
            limit(args.images, args.channels, args.classes),
            lambda: subprocess.run(command, **quiet),
        )
        figures |= {"imports_s": importing, "eval_py_s": whole}
        figures["eval_py_in_limits"] = whole / (importing + bare)
        figures["eval_py_peak_mb"] = peak_of(command)
        figures["eval_py_thirteen_peak_mb"] = peak_of([*command, "--methods", *THIRTEEN])
    report(figures)


if __name__ == "__main__":
    main()
