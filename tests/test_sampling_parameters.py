"""Are wrong sampling parameters named before anything runs?"""

from typing import Any

import pytest

from gmask.errors import GmaskError
from gmask.generation.settings import Sampling


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"min_tokens": 65},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"stop": ("",)},
        {"top_logprobs": 21},
    ],
)
def test_wrong_parameters_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(GmaskError, match=next(iter(values))):
        Sampling(**values)
