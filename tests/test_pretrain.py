"""A pre-training run learns, survives being killed, and stops cleanly at what it cannot use."""

import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from gmask.errors import GmaskError, StoppedError
from gmask.recipes.pretraining import load_recipe
from gmask.training import pretrain, run_folder
from gmask.training.loop import Loop
from gmask.training.run_folder import read_metrics
from pretraining_data import NO_DROPOUT


def losses(out: Path) -> list[tuple[int, float, Any]]:
    return [
        (record["step"], record["loss"], record.get("validation")) for record in read_metrics(out / "metrics.jsonl")
    ]


def test_a_run_ends_with_a_model_folder_and_a_log(recipe_path: Path, tmp_path: Path) -> None:
    model_folder = pretrain.run_pretraining(str(recipe_path))
    names = {path.name for path in model_folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "curves.png", "metrics.jsonl", "recipe.yaml"}
    assert {tensor.dtype for tensor in load_file(model_folder / "model.safetensors").values()} == {torch.bfloat16}
    assert [record[0] for record in losses(tmp_path / "out")] == list(range(1, 17))
    validated = [record for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "validation" in record]
    assert [record["step"] for record in validated] == [8, 16]
    assert set(validated[0]["validation"]["toy"]) == {"token", "sentence", "document"}
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path / "out")] == [
        "checkpoint-00000012",
        "checkpoint-00000016",
    ]
    assert any((tmp_path / "out" / "tensorboard").iterdir())


def test_trackers_are_given_the_numbers_of_the_log(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.seen: list[tuple[int | str, dict[str, float]]] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.seen.append((step, values))

        def finish(self) -> None:
            self.seen.append(("finished", {}))

    blanks = {"English": {"top1": 0.5, "nats": 4.0}}
    record = {"step": 3, "loss": 1.5, "validation": {"toy": {"token": 2.5}}, "blanks": blanks}
    with run_folder.MetricsLog(tmp_path, after_step=0, trackers=[tracker := Tracker()]) as log:
        log.add(record)
    scalars = {
        "training/loss": 1.5, "validation_token/toy": 2.5, "blanks_top1/English": 0.5, "blanks_nats/English": 4.0,
    }  # fmt: skip
    assert tracker.seen == [(3, scalars), ("finished", {})]


def test_twenty_documents_are_learnt(recipe_path: Path, tmp_path: Path) -> None:
    settings = [
        *NO_DROPOUT,
        "optimization.steps=300",
        "optimization.learning_rate=3e-3",
        "run.validate_every=1000",
        "run.save_every=1000",
    ]
    pretrain.run_pretraining(str(recipe_path), settings)
    found = [loss for _, loss, _ in losses(tmp_path / "out")]
    assert sum(found[-20:]) / 20 < 3.0  # guessing by word frequency alone stays near 4


def test_rows_longer_than_the_positions_are_cut_into_pieces(recipe_path: Path, tmp_path: Path) -> None:
    longer = ["data.row_length=256", "model.max_position_embeddings=40", "optimization.steps=8"]
    pretrain.run_pretraining(str(recipe_path), longer)
    assert [step for step, _, validation in losses(tmp_path / "out") if validation] == [8]


def test_a_killed_run_goes_on_bit_for_bit(recipe_path: Path, tmp_path: Path) -> None:
    pretrain.run_pretraining(str(recipe_path), [f"run.out={tmp_path / 'whole'}"])
    overrides = [f"run.out={tmp_path / 'killed'}"]
    code = f"from gmask.training.pretrain import run_pretraining; run_pretraining({str(recipe_path)!r}, {overrides!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300  # a busy machine takes long to start it
    log = tmp_path / "killed" / "metrics.jsonl"
    while time.monotonic() < deadline and not (log.exists() and len(read_metrics(log)) >= 6):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= len(read_metrics(log)) <= 16
    pretrain.run_pretraining(str(recipe_path), overrides)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_run_with_dropout_resumes_bit_for_bit(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    pretrain.run_pretraining(str(recipe_path), [*dropout, f"run.out={tmp_path / 'whole'}"])
    step = Loop.step

    def stop_at_six(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "step", stop_at_six)
    overrides = [*dropout, f"run.out={tmp_path / 'stopped'}"]
    with pytest.raises(KeyboardInterrupt):
        pretrain.run_pretraining(str(recipe_path), overrides)
    monkeypatch.setattr(Loop, "step", step)
    torch.rand(100)  # whatever happened to the random state since
    pretrain.run_pretraining(str(recipe_path), overrides)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_the_loss_does_not_depend_on_how_a_step_is_split(recipe_path: Path, tmp_path: Path) -> None:
    overrides = ["optimization.steps=2", "run.validate_every=100", *NO_DROPOUT]
    for rows in (1, 4):
        pretrain.run_pretraining(
            str(recipe_path), [*overrides, f"optimization.rows_per_pass={rows}", f"run.out={tmp_path / str(rows)}"]
        )
    one, four = ([record[1] for record in losses(tmp_path / str(rows))] for rows in (1, 4))
    assert one == pytest.approx(four, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_the_batch_named(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = pretrain.Pretraining.loss
    calls = []

    def poisoned(self: pretrain.Pretraining, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        found = honest(self, model, batch)
        return found * float("nan") if len(calls) > 2 * 5 and model.training else found

    monkeypatch.setattr(pretrain.Pretraining, "loss", poisoned)
    with pytest.raises(GmaskError, match=r"step 6: the loss is nan .* rows 20 to 23 are kept in .*bad-batch-00000006"):
        pretrain.run_pretraining(str(recipe_path))
    batches = torch.load(tmp_path / "out" / "bad-batch-00000006.pt")
    assert [batch["rows"] for batch in batches] == [[20, 21], [22, 23]]
    assert all(batch["input_ids"].shape == (2, 64) for batch in batches)
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path / "out")] == ["checkpoint-00000004"]


def test_a_full_disk_keeps_the_last_checkpoint(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = run_folder.save_file

    def full_at_eight(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(tensors, path)

    monkeypatch.setattr(run_folder, "save_file", full_at_eight)
    with pytest.raises(GmaskError, match="No space left on device"):
        pretrain.run_pretraining(str(recipe_path))
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path / "out")] == ["checkpoint-00000004"]
    assert not list((tmp_path / "out").glob(".checkpoint*"))
    monkeypatch.undo()
    pretrain.run_pretraining(str(recipe_path))
    assert losses(tmp_path / "out")[-1][0] == 16


def test_a_run_of_an_earlier_version_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """The folder holds the first half of a run with Muon, a moving average and a decay, and the log of the whole.

    The validation of its later steps was recorded anew when the average began to forget its first steps faster.
    """
    folder = Path(__file__).parent / "golden" / "pretraining-run"
    for name in ("checkpoint-00000004", "tokenizer"):
        shutil.copytree(folder / name, tmp_path / "out" / name)
    places = [f"run.out={tmp_path / 'out'}", f"data.root={folder}", f"data.cache={tmp_path / 'cache'}"]
    pretrain.run_pretraining(str(folder / "recipe.yaml"), places)
    expected = [record for record in read_metrics(folder / "log.jsonl") if record["step"] > 4]
    found = read_metrics(tmp_path / "out" / "metrics.jsonl")
    for old, new in zip(expected, found, strict=True):
        assert old.keys() == new.keys()
        assert {"tokens", "labelled_tokens", "learning_rate"} <= old.keys()
        for name in old.keys() - {"seconds", "tokens_per_second", "validation"}:
            assert new[name] == pytest.approx(old[name], rel=1e-4), name
        assert new.get("validation", {}).get("toy", {}) == pytest.approx(
            old.get("validation", {}).get("toy", {}), rel=1e-4
        )


def test_a_checkpoint_of_another_version_stops_the_run(recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-00000004").mkdir(parents=True)
    with pytest.raises(GmaskError, match=r"checkpoint-00000004: has no training\.json: another version of gmask"):
        pretrain.run_pretraining(str(recipe_path))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_damaged_checkpoint_is_named(recipe_path: Path, tmp_path: Path) -> None:
    pretrain.run_pretraining(str(recipe_path), ["optimization.steps=4"])
    path = tmp_path / "out" / "checkpoint-00000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(GmaskError, match=r"checkpoint-00000004: damaged .* delete it"):
        pretrain.run_pretraining(str(recipe_path))


def test_another_model_shape_cannot_resume(recipe_path: Path) -> None:
    pretrain.run_pretraining(str(recipe_path), ["optimization.steps=4"])
    with pytest.raises(GmaskError, match="another shape"):
        pretrain.run_pretraining(str(recipe_path), ["model.hidden_size=64"])
    with pytest.raises(GmaskError, match="holds a run already"):
        pretrain.run_pretraining(str(recipe_path), resume=False)


RATES = ["optimization.steps=110", "optimization.learning_rate=1.0", "optimization.final_learning_rate=0.1"]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(recipe_path: Path) -> None:
    recipe = load_recipe(recipe_path, [*RATES, "optimization.warmup_steps=10"])
    rates = [pretrain.learning_rate(step, recipe) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_norms_and_biases_do_not_decay(recipe_path: Path) -> None:
    training = pretrain.Pretraining(load_recipe(recipe_path))
    decaying, free = training.loop.bare_optimizers[0].param_groups
    assert decaying["weight_decay"] > 0
    assert free["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    assert all("layernorm" in names[id(p)] or names[id(p)].endswith("bias") for p in free["params"])
    assert len(decaying["params"]) + len(free["params"]) == len(names)


CONSTANT = ["optimization.schedule=constant", "optimization.final_learning_rate=0"]
NEW_KEYS = [
    *CONSTANT,
    "optimization.optimizer=muon",
    "optimization.ema=0.9",
    "optimization.decay_embeddings=false",
    "objective.whole_words=true",
    "decay.share=0.25",
    "decay.row_length=96",
    "decay.objective={token_ratio: 0.3}",
]


def test_a_constant_rate_falls_in_a_line_at_the_end(recipe_path: Path) -> None:
    overrides = [*RATES, *CONSTANT, "optimization.warmup_steps=10", "decay.share=0.2"]
    recipe = load_recipe(recipe_path, overrides)
    assert recipe.decay_start == 88
    rates = [pretrain.learning_rate(step, recipe) for step in range(110)]
    assert rates[10:89] == [1.0] * 79
    assert rates[99] == pytest.approx(0.5)
    assert rates[109] == pytest.approx(1 / 22)


def test_muon_takes_the_matrices_of_the_layers_and_embeddings_need_not_decay(recipe_path: Path) -> None:
    training = pretrain.Pretraining(load_recipe(recipe_path, NEW_KEYS))
    adamw, muon = training.loop.bare_optimizers
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    with_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert with_muon == {n for n in names.values() if ".layers." in n and n.endswith("weight") and "norm" not in n}
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in adamw.param_groups}
    assert set(by_decay) == {0.0}
    assert any("word_embeddings" in name for name in by_decay[0.0])
    assert with_muon.isdisjoint(by_decay[0.0])
    assert len(with_muon) + len(by_decay[0.0]) == len(names)


@pytest.mark.parametrize("stop", [6, 14], ids=["before the decay", "in the decay"])
def test_a_run_with_muon_average_and_decay_resumes_bit_for_bit(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = pretrain.run_pretraining(str(recipe_path), [*NEW_KEYS, f"run.out={tmp_path / 'whole'}"])
    step = Loop.step

    def stop_there(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step == stop:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    overrides = [*NEW_KEYS, "run.save_every=2", f"run.out={tmp_path / 'stopped'}"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "step", stop_there)
        pretrain.run_pretraining(str(recipe_path), overrides)
    stopped = pretrain.run_pretraining(str(recipe_path), overrides)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_average_of_the_weights_is_exported(recipe_path: Path) -> None:
    training = pretrain.Pretraining(load_recipe(recipe_path, ["optimization.ema=0.25", "optimization.steps=3"]))
    average: dict[str, torch.Tensor] = {}
    data = training.data(0)
    for decay in (None, 2 / 11, 0.25):  # that of the recipe from the third step on
        training.loop.step(next(data), started=0.0)
        for name, parameter in training.model.named_parameters():
            value = parameter.detach().clone()
            average[name] = value if decay is None else decay * average[name] + (1 - decay) * value
    exported = dict(training.final_model.named_parameters())
    for name, expected in average.items():
        torch.testing.assert_close(exported[name], expected)


def test_a_run_is_made_longer_from_the_start_of_its_decay(recipe_path: Path, tmp_path: Path) -> None:
    settings = [*CONSTANT, "decay.share=0.25", "run.keep_last=1"]
    pretrain.run_pretraining(str(recipe_path), settings)
    kept = [folder.name for folder in run_folder.list_checkpoints(tmp_path / "out")]
    assert kept == ["checkpoint-00000012", "checkpoint-00000016"]
    longer = [*settings, "optimization.steps=24"]
    with pytest.raises(GmaskError, match="delete the checkpoints after that step"):
        pretrain.run_pretraining(str(recipe_path), longer)
    shutil.rmtree(tmp_path / "out" / "checkpoint-00000016")
    pretrain.run_pretraining(str(recipe_path), longer)
    pretrain.run_pretraining(str(recipe_path), [*longer, f"run.out={tmp_path / 'at once'}"])
    assert losses(tmp_path / "out")[12:] == losses(tmp_path / "at once")[12:]


def test_a_run_that_is_past_the_start_of_its_decay_says_so(recipe_path: Path, tmp_path: Path) -> None:
    pretrain.run_pretraining(str(recipe_path), [*CONSTANT, "decay.share=0"])
    with pytest.raises(GmaskError, match=r"past step 12, .* raise optimization.steps"):
        pretrain.run_pretraining(str(recipe_path), [*CONSTANT, "decay.share=0.25"])


def test_another_optimizer_cannot_resume(recipe_path: Path) -> None:
    pretrain.run_pretraining(str(recipe_path), ["optimization.steps=4"])
    with pytest.raises(GmaskError, match=r"had another optimization.optimizer"):
        pretrain.run_pretraining(str(recipe_path), ["optimization.optimizer=muon"])


def test_a_run_on_another_cpu_goes_on_and_says_so(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.run_pretraining(str(recipe_path), ["optimization.steps=4"])
    assert "bit for bit" not in capsys.readouterr().err
    monkeypatch.setattr(pretrain, "cpu_instructions", lambda: "another")
    pretrain.run_pretraining(str(recipe_path), ["optimization.steps=8"])
    assert re.search(r"float32 on another: the run goes on, but not bit for bit", capsys.readouterr().err)


def test_blanks_in_held_out_sentences_are_measured_by_language_and_kind(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = "data.sources=[{name: toy, train: train.jsonl, validation: train.jsonl, kind: modern}]"
    pretrain.run_pretraining(str(recipe_path), ["run.validation_sentences=6", sentences])
    found = [record["blanks"] for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "blanks" in record]
    assert len(found) == 2
    assert set(found[0]) == {"English", "English, modern", "Chinese", "Chinese, modern"}
    assert found[0]["English"] == found[0]["English, modern"]
    assert all(0 <= group["top1"] <= 1 and group["nats"] > 0 and group["blanks"] > 0 for group in found[1].values())
    assert "step 16: first token of one-unit blanks: English" in capsys.readouterr().err


SHORT = ["optimization.steps=12", "optimization.warmup_steps=1", "run.save_every=6", "run.validate_every=100"]


def test_a_spike_changes_no_weight_and_is_told(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = pretrain.Pretraining.loss
    weights: dict[int, torch.Tensor] = {}

    def spiky(self: pretrain.Pretraining, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        step = self.loop.progress.step
        weights[step] = self.model.glm.word_embeddings.weight.detach().clone()
        return honest(self, model, batch) * (3.0 if step == 8 else 1.0)

    guarded = [*SHORT, "optimization.spike_factor=2", "optimization.spike_window=4"]
    monkeypatch.setattr(pretrain.Pretraining, "loss", spiky)
    pretrain.run_pretraining(str(recipe_path), guarded)
    assert "step 9: skipped" in capsys.readouterr().err
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["step"] for record in records if record.get("skipped")] == [9]
    assert torch.equal(weights[8], weights[9]) and not torch.equal(weights[9], weights[10])
    stopped = [*guarded, "optimization.on_spike=stop", f"run.out={tmp_path / 'stopped'}"]
    with pytest.raises(GmaskError, match=r"step 9: the loss is .* more than 2 times the median of the last 4"):
        pretrain.run_pretraining(str(recipe_path), stopped)
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path / "stopped")] == ["checkpoint-00000006"]
    monkeypatch.undo()
    pretrain.run_pretraining(str(recipe_path), stopped)
    assert [record["step"] for record in read_metrics(tmp_path / "stopped" / "metrics.jsonl")] == list(range(1, 13))


def test_the_norms_of_each_layer_and_the_use_of_the_device_are_logged(recipe_path: Path, tmp_path: Path) -> None:
    logged = [*SHORT, "optimization.steps=4", "run.layers_every=2", "run.peak_tflops=1", "optimization.clip_norm=0.01"]
    pretrain.run_pretraining(str(recipe_path), logged)
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert ["layers" in record for record in records] == [False, True, False, True]
    for record in records:
        assert 0 < record["mfu"] < 1
    for record in (records[1], records[3]):
        assert set(record["layers"]) == {"layer 000", "layer 001", "others"}
        squares = [norms["gradient_norm"] ** 2 for norms in record["layers"].values()]
        assert sum(squares) ** 0.5 == pytest.approx(record["gradient_norm"], rel=1e-4), "before clipping"
    weights = load_file(tmp_path / "out" / "checkpoint-00000004" / "model.safetensors")
    first = torch.cat([weight.flatten() for name, weight in weights.items() if ".layers.0." in name])
    assert records[3]["layers"]["layer 000"]["weight_norm"] == pytest.approx(float(first.norm()), rel=1e-2)
    names = dict(run_folder.flatten_record(records[3]))
    assert "gradient_norm/layer 001" in names and "training/layers" not in names


def test_a_run_whose_time_is_up_saves_and_goes_on(recipe_path: Path, tmp_path: Path) -> None:
    pretrain.run_pretraining(str(recipe_path), [*SHORT, f"run.out={tmp_path / 'whole'}"])
    with pytest.raises(StoppedError, match=r"stopped by run\.time_limit after step 1; .* from checkpoint-00000001"):
        pretrain.run_pretraining(str(recipe_path), [*SHORT, "run.time_limit=1e-6"])
    pretrain.run_pretraining(str(recipe_path), SHORT)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.parametrize("kept", ["selective", "true"])
def test_activations_that_are_computed_again_change_no_loss(recipe_path: Path, tmp_path: Path, kept: str) -> None:
    dropout = ["model.hidden_dropout=0.1", "optimization.steps=3", "run.validate_every=100"]
    pretrain.run_pretraining(str(recipe_path), [*dropout, f"run.out={tmp_path / 'plain'}"])
    again = f"optimization.gradient_checkpointing={kept}"
    pretrain.run_pretraining(str(recipe_path), [*dropout, again, f"run.out={tmp_path / kept}"])
    plain, found = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", kept))
    for name in ("loss", "gradient_norm"):
        assert [record[name] for record in found] == pytest.approx([record[name] for record in plain], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="compiling for a CPU takes a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_blocks_change_no_loss(recipe_path: Path, tmp_path: Path) -> None:
    short = [*NO_DROPOUT, "optimization.steps=4", "run.validate_every=4", "run.save_every=2"]
    compiled = [*short, "optimization.compile=true", f"run.out={tmp_path / 'compiled'}"]
    pretrain.run_pretraining(str(recipe_path), [*short, f"run.out={tmp_path / 'plain'}"])
    training = pretrain.Pretraining(load_recipe(recipe_path, compiled))
    assert all(block._compiled_call_impl is not None for block in training.model.glm.transformer.layers)
    training.train()
    plain, found = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled"))
    for name in ("loss", "gradient_norm"):
        assert [record[name] for record in found] == pytest.approx([record[name] for record in plain], rel=1e-4)


class Products(TorchDispatchMode):
    """Counts the matrix products and GELUs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"addmm": 0, "gelu": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_product_again(recipe_path: Path) -> None:
    counts = {}
    for mode in ("false", "selective", "true"):
        overrides = [*NO_DROPOUT, f"optimization.gradient_checkpointing={mode}", "optimization.steps=1"]
        training = pretrain.Pretraining(load_recipe(recipe_path, overrides))
        training.model.train()
        batch = next(training.data(0)).batches[0]
        with Products() as seen:
            training.loss(training.loop.model, batch).backward()
        counts[mode] = seen.counts
    assert counts["selective"]["addmm"] == counts["false"]["addmm"] < counts["true"]["addmm"]
    assert counts["false"]["gelu"] < counts["selective"]["gelu"] == counts["true"]["gelu"]


def test_a_second_stage_begins_with_the_weights_of_the_first(recipe_path: Path, tmp_path: Path) -> None:
    first = pretrain.run_pretraining(str(recipe_path), ["optimization.steps=4"])
    stage = ["optimization.steps=2", f"run.out={tmp_path / 'second'}", f"model.name={first}"]
    training = pretrain.Pretraining(load_recipe(recipe_path, [*stage, "model.hidden_dropout=0.25"]))
    before = load_file(first / "model.safetensors")
    for name, weight in training.model.named_parameters():
        assert torch.equal(weight.detach(), before[name].float()), name
    assert training.model.config.hidden_dropout == training.model.glm.transformer.layers[0].dropout.p == 0.25
    second = training.train()
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert not (tmp_path / "second" / "tokenizer").exists()
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "out")[0]
    assert load_recipe(second / "recipe.yaml").start == "model"
    for override, message in (
        ("model.hidden_size=64", r"model.hidden_size is 64, and that of .* is 32: leave it out"),
        ("optimization.initialization=neighbours", "is of new weights"),
        (f"model.name={tmp_path}", "no config.json there"),
    ):
        with pytest.raises(GmaskError, match=message):
            pretrain.run_pretraining(str(recipe_path), [*stage, f"run.out={tmp_path / 'no'}", override])
    assert not (tmp_path / "no").exists()
