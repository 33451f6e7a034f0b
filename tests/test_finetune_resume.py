"""A fine-tuning run that is killed goes on bit for bit, and goes on with its own recipe and samples only."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gmask.cli import main
from gmask.errors import GmaskError, StoppedError
from gmask.training import finetune, loop, run_folder
from gmask.training.loop import Loop
from tuning_data import CHAT, CLOZE_TASK, SENTIMENT, read_log, read_losses, write_lines, write_recipe

DROPOUT = {"name": "lora", "rank": 4, "dropout": 0.3}  # draws random numbers at every step


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, task="chat/alpaca", records=CHAT, method=DROPOUT, forgetting={"answers": 1},
        optimization={"steps": 12, "batch_size": 2, "accumulation": 2, "save_every": 3, "evaluate_every": 4},
    )  # fmt: skip
    whole, killed = ([f"run.out={tmp_path / name}"] for name in ("whole", "killed"))
    finetune.run_finetuning(path, whole)
    code = f"from gmask.training.finetune import run_finetuning; run_finetuning({path!r}, {killed!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1); {code}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 5 <= len(read_log(tmp_path / "killed")) <= 12
    finetune.run_finetuning(path, killed)
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    predictions = [(tmp_path / name / "predictions.jsonl").read_text("utf-8") for name in ("whole", "killed")]
    assert predictions[0] == predictions[1]
    general = [(tmp_path / name / "forgetting.md").read_text("utf-8") for name in ("whole", "killed")]
    assert general[0] == general[1]


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(
        tmp_path, task="chat/alpaca", records=CHAT, method=DROPOUT, forgetting={"skip": True},
        optimization={"steps": 6, "batch_size": 2, "save_every": 100, "evaluate_every": 4},
    )  # fmt: skip
    whole, stopped = ([f"run.out={tmp_path / name}"] for name in ("whole", "stopped"))
    finetune.run_finetuning(path, whole)
    step, before = Loop.step, signal.getsignal(signal.SIGTERM)

    def asked_in_step_three(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with (
        monkeypatch.context() as patch,
        pytest.raises(StoppedError, match="after step 3; the same command goes on from checkpoint-00000003"),
    ):
        patch.setattr(Loop, "step", asked_in_step_three)
        finetune.run_finetuning(path, stopped)
    assert signal.getsignal(signal.SIGTERM) == before
    finetune.run_finetuning(path, stopped)
    assert read_losses(tmp_path / "stopped") == read_losses(tmp_path / "whole")


def test_a_run_that_sigterm_stopped_exits_with_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise StoppedError("stopped by SIGTERM after step 3; the same command goes on from checkpoint-00000003")

    monkeypatch.setattr("gmask.cli.app", stop)
    monkeypatch.setattr("gmask.cli.app.info", SimpleNamespace(name="gmask"), raising=False)
    main()
    assert "goes on from checkpoint-00000003" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trainer"),
    [
        ("adalora", {}),
        ("p-tuning-v2", {}),
        ("full", {}),
        ("full", {"optim": "adafactor"}),  # keeps numbers beside its tensors
        ("lora", {"optim": "rmsprop", "optim_args": "momentum=0.9"}),
    ],
    ids=["adalora", "p-tuning-v2", "full", "adafactor", "rmsprop"],
)
def test_any_method_and_optimizer_resumes_bit_for_bit(
    tmp_path: Path, method: str, trainer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimization = {"steps": 10, "save_every": 4, "batch_size": 2, "trainer": trainer}
    path = write_recipe(tmp_path, method={"name": method}, optimization=optimization)
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'whole'}"])
    honest = Loop.step

    def stop_at_six(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "step", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        finetune.run_finetuning(path, [f"run.out={tmp_path / 'stopped'}"])
    monkeypatch.undo()
    torch.rand(100)  # whatever happened to the random state since
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'stopped'}"])
    assert read_losses(tmp_path / "stopped") == read_losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_from_the_files_of_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "uses_deepspeed", lambda accelerator: True)
    path = write_recipe(tmp_path, method=DROPOUT)
    finetune.run_finetuning(path, [f"run.out={tmp_path / 'whole'}"])
    stopped = tmp_path / "stopped"
    finetune.run_finetuning(path, [f"run.out={stopped}"])
    (stopped / "results.json").unlink()
    shutil.rmtree(stopped / "checkpoint-00000004")  # as if it had been killed after its second step
    assert (stopped / "checkpoint-00000002" / "sharded").is_dir()
    finetune.run_finetuning(path, [f"run.out={stopped}"])
    assert read_losses(stopped) == read_losses(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    folder = finetune.run_finetuning(path)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert finetune.run_finetuning(path) == folder
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}


def make_checkpoint_of_an_earlier_version(out: Path, step: int) -> Path:
    """The files of a fine-tuning checkpoint when transformers' Trainer made the steps."""
    folder = out / f"checkpoint-{step:08d}"
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "progress.json", "optimizer.pt", "scheduler.pt", "trained.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_of_an_earlier_version_is_never_begun_anew_over_its_checkpoint(tmp_path: Path, resume: bool) -> None:
    path = write_recipe(tmp_path)
    old = make_checkpoint_of_an_earlier_version(tmp_path / "out", 2)
    with pytest.raises(
        GmaskError,
        match=r"checkpoint-00000002: has no training\.json: another version of gmask wrote it, and this one cannot "
        r"continue from it; choose another run\.out, or delete that checkpoint$",
    ):
        finetune.run_finetuning(path, resume=resume)
    assert list((tmp_path / "out").iterdir()) == [old]
    assert all(file.read_text() == file.name for file in old.iterdir()), "nothing of it is lost"
    shutil.rmtree(old)
    finetune.run_finetuning(path, resume=resume)
    assert [one[0] for one in read_losses(tmp_path / "out")] == [1, 2, 3, 4]


def test_only_a_checkpoint_after_the_last_complete_one_stops_a_run(tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path), tmp_path / "out"
    folder = finetune.run_finetuning(path)
    losses = read_losses(out)
    (out / "results.json").unlink()
    (out / "checkpoint-00000002" / "training.json").unlink()  # as if killed while it was removed
    assert finetune.run_finetuning(path) == folder
    assert read_losses(out) == losses
    make_checkpoint_of_an_earlier_version(out, 40)
    assert finetune.run_finetuning(path) == folder, "a finished run needs none"
    (out / "results.json").unlink()
    with pytest.raises(GmaskError, match="checkpoint-00000040: has no"):
        finetune.run_finetuning(path)


def test_another_recipe_cannot_resume_and_its_keys_are_named(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    finetune.run_finetuning(path)
    with pytest.raises(GmaskError, match=r"another recipe: run\.seed, optimization\.steps differ; resume with"):
        finetune.run_finetuning(path, ["run.seed=3", "optimization.steps=6"])
    with pytest.raises(GmaskError, match="holds a run already"):
        finetune.run_finetuning(path, resume=False)
    write_lines(tmp_path / "train.jsonl", SENTIMENT[:-1])
    with pytest.raises(GmaskError, match=r"the content of train file train\.jsonl differs"):
        finetune.run_finetuning(path)


def test_a_task_that_was_changed_is_not_resumed_nor_a_finished_run_taken_for_another(tmp_path: Path) -> None:
    task = tmp_path / "mood.yaml"
    task.write_text(yaml.safe_dump(CLOZE_TASK, sort_keys=False), "utf-8")
    path = write_recipe(tmp_path, task=str(task))
    finetune.run_finetuning(path)
    for checkpoint in run_folder.list_checkpoints(tmp_path / "out"):  # to save room
        shutil.rmtree(checkpoint)
    with pytest.raises(GmaskError, match=r"another recipe: run\.seed differs"):
        finetune.run_finetuning(path, ["run.seed=3"])
    task.write_text(yaml.safe_dump({**CLOZE_TASK, "choices": {"bad": "good", "good": "bad"}}, sort_keys=False), "utf-8")
    with pytest.raises(GmaskError, match="another recipe: the content of task mood differs"):
        finetune.run_finetuning(path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path)
    monkeypatch.setattr(finetune.Finetuning, "_report", lambda self, *args: None)  # killed before the end
    finetune.run_finetuning(path)
    weights = tmp_path / "out" / "checkpoint-00000004" / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(GmaskError, match=r"checkpoint-00000004: damaged .* delete it"):
        finetune.run_finetuning(path)
    state = weights.with_name("training.json")
    state.write_text('{"step": 4,\n')
    with pytest.raises(
        GmaskError, match=r"training\.json, line 2: not JSON .*; delete .*checkpoint-00000004 to resume"
    ):
        finetune.run_finetuning(path)
    state.write_text("{}")
    with pytest.raises(GmaskError, match=r"damaged \(training\.json has no progress\); delete it to resume"):
        finetune.run_finetuning(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("data.json", "choose another run.out"), ("general-before.json", "delete it, and it is written anew"),
     ("results.json", "delete it and run again")],
)  # fmt: skip
def test_other_damaged_files_of_a_run_are_named_with_what_to_do(tmp_path: Path, name: str, remedy: str) -> None:
    path = write_recipe(tmp_path, task="chat/alpaca", records=CHAT, forgetting={"answers": 1})
    folder = finetune.run_finetuning(path)
    damaged = tmp_path / "out" / name
    damaged.write_text('{\n"')
    if name == "results.json":
        with pytest.raises(GmaskError, match=rf"results\.json, line 2: not JSON .*; {remedy}$"):
            finetune.read_results(folder)
    else:
        (tmp_path / "out" / "results.json").unlink()
        with pytest.raises(GmaskError, match=rf"{re.escape(name)}, line 2: not JSON .*; {remedy}$"):
            finetune.run_finetuning(path)


def test_a_checkpoint_that_was_cut_short_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", full)
    with pytest.raises(GmaskError, match=r"cannot be written .*No space left on device"):
        finetune.run_finetuning(path)
    assert run_folder.list_checkpoints(tmp_path / "out") == []
    monkeypatch.undo()
    finetune.run_finetuning(path)
    assert [one[0] for one in read_losses(tmp_path / "out")] == [1, 2, 3, 4]
