"""What no line of the program may do: unpickle, run code or other programs, read arrays or archives without a safeguard."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "lhact").rglob("*.py")])

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "subprocess",
    "pty",
    "ctypes",
    "runpy",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
STARTING = ("system", "popen", "exec", "spawn", "posix_spawn", "fork", "startfile")


def named(node: ast.expr) -> str:
    """The dotted name of what is called: `torch.load` of `torch.load(path)`."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def problems(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES:
                yield f"imports {node.module}"
            # Under another name than torch.load its calls could not be told from others.
            yield from (f"imports {node.module}.{alias.name}" for alias in node.names if alias.name in ("load", "system", "popen"))
        elif isinstance(node, ast.Call):
            name = named(node.func)
            given = {keyword.arg: getattr(keyword.value, "value", "not a constant") for keyword in node.keywords}
            if name in BUILTINS or (name.startswith("os.") and name[3:].startswith(STARTING)):
                yield f"calls {name}"
            if name == "torch.load" and given.get("weights_only") is not True:
                yield "calls torch.load without weights_only=True"
            if name in ("np.load", "numpy.load") and given.get("allow_pickle") is not False:
                yield f"calls {name} without allow_pickle=False"
            elif given.get("allow_pickle", False) is not False:
                yield f"calls {name} with pickles"
            if given.get("shell", False) is not False:
                yield f"calls {name} with a shell"
            if name.endswith((".extractall", ".unpack_archive")) and "filter" not in given:
                yield f"calls {name} without a filter"


def test_there_is_something_to_look_at():
    assert {"get_activation.py", "eval.py", "cache.py", "networks.py", "data.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_does_what_is_not_safe(path):
    assert list(problems(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, subprocess as s",
        "from pickle import loads",
        "from torch import load",
        "from os import system",
        "from numpy import load as read",
        "os.system('ls')",
        "os.execv('/bin/ls', [])",
        "os.popen('ls')",
        "os.fork()",
        "eval('1')",
        "exec('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.savez(path, allow_pickle=True)",
        "run(command, shell=True)",
        "tar.extractall(folder)",
        "shutil.unpack_archive(path)",
        "run(command, shell=flag)",
    ],
)
def test_each_of_these_would_be_found(line):
    assert len(list(problems(f"def function():\n    {line}\n"))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "tar.extractall(folder, filter=safe)",
        "os.replace(a, b)",
        "network.eval()",
        "re.compile('a')",
    ],
)
def test_none_of_these_is(line):
    assert list(problems(line)) == []
