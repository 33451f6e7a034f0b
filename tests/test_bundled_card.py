"""Is the card of the bundled model true to the numbers of its folder?"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "bundled_card.py"
SHIPPED = ROOT / "src" / "gmask" / "pretrained"
SECTIONS = (
    "# The bundled gmask model",
    "## Intended use",
    "## Filling blanks in held-out sentences",
    "### By the kind of text",
    "### Plain sentences",
    "### The first blanks of the sample",
    "## Held-out loss",
    "## Training",
    "## Training data",
    "## Attribution",
    "## Limits",
    "## Reproduce",
)


def write_card(folder: Path, card: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(SCRIPT), str(folder), "--output", str(card), *options]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600)


def read_shipped(name: str) -> Any:
    text = (SHIPPED / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else yaml.safe_load(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the files that the card of the shipped model is made from."""
    for name in ("config.json", "recipe.yaml", "metrics.jsonl", "evaluation.json"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    return tmp_path


def test_the_shipped_card_is_made_from_the_files_beside_it(folder: Path) -> None:
    shipped = (SHIPPED / "README.md").read_text("utf-8")
    (hardware,) = (line.split("|")[2].strip() for line in shipped.splitlines() if line.startswith("| hardware |"))
    done = write_card(folder, folder / "README.md", "--hardware", hardware)
    assert done.returncode == 0, done.stderr
    assert (folder / "README.md").read_text("utf-8") == shipped


def test_the_card_has_every_section_and_the_numbers_of_the_files(folder: Path) -> None:
    evaluation, metrics, recipe = (read_shipped(n) for n in ("evaluation.json", "metrics.jsonl", "recipe.yaml"))
    metrics.append({"step": 20, "loss": 4.5, "tokens": 4_000, "labelled_tokens": 800, "seconds": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    recipe["data"]["sources"] = [
        {"name": name, "train": "train", "weight": weight} for name, weight in (("en/peps", 3), ("zh/oi_wiki", 1))
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = write_card(folder, folder / "README.md", "--hardware", "a slide rule")
    assert done.returncode == 0, done.stderr
    card = (folder / "README.md").read_text("utf-8")
    matter, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(matter)["license"] == "apache-2.0"
    assert {"CC BY 4.0", "public domain"} <= set(yaml.safe_load(matter)["training_data_licenses"])
    assert [line for line in text.splitlines() if line.startswith("#")] == list(SECTIONS)
    exact = evaluation["languages"]["Chinese"]["comparisons"]["1 character"]["scores"]["trigram"]["exact"]
    assert f"{100 * exact['mean']:.1f} [{100 * exact['low']:.1f}, {100 * exact['high']:.1f}]" in text
    assert f"{evaluation['losses']['zh/laws']['token']['nats_per_token']:.2f} (" in text
    assert "4,000, of which 800 to be predicted" in text
    assert "2,000 tokens/s" in text
    assert "a slide rule" in text
    assert "| en/peps | Python Enhancement Proposals (github.com/python/peps) | public domain or CC0 | 75.0 |" in text
    assert "PingCAP and contributors (CC BY-SA 3.0)" in text


def test_the_card_says_nothing_of_hardware_or_credits_that_it_does_not_know(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = importlib.util.spec_from_file_location("bundled_card", SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "bundled_card", script)  # where dataclasses look for the module
    specification.loader.exec_module(script)
    card = script.read_card(folder)
    assert "## Attribution" in script.render_card(card)
    text = script.render_card(script.Card(card.evaluation, card.metrics, card.config, card.recipe, {}, None))
    assert "## Attribution" not in text
    assert "| hardware |" not in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json"])
def test_a_file_that_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    done = write_card(folder, folder / "README.md")
    assert done.returncode == 2
    assert f"{name}: missing" in done.stderr
    assert not (folder / "README.md").exists()
