"""Does `gmask evaluate` measure a model on held-out texts?"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zstandard
from tokenizers import Tokenizer
from typer.testing import CliRunner

import gmask
from gmask.checkpoints.load import load
from gmask.cli import app
from gmask.errors import GmaskError
from gmask.evaluation.infilling import (
    HeldOutTokens,
    encode_texts,
    evaluate_held_out,
    fill_greedily,
    fill_to_length,
    measure_context,
    measure_losses,
    sample_training_texts,
    shuffle_context,
)
from gmask.evaluation.report import describe_leads
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.recipes.pretraining import make_mixture
from gmask.tasks.heldout import CHINESE, ENGLISH, HeldOutBlank
from gmask.tasks.records import Source
from gmask.training.tokenizer import save_tokenizer, train_tokenizer

ENGLISH_TEXTS = [
    f"The {size} {animal} walked down to the river and drank the cold water there. "
    f"Then the {animal} slept under a {size} tree until the moon came up again."
    for size in ("small", "large", "old", "young")
    for animal in ("fox", "bear", "horse", "goat", "cat")
]
CHINESE_TEXTS = [
    f"那只{size}{animal}走到河边喝了一口清凉的水。后来它在一棵{size}树下面睡着了，直到月亮升起来。"
    for size in ("小", "大", "老")
    for animal in ("狐狸", "山羊", "白马")
]
METRICS = [
    {"step": 10, "loss": 5.0, "tokens": 2_000, "labelled_tokens": 400, "seconds": 1.0},
    {"step": 20, "loss": 4.5, "tokens": 4_000, "labelled_tokens": 800, "seconds": 2.0},
]


def write_texts(path: Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(zstandard.compress(lines.encode()))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a recipe and the folder of a model with random weights."""
    folder = tmp_path_factory.mktemp("evaluation")
    for language, texts in (("en", ENGLISH_TEXTS), ("zh", CHINESE_TEXTS)):
        write_texts(folder / f"{language}.train.jsonl.zst", texts[:-4])
        write_texts(folder / f"{language}.val.jsonl.zst", texts[-4:])
    sources = [
        {"name": n, "train": f"{n}.train.jsonl.zst", "validation": f"{n}.val.jsonl.zst", "weight": w, "kind": kind}
        for n, w, kind in (("en", 3, "fables"), ("zh", 1, None))
    ]
    objective = {"token": 0.5, "sentence": 0.0, "document": 0.5}
    recipe = {
        "run": {"out": "out"},
        "data": {"sources": sources, "row_length": 64},
        "objective": objective,
        "optimization": {"steps": 1, "dtype": "float32"},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    save_model(folder / "model", train_tokenizer(ENGLISH_TEXTS + CHINESE_TEXTS, vocab_size=480))
    (folder / "model" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS))
    return folder


def save_model(folder: Path, tokenizer: Tokenizer) -> None:
    special = {"pad_token_id": 0, "mask_token_id": 5, "smask_token_id": 6, "gmask_token_id": 7, "sop_token_id": 8}
    config = GLMConfig(
        vocab_size=480,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eop_token_id=9,
        eos_token_id=9,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GLMForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


@pytest.fixture(scope="module")
def evaluated(workplace: Path) -> dict[str, Any]:
    out = evaluate_held_out(
        str(workplace / "model"),
        recipe=str(workplace / "toy.yaml"),
        data_root=str(workplace),
        out=str(workplace / "out"),
        sentences=6,
        loss_tokens=128,
    )
    evaluation: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return evaluation


def test_every_source_objective_and_span_is_measured(evaluated: dict[str, Any]) -> None:
    assert {source: set(losses) for source, losses in evaluated["losses"].items()} == {
        "en": {"token", "document"},
        "zh": {"token", "document"},
    }
    spans = {language: list(report["comparisons"]) for language, report in evaluated["languages"].items()}
    assert spans["English"] == ["1 word", "2-3 words", "all"]
    assert spans["Chinese"] == ["1 character", "2 characters", "3-4 characters", "all"]
    for report in evaluated["languages"].values():
        for comparison in report["comparisons"].values():
            assert set(comparison["scores"]) == {"model", "model_told_length", "trigram", "unigram"}
            for score in comparison["scores"].values():
                for estimate in score.values():
                    assert 0 <= estimate["low"] <= estimate["mean"] <= estimate["high"] <= 1


def test_on_texts_made_by_a_pattern_counting_beats_random_weights(evaluated: dict[str, Any]) -> None:
    scores = evaluated["languages"]["English"]["comparisons"]["1 word"]["scores"]
    assert scores["trigram"]["exact"]["mean"] > 0.5
    assert scores["model"]["exact"]["mean"] == 0
    assert "less often than the 3-gram" in describe_leads(evaluated, "English")[0]


def test_each_kind_of_text_has_its_own_scores(evaluated: dict[str, Any]) -> None:
    english, chinese = (evaluated["languages"][name] for name in ("English", "Chinese"))
    assert list(english["kinds"]) == ["fables"]
    assert english["kinds"]["fables"]["n_blanks"] == english["comparisons"]["1 word"]["n_blanks"]
    found, all_of_them = (
        part["scores"]["trigram"]["exact"]["mean"]
        for part in (english["kinds"]["fables"], english["comparisons"]["1 word"])
    )
    assert found == all_of_them
    assert chinese["kinds"] == {}  # a source without a kind


def test_the_cost_of_a_shuffled_context_is_a_difference_of_scores(workplace: Path) -> None:
    model, tokenizer = load(workplace / "model")
    blank = HeldOutBlank("en", "The old fox, at night, ", "slept", " under a large tree.", 1)
    moved = shuffle_context(blank, ENGLISH, rng=np.random.default_rng(0))
    assert moved != blank
    assert re.sub("[A-Za-z]", "", moved.text) == re.sub("[A-Za-z]", "", blank.text)  # punctuation stays
    assert sorted(ENGLISH.unit.findall(moved.text)) == sorted(ENGLISH.unit.findall(blank.text))
    found = measure_context(model, tokenizer, [blank], ENGLISH, rng=np.random.default_rng(0))
    true, shuffled = (
        -gmask.score(model, tokenizer, one.text, [one.answer]).answers[0].logprob for one in (blank, moved)
    )
    assert found.true.mean == pytest.approx(true, rel=1e-5)
    assert found.shuffled.mean == pytest.approx(shuffled, rel=1e-5)
    assert found.cost.mean == pytest.approx(shuffled - true, abs=1e-5)


def test_a_model_that_does_not_read_pays_nothing_for_a_shuffled_context(workplace: Path) -> None:
    model, tokenizer = load(workplace / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    blanks = [HeldOutBlank("zh", "那只狐狸走到", "河", "边喝水。", 1)]
    cost = measure_context(model, tokenizer, blanks, CHINESE, rng=np.random.default_rng(0)).cost
    assert cost.mean == pytest.approx(0, abs=1e-5)


def test_the_same_seed_gives_the_same_evaluation(evaluated: dict[str, Any], workplace: Path) -> None:
    again = evaluate_held_out(
        str(workplace / "model"),
        recipe=str(workplace / "toy.yaml"),
        data_root=str(workplace),
        out=str(workplace / "again"),
        sentences=6,
        loss_tokens=128,
    )
    assert json.loads(again.read_text(encoding="utf-8")) == evaluated


def test_a_model_that_knows_nothing_loses_the_logarithm_of_its_vocabulary(workplace: Path) -> None:
    model, tokenizer = load(workplace / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    heldout = {"en": encode_texts(tokenizer, ENGLISH_TEXTS[-2:])}
    mixture = make_mixture(tokenizer.backend_tokenizer, {})
    losses = measure_losses(model, tokenizer, heldout, mixture, max_tokens=1000, seed=0)["en"]
    assert set(losses) == {"token", "sentence", "document"}
    for loss in losses.values():
        assert loss.nats_per_token == pytest.approx(math.log(480), rel=1e-5)
        assert loss.tokens > 0


def test_both_ways_of_filling_give_an_answer_a_blank(workplace: Path) -> None:
    model, tokenizer = load(workplace / "model")
    blanks = [
        HeldOutBlank("en", "The fox ", "slept", " here.", 1),
        HeldOutBlank("en", "The old ", "bear ran", " off.", 2),
    ]
    assert len(fill_greedily(model, tokenizer, blanks)) == 2
    assert len(fill_to_length(model, tokenizer, blanks, ENGLISH)) == 2


def test_the_ngrams_count_as_many_tokens_of_each_source_as_the_model_saw(workplace: Path) -> None:
    sources = [
        Source(n, str(workplace / f"{n}.train.jsonl.zst"), None, weight) for n, weight in (("en", 3.0), ("zh", 1.0))
    ]
    heldout = {"en": HeldOutTokens([np.arange(10)], 40), "zh": HeldOutTokens([np.arange(10)], 15)}
    texts = sample_training_texts(sources, heldout, 200, rng=np.random.default_rng(0))
    english = [text for text in texts if text.isascii()]
    assert 600 <= sum(map(len, english)) <= 600 + max(map(len, ENGLISH_TEXTS))  # 150 tokens of 4 characters
    assert len(sample_training_texts(sources, heldout, None, rng=np.random.default_rng(0))) == 16 + 5


def test_missing_texts_are_one_clear_line(workplace: Path, tmp_path: Path) -> None:
    with pytest.raises(GmaskError, match=r"no text file at .*name a file or a glob"):
        evaluate_held_out(str(workplace / "model"), recipe=str(workplace / "toy.yaml"), data_root=str(tmp_path))
    with pytest.raises(GmaskError, match=r"nowhere\.yaml: cannot be read"):
        evaluate_held_out(str(workplace / "model"), recipe=str(tmp_path / "nowhere.yaml"))


def test_the_verb_prints_the_figures_as_json(workplace: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(workplace / "model"), "--recipe", str(workplace / "toy.yaml"), "--sentences", "4"]
    places = ["--corpus", str(workplace), "--output", str(tmp_path), "--json"]
    shown = CliRunner().invoke(app, [*arguments, *places])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout) == json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
