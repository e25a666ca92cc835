"""No code of ours runs what a file says, read from the sources with `ast`: nothing is imported here.

A call that may do so is refused unless it stands in ALLOWED with the reason why it is safe there. Not looked for are
the pickles that Python sends between a program and processes it has started itself (multiprocessing).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["megazebra", "tools", "pretrain_zebra.py", "setup.py"]

BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
# Read a format in which a file may name functions to be called, or run what they are given.
UNSAFE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle"),
    *(
        "torch.jit.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
        "torch.export.load",
        "torch.ops.load_library",
    ),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"),
    *("os.system", "os.popen", "runpy.run_path", "runpy.run_module", "importlib.import_module"),
    *("ctypes.CDLL", "ctypes.cdll.LoadLibrary"),
    *("jinja2.Environment", "jinja2.Template"),  # not the sandboxed ones
    # Objects that another process sends are pickles.
    *("torch.distributed.all_gather_object", "torch.distributed.gather_object", "torch.distributed.recv_object_list"),
    *("torch.distributed.broadcast_object_list", "torch.distributed.scatter_object_list"),
    # Archives: names in them may lead out of the folder.
    *("shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile"),
}
UNSAFE_METHODS = {"extractall"}
# Safe with this argument only; None: also without it.
ARGUMENTS: dict[str, tuple[str, list[bool | None]]] = {
    "torch.load": ("weights_only", [True]),
    "numpy.load": ("allow_pickle", [None, False]),
}
# Wherever they are passed on.
SWITCHES = {"shell", "trust_remote_code"}

ALLOWED = {
    ("megazebra/attention/backend.py", "importlib.import_module"): "the name is that of a file in megazebra/attention",
    ("megazebra/context/strategy.py", "importlib.import_module"): "the names are those that the schema allows",
    ("megazebra/compiled.py", "importlib.import_module"): "the names are those of our own compiled modules",
    ("megazebra/attention/flash.py", "importlib.import_module"): "the names are constants: versions of FlashAttention",
    ("megazebra/attention/triton.py", "importlib.import_module"): "the name is a constant, imported late",
    ("megazebra/parallel/collectives.py", "torch.distributed.all_gather_object"): "between ranks of one run, which are "
    "one program; who can join its process group can send it gradients as well",
    ("megazebra/attention/simd.py", "ctypes.CDLL"): "torch's own library, by the path that torch gives",
    ("tools/bench/measure.py", "ctypes.CDLL"): "the C library: the name is a constant",
    ("megazebra/supervise/supervisor.py", "shell"): "the command is what the user gives as --available",
    ("tools/bench_data.py", "importlib.import_module"): "the names are constants: what is compared with",
}


def unsafe_calls(source: str) -> Iterator[str]:
    """What stands in a source and may run what it reads, by its full name; several times where it is called so."""
    tree = ast.parse(source)
    full_names = _imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = _full_name(node, full_names)
            if name in UNSAFE or (isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in full_names):
                yield name
        if not isinstance(node, ast.Call):
            continue
        name = _full_name(node.func, full_names)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS:
            yield node.func.attr
        if name in ARGUMENTS:
            argument, safe = ARGUMENTS[name]
            if _constant(given.get(argument)) not in safe or None in given:
                yield name
        yield from (switch for switch in SWITCHES & given.keys() if _constant(given[switch]) is not False)


def _imports(tree: ast.AST) -> dict[str, str]:
    """What the names that imports bind stand for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _constant(node: ast.AST | None) -> object:
    """The value of a constant, None where there is no argument, and the node itself otherwise."""
    return node.value if isinstance(node, ast.Constant) else node


@cache
def _found() -> set[tuple[str, str]]:
    files = [
        file for name in SOURCES for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    assert len(files) > 200
    return {
        (file.relative_to(ROOT).as_posix(), call)
        for file in files
        for call in unsafe_calls(file.read_text(encoding="utf-8"))
    }


def test_nothing_runs_what_a_file_says() -> None:
    assert sorted(_found() - ALLOWED.keys()) == []


def test_every_exception_is_still_made() -> None:
    assert sorted(ALLOWED.keys() - _found()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.load(f)", "torch.load"),
        ("from torch import load as read\nread(f, weights_only=False)", "torch.load"),
        ("import torch\ntorch.load(f, weights_only=flag)", "torch.load"),
        ("import torch\ntorch.load(f, weights_only=True, **more)", "torch.load"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load"),
        ("import pickle as p\nread = p.loads", "pickle.loads"),
        ("import yaml\nyaml.load(f, yaml.SafeLoader)", "yaml.load"),
        ("import yaml\nclass A(yaml.Loader): pass", "yaml.Loader"),
        ("eval('1')", "eval"),
        ("list(map(exec, sources))", "exec"),
        ("archive.extractall(folder)", "extractall"),
        ("import subprocess\nsubprocess.run(line, shell=True)", "shell"),
        ("Auto.from_pretrained(f, trust_remote_code=options.trust)", "trust_remote_code"),
        ("import torch.distributed as dist\ndist.broadcast_object_list(x)", "torch.distributed.broadcast_object_list"),
        ("from importlib import import_module\nimport_module(name)", "importlib.import_module"),
    ],
)
def test_the_check_finds_them(source: str, expected: str) -> None:
    assert list(unsafe_calls(source)) == [expected]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import yaml\nclass A(yaml.SafeLoader): pass",
        "import re, subprocess\nre.compile('a')\nsubprocess.run(['ls'], shell=False)",
        "model.eval()",
    ],
)
def test_what_is_safe_passes(source: str) -> None:
    assert list(unsafe_calls(source)) == []
