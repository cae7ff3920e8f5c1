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
# ASH-S with the sum after pruning where the one before is meant
- values * _gain(activations, values))
+ values * _gain(values, values))
@ lhact/methods/topk.py topk
# one place off, which only rows longer than NumPy sorts whole can show
- np.partition(values.numpy(), columns - k, axis=1)
+ np.partition(values.numpy(), min(columns - k + 1, columns - 1), axis=1)
# the k-th smallest where the k-th largest is meant, which shorter rows cannot show either
- np.argpartition(values.numpy(), columns - k, axis=1)
+ np.argpartition(values.numpy(), k, axis=1)
@ lhact/methods/calibrate.py calibrate
# another definition of a percentile than NumPy's
- Fraction(percent) * (total - 1) / 100
+ Fraction(percent) * max(total - 2, 0) / 100
# sums of millions of activations in single precision
- values.sum(dtype=np.float64)
+ values.sum()
@ lhact/evaluation/metrics.py metrics
# FPR95's threshold one place off for many numbers of images
- rank = min(round(round(1 - keep, 12) * len(id_scores)), len(id_scores) - 1)
+ rank = min(int(round(1 - keep, 12) * len(id_scores)), len(id_scores) - 1)
# the OOD-positive FPR95 catches less than 95 % of OOD
- -(-95 * len(ood_scores) // 100)
+ max(1, 95 * len(ood_scores) // 100)
@ lhact/published.py published
# a number of the paper's table
- (54.20, 87.78)
+ (52.40, 87.78)
@ lhact/methods/scores_by_head.py scores
# LTS sums negative activations
- positive = activations.clamp(min=0)
+ positive = activations
# DICE keeps what lies at the threshold
- contribution.view_as(weight) > threshold
+ contribution.view_as(weight) >= threshold
@ lhact/methods/scores_by_neighbours.py scores
# of more columns than fit into memory at a time one neighbour is lost
- held, width = [largest(torch.cat(held, dim=1), k)], k
+ held, width = [largest(torch.cat(held, dim=1), max(1, k - 1))], k
@ lhact/methods/scores_by_class.py scores
# Mahalanobis with the covariance of all images instead of that within classes
- - deviations.T @ (counts / rows * deviations)
+ - 0 * deviations.T @ (counts / rows * deviations)
@ lhact/extraction/fuse.py fuse
# a tensor that is read later is overwritten
- in_place = _may_be_overwritten(traced, others[0], start, user)
+ in_place = True
@ lhact/benchmarks/digits.py digits
# tested on the hands that the network was trained on
- "train" if i < FIRST_TEST_SCAN else "test"
+ "test" if i < FIRST_TEST_SCAN else "train"
# another network at each call
- torch.default_generator.manual_seed(SEED)
+ torch.default_generator.seed()
@ lhact/reporting/lines.py text
# a draw is called better
- word = "better" if gain > 0 else
+ word = "better" if gain >= 0 else
@ lhact/reporting/joined.py scores_files
# scores come back from their file with other last bits
- f"{value:.9g}"
+ f"{value:.6g}"
@ lhact/extraction/images.py images
# the crop is one pixel off for every other size
- round((n - crop) / 2)
+ (n - crop) // 2
@ lhact/extraction/extract.py on_gpu
# a GPU computes with images that are not there yet
- computing.wait_stream(copying)
+ pass
# on a GPU the original of a folded network, which ODIN needs, stays on the CPU
- network.body.to(device).to(memory_format=torch.channels_last)
+ pass
@ lhact/methods/fit.py on_gpu
# percentiles go by way of the GPU
- calibration.on_cpu or calibration.batches
+ calibration.batches
@ lhact/extraction/extract.py extract
# infinite activations are cached
- if not np.isfinite(rows).all():
+ if np.isnan(rows).any():
@ lhact/extraction/networks.py networks
# the published googlenet and inception_v3 get inputs in another scaling than they were trained with
- network.transform_input = True  #
+ network.transform_input = False  #
# published weights of a ViT for larger images do not fit it
- fixed = {"image_size": side} if
+ fixed = {} if
# batch norms in training mode
- network = built.network.eval().requires_grad_(False)
+ network = built.network.train().requires_grad_(False)
@ lhact/cache.py cache
# a sample of a set whose order has a period is the same few classes
- .integers(ends[:-1], ends[1:]).tolist()
+ .integers(ends[:-1], [end + 1 for end in ends[:-1]]).tolist()
@ lhact/evaluation/reproduce.py reproduce
# the search for published settings is refined too coarsely
- _around(centre[key], values, 2**level)
+ _around(centre[key], values, level)
@ lhact/methods/compose.py compose
# a setting of a score changes nothing
- score=changed[-1])
+ score=method.score)
@ lhact/data.py data
# an archive may write outside of its folder by way of a link
- if member.issym():
+ if False:
@ lhact/methods/rectify.py rectify
# ReAct also removes negative activations
- return activations.clamp(max=cut_to_range(high, activations.dtype))
+ return activations.clamp(0, cut_to_range(high, activations.dtype))
# ASH-B shares the sum out over all channels instead of the kept ones
- fill = activations.sum(dim=1, keepdim=True) / kept
+ fill = activations.sum(dim=1, keepdim=True) / activations.shape[1]
@ lhact/methods/calibrate.py calibrate
# negative activations counted in reverse order
- return np.concatenate([counts[:NEGATIVE_BINS][::-1], counts[NEGATIVE_BINS:]])
+ return np.concatenate([counts[:NEGATIVE_BINS], counts[NEGATIVE_BINS:]])
@ lhact/evaluation/metrics.py metrics
# FPR95 lets an OOD score at the threshold pass
- np.mean(_checked(ood_scores, "ood_scores") > threshold)
+ np.mean(_checked(ood_scores, "ood_scores") >= threshold)
@ lhact/identify.py identify
# IMAGENET1K_V2 passes for the network of the published numbers
- return (network.arch, network.weights) == ("resnet50", "IMAGENET1K_V1")
+ return network.arch == "resnet50"
# activations further from V1's agree with it
- V1_TOLERANCES = (3, 2, 1)
+ V1_TOLERANCES = (3, 3, 3)
# labels that are wrong are never said to be
- if accuracy > limit or limit > 90:
+ if accuracy > 0 or limit > 90:
@ lhact/identify.py evaluation
# accuracy counts the wrong images
- correct += int((logits.argmax(dim=1).cpu() == wanted).sum())
+ correct += int((logits.argmax(dim=1).cpu() != wanted).sum())
@ lhact/parallel.py parallel
# threads times threads on a few cores, and other last bits
- ThreadPoolExecutor(threads, initializer=_use_one_thread)
+ ThreadPoolExecutor(threads)
@ lhact/reporting/lines.py text
# the difference from the published number with the wrong sign
- Value(ours - theirs, digits, signed=True)
+ Value(theirs - ours, digits, signed=True)
# published numbers stand beside the other convention of FPR95
- COMPARABLE = ("fpr95", "auroc")
+ COMPARABLE = ("fpr95", "auroc", "fpr95_ood_positive")
# constant scores get the star of a sweep
- return [] if result.about.over else [method for method in best if not method.tied]
+ return [] if result.about.over else best
# a setting with constant scores is the best of its method
- return method.tied, method.average.metrics["fpr95"]
+ return False, method.average.metrics["fpr95"]
@ lhact/reporting/text.py text
# a cell of a CSV is a formula
- return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text
+ return text
@ lhact/extraction/images.py images
# another long side than torchvision's
- int(resize * long / short)
+ round(resize * long / short)
@ lhact/extraction/image_sets.py sources
# a file of the same name and another size passes for the cached one
- f"{path}\0{size}{label}\n"
+ f"{path}\0{label}\n"
# noise is another in every run
- np.random.default_rng([int(path), 0])
+ np.random.default_rng()
@ lhact/extraction/sources.py sources
# a path of a list leads out of the folder that holds its images
- return None if path == ".." or path.startswith("../") else path
+ return path
@ lhact/extraction/remarks.py sources
# nobody hears that OOD images are linked ID images
- count += int(np.isin(own[own != 0], other).sum())
+ count += 0
@ lhact/extraction/labels.py sources
# a set with only some of ImageNet's classes is labelled wrong
- return {wnid: number for number, wnid in enumerate(wnids)}, order
+ return {wnid: number for number, wnid in enumerate(names)}, order
@ lhact/extraction/extract.py extract
# ODIN's gradient of logits without the head's bias
- logits = nn.functional.linear(activations, *head) / perturbation.temperature
+ logits = nn.functional.linear(activations, head[0]) / perturbation.temperature
# half precision on a CPU goes through the fused network, which computes in single
- if device.type == "cpu" and autocast is None:
+ if device.type == "cpu":
# a run that goes on writes the first rows again
- for first in range(start, images, batch_size)
+ for first in range(0, images, batch_size)
# --precision bf16 computes in float32, and the cache says bf16
- torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
+ torch.autocast(device.type, dtype=autocast, enabled=False),
# ODIN's gradient underflows in fp16
- torch.autograd.grad(loss * FP16_LOSS_SCALE if half else loss, images)
+ torch.autograd.grad(loss, images)
@ lhact/devices.py devices
# matrix products in TF32 where full precision was asked for
- precision = "tf32" if tf32 else "ieee"
+ precision = "tf32"
@ lhact/extraction/head.py networks
# features that are scaled to one length pass
- constant = bool((lengths / lengths.mean() - 1).abs().max() < 1e-4)
+ constant = False
# a network that does more after its head passes
- if not fits or not _same(made, found.logits):
+ if not fits:
# the head is the last layer that is defined, not the one that makes the logits
- made = [key for key, values in outputs.items() if len(values) == 1 and _same(values[0], logits)]
+ made = list(outputs)
@ lhact/extraction/checkpoints.py networks
# averaged weights are passed over
- for key in (*AVERAGED, *PLAIN) if
+ for key in (*PLAIN, *AVERAGED) if
@ lhact/extraction/weights.py networks
# other weights have the same hash, so their cache passes for this network's
- digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
+ digest.update(b"")
@ lhact/extraction/weights.py fuzz
# a checkpoint may run code
- return torch.load(path, map_location="cpu", weights_only=True)
+ return torch.load(path, map_location="cpu", weights_only=False)
@ lhact/cache_writer.py cache
# a killed --overwrite of an unfinished cache leaves a part of it that passes for whole
- write_atomically(folder / f"{dataset}.rows", b"{}")
+ (folder / f"{dataset}.rows").unlink(missing_ok=True)
# a run that ends between two sets leaves a cache that passes for whole
- elif not record.exists():
+ elif False:
# a run of another kind goes on from this one's rows
- if type(rows) is not int or promise["key"] != self._key(rows):
+ if type(rows) is not int:
# rows that could not be written are promised
- if not self.failed:
+ if True:
# workers of a killed run hold its lock
- fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
+ fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
# a link planted in a cache is followed
- path.unlink()
+ pass
# a removed lock lets two runs write
- if not held:
+ if False:
# noise and ODIN's images of the old network survive --overwrite
- if lines and overwrite:
+ if False:
@ lhact/cache.py cache
# activations in half precision pass for those in single
- if found.precision != wanted.precision:
+ if False:
# a cache that is replaced while it is read gives numbers
- changed = stamp_of(path) != stamp
+ changed = False
@ lhact/extraction/build.py get_activation
# TF32 stays on under --precision fp32
- with ExitStack() as held, gpu_arithmetic(PRECISIONS[job.precision].tf32):
+ with ExitStack() as held, gpu_arithmetic(True):
# ODIN moves images by the logits of a head without its bias
- head = (network.weight.to(setup.device), network.bias.to(setup.device))
+ head = (network.weight.to(setup.device), 0 * network.bias.to(setup.device))
# the head is cached without its bias
- cache_writer.save_head(job.folder, network.weight.numpy(), network.bias.numpy())
+ cache_writer.save_head(job.folder, network.weight.numpy(), 0 * network.bias.numpy())
# pictures that were replaced under the same name and size are not seen
- if cached.content is None or cached.modified == part.info.modified:
+ if True:
@ lhact/extraction/build.py ranks_extraction
# the second machine's ranks take GPUs that only the first would have
- local_gpu(ranks.local, torch.cuda.device_count())
+ local_gpu(ranks.rank, torch.cuda.device_count())
# every rank computes all batches
- own = rows[ranks.rank :: ranks.size]
+ own = rows
@ get_activation.py get_activation
# ID images of one's own are compared with the top-1 published for ImageNet's
- comparable=benchmark.published and not args.id,
+ comparable=benchmark.published,
@ lhact/extraction/ranks.py ranks
# the second machine's ranks count on from the first's: none of its GPUs is theirs
- local = int(os.environ.get("LOCAL_RANK") or 0)
+ local = int(os.environ.get("RANK") or 0)
# a machine's first rank prints, too, on each of several
- if not _started_by_torchrun() or os.environ["RANK"] == "0":
+ if not _started_by_torchrun() or os.environ["LOCAL_RANK"] == "0":
@ lhact/evaluation/evaluate.py eval
# the result does not say what settings were selected on
- selected_on=question.select_on,
+ selected_on=None,
# a set with more images than the published one is compared without a word
- if name in opened.sets and opened.sets[name].images != image_set.images
+ if name in opened.sets and opened.sets[name].images < image_set.images
# --reproduce calls percentiles the default of a network that is V1 by its activations
- found = reproduce.reproduce(opened, device, decided.published, bar.update)
+ found = reproduce.reproduce(opened, device, False, bar.update)
# a method that was asked for by name is left out
- _say_left_out if "all" in question.methods else None,
+ _say_left_out,
@ lhact/evaluation/select.py select
# of equal settings the last one is chosen, which depends on the order of the sweep alone
- if method in ranks and ranks[method] < ranks[held]:
+ if method in ranks and ranks[method] <= ranks[held]:
# of settings with equal FPR95 the one with the lowest AUROC
- method: (tied_at_threshold(*pair) > MOST_TIES, fpr95(*pair), -auroc(*pair))
+ method: (tied_at_threshold(*pair) > MOST_TIES, fpr95(*pair), auroc(*pair))
# settings are selected on the ID images that are tested on
- sets = {"id": selection.cache.calibration, "ood": selection.chosen_on}
+ sets = {"id": selection.cache.id, "ood": selection.chosen_on}
# the set that settings are selected on is also tested on
- return Selection(cache.without(name), cache.sets[name])
+ return Selection(cache, cache.sets[name])
@ lhact/evaluation/results.py uncertainty text
# a difference is taken from other draws than the first method's
- map(interval, ours - first)
+ map(interval, ours - np.roll(first, 1, axis=-1))
# a standard deviation over names with n in its denominator
- (STD, statistics.stdev)
+ (STD, statistics.pstdev)
@ lhact/evaluation/uncertainty.py uncertainty
# OOD images that score just the threshold pass
- below > threshold
+ below >= threshold
# ties count whole
- cumulative.take(up_to)
+ cumulative.take(below)
@ lhact/evaluation/results.py evaluation
# ODIN's published row beside another perturbation
- if fitted.perturbed and perturbation != published.ODIN_PERTURBATION:
+ if False:
# the published average over four sets beside one over three
- whole = known and name == AVERAGE and tuple(rows) == published.DATASETS
+ whole = known and name == AVERAGE
@ lhact/cache.py evaluation
# thresholds are taken from the images that are tested on
- return self.sets.get(CALIBRATION, self.id)
+ return self.id
@ lhact/methods/fit.py fit evaluation
# all settings of a sweep share the first one's scores
- key = (before, step.name, tuple(step.parameters.items()))
+ key = (before, step.name)
# a rectifier is fitted to activations that those before it have not rectified
- "calibration": _Rectified(self.calibration.batches, before),
+ "calibration": _Rectified(self.calibration.batches, ()),
@ lhact/methods/compose.py compose
# one threshold for both ends of LHAct is refused
- if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
+ if isinstance(low, int | float) and isinstance(high, int | float) and low >= high:
@ lhact/methods/scores_by_neighbours.py scores
# NNGuide's bank comes from the first classes alone
- chosen = torch.arange(bank) * rows // bank
+ chosen = torch.arange(bank)
@ lhact/detector.py detector
# the threshold comes from images that the method has learnt, which score too high
- if held_out is None and learnt:
+ if False:
# a file is taken for one of the weights that the network has when it is saved
- self._digests,
+ self._digests_now(),
@ lhact/detector_file.py detector
# a published detector runs on a network with other layers below the same head
- if known and len(hashes) > 1:
+ if False:
# no network is the one of a cache of features from elsewhere
- and saved.network.given_as is None
+
# a cache of logits gives a detector that no network has
- if opened.info.network.given_as == LOGITS:
+ if False:
@ lhact/detector_inputs.py detector_inputs
# labels of another kind are taken for class numbers
- if labels.shape != (rows,) or not is_whole:
+ if labels.shape != (rows,):
# a wrapper's name stands before all names of tensors
- while isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
+ while False:
@ lhact/extraction/head.py detector_inputs
# a layer that makes something else of its weights is taken for a linear one
- made = nn.functional.linear(activations, head.weight, head.bias)
+ made = head(activations)
@ lhact/export.py export
# an exported program decides by another threshold than the detector
- torch.where(score > self.threshold, 1, -1)
+ torch.where(score > 0, 1, -1)
@ lhact/detector.py export
# a detector in another precision cannot be exported
- images = torch.zeros(2, *self.shape, dtype=self.input_dtype)
+ images = torch.zeros(2, *self.shape)
@ lhact/score.py score_command
# a detector of features from elsewhere cannot be used on a network given by name
- settings.pop(GIVEN, None)
+
# a folder without images is passed over, and the run seems to have read all
- return sorted(found, key=lambda item: item[0]) or
+ return sorted(found, key=lambda item: item[0]) and
# a link back to a folder that holds it is followed until the system refuses
- and os.path.realpath(os.path.join(place, name)) not in seen
+
@ lhact/methods/module.py detector
# live, a score is of the logits of activations that were not rectified
- if rectifiers and "logits" in score.inputs:
+ if False:
# what a method has learnt becomes half as precise with the network
- self._buffers[name] = buffer.to(fn(buffer).device)
+ self._buffers[name] = fn(buffer)
@ lhact/evaluation/uncertainty.py uncertainty
# many methods are not compared on the same draws: the difference is not paired
- counts = _counts(sizes, bootstrap.seed, draw)
+ counts = _counts(sizes, bootstrap.seed + start, draw)
# ID and OOD sets of one size are drawn alike
- np.random.default_rng((seed, draw, zlib.crc32(ascii(name).encode())))
+ np.random.default_rng((seed, draw))
@ lhact/from_arrays.py features
# a cache with other labels or paths passes for this one
- named.update(repr((list(paths), labels)).encode())
+ named.update(b"")
# the head loses its bias
- bias = np.array(_float32(_floats(head[1], what[1], ("classes",))))
+ _floats(head[1], what[1], ("classes",))
@ lhact/reporting/lines.py text page
# nothing says where settings were chosen
- return [f"settings chosen on {place}, not on what is tested"] if place else []
+ return []
# a method whose scores are tied is the best of its column
- contenders = [method for method in result.all_methods if not method.tied]
+ contenders = list(result.all_methods)
@ lhact/reporting/plot_style.py plots
# a legend is wider than a figure of one column
- room = figure.get_figwidth() / (0.42 + 0.058 * longest)
+ room = DOUBLE / (0.42 + 0.058 * longest)
@ lhact/reporting/page.py page
# the page shows the images that are right as the wrong ones
- order = np.argsort(scores if dataset == "id" else -scores, kind="stable")
+ order = np.argsort(scores, kind="stable")
@ lhact/benchmarks/userfile.py benchmarks
# paths start from where the program runs, not from the file that they stand in
- folder = os.path.dirname(os.path.abspath(self.file))
+ folder = os.getcwd()
# ImageNet's preprocessing comes before what the file says
- given_preprocessing=given,
+ given_preprocessing=RecordedPreprocessing(),
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
