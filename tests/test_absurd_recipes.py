"""Is every value of every key of a recipe read, or refused in one line, before memory or time is spent on it?"""

import copy
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

import gmask
from feedback_data import write_feedback_recipe
from gmask.checkpoints.adapters import save_adapter
from gmask.config import hints_of
from gmask.errors import GmaskError
from gmask.files import write_json
from gmask.generation.engine import Budget, Request, Stepper
from gmask.generation.infill import Infiller
from gmask.generation.settings import make_sampling
from gmask.models.glm import GLMConfig
from gmask.recipes.feedback import FeedbackRecipe, load_feedback_recipe
from gmask.recipes.ppo import PPORecipe, read_ppo_recipe
from gmask.recipes.pretraining import PretrainingRecipe, _objective_hints, read_recipe
from gmask.recipes.tuning import MethodSettings, TuningRecipe, read_tuning_recipe
from gmask.training.methods import apply_method
from gmask.training.preference_tuning import PreferenceTuning
from gmask.training.validation import read_general_scores
from tiny_folder import make_folder

VALUES: list[Any] = [
    None, "text", "", [], [3], [[]], {}, {"a": {"b": [1]}}, math.nan, math.inf, -1, 0, 1e300, 10**30, -(10**30), True,
    1.5, "0x10", 5e-324, "\0", "1" * 5000,
]  # fmt: skip
SHARED = {"run": {"out": "o"}, "model": {}, "data": {"train": "a.jsonl"}, "method": {}, "optimization": {"steps": 4}}
PPO = {
    **SHARED, "task": "chat/alpaca", "reward": {"function": "a:b"}, "rollout": {}, "kl": {}, "ppo": {}, "critic": {},
    "optimization": {"rollouts": 4},
}  # fmt: skip
PRETRAINING = {
    "run": {"out": "o"}, "data": {"sources": [{"name": "a", "train": "a.txt"}]}, "optimization": {"steps": 4},
    "tokenizer": {}, "model": {}, "objective": {}, "decay": {"objective": {}},
}  # fmt: skip
RECIPES: dict[str, tuple[Any, dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "pretraining": (PretrainingRecipe, PRETRAINING, read_recipe),
    "tuning": (TuningRecipe, {**SHARED, "task": "chat/alpaca"}, read_tuning_recipe),
    "ppo": (PPORecipe, PPO, read_ppo_recipe),
    "reward": (FeedbackRecipe, SHARED, lambda tree: read_feedback(tree)),
}
FOLDER: list[Path] = []


def read_feedback(tree: dict[str, Any]) -> Any:
    path = FOLDER[0] / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8")
    return load_feedback_recipe(path, "reward")


def keys_of(kind: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The dotted keys of a recipe and of its sections."""
    for name, hint in hints_of(kind).items():
        yield (*above, name)
        inner = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and dataclasses.is_dataclass(one)]
        if inner:
            yield from keys_of(inner[0], (*above, name))


def changed(tree: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    place = tree
    for name in key[:-1]:
        place = place.setdefault(name, {})
        place = place[0] if isinstance(place, list) else place  # the first of the sources
    place[key[-1]] = value
    return tree


@pytest.mark.parametrize("name", RECIPES)
def test_an_absurd_value_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    FOLDER[:] = [tmp_path]
    kind, tree, read = RECIPES[name]
    keys = list(keys_of(kind))
    if name == "pretraining":
        keys += [("model", key) for key in hints_of(GLMConfig)]
        keys += [(*section, key) for section in (("objective",), ("decay", "objective")) for key in _objective_hints()]
    refused = 0
    for key in keys:
        for value in VALUES if name != "reward" else VALUES[::3]:
            try:
                read(changed(tree, key, value))
            except GmaskError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 700, (key, value)
    assert refused > len(keys)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("pretraining", "model.id2label", 3, "model has no key 'id2label'"),
        ("pretraining", "model.dtype", "text", "model has no key 'dtype'"),
        ("pretraining", "model.sop_token_id", 10**30, "model has no key 'sop_token_id'"),
        ("pretraining", "objective.token_ratio", 1.5, "objective.token_ratio is 1.5: it must be from 0 to 1"),
        ("pretraining", "objective.mean_span_length", 1e300, "objective.mean_span_length is 1e"),
        ("pretraining", "optimization.rows_per_step", 10**8, "at most 1000000"),
        ("pretraining", "data.row_length", 10**12, "at most 1000000"),
        ("pretraining", "run.threads", 10**6, "run.threads is 1000000: it must be at most 1024"),
        ("tuning", "method.rank", 10**6, "method.rank is 1000000: it must be at most 8192"),
        ("tuning", "forgetting.answers", 10**30, "forgetting.answers is 1"),
        ("ppo", "ppo.epochs", 10**12, "ppo.epochs is 1000000000000: it must be from 1 to 1000"),
        ("ppo", "rollout.rows", 2, "rollout.rows is 2: the 4 answers to a prompt"),
        ("ppo", "rollout.prompts", 10**6, "rollout.prompts is 1000000: it must be from 1 to 10000"),
        ("ppo", "reward.cut", 1e300, "reward.cut is 1e+300: it must be from"),
        ("ppo", "optimization.learning_rate", 10**6, "at most 100"),
    ],
)
def test_what_would_take_for_ever_says_its_range(name: str, key: str, value: Any, message: str) -> None:
    _, tree, read = RECIPES[name]
    with pytest.raises(GmaskError, match=re.escape(message)):
        read(changed(tree, tuple(key.split(".")), value))


def test_shares_that_are_all_0_are_refused_before_a_tokenizer_is_trained() -> None:
    nothing = {"token": 0, "sentence": 0, "document": 0}
    with pytest.raises(GmaskError, match=r"^objective: the shares of token, sentence, document are all 0"):
        read_recipe({**PRETRAINING, "objective": nothing})
    constant = {"steps": 4, "schedule": "constant"}
    with pytest.raises(GmaskError, match=r"^decay.objective: the shares"):
        read_recipe({**PRETRAINING, "optimization": constant, "decay": {"objective": nothing}})
    some = {"objective": {"token": 0}, "decay": {"objective": {"sentence": 0}}}
    read_recipe({**PRETRAINING, "optimization": constant, **some})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": [3]}, r"trl.beta is \[3\]: expected a finite number"),
        ({"beta": "zzz"}, "trl.beta is 'zzz': expected a finite number"),
        ({"beta": None}, "trl.beta is None: expected a finite number"),
        ({"loss_type": None}, "trl.loss_type is None: expected a list"),
        ({"loss_type": [3]}, "trl.loss_type is 3: expected str"),
        ({"ld_alpha": "zzz"}, "trl.ld_alpha is 'zzz': expected a finite number"),
        ({"loss_weights": ["zzz"]}, "trl.loss_weights is 'zzz': expected a finite number"),
    ],
)
def test_options_of_trl_have_the_types_that_trl_says(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("trl")
    path = write_feedback_recipe(tmp_path, trl=options)
    with pytest.raises(GmaskError, match=message):
        PreferenceTuning(load_feedback_recipe(path, "dpo"), "dpo")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_name_of_a_loss_is_a_list_of_one(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    path = write_feedback_recipe(tmp_path, trl={"loss_type": "ipo"})
    run = PreferenceTuning(load_feedback_recipe(path, "dpo"), "dpo")
    assert run.args.loss_type == ["ipo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("absurd") / "model")


def test_a_request_that_never_fits_is_refused_and_does_not_wait(folder: Path) -> None:
    infiller = Infiller(*gmask.load(folder, device="cpu"), make_sampling({"n": 3, "temperature": 1.0}))
    whole = infiller.decoder()
    assert isinstance(whole, Stepper)
    small = Stepper(infiller.model, infiller.tokenizer, whole.sampler, infiller.reader.special, budget=Budget(rows=2))
    context = infiller.read("a [MASK]").context
    with pytest.raises(GmaskError, match=r"3 samples of .* and 2 rows: lower n"):
        small.run([context], infiller.sampling, seeds=[0])
    with pytest.raises(GmaskError, match=r"3 samples of .* and 2 rows: lower n"):
        next(small.stream(Request(context=context, sampling=infiller.sampling), seed=0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": "(.*)*" * 12 + "x"}, "repeats a group"),
        ({"target_modules": ".*" * 12 + "x"}, "more than 4 repetitions"),
        ({"exclude_modules": "(a+)+$"}, "repeats a group"),
        ({"alpha_pattern": {"(a|a)*": 3}}, "repeats a group"),
        ({"r": 10**9}, "a rank is 1000000000, and at most 8192 is read"),
        ({"rank_pattern": {"dense": 1e300}}, r"a rank is 1e\+300"),
        ({"megatron_config": {"a": 1}}, "cannot be put into this model"),
        ({f"k{number}": 0 for number in range(20_000)}, "keys, and no such file has as many"),
        ({"peft_type": "a" * 5000}, r"a\.\.\. is none of"),
    ],
)
def test_an_adapter_config_that_nobody_means_is_one_line(
    folder: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    model, _ = gmask.load(folder, device="cpu")
    apply_method(model, MethodSettings(rank=2))
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(GmaskError, match=message) as caught:
        gmask.load(folder, adapter=tmp_path / "adapter", device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_the_usual_patterns_of_an_adapter_are_read(folder: Path, tmp_path: Path) -> None:
    model, _ = gmask.load(folder, device="cpu")
    apply_method(model, MethodSettings(rank=2))
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    path = tmp_path / "adapter" / "adapter_config.json"
    pattern = r".*\.layers\.(0|1)\.attention\.(?:query_key_value|key)"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": pattern}))
    again, _ = gmask.load(folder, adapter=tmp_path / "adapter", device="cpu")
    learnt, found = (
        {name: value for name, value in one.state_dict().items() if "lora_" in name} for one in (model, again)
    )
    assert len(learnt) == 4 and learnt.keys() == found.keys()  # two matrices in each of two layers
    assert all(torch.equal(learnt[name], found[name]) for name in learnt)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_of_a_million_keys_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **{f"k{number}": 0 for number in range(20_000)}}))
    with pytest.raises(GmaskError, match=f"{name}: has 200.. keys, and no such file has as many; download"):
        gmask.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("values", [{}, {"a": 1}, {"text_loss": "x", "reply_loss": 1, "answers": []},
                                    {"text_loss": 1, "reply_loss": 1, "answers": 5}])  # fmt: skip
def test_scores_of_a_run_without_their_fields_are_one_line(tmp_path: Path, values: dict[str, Any]) -> None:
    write_json(tmp_path / "general-before.json", values)
    with pytest.raises(GmaskError, match=r"general-before.json.*; delete it, and it is written anew$"):
        read_general_scores(tmp_path / "general-before.json")
