"""A fine-tuning recipe is data: what excludes what is known, and a mistake is one line that names the nearest key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gmask.errors import GmaskError
from gmask.recipes.tuning import differing_keys, load_tuning_recipe, read_tuning_recipe
from gmask.tasks.task import load_task, read_task

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("finetune-*.yaml"))
TREE: dict[str, Any] = {
    "run": {"out": "out"},
    "task": "chat/alpaca",
    "data": {"train": "train.jsonl", "validation": "val.jsonl"},
    "optimization": {"epochs": 1},
}


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_overrides_reach_every_section(recipe_path: Path) -> None:
    recipe = load_tuning_recipe(
        recipe_path,
        [
            "method.name=lora", "method.rank=4", "method.targets=[dense, query_key_value]", "decoding.num_beams=3",
            "data.validation=0.1", "optimization.learning_rate=1e-3", "optimization.trainer.optim=adafactor",
        ],
    )  # fmt: skip
    assert recipe.method.rank == 4
    assert recipe.method.targets == ("dense", "query_key_value")
    assert recipe.decoding == {"num_beams": 3}
    assert recipe.data.validation == 0.1
    assert recipe.optimization.learning_rate == 1e-3
    assert recipe.optimization.trainer == {"optim": "adafactor"}


def test_a_recipe_written_out_reads_back_equal(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_tuning_recipe(recipe_path, ["method.targets=[dense]", "task={name: t, kind: language-model}"])
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert load_tuning_recipe(tmp_path / "copy.yaml") == recipe


def test_the_keys_that_change_the_numbers_are_told_apart_from_places(recipe_path: Path) -> None:
    first = load_tuning_recipe(recipe_path)
    moved = load_tuning_recipe(recipe_path, ["run.out=x", "run.threads=2", "data.root=y", "optimization.save_every=7"])
    other = load_tuning_recipe(recipe_path, ["run.seed=1", "method.rank=16", "optimization.trainer.optim=sgd"])
    assert differing_keys(first, moved) == []
    assert differing_keys(first, other) == ["run.seed", "method.rank", "optimization.trainer.optim"]
    assert differing_keys(other, first) == ["run.seed", "method.rank", "optimization.trainer.optim"]


def test_a_recipe_that_travels_names_no_place(recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    places = ["run.out=/x/out", "run.device=cpu", "data.root=/data", f"model.name={tmp_path / 'mine'}"]
    travels = load_tuning_recipe(recipe_path, places).portable()
    assert str(tmp_path) not in travels.to_yaml()
    assert "/data" not in travels.to_yaml()
    assert (travels.run.out, travels.run.device, travels.model.name) == ("out", None, "mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.epoch=1", "nearest is 'epochs'"),
        ("methd.rank=1", "nearest is 'method'"),
        ("method.rnak=1", "nearest is 'rank'"),
        ("method.name=lorra", "choose full"),
        ("method.prefix_length=3", "belongs to p-tuning-v2"),
        ("optimization.steps=10", "not both: optimization.epochs=null counts by steps"),
        ("optimization.batch_size=0", "must be above 0"),
        ("optimization.schedule=cosin", "choose linear, cosine or constant"),
        ("optimization.dtype=float16", "choose auto, float32 or bfloat16"),
        ("optimization.trainer=3", "expected key: value pairs"),
        ("decoding=[1]", "expected key: value pairs"),
        ("data.validation=1.5", "between 0 and 1"),
        ("data.validation=true", "data.validation is True: expected str, or a number between 0 and 1"),
        ("data.folds=4", "leave data.validation out"),
        ("data.fold=1", "without data.folds"),
        ("data.max_source=-1", "must be above 0"),
        ("data.truncation=middle", "choose left or right"),
        ("data.train=7", "expected str"),
        ("model.initialization=zero", "choose pretrained or random"),
        ("task=null", "task is missing"),
        ("run.out=null", "expected str"),
    ],
)
def test_a_mistake_is_named_in_one_line(recipe_path: Path, override: str, message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        load_tuning_recipe(recipe_path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "optimization.learning_rate=.nan", "optimization.learning_rate=.inf", "optimization.learning_rate=true",
        "optimization.warmup=-1", "optimization.weight_decay=-1", "optimization.clip_norm=-1",
        "optimization.clip_norm=null", "optimization.steps=.inf", "optimization.steps=.nan", "optimization.epochs=.inf",
        "run.seed=-1", "run.seed=4294967296", "run.threads=-3", "run.log_every=0", "forgetting.answers=-1",
        "method.targets=3", "method.targets=[]", "method.targets=''", "method.targets={dense: 1}",
        "method.targets=[3]", "method.alpha=.nan", "method.alpha=.inf", "method.dropout=.nan", "method.rank=.inf",
        "model.quantize=int3", "model.quantize=8", "model.dtype=foo", "data.validation=.nan",
    ],
)  # fmt: skip
def test_a_number_without_sense_is_refused_by_its_key(recipe_path: Path, override: str) -> None:
    with pytest.raises(GmaskError) as caught:
        load_tuning_recipe(recipe_path, [override])
    assert override.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "optimization.warmup=0", "optimization.warmup=100", "optimization.clip_norm=0", "forgetting.answers=0",
        "run.seed=4294967295", "run.threads=null", "model.quantize=null", "model.quantize=int8", "model.dtype=auto",
        "model.dtype=float16", "method.targets=all-linear", "method.alpha=1e-1",
    ],
)  # fmt: skip
def test_a_number_at_its_limit_is_taken(recipe_path: Path, override: str) -> None:
    key, _, text = override.partition("=")
    section, _, name = key.partition(".")
    value = yaml.safe_load(text)
    taken = getattr(getattr(load_tuning_recipe(recipe_path, [override]), section), name)
    assert taken == (float(value) if text == "1e-1" else value)


def test_settings_that_exclude_each_other_are_refused(recipe_path: Path) -> None:
    with pytest.raises(GmaskError, match=r"early_stop needs data\.validation"):
        load_tuning_recipe(recipe_path, ["data.validation=null", "optimization.early_stop=2"])
    with pytest.raises(GmaskError, match="counted from 1"):
        load_tuning_recipe(recipe_path, ["data.validation=null", "data.folds=3", "data.fold=4"])
    with pytest.raises(GmaskError, match="merge it first"):
        load_tuning_recipe(recipe_path, ["model.adapter=folder", "method.name=full"])


def test_the_shipped_recipes_and_their_tasks_are_valid() -> None:
    assert len(RECIPES) >= 4
    for path in RECIPES:
        recipe = load_tuning_recipe(path)
        task = load_task(recipe.task) if isinstance(recipe.task, str) else read_task(recipe.task)
        assert task.kind == "language-model" or task.metrics


def test_the_adgen_recipe_has_the_published_hyperparameters() -> None:
    recipe = read_tuning_recipe(yaml.safe_load(RECIPES[0].with_name("finetune-adgen.yaml").read_text("utf-8")))
    assert (recipe.method.name, recipe.method.prefix_length, recipe.method.projection) == ("p-tuning-v2", 128, False)
    assert (recipe.data.max_source, recipe.data.max_target) == (64, 64)
    optimization = recipe.optimization
    assert (optimization.steps, optimization.batch_size, optimization.accumulation) == (3000, 1, 16)
    assert (optimization.learning_rate, optimization.schedule) == (2e-2, "linear")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.epochs=1.0e+300", "must be at most 1000000"),
        ("optimization.batch_size=1000000000", "must be at most 16384"),
        ("optimization.learning_rate=.nan", "expected a finite number"),
        ("optimization.learning_rate=-1", "must be above 0"),
        ("optimization.learning_rate=1.0e+9", "must be at most 100"),
        ("method.rank=1000000000000000000", "must be at most"),
        ("data.max_source=1000000000000000000", "must be at most"),
    ],
)
def test_numbers_that_nobody_means_are_refused(recipe_path: Path, override: str, message: str) -> None:
    with pytest.raises(GmaskError, match=rf"^{override.split('=')[0]} is .*{message}"):
        load_tuning_recipe(recipe_path, [override])
