"""The compiled parts of the package; everything else stands in pyproject.toml.

Without a C++ compiler the installation succeeds, slower Python serves in their place, and says so. They are built
without torch: the index builder deals with numpy's buffers, attention with plain pointers.
"""

import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
from megazebra.compiled import sources_digest

ParallelCompile("MEGAZEBRA_BUILD_JOBS").install()


def extension(module: str, name: str, flags: list[str]) -> Pybind11Extension:
    """The module built from the C++ files of csrc/NAME."""
    return Pybind11Extension(
        module,
        sorted(glob(f"csrc/{name}/*.cpp")),
        depends=sorted(glob(f"csrc/{name}/*.hpp")),
        define_macros=[("SOURCES_DIGEST", f'"{sources_digest(name)}"')],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", *flags],
        optional=True,
    )


setup(
    ext_modules=[
        extension("megazebra.data.index._index_builder", "index_builder", ["-fno-tree-loop-distribute-patterns"]),
        extension("megazebra.attention._windowed_attention", "windowed_attention", ["-ffp-contract=fast"]),
    ]
)
