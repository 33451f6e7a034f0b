"""What torch keeps of each shape that it has multiplied is bounded, unless the user says otherwise."""

import os

import pytest

import gmask
from gmask.native.primitive_cache import CAPACITY, VARIABLE


@pytest.mark.parametrize(("stated", "found"), [(None, str(CAPACITY)), ("7", "7")])
def test_loading_a_model_bounds_the_cache(monkeypatch: pytest.MonkeyPatch, stated: str | None, found: str) -> None:
    monkeypatch.setenv(VARIABLE, "") if stated is None else monkeypatch.setenv(VARIABLE, stated)
    if stated is None:
        monkeypatch.delenv(VARIABLE)
    gmask.load("bundled")
    assert os.environ[VARIABLE] == found
