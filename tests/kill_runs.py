"""Real runs of get_activation.py, ended by signals at random moments and started again: what must
hold after each of them.

    python tests/kill_runs.py --kills 300

prints one line; its exit status is 1 if something half-made passed for whole, something finished
was done again, or a byte differs from those of a run that nothing disturbs. The test suite does the
same with fewer kills.
"""

import argparse
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from helpers import ARCH, Run, fork, make_data_root, make_network, shrink, wait

import get_activation
from lhact import cache
from lhact.extraction import build
from lhact.extraction.image_sets import FileReader

# How a run ends -> its exit status (0 is that of one that came to its end first), what it says.
ENDS = {
    "kill": (-signal.SIGKILL, ""),
    "interrupt": (130, "interrupted; the same command goes on where it stopped"),
    "kill a worker": (1, "get_activation.py: a worker process that reads images ended"),
}


class Violation(Exception):
    """A promise that a run did not keep."""


def demand(kept: bool, what: str) -> None:
    if not kept:
        raise Violation(what)


def start(
    run: Run, caches: Path, seconds_between_syncs: float, *arguments: object
) -> tuple[int, int]:
    """A run in a process group of its own; its id, and a pipe that gets the id of a process when
    that begins the run and when it reads an image."""
    told, tell = os.pipe()

    def main() -> int:
        os.setpgid(0, 0)
        load, whole_run = FileReader.pixels, get_activation.run

        def telling(function):
            return lambda *arguments: (
                os.write(tell, struct.pack("i", os.getpid())) and function(*arguments)
            )

        FileReader.pixels, get_activation.run = telling(load), telling(whole_run)
        build.SECONDS_BETWEEN_SYNCS = seconds_between_syncs
        os.fsync = lambda descriptor: None  # no power is cut here, and it is slow
        with run.log.open("w") as err, redirect_stderr(err):
            status = get_activation.main(run.arguments(*arguments, caches=caches))
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # too late to interrupt it
        return status

    pid = fork(main)
    os.close(tell)
    return pid, told


def end(pid: int, told: int, how: str, draw: random.Random) -> int:
    """Ends the run while it reads one of the next images, or a little later; its exit status."""
    first = int(how == "kill a worker")  # no worker is there before the first image
    readers = [
        struct.unpack("i", told_by)[0]
        for _ in range(1 + draw.randint(first, 8))
        if (told_by := os.read(told, 4))
    ]
    time.sleep(draw.uniform(0, 0.02) if how != "kill a worker" else 0)
    if how == "kill":
        os.kill(pid, signal.SIGKILL)
    elif how == "interrupt":
        os.killpg(pid, signal.SIGINT)  # as a terminal does: to the workers too
    elif readers[-1] != pid:
        with suppress(ProcessLookupError):  # it may have had no more to read
            os.kill(readers[-1], signal.SIGKILL)
    status = patiently(pid)
    os.close(told)
    return status


def patiently(pid: int) -> int:
    """The exit status of a run; one that a signal has caught within a lock of Python's queues gets
    another, as users would do."""
    for _ in range(1000):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGINT)
    return wait(pid)


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves in the cache, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"  # which names its process
    }


def images_of(whole: dict[str, bytes]) -> dict[str, int]:
    """Their number by the name of each set's .json."""
    names = [name for name in whole if name.endswith(".json")]
    return {name: json.loads(whole[name])["images"] for name in names}


def finished(folder: Path, whole: dict[str, bytes]) -> int:
    """How many images' activations are safely there: those of sets that are complete, and those
    counted of the others."""
    count = 0
    for name, images in images_of(whole).items():
        record = (folder / name).with_suffix(".rows")
        if (folder / name).exists():
            count += images
        elif record.exists():
            count += json.loads(record.read_bytes()).get("rows", 0)
    return count


def check(folder: Path, whole: dict[str, bytes]) -> bool:
    """Whether the cache passes for whole. Raises Violation if it or one of its image sets does and
    is not right."""
    found = files(folder) if folder.exists() else {}
    for name in images_of(whole).keys() & found.keys():
        demand(found[name] == whole[name], f"{name} appeared with other bytes")
        array = str(Path(name).with_suffix(".npy"))
        demand(found.get(array) == whole[array], f"{name} appeared, and {array} is not right")
    try:
        cache.datasets(folder)
    except cache.BadCache:
        return False
    missing = [name for name in whole if "/" not in name and found.get(name) != whole[name]]
    demand(not missing, f"a cache passes for whole without the right {', '.join(missing)}")
    return True


def kill_runs(run: Run, kills: int, *arguments: object, seed: int = 0) -> Counter:
    """Ends so many runs, and starts each again until it is done. How many of each kind, and what
    became of them.

    Raises Violation.
    """
    arguments = ("--batch-size", 1, *arguments)
    demand(run(*arguments) == 0, f"a run that nothing disturbs failed: {run.err}")
    whole = files(run.folder)
    total = sum(images_of(whole).values())
    draw, counts = random.Random(seed), Counter()
    while (ended := sum(counts[how] for how in ENDS)) < kills:
        demand(
            counts["runs"] < 10 * kills,
            f"only {ended} of {counts['runs']} runs were still going when they were to end",
        )
        caches = run.caches.with_name(f"killed-{counts['caches']}")
        folder = caches / "imagenet" / ARCH
        for _ in range(draw.randint(1, 6)):
            how = draw.choices(list(ENDS), [3, 3, 1])[0]  # workers take long to start
            workers = 1 if how == "kill a worker" else draw.choices([0, 1], [4, 1])[0]
            seconds = draw.choice([-1, build.SECONDS_BETWEEN_SYNCS])
            status = end(*start(run, caches, seconds, *arguments, "--workers", workers), how, draw)
            said, (wanted, words) = run.log.read_text(), ENDS[how]
            demand(status in (0, wanted), f"{how}: exit status {status}: {said}")
            demand(status == 0 or words in said, f"{how}: {said}")
            is_whole = check(folder, whole)
            demand(is_whole or status != 0, f"{how}: done, and the cache does not pass for whole")
            counts["runs"] += 1
            counts[how] += status != 0
        done = finished(folder, whole)
        workers = draw.choices([0, 1], [4, 1])[0]
        seconds = build.SECONDS_BETWEEN_SYNCS
        pid, told = start(run, caches, seconds, *arguments, "--workers", workers)
        with os.fdopen(told, "rb") as pipe:
            read = len(pipe.read()) // 4 - 1
        demand(wait(pid) == 0, f"started again, a run failed: {run.log.read_text()}")
        again = f"{done} of {total} images were finished, and {read} were read again"
        demand(read == total - done, again)
        found = files(folder)
        others = sorted(n for n in {**found, **whole} if found.get(n) != whole.get(n))
        demand(not others, f"other files than of a run that nothing disturbs: {others}")
        counts["caches"] += 1
        counts["not read again"] += done
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        checkpoint = Path(place, "small.pth")
        torch.save(make_network(ARCH).state_dict(), checkpoint)
        try:
            run = Run(make_data_root(Path(place)), checkpoint, Path(place))
            counts = kill_runs(run, args.kills, "--odin", seed=args.seed)
        except Violation as violation:
            print(f"violated: {violation}")
            return 1
    ended = sum(counts[how] for how in ENDS)
    how_often = ", ".join(f"{how} {counts[how]}" for how in ENDS)
    print(
        f"{ended} of {counts['runs']} runs ended early ({how_often}), {counts['caches']} caches: "
        "none passed for whole before it was, all bytes are the same, "
        f"{counts['not read again']} images not read again"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
