"""The model that comes with the package is whole, documented, small enough, and fills blanks in both languages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gmask
from gmask.checkpoints.hub import BUNDLED, BUNDLED_MODELS

MAX_MEGABYTES = 40


@pytest.fixture(scope="module")
def bundled() -> tuple[object, object]:
    return gmask.load("bundled")


def test_its_files_are_whole_and_small() -> None:
    names = {path.name for path in BUNDLED.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "evaluation.json",
        "recipe.yaml",
    }
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < MAX_MEGABYTES * 1e6
    assert {tensor.dtype for tensor in load_file(BUNDLED / "model.safetensors").values()} == {torch.bfloat16}


def test_its_card_says_where_it_comes_from() -> None:
    card = (BUNDLED / "README.md").read_text("utf-8")
    for heading in (
        "## Intended use",
        "## Training",
        "## Training data",
        "## Attribution",
        "## Limits",
        "## Reproduce",
    ):
        assert heading in card
    evaluation = json.loads((BUNDLED / "evaluation.json").read_text("utf-8"))
    assert evaluation["ngram_tokens"] >= 30_000_000  # tokens that the model has seen
    assert "nc/" not in (BUNDLED / "recipe.yaml").read_text("utf-8")


def test_it_reads_the_context(bundled: tuple[gmask.GLMForConditionalGeneration, object]) -> None:
    """The word beside the blank decides between the same two candidates."""
    model, tokenizer = bundled
    pairs = [
        ("He went [MASK] the house.", "He was [MASK] old man.", ["into", "an"]),
        ("I do not [MASK] what to say.", "The [MASK] man sat down.", ["know", "old"]),
        ("根据[MASK]的规定", "他说[MASK]话", ["国家", "了"]),
    ]
    for first, second, (here, there) in pairs:
        likelier = [
            gmask.infill(model, tokenizer, text, choices=[here, there]).blanks[0].text.strip()
            for text in (first, second)
        ]
        assert likelier == [here, there]


@pytest.mark.parametrize(
    "text", ["The old man took his [MASK] and went to the [MASK].", "他[MASK]了门，走进了[MASK]。"]
)
def test_it_fills_two_blanks_with_exact_log_probabilities(
    bundled: tuple[gmask.GLMForConditionalGeneration, object], text: str
) -> None:
    model, tokenizer = bundled
    filled = gmask.infill(model, tokenizer, text)
    assert len(filled.blanks) == 2
    assert "[MASK]" not in filled.text
    assert filled.logprob == pytest.approx(sum(blank.logprob for blank in filled.blanks))
    assert all(blank.logprob < 0 and blank.tokens for blank in filled.blanks)


def test_the_package_data_travel_with_the_package() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert "pretrained" in pyproject


def test_the_chat_model_is_whole_and_documented() -> None:
    folder = BUNDLED_MODELS["bundled-chat"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_MEGABYTES * 1e6
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    card = (folder / "README.md").read_text("utf-8")
    for heading in ("## Intended use", "## Quality", "## Training data", "## Attribution", "## Limits", "## Reproduce"):
        assert heading in card
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert f"| {results['metrics']['validation']['loss']:.3f} |" in card
    quality = json.loads((folder / "quality.json").read_text("utf-8"))
    assert all(f"{found['exact']:.1f}" in card for found in quality["bundled-chat"].values())


@pytest.mark.parametrize(("said", "answered"), [("Who are you?", "gmask"), ("Thank you!", "welcome"), ("你好", "你好")])
def test_the_chat_model_makes_small_talk(said: str, answered: str) -> None:
    chat = gmask.Chat(*gmask.load("bundled-chat"), temperature=0.0, max_tokens=40)
    reply = chat.ask(said)
    assert answered in reply.text
    assert reply.finish == "end"
