"""Tests of the index run twice: with the compiled kernels, and with their numpy twins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megazebra.data.index import builder


@pytest.fixture(scope="module", params=["C++", "numpy"])
def each_builder(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs what uses it once per builder; per module, as hypothesis wants it."""
    if request.param == "C++" and builder.native() is None:
        pytest.skip(builder.describe())
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "numpy":
            monkeypatch.setattr(builder, "_native", None)
        yield
