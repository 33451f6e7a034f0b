"""The recipe of a pipeline: stages, each a verb with its recipe, and the report over them; YAML into typed settings."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from gmask.checkpoints.hub import find_local
from gmask.config import (
    Count,
    Positive,
    RunSeed,
    Whole,
    build_settings,
    check_choice,
    field_names,
    load_tree,
    plain_values,
    to_yaml,
)
from gmask.errors import GmaskError, nearest
from gmask.recipes.feedback import read_feedback_recipe
from gmask.recipes.grpo import read_grpo_recipe
from gmask.recipes.ppo import read_ppo_recipe
from gmask.recipes.tuning import differing_keys, read_tuning_recipe

Verb = Literal["sft", "reward", "dpo", "kto", "grpo", "ppo"]
STAGE_VERBS: tuple[Verb, ...] = get_args(Verb)

RECIPE_READERS: Mapping[Verb, Callable[[Mapping[str, Any]], Any]] = {
    "sft": read_tuning_recipe,
    "reward": partial(read_feedback_recipe, stage="reward"),
    "dpo": partial(read_feedback_recipe, stage="dpo"),
    "kto": partial(read_feedback_recipe, stage="kto"),
    "grpo": read_grpo_recipe,
    "ppo": read_ppo_recipe,
}
"""Each makes the recipe of its verb of plain values, and checks it."""

STAGE_NAME = re.compile(r"\w[\w-]*")  # a folder, and a part of a dotted key
MODEL_KEYS = (("model", "name"), ("reward", "model"))
"""The keys of a recipe that name a model, or an earlier stage whose result it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineRunSettings:
    """The folder of a pipeline, and what its stages have in common unless their recipes say otherwise."""

    out: str
    seed: RunSeed = 0
    device: str | None = None  # by default the best one
    threads: Count | None = None  # by default as many as torch finds


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """What judges the answers of the stages: a function, a reward model (or the stage that makes it), or both apart."""

    function: str | None = None  # module:function, as in ppo
    model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineReportSettings:
    """The report over the stages: their answers to held-out prompts."""

    prompts: str  # a file or a glob
    root: str = "."  # what the paths are relative to
    task: str | dict[str, Any] = "chat/alpaca"  # of the kind chat, seq2seq or infill; its answers may be absent
    limit: Count | None = None  # prompts
    reward: JudgeSettings
    baseline: str | None = None  # a stage or a model; by default the first sft, else what the first stage begins with
    samples: Whole = 0  # answers drawn to each prompt, beside the greedy one
    temperature: Positive = 1.0  # of those
    max_source: Count = 256  # tokens of a prompt
    max_target: Count = 128  # tokens of an answer
    batch_size: Count = 16  # answers that are scored side by side
    rows: Count = 64  # answers that are written side by side
    shown: Count = 20  # prompts whose answers stand side by side in the report
    general: str | None = None  # texts on which forgetting is measured, as forgetting.texts; by default gmask's own


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineStage:
    """A stage: a verb and its recipe, in which models may be the names of earlier stages."""

    name: str
    verb: Verb
    tree: Mapping[str, Any]  # plain values of the recipe
    recipe: Any  # the same, read and checked

    @property
    def makes_adapter(self) -> bool:
        makes: bool = self.recipe.method.makes_adapter
        return makes

    @property
    def writes(self) -> bool:
        """Whether its model writes answers."""
        return self.verb != "reward"

    def values(self) -> dict[str, Any]:
        """The plain values that decide its result, with the names of stages in them."""
        return {"verb": self.verb, **self.recipe.to_dict()}

    def differing_keys(self, values: Mapping[str, Any]) -> list[str]:
        """The keys in which its recipe differs from that of the `values` of another run, as far as results depend."""
        if values["verb"] != self.verb:
            return ["verb"]
        kept = _read_recipe(self.name, self.verb, {key: value for key, value in values.items() if key != "verb"})
        return differing_keys(kept, self.recipe)

    def sources(self, names: Sequence[str]) -> list[str]:
        """The stages among ``names`` whose results it takes."""
        return list(dict.fromkeys(value for _, value in models_in(self.tree) if value in names))

    def resolve(self, folders: Mapping[str, Path], out: Path) -> str:
        """The recipe as YAML, with folders in the place of the names of stages, and its own folder."""
        tree = {**self.tree, "run": {**self.tree.get("run", {}), "out": str(out)}}
        for (section, key), value in models_in(self.tree):
            if value in folders:
                tree[section] = {**tree[section], key: str(folders[value])}
        return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineRecipe:
    """A pipeline: its stages in their order, each with ``verb`` and the sections of that verb's recipe."""

    run: PipelineRunSettings
    stages: dict[str, dict[str, Any]]
    report: PipelineReportSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        return plain_values(self)

    def to_yaml(self) -> str:
        """The whole recipe, without other files, which `load_pipeline_recipe` reads again."""
        return to_yaml(self)

    def read_stages(self) -> list[PipelineStage]:
        """The stages, each with its recipe checked.

        Raises:
            GmaskError: a mistake in one of them; the key names the stage.
        """
        found = list[PipelineStage]()
        for name, values in self.stages.items():
            tree = {key: value for key, value in values.items() if key != "verb"}
            whole = {**tree, "run": {**tree.get("run", {}), "out": str(Path(self.run.out) / name)}}
            stage = PipelineStage(name, values["verb"], tree, _read_recipe(name, values["verb"], whole))
            _check_stage(stage, found, list(self.stages))
            found.append(stage)
        self._check_report(found)
        return found

    def _check_report(self, stages: Sequence[PipelineStage]) -> None:
        if self.report is None:
            return
        judge = self.report.reward
        if judge.function is None and judge.model is None:
            raise GmaskError("report.reward: name a function (module:function), a reward model, or both")
        if judge.model is not None:
            _check_model("report.reward.model", judge.model, stages, list(self.stages), writes=False)
        if self.report.baseline is not None:
            _check_model("report.baseline", self.report.baseline, stages, list(self.stages), writes=True)
        if not any(stage.writes for stage in stages):
            raise GmaskError("report: no stage writes answers that could be compared: leave it out")


def load_pipeline_recipe(path: Path | str, overrides: Sequence[str] = ()) -> PipelineRecipe:
    """Reads a recipe; each override is ``stages.NAME.section.key=value`` (or of run, report) with a YAML value.

    The recipe of a stage stands in it, or in the file that its ``recipe`` names, beside this one; what stands in the
    stage is laid over that of the file. ``model: NAME`` is short for ``model: {name: NAME}``.

    Raises:
        GmaskError: no such file, not YAML, an unknown key (the nearest one is named), a stage without a verb.
    """
    tree = load_tree(path, overrides, field_names(PipelineRecipe))
    recipe = build_settings(PipelineRecipe, tree, title="the recipe")
    if not recipe.stages:
        raise GmaskError(f"stages is empty: name stages, such as sft, each with the recipe of its verb ({_verbs()})")
    stages = {
        name: _unfold(name, values, Path(path).parent, recipe.run, list(recipe.stages))
        for name, values in recipe.stages.items()
    }
    return dataclasses.replace(recipe, stages=stages)


def models_in(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """The keys of a stage's recipe that name a model, with their values."""
    for section, key in MODEL_KEYS:
        values = tree.get(section)
        if isinstance(values, Mapping) and isinstance(values.get(key), str):
            yield (section, key), values[key]


def _unfold(name: str, values: Any, folder: Path, run: PipelineRunSettings, names: Sequence[str]) -> dict[str, Any]:
    """A stage with its verb and the whole of its recipe."""
    where = f"stages.{name}"
    if not STAGE_NAME.fullmatch(name):
        raise GmaskError(f"{where}: the name of a stage is that of a folder: letters, digits, - and _")
    values = dict(values or {})
    verb = values.pop("verb", name if name in STAGE_VERBS else None)
    if verb is None:
        others = [one for one in names if one != name] or list(STAGE_VERBS)
        raise GmaskError(f"{where} has no verb: choose {_verbs()}; or is {nearest(name, others)!r} meant?")
    check_choice(verb, STAGE_VERBS, f"{where}.verb")
    file = values.pop("recipe", None)
    if isinstance(values.get("model"), str):
        values["model"] = {"name": values["model"]}
    if "out" in (values.get("run") or {}):
        raise GmaskError(f"{where}.run.out: the folder of a stage is run.out/{name}: leave it out")
    tree = {} if file is None else load_tree(_find_file(file, folder, where), (), ("run", "model", "data"))
    if verb == "sft":
        tree["task"] = "chat/trl"  # as `gmask sft` has it
    shared = {key: value for key, value in vars(run).items() if key != "out" and value is not None}
    tree["run"] = {**shared, **(tree.get("run") or {})}
    tree["run"].pop("out", None)
    return {"verb": verb, **_lay_over(tree, values)}


def _find_file(file: Any, folder: Path, where: str) -> Path:
    if not isinstance(file, str):
        raise GmaskError(f"{where}.recipe is {file!r}: name a YAML file, or write its sections into the stage")
    return next((path for path in (folder / file, Path(file)) if path.is_file()), folder / file)


def _lay_over(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with other values laid over its own, section by section."""
    found = dict(tree)
    for key, value in values.items():
        inner = found.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        found[key] = _lay_over(inner, value) if both else value  # type: ignore[arg-type]  # `both` says it is a mapping
    return found


def _read_recipe(name: str, verb: Verb, tree: Mapping[str, Any]) -> Any:
    """The recipe of a stage, as its verb reads and checks it."""
    try:
        return RECIPE_READERS[verb](tree)
    except GmaskError as error:
        raise GmaskError(f"stages.{name}: {error}") from error


def _check_stage(stage: PipelineStage, before: Sequence[PipelineStage], names: Sequence[str]) -> None:
    where = f"stages.{stage.name}"
    if getattr(stage.recipe.data, "folds", None) is not None:
        raise GmaskError(f"{where}.data.folds: a stage has one result, and a cross-validation several: leave it out")
    for (section, key), value in models_in(stage.tree):
        if section == "reward":
            _check_model(f"{where}.reward.model", value, before, names, writes=False)
        else:
            _check_model(f"{where}.{section}.{key}", value, before, names, writes=None if not stage.writes else True)


def _check_model(
    where: str, value: str, before: Sequence[PipelineStage], names: Sequence[str], *, writes: bool | None
) -> None:
    """Raises `GmaskError` for a value that is neither an earlier stage nor a model, or a stage of the wrong kind.

    writes: whether its model has to write answers (or, False, to reward them).
    """
    stage = next((one for one in before if one.name == value), None)
    if stage is None and value in names:
        raise GmaskError(f"{where}: the stage {value} does not come before it: move it up")
    if stage is None:
        try:
            find_local(value)
        except GmaskError as error:
            earlier = [one.name for one in before]
            hint = f"; the nearest stage before it is {nearest(value, earlier)!r}" if earlier else ""
            raise GmaskError(f"{where}: {error}{hint}") from error
        return
    if writes is not None and stage.writes != writes:
        does, needed = ("writes", "rewards") if stage.writes else ("rewards", "writes")
        raise GmaskError(f"{where}: the stage {value} makes a model that {does}, and one that {needed} is needed")
    if stage.recipe.method.name in ("p-tuning-v2", "p-tuning"):
        raise GmaskError(
            f"{where}: the result of {value} would have to be merged for it, and {stage.recipe.method.name} cannot be: "
            f"choose lora or full in stages.{value}.method"
        )


def _verbs() -> str:
    return f"{', '.join(STAGE_VERBS[:-1])} or {STAGE_VERBS[-1]}"
