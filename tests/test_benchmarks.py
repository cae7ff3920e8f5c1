"""Benchmarks: those that are built in, as users have their files, and the user's own FILE.toml."""

import csv
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_images

import eval as eval_script
import get_activation
from lhact import data, features
from lhact.benchmarks.builtin import BENCHMARKS, MissingData, locate
from lhact.benchmarks.userfile import BadBenchmark, open_benchmark, read
from lhact.records import Preprocessing, RecordedPreprocessing

MODULE = """
from torch import nn

def small(num_classes=1000):
    body = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(4, num_classes))
"""
README = (Path(__file__).parents[1] / "datasets" / "README.md").read_text()
EXAMPLE = re.search(r"```toml\n(.*?)```", README, flags=re.DOTALL)[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with all that README's example names, and flowers.toml; the current folder is
    another one."""
    folder, name = tmp_path / "work", f"networks_{tmp_path.name}".replace("-", "_")
    write_images(folder / "flowers/test", [f"{kind}/{n}.png" for kind in "abc" for n in range(4)])
    write_images(folder / "flowers/train", [f"{kind}/t{n}.png" for kind in "abc" for n in range(2)])
    write_images(folder / "insects", ["ant.png", "bee.png"])
    write_images(folder / "images", ["birds/crow.jpg", "birds/owl.jpg", "birds/tit.jpg"])
    (folder / "birds.txt").write_text("birds/owl.jpg -1\nbirds/crow.jpg -1\nbirds/tit.jpg -1\n")
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=noise)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    shapes = {"0.weight": (4, 3, 3, 3), "0.bias": (4,), "4.weight": (3, 4), "4.bias": (3,)}
    torch.save({key: torch.randn(s) for key, s in shapes.items()}, folder / "small.pth")
    (folder / "flowers.toml").write_text(EXAMPLE.replace("my_networks", name))
    monkeypatch.chdir(tmp_path)
    return folder


def run(main, capsys, *arguments):
    """(exit status, stdout, stderr)."""
    try:
        status = main([str(part) for part in arguments])
    except SystemExit as exit:  # argparse ends the process itself
        status = exit.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


def extract(capsys, *arguments):
    options = ("--cache-dir", "caches", "--workers", 0, "--device", "cpu")
    return run(get_activation.main, capsys, *options, *arguments)


def evaluate(capsys, *arguments):
    """The rows of the CSV, by OOD set or average, and what is said."""
    options = ("--cache-dir", "caches", "--methods", "energy", "--format", "csv", "--device", "cpu")
    status, out, err = run(eval_script.main, capsys, *options, *arguments)
    assert status == 0, err
    return {row["dataset"]: row for row in csv.DictReader(io.StringIO(out))}, err


# ---- the user's own file ----


def test_own_file_from_images_to_the_table(place, capsys):
    status, _, err = extract(capsys, "--benchmark", "work/flowers.toml")
    assert status == 0, err
    assert "shorter side to 32, crop 28" in err
    (folder,) = Path("caches/flowers").iterdir()
    weight, bias = (torch.load(place / "small.pth")[f"4.{key}"] for key in ("weight", "bias"))
    energy = {}
    for name, count in {"id": 12, "calibration": 6, "Insects": 2, "Birds": 3, "Noise": 5}.items():
        rows = np.load(folder / f"{name}.npy")
        assert rows.shape == (count, 4)
        energy[name] = torch.logsumexp(torch.from_numpy(rows) @ weight.T + bias, 1).numpy()
    rows, _ = evaluate(capsys, "--benchmark", "work/flowers.toml")
    assert [*rows] == ["Insects", "Birds", "Noise", "near average", "far average", "average"]
    auroc = {
        name: 100 * np.mean([(a > b) + (a == b) / 2 for a in energy["id"] for b in energy[name]])
        for name in ("Insects", "Birds", "Noise")
    }
    auroc["near average"] = (auroc["Insects"] + auroc["Birds"]) / 2
    auroc["far average"] = auroc["Noise"]
    for name, value in auroc.items():
        assert float(rows[name]["auroc"]) == pytest.approx(value, abs=1e-3), name


def test_the_command_line_comes_before_the_file(place, capsys, tmp_path):
    other = torch.load(place / "small.pth")
    torch.save({**other, "4.weight": torch.ones(2, 4), "4.bias": torch.ones(2)}, "other.pth")
    status, _, err = extract(
        capsys,
        *("--benchmark", place / "flowers.toml", "--arch-arg", "num_classes=2"),
        *("--checkpoint", "other.pth", "--crop", 20, "--name", "mine"),
        *("--ood", f"Mine={place / 'insects'}"),
    )
    assert status == 0, err
    assert "crop 20" in err
    sets = {path.stem for path in Path("caches/flowers/mine").glob("*.npy")}
    assert sets == {"id", "calibration", "Mine"}
    assert np.load("caches/flowers/mine/head.npz")["weight"].shape == (2, 4)


@pytest.fixture
def jobs(monkeypatch):
    """What get_activation.py would do."""
    seen = []
    monkeypatch.setattr(get_activation, "build", lambda job, ranks: seen.append(job))
    return seen


def test_preprocessing_of_the_file_is_for_its_network_and_comes_before_the_weights(
    place, capsys, jobs, checkpoint
):
    """A network that is named on the command line may need other sizes than the file's."""
    file = ("--benchmark", place / "flowers.toml")
    assert extract(capsys, *file, "--crop", 20)[0] == 0
    assert extract(capsys, *file, "--arch", "resnet18", "--checkpoint", checkpoint)[0] == 0
    own, other = jobs
    channels = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert own.preprocessing == RecordedPreprocessing(32, 20, None, *channels)
    assert other.preprocessing == RecordedPreprocessing()
    assert other.default_preprocessing == Preprocessing(32, 28, "bilinear", *channels)
    assert other.network.arguments == {}


def test_weights_by_name_and_list_root_of_the_command_line(place, capsys, jobs):
    text = '[network]\narch = "resnet50"\nhead = "fc"\nweights = "IMAGENET1K_V2"\n'
    file = place / "named.toml"
    file.write_text('id = "flowers/test"\n[ood]\nBirds = "insects"\n' + text)
    assert extract(capsys, "--benchmark", file, "--list-root", "lists")[0] == 0
    (job,) = jobs
    network = job.network
    assert (network.weights, network.checkpoint, network.head) == ("IMAGENET1K_V2", None, "fc")
    assert job.options.list_root == Path("lists")
    assert "calibration" not in job.sources


def test_paths_start_from_the_files_folder_or_home(place, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    text = 'id = "~/a"\ncalibration = "../b"\n[ood]\nC = "/c"\nD = "torchvision:SVHN:test"\n'
    (place / "paths.toml").write_text(text)
    places = [image_set.places for image_set in read(Path("work/paths.toml")).sets.values()]
    parent = str(place.parent)
    wanted = ("/home/of/somebody/a", f"{parent}/b", "/c", "torchvision:SVHN:test")
    assert places == [(one,) for one in wanted]


HEAD = 'id = "a"\n[ood]\nBirds = "b"\n'
WRONG = {
    "id = ": "is no TOML",
    'id = "\udcff"': "is no TOML",
    'id = "a"\n[odd]\nBirds = "b"': "odd is no key (did you mean ood?); known are",
    '[ood]\nBirds = "b"': "id is missing",
    "id = 3\n[ood]\nB = 'b'": "id must be a source",
    "id = ''\n[ood]\nB = 'b'": "id.source must be a text",
    'id = "a"': "ood has no sets",
    'id = "a"\nood = "b"': "ood must be a table, got 'b'",
    'id = "a"\n[ood]\nSUN = "b"\nsun = "c"': "SUN and sun differ by letter case",
    'id = "a"\n[ood]\nID = "b"': "ood.ID is a name that no OOD set may",
    'id = "a"\n[ood]\naverage = "b"': "ood.average is a name that no OOD set may",
    'id = "a"\n[ood]\n"a b" = "b"': "ood.a b is no name that can be used",
    'id = "a"\n[ood.B]\nlist_root = "b"': "ood.B.source is missing",
    'id = "a"\n[ood.B]\nsuorce = "b"': "B.suorce is no key (did you mean source?)",
    'id = "a"\n[ood.B]\nsource = "b"\nlist_root = "c"': "B.list_root goes with a list FILE.txt",
}
WRONG |= {
    HEAD + text: said
    for text, said in {
        '[groups]\nnear = ["Brids"]': "groups.near has no OOD set 'Brids' (did you mean Birds?)",
        "[groups]\nnear = [[1]]": "groups.near has no OOD set [1]",
        "[groups]\nnear = []": "groups.near must be a list of OOD sets, got []",
        '[groups]\nn = ["Birds", "Birds"]': "groups.n names a set twice",
        '[groups]\n"\\n" = ["Birds"]': "groups.\\n is no name",
        "[network]\narchs = 1": "network.archs is no key (did you mean",
        '[network]\nhead = "fc"': "network.arch is missing",
        "[network]\narch = 1": "network.arch must be a text, got 1",
        '[network]\narch = "x"\nweights = "y"\ncheckpoint = "z"': "network.checkpoint exclude",
        '[network]\narch = "x"\narch_args = { "a-b" = 1 }': "arch_args.a-b is no name of a Python",
        '[network]\narch = "x"\narch_args = { a = { b = 1 } }': "arch_args.a must be a text, a num",
        "[preprocessing]\nresize = -1": "preprocessing.resize must be pixels, 0",
        "[preprocessing]\nsquash = 1": "preprocessing.squash must be true or false",
        "[preprocessing]\ncrop = true": "preprocessing.crop must be pixels",
        "[preprocessing]\ninterpolation = 'cubic'": "interpolation must be one of bilinear, ",
        "[preprocessing]\nmean = [0, nan, 0]": "preprocessing.mean must be three numbers",
        "[preprocessing]\nstd = [1, 0, 1]": "std must be three numbers above 0",
    }.items()
}


@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=range(len(WRONG)))
def test_wrong_files_are_told_in_one_line_that_names_file_and_key(text, said, tmp_path, capsys):
    file = tmp_path / "own.toml"
    file.write_text(text, errors="surrogateescape")
    for main in (get_activation.main, eval_script.main, data.main):
        status, out, err = run(main, capsys, "--benchmark", file)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        assert f"{file}" in err
        assert said in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar10.toml", "a benchmark cifar10 is built in; rename the file"),
        ("ImageNet.toml", "a benchmark imagenet is built in"),
        ("my own.toml", "must be made of letters"),
        ("absent.toml", "cannot be read: No such file"),
    ],
)
def test_names_that_a_file_cannot_have(name, said, tmp_path):
    if "absent" not in name:
        (tmp_path / name).write_text(HEAD)
    with pytest.raises(BadBenchmark, match=said):
        open_benchmark(str(tmp_path / name))


@pytest.mark.parametrize("main", [get_activation.main, eval_script.main, data.main])
def test_an_unknown_name_is_no_command_line(main, capsys):
    status, out, err = run(main, capsys, "--benchmark", "openod-cifar10")
    assert (status, out) == (2, "")
    assert "'openod-cifar10' is no benchmark (did you mean openood-cifar10?)" in err
    assert all(name in err for name in BENCHMARKS)


NOBODYS = "~no-such-user/x"
FEATURES = ("--name", "x", "--logits", "--ood", "SUN=x.npy")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (data.main, ("--benchmark", f"{NOBODYS}.toml")),
        (data.main, ("--benchmark", "cifar10", "--data-root", NOBODYS)),
        (get_activation.main, ("--data-root", NOBODYS)),
        (eval_script.main, ("--cache-dir", NOBODYS)),
        (features.main, (*FEATURES, "--id", f"{NOBODYS}.npy")),
        (features.main, (*FEATURES, "--id", f"{NOBODYS}.npz:a")),
    ],
)
def test_the_home_of_nobody_holds_nothing(main, arguments, capsys):
    status, out, err = run(main, capsys, *arguments)
    assert status == 1
    assert NOBODYS in out + err


def test_states_of_an_own_file(place, capsys):
    (place / "images/birds/owl.jpg").unlink()
    shutil.rmtree(place / "insects")
    with open(place / "flowers.toml", "a") as file:
        file.write('[ood.House-numbers]\nsource = "torchvision:SVHN:test"\n')
    text = (place / "flowers.toml").read_text()
    status, out, _ = run(data.main, capsys, "--benchmark", place / "flowers.toml")
    assert status == 1
    states = {line.split()[0]: line for line in out.splitlines()}
    assert "complete (12)" in states["id"]
    assert "complete (6)" in states["calibration"]
    assert "missing" in states["Insects"]
    assert "names 1 of 3 files that cannot be found" in states["Birds"]
    assert "line 1: birds/owl.jpg" in states["Birds"]
    assert "complete (5)" in states["Noise"]
    assert "not there, or not whole; get_activation.py --download" in states["House-numbers"]
    assert (place / "flowers.toml").read_text() == text
    assert not Path("datasets").exists()
    (place / "flowers.toml").write_text(text.replace(":SVHN:test", ":SVNH:test"))
    _, out, _ = run(data.main, capsys, "--benchmark", place / "flowers.toml")
    assert "unreadable: torchvision:SVNH:test is not known" in out


def test_images_of_every_source_are_checked(place, capsys):
    file = ("--benchmark", place / "flowers.toml", "--check-images")
    assert run(data.main, capsys, *file)[:2] == (0, "28 images can be read, 0 cannot\n")
    (place / "images/birds/owl.jpg").write_bytes(b"no image")
    status, out, _ = run(data.main, capsys, *file)
    assert status == 1
    assert out.splitlines()[0].startswith("Birds: ")
    assert "owl.jpg" in out
    assert "27 images can be read, 1 cannot" in out


def test_missing_sets_of_an_own_file_are_all_listed(place):
    shutil.rmtree(place / "insects")
    (place / "noise.npz").unlink()
    with pytest.raises(MissingData) as caught:
        locate(read(place / "flowers.toml"), Path("datasets"), {})
    head, *sets, _, command, _ = str(caught.value).splitlines()
    assert head == f"2 of the image sets of the benchmark {place}/flowers.toml are missing:"
    assert sets == [f"  Insects: {place}/insects", f"  Noise: {place}/noise.npz"]
    assert command.endswith(f"python -m lhact.data --benchmark {place}/flowers.toml")


# ---- built in ----

# Folder of the images, and list, of every set of OpenOOD v1.5: configs/datasets/*/*_ood.yml there.
CLASSIC, LARGE = "images_classic", "images_largescale"
OPENOOD = {
    "openood-imagenet": {
        "id": (LARGE, "imagenet/test_imagenet"),
        "calibration": (LARGE, "imagenet/train_imagenet"),
        "SSB-hard": (LARGE, "imagenet/test_ssb_hard"),
        "NINCO": (LARGE, "imagenet/test_ninco"),
        "iNaturalist": (LARGE, "imagenet/test_inaturalist"),
        "Textures": (CLASSIC, "imagenet/test_textures"),
        "OpenImage-O": (LARGE, "imagenet/test_openimage_o"),
    }
}
for own, other, name in (("cifar10", "cifar100", "CIFAR-100"), ("cifar100", "cifar10", "CIFAR-10")):
    lists = {"id": f"test_{own}", "calibration": f"train_{own}", name: f"test_{other}"}
    lists |= {"TinyImageNet": "test_tin", "MNIST": "test_mnist", "SVHN": "test_svhn"}
    lists |= {"Textures": "test_texture", "Places365": "test_places365"}
    OPENOOD[f"openood-{own}"] = {key: (CLASSIC, f"{own}/{name}") for key, name in lists.items()}


@pytest.mark.parametrize("name", OPENOOD)
def test_openood_as_its_users_have_it(name, place, capsys):
    """Two images in each set, a third that is on no list; near and far have their own averages."""
    root = Path("data")
    for key, (folder, listed) in OPENOOD[name].items():
        names = [f"{key}/{n}.jpg" for n in range(3)]
        write_images(root / folder, names)
        file = root / "benchmark_imglist" / f"{listed}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        is_id = key in ("id", "calibration")
        file.write_text("".join(f"{names[n]} {n if is_id else -1}\n" for n in (1, 0)))
    chosen = ("--benchmark", name, "--data-root", root)
    status, out, _ = run(data.main, capsys, *chosen)
    assert status == 0
    assert out.count("complete (2)") == len(OPENOOD[name])
    network = ("--arch", read(place / "flowers.toml").arch, "--arch-arg", "num_classes=3")
    network += ("--checkpoint", place / "small.pth", "--resize", 32, "--crop", 32, "--name", "x")
    status, _, err = extract(capsys, *chosen, *network)
    assert status == 0, err
    assert "top-1" in err, "labels come with the lists"
    metrics = ("--metrics", "fpr95", "fpr95_ood_positive")
    rows, err = evaluate(capsys, "--benchmark", name, "--name", "x", *metrics)
    assert "fpr95_ood_positive" in err
    ood = [key for key in OPENOOD[name] if key not in ("id", "calibration")]
    assert [*rows] == [*ood, "near average", "far average", "average"]
    for average, members in (("near average", ood[:2]), ("far average", ood[2:])):
        assert BENCHMARKS[name].groups[average] == tuple(members)
        mean = np.mean([float(rows[member]["auroc"]) for member in members])
        assert float(rows[average]["auroc"]) == pytest.approx(mean, abs=1e-3)
    (root / CLASSIC / "Textures/1.jpg").unlink()
    assert "names 1 of 2 files" in run(data.main, capsys, *chosen)[1]
    textures = f"benchmark_imglist/{OPENOOD[name]['Textures'][1]}.txt"
    (root / textures).unlink()
    status, _, err = extract(capsys, *chosen, *network)
    assert status == 1
    assert f"Textures: data/{textures}" in err
    assert f"its images in data/{CLASSIC}; from https://github.com/Jingkang50/OpenOOD" in err


# openood/evaluation_api/preprocessor.py of OpenOOD; DICE's and KNN-OOD's code.
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar100", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("openood-cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("openood-cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_preprocessing_of_cifar(name, mean, std):
    assert BENCHMARKS[name].preprocessing == Preprocessing(32, 32, "bilinear", mean, std)


@pytest.mark.parametrize("parent", ["ood_datasets", "ood_data"])
def test_folders_of_cifars_ood_sets(parent, tmp_path):
    """Those that DICE's readme (ood_datasets) and KNN-OOD's code (ood_data) name."""
    places = "places365/test_subset" if parent == "ood_datasets" else "places365"
    folders = {"Textures": "dtd/images", "Places365": places, "LSUN-C": "LSUN"}
    folders |= {"LSUN-R": "LSUN_resize", "iSUN": "iSUN"}
    for folder in folders.values():
        (tmp_path / parent / folder).mkdir(parents=True)
    found = locate(open_benchmark("cifar100"), tmp_path, {})
    assert {key: place.source for key, place in found.items()} == {
        "id": "torchvision:CIFAR100:test",
        "calibration": "torchvision:CIFAR100:train",
        "SVHN": "torchvision:SVHN:test",
        **{key: str(tmp_path / parent / folder) for key, folder in folders.items()},
    }


def test_cifar_without_its_files_says_what_is_missing_and_what_can_be_fetched(tmp_path):
    with pytest.raises(MissingData) as caught:
        locate(open_benchmark("cifar10"), tmp_path, {})
    text = str(caught.value)
    assert f"{tmp_path}/ood_datasets/dtd/images" in text
    assert "5 of the image sets" in text
    assert "--download" in text
    assert "--benchmark cifar10" in text


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "openood-cifar10", "openood-cifar100"])
def test_networks_of_cifar_must_be_named(name, capsys):
    for main, option in ((get_activation.main, "--arch"), (eval_script.main, "--name")):
        status, _, err = run(main, capsys, "--benchmark", name)
        assert (status, err.count("\n")) == (2, 1)
        assert f"the benchmark {name} has no network of its own; give {option}" in err
