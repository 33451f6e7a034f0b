"""How is a model judged by its held-out texts? `run` is `gmask evaluate` without `--task`, and writes what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.evaluation.infilling import evaluate_infilling
from gmask.evaluation.model_card import Card, render_card
from gmask.evaluation.report import print_evaluation
from gmask.loading import find_folder, load
from gmask.models.glm import GLMForConditionalGeneration
from gmask.tasks.recipes.pretraining import Recipe, load_recipe
from gmask.tasks.vocabulary import make_mixture


def run(
    model: str = "bundled",
    *,
    recipe: str,
    data_root: str | None = None,
    out: str | None = None,
    card: str | None = None,
    hardware: str | None = None,
    sentences: int = 300,
    loss_tokens: int = 8192,
    seed: int = 0,
    device: str | None = None,
    tables: bool = True,
) -> Path:
    """Measure a model by the recipe that it was trained with and return the path of evaluation.json.

    data_root: the corpus folder, if it is not the recipe's own.
    out: the folder for evaluation.json, which holds every number; the model's own if not given.
    card: write the bundled model's card to this path as well. Its numbers come from evaluation.json, the config, the
        recipe and the model folder's metrics.jsonl; origins, licences and credits from RECIPE-sources.yaml beside the
        recipe, a list of `{name, origin, licence, credit}`.
    hardware: what the model was trained on, in words, for the card.
    sentences, loss_tokens, seed: as in `evaluate_infilling`.
    tables: print what was found.

    Raises `GmaskError`: a file that is missing or cannot be read.
    """
    console = Console(stderr=not tables)
    folder = find_folder(model)
    plan = load_recipe(recipe, [] if data_root is None else [f"data.root={json.dumps(data_root)}"])
    metrics = _read_metrics(folder / "metrics.jsonl")
    if card and not metrics:
        raise GmaskError(f"{folder}: no metrics.jsonl of its training there, which the model card needs")
    origins = _read_origins(recipe) if card else {}
    network, tokenizer = load(folder, dtype="float32", device=device, model_class=GLMForConditionalGeneration)
    tokens_seen = metrics[-1]["tokens"] if metrics else None
    settings = {"sentences": sentences, "loss_tokens": loss_tokens, "seed": seed}
    with console.status("evaluating") as status:
        evaluation = _measure(network, tokenizer, plan, settings, tokens_seen, status.update)
    if tables:
        print_evaluation(evaluation, console)
    written = Path(out or folder) / "evaluation.json"
    _write_text(written, json.dumps(evaluation, ensure_ascii=False, indent=1) + "\n")
    if card:
        facts = Card(
            evaluation=evaluation,
            metrics=metrics,
            config=network.config.to_dict(),
            recipe=plan.to_dict(),
            recipe_path=recipe,
            origins=origins,
            hardware=hardware,
        )
        _write_text(Path(card), render_card(facts))
    return written


def _measure(
    network: GLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    plan: Recipe,
    settings: dict[str, int],
    tokens_seen: int | None,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """What evaluation.json holds; arguments as of `evaluate_infilling`."""
    report = evaluate_infilling(
        network,
        tokenizer,
        plan.data.placed_sources,
        make_mixture(tokenizer.backend_tokenizer, plan.objective),
        tokens_seen=tokens_seen,
        longest=plan.data.max_piece or plan.data.row_length,
        on_progress=on_progress,
        **settings,
    )
    return {
        "settings": {**settings, "dtype": "float32"},
        "versions": {name: version(name) for name in ("gmask", "torch", "transformers", "tokenizers")},
        "parameters": network.num_parameters(),
        "ngram_tokens": tokens_seen,
        **asdict(report),
    }


def _read_origins(recipe: str) -> dict[str, Any]:
    """Origin, licence and credit of each source, from the table beside the recipe."""
    table = Path(recipe)
    return {entry["name"]: entry for entry in _read_yaml(table.with_name(f"{table.stem}-sources.yaml"))}


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise GmaskError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GmaskError(f"{path}: cannot be written ({error.strerror})") from error


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
