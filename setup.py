"""The compiled part of the package; everything else stands in pyproject.toml.

Without a C++ compiler the installation succeeds and `megazebra.data.index` serves from numpy, and says so.
"""

import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
from megazebra.data.index.builder import sources_digest

ParallelCompile("MEGAZEBRA_BUILD_JOBS").install()

index_builder = Pybind11Extension(
    "megazebra.data.index._index_builder",
    sorted(glob("csrc/index_builder/*.cpp")),
    depends=sorted(glob("csrc/index_builder/*.hpp")),
    define_macros=[("SOURCES_DIGEST", f'"{sources_digest()}"')],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-fno-tree-loop-distribute-patterns"],
    optional=True,
)

setup(ext_modules=[index_builder])
