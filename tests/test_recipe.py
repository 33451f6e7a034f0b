"""A recipe is data: what it may say is known, and what it may not say is told in one line."""

from pathlib import Path

import pytest
import yaml

from gmask.errors import GmaskError
from gmask.recipes.pretraining import load_recipe

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
    travels = load_recipe(recipe_path, places).portable()
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
        ("optimization.dtype=float16", "choose auto, float32 or bfloat16"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources=3", "data.sources is 3: expected a list"),
        ("data.sources=[{name: a, train: a.txt, weight: .nan}]", "data.sources.weight is nan"),
        ("data=3", "data: expected key: value pairs"),
        ("data.row_length=0", "data.row_length is 0: it must be above 0"),
        ("tokenizer.vocab_size=0", "tokenizer.vocab_size is 0"),
        ("model=3", "model: expected key: value pairs"),
        ("model.hidden_size=wide", "model.hidden_size is 'wide': expected int"),
        ("model.num_attention_heads=0", "model.num_attention_heads is 0"),
        ("model.num_attention_heads=5", "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ("model.hidden_dropout=1", "model.hidden_dropout is 1.0: it must be from 0 to below 1"),
        ("objective=[1]", "objective: expected key: value pairs"),
        ("objective.token=.nan", "objective.token is nan: expected a finite number"),
        ("optimization.steps=.inf", "optimization.steps is inf: expected int"),
        ("optimization.steps=0", "optimization.steps is 0"),
        ("optimization.rows_per_pass=0", "optimization.rows_per_pass is 0"),
        ("optimization.learning_rate=.inf", "optimization.learning_rate is inf"),
        ("optimization.final_learning_rate=-1", "it must be from 0 to 100"),
        ("optimization.warmup_steps=-1", "optimization.warmup_steps is -1"),
        ("optimization.weight_decay=-1", "optimization.weight_decay is -1"),
        ("optimization.clip_norm=0", "optimization.clip_norm is 0.0: it must be above 0"),
        ("optimization.betas=3", "optimization.betas is 3: expected 2 values"),
        ("optimization.betas=[0.9]", "expected 2 values"),
        ("optimization.betas=[0.9, 1.0]", "optimization.betas is 1.0: it must be from 0 to below 1"),
        ("run.threads=-3", "run.threads is -3"),
        ("run.log_every=0", "run.log_every is 0"),
        ("run.validate_every=0", "run.validate_every is 0"),
        ("run.seed=-1", "run.seed is -1: it must be from 0"),
        ("data.sources=[{name: a}]", "data.sources: train is missing"),
        ("data.skip_bad_lines=maybe", "expected bool"),
        ("steps", "section.key=value"),
        ("run.seed.deep=1", "has no keys of its own"),
        ("run.seed=[1", "not YAML"),
        ("run={out: a, out: b}", "the key 'out' is there twice"),
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
