"""A recipe is data: what it may say is known, and what it may not say is told in one line."""

from pathlib import Path

import pytest
import yaml

from gmask.errors import GmaskError
from gmask.tasks.recipes.pretraining import load_recipe

TREE = {
    "run": {"out": "out"},
    "tokenizer": {},
    "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "objective": {"token": 1.0},
    "optimization": {"steps": 10},
    "data": {"sources": [{"name": "a", "train": "a.txt"}]},
}


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_overrides_are_yaml_values_at_dotted_keys(recipe_path: Path) -> None:
    recipe = load_recipe(
        recipe_path, ["optimization.learning_rate=3e-4", "optimization.betas=[0.8, 0.9]", "model.hidden_size=128"]
    )
    assert recipe.optimization.learning_rate == 3e-4
    assert recipe.optimization.betas == (0.8, 0.9)
    assert recipe.model["hidden_size"] == 128


def test_a_recipe_written_out_reads_back_equal(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe


def test_a_recipe_that_travels_names_no_place(recipe_path: Path) -> None:
    places = ["run.out=/x/out", "run.threads=2", "data.root=/data", "data.cache=/cache", "tokenizer.path=/tokens"]
    travels = load_recipe(recipe_path, places).without_places()
    assert "/" not in travels.to_yaml().replace("/pretrain", "")
    assert (travels.run.out, travels.run.threads, travels.data.root) == ("out", None, ".")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.stepz=1", "nearest is 'steps'"),
        ("model.hiden_size=1", "nearest is 'hidden_size'"),
        ("objective.sentense=1", "nearest is 'sentence'"),
        ("objective.special=1", "no key 'special'"),
        ("rnu.out=x", "nearest is 'run'"),
        ("run.seed=soon", "run.seed is 'soon': expected int"),
        ("run.seed=1.5", "expected int"),
        ("optimization.dtype=float16", "choose float32 or bfloat16"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources=[{name: a}]", "data.sources: train is missing"),
        ("data.skip_bad_lines=maybe", "expected bool"),
        ("steps", "section.key=value"),
        ("run.seed.deep=1", "has no keys of its own"),
        ("run.seed=[1", "not YAML"),
    ],
)
def test_a_mistake_is_named(recipe_path: Path, override: str, message: str) -> None:
    with pytest.raises(GmaskError, match=None) as caught:
        load_recipe(recipe_path, ["run.seed=1", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(GmaskError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(GmaskError, match="not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(GmaskError, match="YAML mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_the_shipped_recipe_is_valid() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "bundled.yaml")
    assert len(recipe.data.sources) > 30
    assert not any("nc/" in source.train for source in recipe.data.sources)
