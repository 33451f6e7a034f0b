"""A model is tuned to every kind of task, by every method, and what comes out is what was measured."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import gmask
from gmask.errors import GmaskError
from gmask.evaluation.harness import Evaluation, run_tasks
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.tasks.task import load_task
from gmask.training import finetune
from gmask.training import losses as training_losses
from gmask.training.report import TuningResults
from gmask.training.run_folder import last_checkpoint, list_checkpoints
from gmask.training.validation import Validator
from tuning_data import CHAT, CLOZE_TASK, SENTIMENT, read_log, read_losses, write_recipe

TASKS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "cloze": (CLOZE_TASK, SENTIMENT),
    "multiple-choice": (
        {**CLOZE_TASK, "kind": "multiple-choice", "choices": {"good": "very good", "bad": "quite bad indeed"}},
        SENTIMENT,
    ),
    "classification": (
        {**CLOZE_TASK, "kind": "classification", "template": "{text}", "choices": {"good": "good", "bad": "bad"}},
        SENTIMENT,
    ),
    "seq2seq": ("seq2seq/plain", [{"source": r["text"], "target": r["label"]} for r in SENTIMENT]),
    "infill": ("infill/text", [{"text": f"It is a [MASK={r['label']}] day: [sMASK={r['text']}]"} for r in SENTIMENT]),
    "language-model": ("language-model/text", [{"text": f"{r['text']} {r['text']}"} for r in SENTIMENT]),
    "chat": ("chat/alpaca", CHAT),
}
METHODS = ["full", "frozen-embeddings", "lora", "dora", "adalora", "ia3", "p-tuning-v2", "p-tuning"]


def read_results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("kind", TASKS)
def test_every_kind_of_task_is_learnt(tmp_path: Path, kind: str) -> None:
    task, records = TASKS[kind]
    path = write_recipe(
        tmp_path, task=task, records=records, forgetting={"skip": True},
        optimization={"steps": 12, "evaluate_every": 12},
    )  # fmt: skip
    folder = finetune.run_finetuning(path)
    losses = [record["loss"] for record in read_log(tmp_path / "out")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    model, _ = gmask.load(folder)
    assert isinstance(model, GLMForSequenceClassification) == (kind == "classification")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    rate = {"p-tuning-v2": 2e-2, "ia3": 3e-2}.get(method, 3e-3)
    settings = {"name": method, **({"prefix_length": 8} if method == "p-tuning-v2" else {})}
    folder = finetune.run_finetuning(
        write_recipe(tmp_path, method=settings, optimization={"steps": 10, "learning_rate": rate, "evaluate_every": 10})
    )
    losses = [record["loss"] for record in read_log(tmp_path / "out")]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert folder.name == ("model" if method in ("full", "frozen-embeddings") else "adapter")
    results = read_results(tmp_path / "out")
    assert (results["trainable_parameters"] == results["parameters"]) == (method == "full")


@pytest.mark.filterwarnings("ignore:of 4 samples 4 were cut:UserWarning")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_saved_weights_predict_what_was_measured(tmp_path: Path, method: str) -> None:
    """The evaluation cuts texts as the run did: its recipe lies beside the weights."""
    path = write_recipe(
        tmp_path,
        data={"max_source": 7},
        method={"name": method},
        optimization={"steps": 6, "learning_rate": 3e-3},
        decoding={"max_tokens": 5},
    )
    finetune.run_finetuning(path)
    out = tmp_path / "out"
    (task := tmp_path / "task.yaml").write_text(yaml.safe_dump(CLOZE_TASK, sort_keys=False), "utf-8")
    report = run_tasks(
        str(out / "model") if method == "full" else "bundled",
        adapter=None if method == "full" else str(out / "adapter"),
        tasks=[str(task)],
        data=str(tmp_path / "validation.jsonl"),
        out=str(tmp_path / "again"),
        device="cpu",
        tables=False,
    )
    (found,) = report.tasks
    assert found.settings["max_source"] == 7
    told, again = (
        [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
        for folder in (out, tmp_path / "again" / CLOZE_TASK["name"])
    )
    assert [one["predicted_label"] for one in told] == [one["predicted_label"] for one in again]
    for one, found in zip(told, again, strict=True):
        assert one["scores"] == pytest.approx(found["scores"], abs=2e-4)


def test_a_run_leaves_what_a_reader_needs(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, task="chat/alpaca", records=CHAT, method={"name": "lora"}, forgetting={"answers": 2})
    folder = finetune.run_finetuning(path)
    out = tmp_path / "out"
    names = {file.name for file in out.iterdir()}
    assert names >= {
        "adapter", "recipe.yaml", "metrics.jsonl", "predictions.jsonl", "curves.png", "results.json", "README.md",
        "forgetting.md", "start.txt", "best.safetensors",
    }  # fmt: skip
    start = (out / "start.txt").read_text("utf-8")
    assert "⟦2<|endofpiece|>⟧" in start.replace(" ", "")
    assert "What trains (lora)" in start
    results = json.loads((out / "results.json").read_text("utf-8"))
    progress = json.loads((last_checkpoint(out) / "training.json").read_text("utf-8"))["progress"]
    assert results["evaluation_seconds"] > progress["validation_seconds"] > 0, "that before the first step counts, too"
    assert "| time of the evaluations |" in (out / "README.md").read_text("utf-8")
    assert "memory: about" in start
    card = (out / "README.md").read_text("utf-8")
    assert "base_model: bundled" in card
    assert "SHA-256" in card and "train.jsonl" in card
    assert "chat/alpaca" in card and "## Licence" in card and "## Forgetting" in card
    exported = "".join(file.read_text("utf-8") for file in folder.iterdir() if file.suffix in (".md", ".json", ".yaml"))
    assert str(tmp_path) not in exported
    results = read_results(out)
    assert set(results["metrics"]["validation"]) == {"loss", *load_task("chat/alpaca").metrics}
    assert results["forgetting"]["text_loss_before"] != results["forgetting"]["text_loss_after"]
    assert results["peak_memory_bytes"] > 10**7
    validated = [record["step"] for record in read_log(out) if "validation" in record]
    assert validated == [2, 4]


def test_the_loss_does_not_depend_on_how_a_step_is_split(tmp_path: Path) -> None:
    task, records = TASKS["seq2seq"]
    path = write_recipe(tmp_path, task=task, records=records)
    found = {}
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        out = tmp_path / f"{batch_size}"
        finetune.run_finetuning(
            path,
            [f"run.out={out}", f"optimization.batch_size={batch_size}", f"optimization.accumulation={accumulation}"],
        )
        found[batch_size] = [record["loss"] for record in read_log(out)]
    assert found[1] == pytest.approx(found[4], rel=1e-4)
    assert found[2] == pytest.approx(found[4], rel=1e-4)


def test_packed_samples_have_the_loss_that_they_have_alone(tmp_path: Path) -> None:
    task, records = TASKS["seq2seq"]
    path = write_recipe(tmp_path, task=task, records=records, optimization={"steps": 1, "batch_size": 8})
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'alone'}"])
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'packed'}", "data.packing=200", "optimization.batch_size=1"])
    alone, packed = (read_log(tmp_path / name)[0] for name in ("alone", "packed"))
    assert packed["supervised_tokens"] == alone["supervised_tokens"]
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    with pytest.raises(GmaskError, match=r"data\.packing is for tasks that write"):
        finetune.run_finetuning(write_recipe(tmp_path / "cloze", data={"packing": 64}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "p-tuning-v2"])
def test_checkpointing_gradients_changes_no_loss(tmp_path: Path, method: str) -> None:
    path = write_recipe(tmp_path, method={"name": method})
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'plain'}"])
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'saving'}", "optimization.gradient_checkpointing=true"])
    plain, saving = ([record["loss"] for record in read_log(tmp_path / name)] for name in ("plain", "saving"))
    assert plain == pytest.approx(saving, rel=1e-5)


def test_a_bfloat16_forward_keeps_float32_master_weights(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, method={"name": "lora"}, model={"dtype": "bfloat16"}, optimization={"dtype": "bfloat16"}
    )
    finetune.run_finetuning(path)
    weights = load_file(tmp_path / "out" / "checkpoint-00000004" / "trained.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all("lora" in name for name in weights)
    assert all(math.isfinite(record["loss"]) for record in read_log(tmp_path / "out"))


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("method", ["qlora", "p-tuning-v2"])
def test_adapters_learn_beside_integers(tmp_path: Path, form: str, method: str) -> None:
    rate = 2e-2 if method == "p-tuning-v2" else 3e-3
    path = write_recipe(
        tmp_path, method={"name": method}, model={"quantize": form}, optimization={"steps": 8, "learning_rate": rate}
    )
    finetune.run_finetuning(path)
    losses = [record["loss"] for record in read_log(tmp_path / "out")]
    assert sum(losses[-2:]) < sum(losses[:2])


def test_the_best_weights_are_kept_and_worse_ones_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([40.0, 60.0, 50.0, 60.0, 55.0, 99.0])
    seen: list[dict[str, torch.Tensor]] = []

    def validate(self: Validator, samples: Any, **kwargs: Any) -> Evaluation:
        weights = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        seen.append(weights)
        return Evaluation([], {"loss": 1.0, "accuracy": next(told)}, {})

    monkeypatch.setattr(Validator, "validate", validate)
    folder = finetune.run_finetuning(
        write_recipe(tmp_path, optimization={"steps": 40, "evaluate_every": 2, "early_stop": 2, "learning_rate": 1e-4})
    )
    results = read_results(tmp_path / "out")
    assert (results["best_step"], results["steps"], results["stopped_early"]) == (4, 8, True)
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)
    assert not all(torch.equal(saved[name], seen[3][name]) for name in saved)


def test_folds_hold_out_every_record_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, data={"validation": None, "folds": 4}, optimization={"steps": 2})
    out = finetune.run_finetuning(path)
    results = read_results(out)
    texts = [
        json.loads(line)["text"]
        for fold in range(1, 5)
        for line in (out / f"fold-{fold}" / "predictions.jsonl").read_text("utf-8").splitlines()
    ]
    assert sorted(texts) == sorted(f"{record['text']} It was [MASK]." for record in SENTIMENT)
    runs = [run["metrics"]["validation"]["accuracy"] for run in results["runs"]]
    assert len(runs) == 4 and {"steps", "best_step"}.isdisjoint(results)
    assert results["metrics"]["validation"]["accuracy"]["mean"] == pytest.approx(sum(runs) / 4)
    assert set(results["majority"]["validation"]) == {"accuracy"}
    told = capsys.readouterr().err
    assert "4 folds" in told and f"{sum(runs) / 4:.2f} ± " in told


def test_a_random_model_of_the_same_shape_can_be_compared(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, task="language-model/text", records=TASKS["language-model"][1])
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'known'}"])
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'random'}", "model.initialization=random"])
    known, random = (read_log(tmp_path / name)[0]["loss"] for name in ("known", "random"))
    assert known < random - 1


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = training_losses.find_loss, []

    def poisoned(kind: Any) -> Any:
        loss = honest(kind)

        def found(model: Any, batch: Any) -> Any:
            total, count = loss(model, batch)
            calls.extend([1] * model.training)
            return total * (float("nan") if len(calls) == 3 and model.training else 1), count

        return found

    monkeypatch.setattr(training_losses, "find_loss", poisoned)
    with pytest.raises(
        GmaskError, match=r"step 3: the loss is nan .*train\.jsonl:\d.* are kept in .*bad-batch-00000003"
    ):
        finetune.run_finetuning(write_recipe(tmp_path))
    (batch,) = torch.load(tmp_path / "out" / "bad-batch-00000003.pt")
    assert len(batch["samples"]) == len(batch["input_ids"]) == 4
    assert [folder.name for folder in list_checkpoints(tmp_path / "out")] == ["checkpoint-00000002"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "p-tuning-v2"}, "was trained by lora or dora or qlora, and method.name is p-tuning-v2"),
        ({"name": "lora", "rank": 4}, "its rank is 8, and method.rank is 4"),
    ],
)
def test_an_adapter_of_another_method_is_not_trained_on(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = finetune.run_finetuning(write_recipe(tmp_path, method={"name": "lora"}, optimization={"steps": 1}))
    path = write_recipe(tmp_path / "more", model={"adapter": str(folder)}, method=settings)
    with pytest.raises(GmaskError, match=message):
        finetune.run_finetuning(path)


def test_a_batch_without_a_supervised_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = training_losses.find_collator

    def masking(kind: Any, *, pad_id: int) -> Any:
        def collate(items: Any) -> Any:
            batch = honest(kind, pad_id=pad_id)(items)
            batch["labels"].fill_(-100)
            return batch

        return collate

    monkeypatch.setattr(training_losses, "find_collator", masking)
    task, records = TASKS["seq2seq"]
    with pytest.raises(GmaskError, match=r"step 1: no token of its samples is supervised.*train\.jsonl:\d"):
        finetune.run_finetuning(write_recipe(tmp_path, task=task, records=records))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train=absent.jsonl", "absent.jsonl"),
        ("task.template='{txt} It was [MASK].'", "no column 'txt', the columns are text, label; the nearest is 'text'"),
        ("task.choices={good: good}", "the label 'bad' is none of the choices: good"),
        ("task.metrics=[acuracy]", "nearest is 'accuracy'"),
        ("decoding.beams=2", "no setting 'beams'"),
        ("optimization.trainer.optm=sgd", "nearest is 'optim'"),
        ("optimization.trainer.label_smoothing_factor=0.1", "has no effect on a run"),
        ("optimization.trainer.learning_rate=1", "set optimization.learning_rate instead"),
        ("optimization.trainer.optim=nonsense", "nonsense"),
        ("optimization.trainer.optim=adamw_bnb_8bit", "bitsandbytes"),
        ("optimization.trainer.report_to=abacus", "report_to: abacus is not installed"),
        ("optimization.trainer.deepspeed=ds.json", "eepspeed"),
        ("run.device=tpu", "choose cpu, cuda or mps"),
        ("data.max_source=100000", "positions"),
        ("optimization.trainer.fsdp=full_shard", "fsdp"),
        ("method.name=qlora", "set model.quantize"),
        ("task.template='{text} [PROMPT] [MASK].'", "a vector that p-tuning trains: set method.name"),
        ("model.name=no-such-folder", "no such folder"),
        ("model.quantize=int4", "integers cannot be trained"),
        ("data.folds=100 data.validation=null", "only 8 records"),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(tmp_path: Path, change: str, message: str) -> None:
    changes = change.split(" data.") if change.startswith("data.folds") else [change]
    changes = [changes[0], *(f"data.{one}" for one in changes[1:])]
    with pytest.raises(GmaskError) as caught:
        finetune.run_finetuning(write_recipe(tmp_path), changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_records_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    records = [*SENTIMENT, {"text": "", "label": "good"}, {"text": "Odd.", "label": "odd"}]
    path = write_recipe(tmp_path, records=records, data={"validation": None})
    with pytest.raises(GmaskError, match=r"train\.jsonl, line 9: .*'text' is empty"):
        finetune.run_finetuning(path)
    finetune.run_finetuning(path, ["data.skip_bad_lines=true"])
    assert "2 records could not be used" in (tmp_path / "out" / "start.txt").read_text("utf-8")
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    finetune.run_finetuning(path, ["data.skip_bad_lines=true", f"run.out={tmp_path / 'again'}"])
    assert "3 records could not be used" in (tmp_path / "again" / "start.txt").read_text("utf-8")


def test_long_samples_are_cut_and_counted_and_odd_rates_hinted_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, data={"max_source": 8}, method={"name": "p-tuning-v2"})
    finetune.run_finetuning(path, ["optimization.learning_rate=2e-4"])
    start = (tmp_path / "out" / "start.txt").read_text("utf-8")
    assert "of 8 samples, " in start and "raise data.max_source (8)" in start and "tokens on the left" in start
    assert "validation: of 4 samples " in capsys.readouterr().err
    assert read_results(tmp_path / "out")["truncated"]["cut"] > 0
    assert "a learning rate of 0.0002 is unusual for p-tuning-v2" in start


@pytest.mark.slow
def test_options_of_the_library_pass_through(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'adamw'}"])
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'sgd'}", "optimization.trainer.optim=sgd"])
    adamw, sgd = (read_losses(tmp_path / name) for name in ("adamw", "sgd"))
    assert adamw[0][1] == sgd[0][1]
    assert adamw[1][1] != sgd[1][1]


@pytest.mark.slow
def test_the_command_prints_results_or_one_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, optimization={"steps": 1})
    start = [sys.executable, "-m", "gmask", "finetune", path]
    done = subprocess.run([*start, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["folder"].endswith("model") and "accuracy" in found["metrics"]["validation"]
    done = subprocess.run([*start, "run.seed=9"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "run.seed differs" in done.stderr


def test_sft_is_finetune_with_the_columns_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gmask.cli import main

    records = [
        {"prompt": "Say hello.", "completion": "Hello!"},
        {"messages": [{"role": "user", "content": "Say goodbye."}, {"role": "assistant", "content": "Goodbye!"}]},
    ] * 4
    path = write_recipe(tmp_path, records=records, forgetting={"skip": True}, optimization={"steps": 1})
    monkeypatch.setattr("sys.argv", ["gmask", "sft", path])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert (tmp_path / "out" / "task.yaml").read_text("utf-8").count("reader: trl") == 1


def test_evaluations_that_outlast_the_steps_are_told_with_what_makes_them_fewer() -> None:
    results = TuningResults(
        recipe=None,  # type: ignore[arg-type]
        task=None,  # type: ignore[arg-type]
        files=(),
        trainable_parameters=1,
        parameters=1,
        records=[{"seconds": 2.0}],
        metrics={},
    )
    assert results.advise_evaluations(1.5) is None
    assert results.advise_evaluations(57.0) == (
        "evaluations between the steps took 57 s, the steps 2 s: a higher optimization.evaluate_every or a lower "
        "data.validation_limit saves time"
    )
