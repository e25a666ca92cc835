"""Who may import whom, read from the sources with `ast`: nothing is imported here.

Every import counts, also those inside functions; those under `if TYPE_CHECKING` are never made.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megazebra"

# Lowest first. A module may import its own unit and units of lower tiers; never another unit of its own tier.
# The longest name that fits decides.
TIERS: list[list[str]] = [
    ["megazebra"],  # the version
    ["pattern", "labels", "errors", "durable", "compiled", "parallel.traffic"],
    ["launch"],
    ["config"],
    ["parallel", "attention", "data.errors", "supervise"],
    ["data.index"],
    ["data.corpus"],
    ["data.samples"],
    ["data.sources"],
    ["data.prepare", "data"],
    ["context"],
    ["models", "train.schedule", "train.guard", "train.deepspeed_config"],
    ["plan", "train.optimizer"],
    ["report", "train.engine"],
    ["checkpoint", "monitor"],
    ["hf"],
    ["foreign", "generate"],
    ["evaluate"],
    ["train"],
]
ONLY = {  # what a unit may import beyond the rule of tiers: nothing but these
    "data.index": {"labels", "compiled", "data.errors"},
    "data.corpus": {"durable", "data.errors", "data.index"},
    "data.samples": {"labels", "data.errors", "data.index", "data.corpus"},
    "data.sources": {"config", "data.errors", "data.index", "data.corpus", "data.samples"},
    "data.prepare": {"megazebra", "durable", "data.errors", "data.corpus"},
    "data": {"config", "labels", "data.errors", "data.index", "data.corpus", "data.samples", "data.sources"},
    "plan": {"megazebra", "config", "pattern", "context", "parallel.traffic", "train.deepspeed_config"},
    "report": {"megazebra", "config", "durable", "errors", "plan"},
    "monitor": {"config", "errors", "report"},
    "supervise": {"megazebra", "config", "errors", "launch"},
    "train.schedule": {"megazebra", "config", "train"},
    "train.deepspeed_config": {"megazebra", "config", "train"},
}
WITHOUT_TORCH = [
    "pattern",
    "labels",
    "errors",
    "durable",
    "launch",
    "config",
    "data.errors",
    "data.index",
    "data.corpus",
    "data.samples",
    "data.sources",
    "data.prepare",
    "parallel.traffic",
    "plan",
    "report",
    "monitor",
    "supervise",
    "train.schedule",
    "train.deepspeed_config",
]
KNOW_DEEPSPEED = {"train.engine", "checkpoint.fragments"}


@dataclass(frozen=True)
class Tree:
    """Names are dotted, without 'megazebra.'; the package itself is 'megazebra'.

    imports: for every module, what it imports, with third-party names as they are, under 'inside' and 'outside'.
    """

    inside: dict[str, set[str]]
    outside: dict[str, set[str]]

    @classmethod
    def read(cls, package: Path) -> Tree:
        # A folder without __init__.py is data: hf/remote_code is copied to exported models, and imported there.
        paths = [path for path in sorted(package.rglob("*.py")) if (path.parent / "__init__.py").exists()]
        files = {_module_name(path, package): path for path in paths}
        tree = cls({}, {})
        for module, path in files.items():
            names = set(_imported(ast.parse(path.read_text(encoding="utf-8"))))
            own = {name for name in names if name.split(".")[0] == package.name}
            tree.outside[module] = names - own
            tree.inside[module] = {_nearest(name, files, package) for name in own} - {module}
        return tree

    def closure(self, module: str) -> set[str]:
        """The modules that importing `module` runs: its imports, and the packages they lie in."""
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self.inside:
                continue
            seen.add(name)
            waiting += [*self.inside[name], *_parents(name)]
        return seen


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or package.name


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return ["megazebra", *(".".join(parts[:i]) for i in range(1, len(parts)))]


def _nearest(name: str, files: Iterable[str], package: Path) -> str:
    """The module that a dotted name is or lies in: `from megazebra.config.schema import Config` gives config.schema."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in files:
        parts = parts[:-1]
    return ".".join(parts) or package.name


def _imported(node: ast.AST) -> Iterable[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imported(ast.Module([other], []))
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the whole path"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from _imported(child)


def _unit(module: str) -> str:
    units = [unit for tier in TIERS for unit in tier if module == unit or module.startswith(f"{unit}.")]
    if not units:
        raise AssertionError(f"{module} has no place in TIERS")
    return max(units, key=len)


def _tier(unit: str) -> int:
    return next(level for level, tier in enumerate(TIERS) if unit in tier)


def wrong_directions(tree: Tree) -> list[str]:
    wrong = []
    for module, imports in tree.inside.items():
        unit = _unit(module)
        for imported in sorted(imports):
            other = _unit(imported)
            if other == unit:
                continue
            if _tier(other) >= _tier(unit) or other not in ONLY.get(unit, {other}):
                wrong.append(f"{module} imports {imported}")
    return wrong


def heavy_imports(tree: Tree) -> list[str]:
    """Modules that must not load torch or deepspeed and do, at first or at second hand."""
    wrong = []
    for module in tree.inside:
        if _unit(module) not in WITHOUT_TORCH:
            continue
        for loaded in sorted(tree.closure(module)):
            heavy = {name.split(".")[0] for name in tree.outside[loaded]} & {"torch", "deepspeed"}
            wrong += [f"{module} loads {name} through {loaded}" for name in sorted(heavy)]
    return wrong


def deepspeed_users(tree: Tree) -> set[str]:
    return {module for module, names in tree.outside.items() if any(n.split(".")[0] == "deepspeed" for n in names)}


def test_imports_go_one_way() -> None:
    assert wrong_directions(Tree.read(PACKAGE)) == []


def test_what_must_start_fast_imports_no_torch() -> None:
    assert heavy_imports(Tree.read(PACKAGE)) == []


def test_only_the_engine_and_the_checkpoint_know_deepspeed() -> None:
    assert deepspeed_users(Tree.read(PACKAGE)) <= KNOW_DEEPSPEED


def test_every_unit_of_the_rules_exists() -> None:
    modules = set(Tree.read(PACKAGE).inside)
    rules = {unit for tier in TIERS for unit in tier} | set(ONLY) | set(WITHOUT_TORCH) | KNOW_DEEPSPEED
    assert rules <= modules


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """A package that breaks every rule once, and one that looks as if it did."""
    sources = {
        "__init__": "",
        "pattern": "import typing\nif typing.TYPE_CHECKING:\n    import torch\n    from megazebra import models\n",
        "config.__init__": "from megazebra.config.schema import Config\n",
        "config.schema": "from megazebra.pattern import x\n",
        "config.late": "def f():\n    import torch.nn\n",
        "parallel.__init__": "",
        "parallel.mesh": "import torch\nfrom megazebra.config import Config\nfrom megazebra import attention\n",
        "attention.__init__": "from megazebra.attention.kernel import attend\n",
        "attention.kernel": "import torch\ntry:\n    import deepspeed\nexcept ImportError:\n    pass\n",
        "data.__init__": "",
        "data.index.__init__": "import megazebra.durable\n",
        "data.corpus.__init__": "import megazebra.data.index\nfrom megazebra.data.prepare import text\n",
        "data.prepare.__init__": "",
        "data.prepare.text": "import megazebra.data.corpus\nimport megazebra.data.loader\n",
        "data.samples": "import megazebra.data.loader\n",
        "data.loader": "import torch\nimport megazebra.data.samples\nimport megazebra.data.prepare.text\n",
        "durable": "",
        "models.__init__": "from megazebra.parallel import mesh\n",
        "plan.__init__": "",
        "plan.flops": "from megazebra.config.schema import Config\nimport megazebra.parallel.mesh\n",
        "context.__init__": "import megazebra.models\n",
        "train.__init__": "",
        "train.engine": "import deepspeed\nimport megazebra.models\n\nclass A:\n    import megazebra.train.loop\n",
        "train.loop": "import megazebra.train.engine\n",
    }
    for name, source in sources.items():
        path = tmp_path / "megazebra" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "megazebra"


def test_the_checks_find_what_is_wrong(small_package: Path) -> None:
    tree = Tree.read(small_package)
    assert wrong_directions(tree) == [
        "context imports models",
        "data.corpus imports data.prepare.text",
        "data.index imports durable",
        "data.loader imports data.prepare.text",
        "data.prepare.text imports data.loader",
        "data.samples imports data.loader",
        "parallel.mesh imports attention",
        "plan.flops imports parallel.mesh",
        "train.engine imports train.loop",
    ]
    assert sorted(heavy_imports(tree)) == [
        "config.late loads torch through config.late",
        "data.corpus loads torch through data.loader",
        "data.prepare.text loads torch through data.loader",
        "data.samples loads torch through data.loader",
        "plan.flops loads deepspeed through attention.kernel",
        "plan.flops loads torch through attention.kernel",
        "plan.flops loads torch through parallel.mesh",
    ]
    assert deepspeed_users(tree) == {"attention.kernel", "train.engine"}
    (small_package / "elsewhere.py").write_text("")
    with pytest.raises(AssertionError, match="elsewhere has no place in TIERS"):
        wrong_directions(Tree.read(small_package))
