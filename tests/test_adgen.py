"""AdvertiseGen by the published recipe, on a ChatGLM in miniature: it learns, resumes exactly, and is measured."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import gmask
from gmask.generation.predict import predict
from gmask.generation.settings import make_sampling
from gmask.recipes.tuning import load_tuning_recipe
from gmask.tasks.metrics import score_predictions
from gmask.tasks.records import read_records
from gmask.tasks.task import load_task
from gmask.training import finetune
from gmask.training.loop import Loop
from test_chatglm_chat import VOCABULARY, needs_vocabulary
from tuning_data import read_log, read_losses, write_lines

RECIPE = str(Path(__file__).parents[1] / "recipes" / "finetune-adgen.yaml")
ADGEN = Path(__file__).parents[2] / "shared" / "corpus" / "nc" / "adgen"
STEPS, STOP = 6, 4
WEIGHTS = "adapter_model.safetensors"
LINES = [
    {
        "content": f"类型#{kind}*颜色#{colour}*风格#{style}",
        "summary": f"这件{colour}的{kind}很{style}，穿上它出门，舒服又好看。",
    }
    for kind in ("上衣", "裤", "裙", "外套")
    for colour in ("白色", "黑色", "红色", "蓝色")
    for style in ("简约", "复古")
]
"""In the form of AdvertiseGen, for where that is not."""

pytestmark = needs_vocabulary


def read_lines(name: str, number: int) -> list[dict[str, str]]:
    path = ADGEN / name
    lines = path.read_text("utf-8").splitlines() if path.is_file() else [json.dumps(line) for line in LINES]
    return [json.loads(line) for line in lines[:number]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with the positions of the published one, and samples by their published names."""
    folder = tmp_path_factory.mktemp("adgen")
    shutil.copytree(VOCABULARY.parent, model := folder / "model", copy_function=shutil.copyfile)
    model.chmod(0o755)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "max_sequence_length": 2048}), "utf-8")
    write_lines(folder / "train.json", read_lines("train_like_600.json", 16))
    write_lines(folder / "dev.json", read_lines("dev_400.json", 4))
    return folder


def tune(folder: Path, out: Path) -> Path:
    """The published hyperparameters, but for the number of steps; replies are kept short, to take no time."""
    settings = {
        "run.out": out, "run.device": "cpu", "model.name": folder / "model", "data.root": folder,
        "optimization.steps": STEPS, "optimization.evaluate_every": STEPS, "optimization.save_every": 3,
        "decoding.max_tokens": 24, "forgetting.skip": "true",
    }  # fmt: skip
    return finetune.run_finetuning(RECIPE, [f"{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    return tune(folder, folder / "whole")


def test_the_recipe_has_the_published_hyperparameters() -> None:
    recipe = load_tuning_recipe(RECIPE)
    method, data, optimization = recipe.method, recipe.data, recipe.optimization
    assert (method.name, method.prefix_length, method.projection) == ("p-tuning-v2", 128, False)
    assert (data.max_source, data.max_target) == (64, 64)
    assert (optimization.learning_rate, optimization.steps) == (2e-2, 3000)
    assert (optimization.batch_size, optimization.accumulation) == (1, 16)
    assert recipe.model.quantize == "int4"


def test_the_loss_falls(folder: Path, adapter: Path) -> None:
    records = read_log(folder / "whole")
    losses = [record["loss"] for record in records]
    assert len(losses) == STEPS
    assert losses == sorted(losses, reverse=True)  # every step is of the same 16 samples
    assert losses[-1] < losses[0] - 0.1
    assert records[0]["learning_rate"] == pytest.approx(2e-2)
    assert all(16 < record["supervised_tokens"] <= 16 * 63 for record in records)  # of 64 positions one is <sop>


def test_only_a_prefix_is_saved(folder: Path, adapter: Path) -> None:
    results = json.loads((folder / "whole" / "results.json").read_text("utf-8"))
    config = json.loads((folder / "model" / "config.json").read_text("utf-8"))
    numbers = 128 * 2 * config["num_layers"] * config["hidden_size"]
    assert results["trainable_parameters"] == numbers
    assert 4 * numbers <= (adapter / WEIGHTS).stat().st_size < 4 * numbers + 10_000


def test_bleu_and_rouge_are_those_of_what_was_written(folder: Path, adapter: Path) -> None:
    results = json.loads((folder / "whole" / "results.json").read_text("utf-8"))
    task = load_task("chat/adgen")
    samples = task.samples(read_records(folder / "dev.json"))
    model, tokenizer = gmask.load(folder / "model", adapter=adapter, quantize="int4", device="cpu")
    decoding = {**load_tuning_recipe(RECIPE).decoding, "max_tokens": 24}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some are cut to 64 tokens, as published
        again = predict(
            model, tokenizer, "chat", samples, settings=make_sampling(decoding), batch_size=1, max_source=64
        )
    assert any(prediction.texts[0] for prediction in again)
    lines = (folder / "whole" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["predicted_texts"] for line in lines] == [[*prediction.texts] for prediction in again]
    metrics: dict[str, Any] = results["metrics"]["validation"]
    assert set(metrics) == {"loss", "rouge-1", "rouge-2", "rouge-l", "bleu-4"}
    assert {**metrics, **score_predictions(task.metrics, again, samples, language="zh")} == pytest.approx(metrics)


def test_a_stopped_run_resumes_exactly(folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Loop.step

    def stop(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step == STOP:
            raise KeyboardInterrupt
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, folder / "stopped")
    monkeypatch.undo()
    torch.rand(10)  # whatever happened to the random state since
    again = tune(folder, folder / "stopped")
    assert read_losses(folder / "stopped") == read_losses(folder / "whole")
    assert (again / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
