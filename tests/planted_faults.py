"""One-line faults in the product in; which of them the tests catch out.

    python tests/planted_faults.py                 plants all of them, in about half an hour
    python tests/planted_faults.py topk eval.py    those with one of these words in them
    python tests/planted_faults.py --list          plants nothing

Each fault is planted by itself in a copy of the working tree, where the test files that should see
it are run. Before that, the same files must pass in the unchanged copy. Exit status 1: a fault
survived, a line was not found, or the unchanged copy failed. Run it by hand, before and after
tests are cut or the product is rebuilt: what survived only afterwards was lost in between.

FAULTS is the list. `@` names a file and, behind it, the tests that should see the faults that
follow: `topk` is tests/test_topk.py. Of each fault, `#` says why it matters, `-` is the line or a
part of it that no other line of the file has, `+` is what takes its place.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # for one run of tests; a fault that lets them hang is caught, too

FAULTS = r"""
@ lhact/methods/rectify.py rectify
# LHAct's upper branch loses its "+ low"
- rectified.clamp_(min=low)  #
+ rectified.clamp_(min=0)  #
# LHAct with a negative low moves the upper branch the wrong way
- rectified.add_(above > 0, alpha=low)
+ rectified.add_(above > 0, alpha=-low)
# an activation of exactly `high` falls into LHAct's lower branch
- threshold(rectified, _just_below(high, activations.dtype), 0)
+ threshold(rectified, high, 0)
# ReAct also removes negative activations
- return activations.clamp(max=high)
+ return activations.clamp(0, high)
# ASH's number of kept activations, where the share is not whole
- max(1, channels - round(channels * percentile / 100))
+ max(1, channels - int(channels * percentile / 100))
# ASH-S with the sum after pruning where the one before is meant
- values * _gain(activations, values))
+ values * _gain(values, values))
# ASH-B shares the sum out over all channels instead of the kept ones
- / channels.shape[1]
+ / activations.shape[1]
@ lhact/methods/topk.py topk
# one place off, which only rows longer than NumPy sorts whole can show
- np.partition(values.numpy(), columns - k, axis=1)
+ np.partition(values.numpy(), min(columns - k + 1, columns - 1), axis=1)
# the k-th smallest where the k-th largest is meant, which shorter rows cannot show either
- np.argpartition(values.numpy(), columns - k, axis=1)
+ np.argpartition(values.numpy(), k, axis=1)
@ lhact/methods/calibrate.py calibrate
# negative activations counted in reverse order
- return np.concatenate([counts[:NEGATIVE][::-1], counts[NEGATIVE:]])
+ return np.concatenate([counts[:NEGATIVE], counts[NEGATIVE:]])
# another definition of a percentile than NumPy's
- Fraction(percent) * (total - 1) / 100
+ Fraction(percent) * max(total - 2, 0) / 100
# sums of millions of activations in single precision
- values.sum(dtype=np.float64)
+ values.sum()
@ lhact/evaluation/metrics.py metrics
# FPR95 lets an OOD score at the threshold pass
- np.mean(ood_scores > threshold)
+ np.mean(ood_scores >= threshold)
# FPR95's threshold one place off for many numbers of images
- round(0.05 * len(id_scores))
+ int(0.05 * len(id_scores))
# a tie counts for ID as a whole in AUROC
- in ("right", "left")
+ in ("left", "left")
# the OOD-positive FPR95 catches less than 95 % of OOD
- -(-95 * len(ood_scores) // 100)
+ max(1, 95 * len(ood_scores) // 100)
@ lhact/published.py published
# a number of the paper's table
- (54.20, 87.78)
+ (52.40, 87.78)
# numbers from memory stand beside ours as published
- row.method == method and row.confirmed and
+ row.method == method and
# IMAGENET1K_V2 passes for the network of the published numbers
- and network.get("weights") == "IMAGENET1K_V1"
+ and network.get("weights") in ("IMAGENET1K_V1", "IMAGENET1K_V2")
# activations further from V1's agree with it
- V1_PERCENTILES.items(), (3, 2, 1)
+ V1_PERCENTILES.items(), (3, 3, 3)
@ lhact/methods/scores.py scores
# LTS sums negative activations
- positive = activations.clamp(min=0)
+ positive = activations
# DICE keeps what lies at the threshold
- contribution.view_as(weight) > threshold
+ contribution.view_as(weight) >= threshold
# KNN's calibration rows are not scaled to unit length
- rows = normalize(rows, dim=1)
+ rows = rows * 1
# the (k - 1)-th neighbour
- _largest(closeness(), int(k))
+ _largest(closeness(), max(1, int(k) - 1))
# of more columns than fit into memory at a time one neighbour is lost
- held, width = [largest(torch.cat(held, dim=1), k)], k
+ held, width = [largest(torch.cat(held, dim=1), max(1, k - 1))], k
# NNGuide's bank comes from the first classes alone
- torch.arange(count) * rows // count
+ torch.arange(count)
# Mahalanobis with the covariance of all images instead of that within classes
- - deviations.T @ (counts / rows * deviations)
+ - 0 * deviations.T @ (counts / rows * deviations)
@ lhact/parallel.py parallel
# all batches of a set come to lie in memory
- if len(waiting) >= 2 * threads:
+ if len(waiting) >= 2000 * threads:
# threads times threads on a few cores, and other last bits
- ThreadPoolExecutor(threads, initializer=_one_thread)
+ ThreadPoolExecutor(threads)
@ lhact/extraction/fuse.py fuse
# a tensor that is read later is overwritten
- in_place = _may_be_overwritten(traced, others[0], start, user)
+ in_place = True
# a network that was traced wrongly is used
- return traced if agrees else network
+ return traced
@ lhact/benchmarks/digits.py digits
# tested on the hands that the network was trained on
- "train" if i < FIRST_TEST_SCAN else "test"
+ "test" if i < FIRST_TEST_SCAN else "train"
# another network at each call
- torch.default_generator.manual_seed(SEED)
+ torch.default_generator.seed()
@ lhact/reporting/text.py report
# a draw is called better
- word = "better" if gain > 0 else
+ word = "better" if gain >= 0 else
# the difference from the published number with the wrong sign
- row[metric] - values[metric]
+ values[metric] - row[metric]
# published numbers stand beside the other convention of FPR95
- COMPARABLE = {"fpr95", "auroc"}
+ COMPARABLE = {"fpr95", "auroc", "fpr95_ood_positive"}
# scores come back from their file with other last bits
- f"{value:.9g}"
+ f"{value:.6g}"
@ lhact/extraction/images.py images
# the crop is one pixel off for every other size
- round((n - crop) / 2)
+ (n - crop) // 2
# another long side than torchvision's
- int(resize * long / short)
+ round(resize * long / short)
# a set with some of ImageNet's classes is labelled wrong
- order = wnids
+ order = sorted(names)
# a changed image of the same name passes for the cached one
- {path}\0{size}\n
+ {path}\n
# noise is another in every run
- np.random.default_rng([row, 0])
+ np.random.default_rng()
@ lhact/extraction/extract.py extract
# ODIN's gradient of logits without the head's bias
- linear(body(images).float(), weight, bias) / temperature
+ linear(body(images).float(), weight) / temperature
# infinite activations are cached
- if not np.isfinite(rows).all():
+ if np.isnan(rows).any():
# half precision on a CPU goes through the fused network, which computes in single
- if device.type == "cpu" and autocast is None:
+ if device.type == "cpu":
# a run that goes on writes the first rows again
- in range(start, images, batch_size)]
+ in range(0, images, batch_size)]
@ lhact/devices.py extract
# matrix products in TF32 where full precision was asked for
- (torch.backends.cuda.matmul, "allow_tf32", tf32),
+ (torch.backends.cuda.matmul, "allow_tf32", True),
@ lhact/extraction/networks.py models
# the published googlenet and inception_v3 get inputs in another scaling than they were trained with
- network.transform_input = True  #
+ network.transform_input = False  #
# the published weights by their file with a user's preprocessing instead of their own
- dict(preprocessing or {}) if preset is None else _preset(preset)
+ dict(preprocessing or {})
# batch norms in training mode
- network.eval().requires_grad_(False)
+ network.requires_grad_(False)
# other weights have the same hash, so their cache passes for this network's
- digest.update(value.reshape(-1).view(torch.uint8).numpy())
+ digest.update(b"")
# a checkpoint may run code
- map_location="cpu", weights_only=True)
+ map_location="cpu", weights_only=False)
@ lhact/cache.py cache
# a killed --overwrite of an unfinished cache leaves a part of it that passes for whole
- for suffix in ("json", "npy", "npy.part", "rows"):
+ for suffix in ("rows", "json", "npy", "npy.part"):
# a run that ends between two sets leaves a cache that passes for whole
- elif not record.exists():
+ elif False:
# more rows are promised than reached the disk
- return rows if fits and rows <= there else 0
+ return rows if fits else 0
# a run of another kind goes on from this one's rows
- if record["key"] != self.key or type(rows)
+ if type(rows)
# activations in half precision pass for those in single
- "preprocessing", "precision", "odin", "fingerprint")
+ "preprocessing", "odin", "fingerprint")
# a sample of a set whose order has a period is the same few classes
- .integers(ends[:-1], ends[1:]).tolist()
+ .integers(ends[:-1], [end + 1 for end in ends[:-1]]).tolist()
# workers of a killed run hold its lock
- fcntl.lockf(file,
+ fcntl.flock(file,
@ get_activation.py get_activation
# noise of the old network survives --overwrite, and settings are selected on it
- cache.clear(folder / "selection")
+ pass
# ODIN's images of the old network survive --overwrite
- cache.clear(folder / "odin")
+ pass
# --precision bf16 computes in float32, and the cache says bf16
- PRECISIONS[args.precision].autocast,
+ None,
# TF32 stays on under --precision fp32
- with gpu_arithmetic(precision.tf32):
+ with gpu_arithmetic(True):
# ODIN moves images by the logits of a head without its bias
- network.bias.to(device))
+ 0 * network.bias.to(device))
# the head is cached without its bias
- cache.save_head(folder, network.weight.numpy(), network.bias.numpy())
+ cache.save_head(folder, network.weight.numpy(), 0 * network.bias.numpy())
# a set left over from another precision stays beside the new ones
- for key in ("network", "preprocessing", "precision")}
+ for key in ("network", "preprocessing")}
# ID images of one's own are compared with the top-1 published for ImageNet's
- and not args.id_dir and not metadata["odin"]
+ and not metadata["odin"]
@ get_activation.py ranks
# the second machine's ranks take GPUs that only the first would have
- pick_device(f"cuda:{ranks.local}"
+ pick_device(f"cuda:{ranks.rank}"
# as many workers on each machine as if it ran the ranks of all
- "LOCAL_WORLD_SIZE"
+ "WORLD_SIZE"
@ lhact/extraction/ranks.py ranks
# the second machine's ranks count on from the first's: none of its GPUs is theirs
- os.environ.get("LOCAL_RANK", "0")
+ os.environ.get("RANK", "0")
# on a second machine nobody loads the network before the others do
- together(ranks, function if ranks.local == 0 else
+ together(ranks, function if ranks.rank == 0 else
# a machine's first rank prints, too, on each of several
- os.environ.get("RANK") == "0"
+ os.environ.get("LOCAL_RANK") == "0"
@ eval.py eval
# the result does not say what settings were selected on
- result["selected_on"] = args.select_on
+ result["selected_on"] = None
# a set with more images than the published one is compared without a word
- and opened.sets[dataset].images != image_set.images
+ and opened.sets[dataset].images < image_set.images
# --reproduce calls percentiles the default of a network that is V1 by its activations
- reproduce.reproduce(opened, device, thresholds.published, bar.update)
+ reproduce.reproduce(opened, device, published.is_v1(opened.network), bar.update)
# a method that was asked for by name is left out
- device, "all" in args.methods, bar.update)
+ device, True, bar.update)
@ lhact/evaluation/select.py select
# of equal settings the last one is chosen, which depends on the order of the sweep alone
- or rank < best[method.name][0]
+ or rank <= best[method.name][0]
# of settings with equal FPR95 the one with the lowest AUROC
- -metrics.auroc(*pair)
+ metrics.auroc(*pair)
# settings are selected on the ID images that are tested on
- id_name = "calibration" if "calibration" in opened.sets else "id"
+ id_name = "id"
@ lhact/evaluation/score.py select
# the set that settings are selected on is also tested on
- not in ("id", "calibration", self.selected_on)
+ not in ("id", "calibration")
@ lhact/evaluation/score.py evaluate
# thresholds are taken from the images that are tested on
- self.sets.get("calibration", self.id)
+ self.id
# ODIN's published row beside another perturbation
- known = known and perturbed == published.ODIN_PERTURBATION
+ known = known and perturbed
# the published average over four sets beside one over three
- same_sets = tuple(opened.ood) == published.DATASETS
+ same_sets = True
@ lhact/evaluation/score.py eval
# all settings of a sweep share the first one's scores
- return step.name, tuple(step.parameters.items())
+ return step.name, ()
@ lhact/evaluation/reproduce.py reproduce
# the search for published settings is refined too coarsely
- _around(centre[key], values, 2**level)
+ _around(centre[key], values, level)
@ lhact/methods/compose.py methods
# one threshold for both ends of LHAct is refused
- parameters.get("low", -math.inf) > parameters.get("high", math.inf)
+ parameters.get("low", -math.inf) >= parameters.get("high", math.inf)
# a setting of a score changes nothing
- score=changed[-1])
+ score=method.score)
@ lhact/data.py data
# an archive may write outside of its folder by way of a link
- if member.issym():
+ if False:
"""


class Fault(NamedTuple):
    """In one line of `file`, `old` becomes `new`; one of the test files `tests` should see it."""

    file: str
    tests: tuple[str, ...]
    why: str
    old: str
    new: str


def parse(text: str) -> list[Fault]:
    """The faults of a text such as FAULTS. Raises ValueError for a line that is out of order."""
    faults, parts = [], []
    for line in text.strip().splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "@" and not parts:
            file, *names = rest.split()
            tests = tuple(f"tests/test_{name}.py" for name in names)
        elif mark == "#-+"[len(parts)]:
            parts.append(rest)
        else:
            raise ValueError(f"a line must begin with @, or with #, - and + in turn; got {line!r}")
        if len(parts) == 3:
            faults.append(Fault(file, tests, *parts))
            parts = []
    return faults


def plant(content: str, fault: Fault) -> str | None:
    """The file's content with the fault. None unless one line is the text, or else one has it."""
    lines = content.splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if line.strip() == fault.old]
    found = found or [i for i, line in enumerate(lines) if fault.old in line]
    if len(found) != 1:
        return None
    lines[found[0]] = lines[found[0]].replace(fault.old, fault.new, 1)
    return "".join(lines)


def copy_project(target: Path) -> None:
    """Copies every file of the working tree that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # git still lists a file that has been deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def first_failure(tests: Sequence[str], folder: Path) -> str | None:
    """The first test of those files that fails in that copy, or how they end; None: all pass."""
    # No .pyc files: Python takes one for current if its source has kept its size and its second.
    settings = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as run:
        try:
            output, _ = run.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"the limit of {SECONDS} seconds"
        finally:
            if run.returncode is None:  # also after Ctrl-C
                os.killpg(run.pid, signal.SIGKILL)  # the tests and what they have started
    if run.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", output, re.MULTILINE)
    return failed[1] if failed else f"exit status {run.returncode}"


def outcome_of(fault: Fault, folder: Path) -> str:
    """What the tests say of the fault in that copy, which is afterwards as it was."""
    path = folder / fault.file
    whole = path.read_text(encoding="utf-8") if path.is_file() else ""
    planted = plant(whole, fault)
    if planted is None:
        return "TEXT NOT FOUND"
    path.write_text(planted, encoding="utf-8")
    failure = first_failure(fault.tests, folder)
    path.write_text(whole, encoding="utf-8")
    return f"caught by {failure}" if failure else "SURVIVED"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plants faults and says which no test catches.")
    parser.add_argument("word", nargs="*", help="only faults with this in file, tests, text or why")
    parser.add_argument("--list", action="store_true", help="print the faults, plant none")
    args = parser.parse_args(argv)
    words = args.word or [""]
    faults = [fault for fault in parse(FAULTS) if any(word in str(fault) for word in words)]
    if args.list:
        for fault in faults:
            print(f"{fault.file}: {fault.why}\n  - {fault.old}\n  + {fault.new}")
        print(f"{len(faults)} faults")
        return 0
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_project(folder)
        unchanged = {tests: first_failure(tests, folder) for tests in {f.tests for f in faults}}
        for fault in faults:
            start = time.monotonic()
            broken = unchanged[fault.tests]
            outcome = f"NOT RUN: {broken} fails without it" if broken else outcome_of(fault, folder)
            line = f"{fault.file}: {fault.why}: {outcome}"
            print(f"{line} ({time.monotonic() - start:.0f} s)", flush=True)
            if not outcome.startswith("caught"):
                missed.append(line)
    print("\n".join(["", *missed, f"{len(faults)} faults, {len(faults) - len(missed)} caught"]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
