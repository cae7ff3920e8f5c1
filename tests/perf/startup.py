"""How long get_activation.py takes before it reads the first image, as a ratio to os.scandir and
stat alone over the same files.

    python tests/perf/startup.py [--files 1000000] [--folder DIR]

Makes that many empty files in a temporary folder (about a minute for a million), 1,000 in each
class folder, and runs main of get_activation.py on them as the ID set; the network alone is
exchanged for one of 8 channels that looks at no image. Then once more, with everything cached, and
opens the cache as eval.py does. The system has the folders in memory by then: from a cold or a
network disk, both scandir and the listing wait for it. Prints a table and, last, one line of JSON.
"""

import contextlib
import functools
import io
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bench import options, peak_mb, report

import get_activation
from lhact import cache
from lhact.extraction import build, extract, networks
from lhact.extraction.image_sets import Images
from lhact.records import NetworkInfo, Preprocessing

PER_FOLDER = 1000
CHANNELS = 8


def make(root: Path, files: int) -> None:
    for first in range(0, files, PER_FOLDER):
        folder = root / f"n{first // PER_FOLDER:08}"
        folder.mkdir(parents=True)
        for number in range(min(PER_FOLDER, files - first)):
            # In another order than that of the names, as archives are unpacked.
            file = folder / f"{folder.name}_{number * 7 % PER_FOLDER}.JPEG"
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY))


def scan(root: Path) -> int:
    """The limit: every name and every size, and nothing kept."""
    return sum(
        entry.stat().st_size >= 0
        for folder in os.scandir(root)
        for entry in os.scandir(folder.path)
    )


def network(classes: int) -> networks.Network:
    info = NetworkInfo("none", None, None, "0" * 64, classes, CHANNELS)
    weight, bias = torch.zeros(classes, CHANNELS), torch.zeros(classes)
    return networks.Network(torch.nn.Identity(), weight, bias, Preprocessing(), info)


def timed(function: Callable, name: str, seconds: Counter) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return wrapper


def run(arguments: list[str]) -> None:
    remarks = io.StringIO()
    with contextlib.redirect_stderr(remarks):
        status = get_activation.main(arguments)
    assert status == 0, remarks.getvalue()


def measure(place: Path, files: int) -> dict[str, float]:
    make(place / "many", files)
    make(place / "few", 1)
    few, caches = f"few={place / 'few'}", place / "cache"
    arguments = ["--id-dir", place / "many", "--ood", few, "--cache-dir", caches, "--name", "many"]
    arguments = [*map(str, arguments), "--device", "cpu"]
    steps = Counter()
    before_first = []

    def no_images(*parts: object) -> Iterator[np.ndarray]:
        before_first.append((time.perf_counter() - start, peak_mb(), dict(steps)))
        for rows in parts[2]:
            yield np.zeros((len(rows), CHANNELS), np.float32), np.zeros((len(rows), 16), np.uint8)

    networks.load = lambda *_: network(-(-files // PER_FOLDER))
    extract.extract = no_images
    timed_steps = ("open_source", "labels", "SetWriter")
    for owner, name in [(Images, "fingerprint"), *((build, step) for step in timed_steps)]:
        setattr(owner, name, timed(getattr(owner, name), name.lower(), steps))
    unused = peak_mb()
    limits = []
    for _ in range(2):  # the first time brings the folders into memory
        start = time.perf_counter()
        assert scan(place / "many") == files
        limits.append(time.perf_counter() - start)
    start = time.perf_counter()
    run(arguments)
    before, peak, parts = before_first[0]
    start = time.perf_counter()
    run(arguments)
    again = time.perf_counter() - start
    start = time.perf_counter()
    cache.open_set(place / "cache" / "imagenet" / "many", "id")
    opened = time.perf_counter() - start
    return {
        "files": files,
        "scandir_stat_s": limits[-1],
        **{f"{name}_s": seconds for name, seconds in parts.items()},
        "before_first_image_s": before,
        "ratio_to_scandir_stat": before / limits[-1],
        "all_cached_already_s": again,
        "open_cache_s": opened,
        "imports_mb": unused,
        "peak_before_first_image_mb": peak,
        "peak_mb": peak_mb(),
    }


def main() -> None:
    parser = options(__doc__, files=1_000_000)
    parser.add_argument("--folder", help="where to make them; default: the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        report(measure(Path(place), args.files))


if __name__ == "__main__":
    main()
