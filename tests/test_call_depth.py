"""Are there at most four calls of ours between a public function and the model's forward pass?"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gmask
from tiny_folder import make_folder

SOURCE = str(Path(gmask.__file__).parent)
TEXT = "The [MASK] dog [sMASK]."


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return gmask.load(make_folder(tmp_path_factory.mktemp("model")), device="cpu")


def own_calls() -> list[str]:
    """The functions of the package on the stack, from the outermost in. A listcomp is no call."""
    found, frame = [], sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(SOURCE) and not code.co_name.startswith("<"):
            found.append(code.co_qualname)
        frame = frame.f_back
    return found[::-1]


@pytest.fixture
def deepest(pair: tuple[Any, Any]) -> Iterator[Callable[[Callable[[], Any]], list[str]]]:
    """Calls a public function; gives the longest way from it, which is not counted, to the body of the model."""
    ways: list[list[str]] = []
    model = pair[0]
    hook = model.base_model.register_forward_pre_hook(lambda *_: ways.append(own_calls()))

    def run(function: Callable[[], Any]) -> list[str]:
        function()
        assert ways, "the model ran"
        return max(([name for name in way[1:] if not name.endswith(".forward")] for way in ways), key=len)

    yield run
    hook.remove()


@pytest.mark.parametrize(
    "keywords",
    [{}, {"temperature": 1.0, "n": 2, "seed": 0}, {"n": 2}, {"num_beams": 3}, {"choices": [["a"], ["b", "c"]]}],
)
def test_infill_is_near_the_model(pair: Any, deepest: Any, keywords: dict[str, Any]) -> None:
    way = deepest(lambda: gmask.infill(*pair, [TEXT, TEXT[4:]], **keywords))
    assert len(way) <= 4, way


@pytest.mark.parametrize("normalization", ["sum", "mean", "unconditional"])
def test_score_is_near_the_model(pair: Any, deepest: Any, normalization: Any) -> None:
    way = deepest(lambda: gmask.score(*pair, "It was [MASK].", ["old", "rainy day"], normalization=normalization))
    assert len(way) <= 4, way


def test_embed_is_near_the_model(pair: Any, deepest: Any) -> None:
    way = deepest(lambda: gmask.embed(*pair, ["It was"]))
    assert len(way) <= 4, way


def test_a_conversation_is_near_the_model(pair: Any, deepest: Any) -> None:
    chat = gmask.Chat(*pair, temperature=0, max_tokens=4)
    assert len(deepest(lambda: chat.ask("hello"))) <= 4
    assert len(deepest(lambda: list(chat.stream("hello")))) <= 4
    assert len(deepest(lambda: list(gmask.stream_infill(*pair, TEXT, max_tokens=4)))) <= 4
