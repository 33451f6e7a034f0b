"""What torch keeps of each shape that it has multiplied is bounded, unless the user says otherwise."""

import os

import pytest

import gmask
from gmask.hardware import PRIMITIVE_CACHE, PRIMITIVE_CACHE_SHAPES


@pytest.mark.parametrize(("stated", "found"), [(None, str(PRIMITIVE_CACHE_SHAPES)), ("7", "7")])
def test_loading_a_model_bounds_the_cache(monkeypatch: pytest.MonkeyPatch, stated: str | None, found: str) -> None:
    monkeypatch.setenv(PRIMITIVE_CACHE, "") if stated is None else monkeypatch.setenv(PRIMITIVE_CACHE, stated)
    if stated is None:
        monkeypatch.delenv(PRIMITIVE_CACHE)
    gmask.load("bundled")
    assert os.environ[PRIMITIVE_CACHE] == found
