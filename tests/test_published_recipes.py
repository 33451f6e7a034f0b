"""Are the published pretraining recipes readable, and of the models that they name?"""

from pathlib import Path

import pytest
import torch

from gmask.checkpoints.zoo import find_family
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.recipes.pretraining import VOCABULARY_MULTIPLE, PretrainingRecipe, load_recipe
from gmask.training.pretrain import learning_rate

FOLDER = Path(__file__).parents[1] / "recipes/published"
FAMILIES = {
    "glm-base": "GLM-Base",
    "glm-large": "GLM-Large",
    "glm-large-chinese": "GLM-Large-Chinese",
    "glm-410m": "GLM-410M",
    "glm-515m": "GLM-515M",
    "glm-2b": "GLM-2B",
    "glm-10b": "GLM-10B",
    "glm-10b-longer": "GLM-10B",
}


def read(name: str) -> PretrainingRecipe:
    return load_recipe(FOLDER / f"{name}.yaml")


def test_there_is_no_other_recipe() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_has_the_shape_and_the_masks_of_its_model(name: str) -> None:
    recipe, family = read(name), find_family(FAMILIES[name])
    assert family is not None
    rows = -(-recipe.tokenizer.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    with torch.device("meta"):
        model = GLMForConditionalGeneration(GLMConfig(vocab_size=rows, **recipe.shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == family.parameters
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.max_position_embeddings)
    assert shape == (family.layers, family.hidden_size, family.heads, family.positions)
    assert config.vocab_size == family.vocab_size
    assert recipe.objective["task_mask"] == (len(family.masks) == 3)
    assert [kind for kind in ("token", "sentence", "document") if recipe.objective[kind]] == list(family.objectives)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_runs_in_whole_passes_and_rises_and_falls(name: str) -> None:
    recipe = read(name)
    settings = recipe.optimization
    assert settings.rows_per_step % settings.rows_per_pass == 0
    rates = [learning_rate(step, recipe) for step in (0, settings.warmup_steps, settings.steps // 2, settings.steps)]
    assert rates[0] < rates[1] == pytest.approx(settings.learning_rate, rel=1e-3)
    assert rates[1] > rates[2] > rates[3] == pytest.approx(settings.final_learning_rate, abs=1e-12)


def test_the_last_stage_falls_in_a_line() -> None:
    """Source: --lr-decay-style linear, --lr-decay-iters 50000, --warmup 0.005."""
    recipe = read("glm-10b-longer")
    for step in (250, 10_000, 40_000):
        assert learning_rate(step, recipe) == pytest.approx(3e-5 * (50_000 - step) / 49_750)
