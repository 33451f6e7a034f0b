"""Do DPO and KTO read rows as the model alone does, begin at the model itself, and resume bit for bit?"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

import gmask
from feedback_data import PAIRS, make_chatglm_folder, write_feedback_recipe
from gmask.checkpoints.adapters import inject
from gmask.errors import StoppedError
from gmask.generation.reward import AnswerEncoder
from gmask.recipes.feedback import load_feedback_recipe
from gmask.recipes.tuning import MethodSettings, TuningDataSettings
from gmask.tasks.preferences import AnswerPair, Intake, Question
from gmask.tasks.records import Record
from gmask.tasks.task import load_task
from gmask.training import preference_tuning, trl_run
from gmask.training.feedback import PreferenceEncoder
from gmask.training.losses import TaskObjective
from gmask.training.methods import make_peft_config
from gmask.training.preference_tuning import PreferenceTuning, check_first_batch, kto_rows, run_preference_tuning
from gmask.training.trl_run import TRLRun
from tiny_folder import make_folder
from tuning_data import read_log

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")

FOLDERS = {"glm": make_folder, "chatglm": make_chatglm_folder}


def restate(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """The log-probability of an answer: one row, with a layout and a mask that are written down here."""
    row, start = [*prompt, *answer], len(prompt) - 1
    blanks = [model.config.gmask_token_id, model.config.mask_token_id]
    blank = next(index for index, token in enumerate(row) if token in blanks)
    first = [*range(start), *[blank] * (len(row) - start)]
    second = [*[0] * start, *range(1, len(row) - start + 1)]
    visible = torch.ones(len(row), len(row), dtype=torch.long).tril()
    visible[:, :start] = 1
    states = model.base_model(
        input_ids=torch.tensor([row]), layout=torch.tensor([[first, second]]), attention_mask=visible[None, None]
    ).last_hidden_state
    logits = F.linear(states[0, start:-1], model.get_output_embeddings().weight)
    return F.log_softmax(logits.double(), -1).gather(1, torch.tensor(answer)[:, None]).sum()


def make_trainer(folder: Path, kind: str, stage: Any, dtype: torch.dtype, **trl: Any) -> Any:
    """A trainer whose policy has moved away from its reference, and its first batch."""
    path = write_feedback_recipe(folder, model=FOLDERS[kind](folder / "base"), trl=trl, data={"validation": None})
    run = PreferenceTuning(load_feedback_recipe(path, stage), stage)
    model, run.tokenizer = gmask.load(folder / "base")
    encoder = preference_tuning.PreferenceEncoder(run.tokenizer, model.config, run.recipe)
    encode: Any = encoder.encode_judgements if stage == "kto" else encoder.encode_pairs
    trainer = run._make_trainer(model, encode(run.splits.train, run.intake_of("train")), [])
    trainer.model.to(dtype)
    trainer.ref_model.to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    trainer.model.eval()
    rows = [trainer.train_dataset[index] for index in range(4)]
    return trainer, rows, trainer.data_collator(rows)


PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-6)]
"""TRL's head gives log-probabilities in float32, whatever the dtype of the model."""


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize(("dtype", "close"), PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("trl", "per_pair"),
    [
        ({"beta": 0.3}, lambda c, r, _: -F.logsigmoid(0.3 * (c - r))),
        ({"beta": 0.3, "loss_type": ["ipo"]}, lambda c, r, n: (c / n[0] - r / n[1] - 1 / 0.6) ** 2),
        (
            {"beta": 0.3, "loss_type": ["robust"], "label_smoothing": 0.1},
            lambda c, r, _: (-0.9 * F.logsigmoid(0.3 * (c - r)) + 0.1 * F.logsigmoid(-0.3 * (c - r))) / 0.8,
        ),
    ],
    ids=["sigmoid", "ipo", "robust"],
)
def test_the_loss_of_dpo_is_that_of_single_rows(
    kind: str, dtype: torch.dtype, close: float, trl: dict[str, Any], per_pair: Any, tmp_path: Path
) -> None:
    trainer, rows, batch = make_trainer(tmp_path, kind, "dpo", dtype, **trl)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch)
        losses = []
        for row in rows:
            ratios = [
                restate(trainer.model, row["prompt_ids"], row[name])
                - restate(trainer.ref_model, row["prompt_ids"], row[name])
                for name in ("chosen_ids", "rejected_ids")
            ]
            losses.append(per_pair(*ratios, (len(row["chosen_ids"]), len(row["rejected_ids"]))))
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), abs=close)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize(("dtype", "close"), PRECISIONS, ids=["float32", "float64"])
def test_the_loss_of_kto_is_that_of_single_rows(kind: str, dtype: torch.dtype, close: float, tmp_path: Path) -> None:
    trainer, rows, batch = make_trainer(tmp_path, kind, "kto", dtype, beta=0.3)

    def ratio(row: dict[str, Any], name: str) -> Tensor:
        return restate(trainer.model, row["prompt_ids"], row[name]) - restate(
            trainer.ref_model, row["prompt_ids"], row[name]
        )

    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch)
        kl = torch.stack([ratio(row, "KL_completion_ids") for row in rows]).mean().clamp(min=0)
        losses = [
            1 - torch.sigmoid(0.3 * ((ratio(row, "completion_ids") - kl) * (1 if row["label"] else -1))) for row in rows
        ]
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), abs=close)


def test_rows_of_kto_take_the_answer_before_in_their_batch() -> None:
    items = [preference_tuning.EncodedJudgement((1,), (10 + n,), True, "here") for n in range(5)]
    rows = kto_rows(items, 2)
    assert [(row["completion_ids"], row["KL_completion_ids"]) for row in rows] == [
        ([10], [11]), ([11], [10]), ([12], [13]), ([13], [12]),
    ]  # fmt: skip
    with pytest.raises(gmask.GmaskError, match="batch_size 2 at least"):
        kto_rows(items, 1)


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"name": "full"}},
    "lora": {"method": {"name": "lora", "rank": 4, "targets": "all-linear"}},
    "qlora": {"method": {"name": "qlora", "rank": 4}, "quantize": "int8"},
}


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_begins_at_the_model_itself_and_learns(stage: Any, method: str, tmp_path: Path) -> None:
    options = METHODS[method]
    path = write_feedback_recipe(
        tmp_path, method=options["method"], optimization={"steps": 12, "learning_rate": 5e-3, "schedule": "constant"}
    )
    overrides = [f"model.quantize={options['quantize']}"] if "quantize" in options else []
    folder = run_preference_tuning(path, stage, overrides)
    log = [record for record in read_log(tmp_path / "out") if "loss" in record]
    assert log[0]["loss"] == pytest.approx(math.log(2) if stage == "dpo" else 0.5, abs=1e-4)
    assert log[-1]["loss"] < log[0]["loss"]
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["validation"]["rewards/margins"] > 0
    assert (folder / "chat_template.jinja").is_file() and (folder / "recipe.yaml").is_file()
    if method == "full":
        again, _ = gmask.load(folder)
    else:
        again, _ = gmask.load(tmp_path / "base", quantize=options.get("quantize"), adapter=folder)
    plain, _ = gmask.load(tmp_path / "base", quantize=options.get("quantize"))
    ids = torch.tensor([[20, 21, plain.config.gmask_token_id, plain.config.sop_token_id, 30]])
    assert not torch.equal(again(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_chatglm_is_tuned(tmp_path: Path) -> None:
    path = write_feedback_recipe(
        tmp_path, model=make_chatglm_folder(tmp_path / "base"), optimization={"steps": 2, "evaluate_every": 2}
    )
    run_preference_tuning(path, "dpo")
    assert read_log(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_stopped_run_goes_on_bit_for_bit(
    stage: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_feedback_recipe(tmp_path, **{"method": METHODS[method]["method"]})
    run_preference_tuning(path, stage, [f"run.out={tmp_path / 'whole'}"])

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    honest = PreferenceTuning._make_trainer

    def stopping(self: PreferenceTuning, *args: Any) -> Any:
        trainer = honest(self, *args)
        trainer.add_callback(Stop())
        return trainer

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PreferenceTuning, "_make_trainer", stopping)
        run_preference_tuning(path, stage, [f"run.out={tmp_path / 'stopped'}"])
    run_preference_tuning(path, stage, [f"run.out={tmp_path / 'stopped'}"])
    logs = [
        [(one["step"], one["loss"], one["gradient_norm"]) for one in read_log(tmp_path / name) if "loss" in one]
        for name in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]
    file = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    weights = [load_file(tmp_path / name / file) for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_reference_computed_before_gives_the_same_run(tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path)
    for name, value in (("kept", "false"), ("computed", "true")):
        run_preference_tuning(path, "dpo", [f"run.out={tmp_path / name}", f"trl.precompute_ref_log_probs={value}"])
    losses = [[one["loss"] for one in read_log(tmp_path / name) if "loss" in one] for name in ("kept", "computed")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_another_reference_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent error 6: TRL reloads a model by its name, without what was changed in memory."""
    path = write_feedback_recipe(tmp_path)
    honest = PreferenceTuning._make_trainer

    def changed(self: PreferenceTuning, *args: Any) -> Any:
        trainer = honest(self, *args)
        with torch.no_grad():
            next(trainer.ref_model.parameters()).mul_(2.0)
        return trainer

    monkeypatch.setattr(PreferenceTuning, "_make_trainer", changed)
    with pytest.raises(gmask.GmaskError, match="the reference is not the model as it begins"):
        run_preference_tuning(path, "dpo")
    monkeypatch.setattr(preference_tuning, "check_first_batch", lambda *args, **keywords: None)
    with pytest.raises(gmask.GmaskError, match="has to be ln 2"):
        run_preference_tuning(path, "dpo")


def test_a_model_with_an_adapter_in_place_is_refused(tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path)
    run = PreferenceTuning(load_feedback_recipe(path, "dpo"), "dpo")
    model, run.tokenizer = gmask.load(tmp_path / "base")
    inject(model, make_peft_config(MethodSettings(rank=2)))
    with pytest.raises(gmask.GmaskError, match="reloaded without it: merge it first"):
        run._make_trainer(model, [], [])


def test_dropout_of_attention_is_off_too(tmp_path: Path) -> None:
    """TRL switches modules off; a first loss of 0.665 in place of ln 2 showed the dropout of attention weights."""
    trainer, _, _ = make_trainer(tmp_path, "glm", "dpo", torch.float32)
    assert trainer.model.config.attention_dropout > 0
    trainer.model.train()
    ids = torch.tensor([[20, 21, trainer.model.config.gmask_token_id, trainer.model.config.sop_token_id, 30]])
    assert torch.equal(trainer.model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["trl.packing_strategy=wrapped"], "wrapped cuts samples"),
        (["trl.use_vllm=true"], "vLLM runs a prefix LM as a causal one"),
        (["trl.use_transformers_continuous_batching=true"], "it reads a context in one direction"),
        (["trl.use_liger_kernel=true"], "it replaces the forward pass"),
        (["optimization.trainer={use_vllm: true}"], r"optimization\.trainer\.use_vllm: vLLM runs"),
        (["optimization.trainer={packing: true}"], "rows are not packed here"),
        (["trl.max_length=64"], "set data.max_source and data.max_target instead"),
        (["trl.padding_free=true"], "TRL has none at present"),
        (["trl.betta=0.1"], "the nearest is 'beta'"),
        (["trl.learning_rate=0.1"], "set optimization.learning_rate instead"),
        (["trl.loss_type=[sigmoidd]"], "trl: .*sigmoidd"),
        (["model.adapter=somewhere", "method.name=lora"], "merge it first"),
        (["method.name=p-tuning-v2"], "dpo takes full, lora, dora, qlora"),
        (["data.margins=true"], "data.margins has an effect on `gmask reward` alone"),
        (["optimization.early_stop=1"], "optimization.early_stop has an effect on"),
        (["reward.center=0.1"], "reward belongs to `gmask reward`"),
        (["data.max_source=97"], "max_source is 97, but the model has only 96 positions"),
    ],
)
def test_what_would_be_silently_wrong_is_one_line(overrides: list[str], reason: str, tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path)
    with pytest.raises(gmask.GmaskError, match=reason):
        run_preference_tuning(path, "dpo", overrides)


def test_what_is_too_long_is_counted_before_the_start(tmp_path: Path) -> None:
    """Silent error 10: TRL drops or cuts such pairs without a word."""
    long = [{"prompt": "the old man " * 40, "chosen": "a", "rejected": "b"}]
    run_preference_tuning(write_feedback_recipe(tmp_path, records=PAIRS + long), "dpo", ["optimization.steps=1"])
    assert "1  dropped: the prompt has more than 48 tokens" in (tmp_path / "out" / "start.txt").read_text("utf-8")
    with pytest.raises(gmask.GmaskError, match="nothing is left to learn from"):
        run_preference_tuning(write_feedback_recipe(tmp_path / "b", records=long * 4), "dpo")


def test_answers_of_ids_without_an_end_or_of_control_tokens_are_counted(tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path)
    model, tokenizer = gmask.load(tmp_path / "base")
    encoder = PreferenceEncoder(tokenizer, model.config, load_feedback_recipe(path, "dpo"))
    special = encoder.answers.special
    prompt, _ = encoder.answers.encode_question(Question("the"))
    asked, intake = Question(ids=prompt), Intake()
    pairs = [
        AnswerPair(question=asked, chosen=(20, 21), rejected=(22, special.eop)),
        AnswerPair(question=asked, chosen=(special.gmask, special.mask), rejected=(20, special.eop)),
    ]
    found = encoder.encode_pairs(pairs, intake)
    assert [one.chosen for one in found] == [(20, 21), (special.gmask, special.mask)]  # as they were sampled
    assert intake.cut == {"the ids of an answer have no end token": 2}
    with pytest.raises(gmask.GmaskError, match="holds <sop>, behind which a second answer would begin"):
        encoder.encode_pairs([AnswerPair(question=asked, chosen=(special.sop,), rejected=(20,))], intake)


def test_control_words_in_preferences_are_text(tmp_path: Path) -> None:
    record = {"prompt": "the [gMASK] <|startofpiece|> man", "chosen": "a dog", "rejected": "a day"}
    model, tokenizer = gmask.load(make_folder(tmp_path))
    encoder = AnswerEncoder(tokenizer, model.config, max_source=90, max_target=32)
    ids, _ = encoder.encode_question(Question(record["prompt"]))
    assert ids.count(encoder.special.gmask) == ids.count(encoder.special.sop) == 1


def test_messages_of_several_turns_teach_the_replies_alone(tmp_path: Path) -> None:
    """Silent error 2: TRL's loss of messages runs over the context, which is read in both directions, too."""
    model, tokenizer = gmask.load(make_folder(tmp_path))
    said = [
        {"role": role, "content": text}
        for role, text in (("user", "the"), ("assistant", "old man"), ("user", "his"), ("assistant", "dog"))
    ]
    samples = load_task("chat/trl").samples([Record({"messages": said}, tmp_path, 1)])
    data = TuningDataSettings(train="", max_source=64, max_target=32)
    encoded = TaskObjective(tokenizer, model.config, "chat", data).encode(samples)
    encoder = AnswerEncoder(tokenizer, model.config, max_source=64, max_target=32)
    for item, reply in zip(encoded.items, ("old man", "dog"), strict=True):
        labels = [label for label in item.labels.tolist() if label != -100]  # type: ignore[union-attr]
        assert labels == list(encoder.encode_answer(reply))


def test_the_check_of_a_batch_finds_padding_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = make_trainer(tmp_path, "glm", "dpo", torch.float32)
    trainer.ref_model = trainer.model
    check_first_batch(trainer, [], pad=0, tolerance=1e-3)
    honest = trainer.data_collator

    def blind(rows: Any) -> Any:
        return {**honest(rows), "attention_mask": torch.ones_like(honest(rows)["attention_mask"]).roll(1, 0) * 0 + 1}

    trainer.data_collator = lambda rows: {
        **blind(rows), "input_ids": honest(rows)["input_ids"].flip(0)
    }  # fmt: skip
    with pytest.raises(gmask.GmaskError, match="nats in a batch"):
        check_first_batch(trainer, [], pad=0, tolerance=1e-3)


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 10, 12, 14):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 12:
            cut = step == 14  # by a full disk
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{" if cut else "{}", "utf-8")
    assert trl_run.last_trainer_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists() and not (tmp_path / "checkpoint-14").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_killed_behind_its_last_step_makes_no_other(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_feedback_recipe(tmp_path, **{"method": METHODS[method]["method"]})
    run_preference_tuning(path, "dpo", [f"run.out={tmp_path / 'whole'}"])

    def killed(self: PreferenceTuning, *args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PreferenceTuning, "_write_results", killed)
        run_preference_tuning(path, "dpo", [f"run.out={tmp_path / 'killed'}"])
    run_preference_tuning(path, "dpo", [f"run.out={tmp_path / 'killed'}"])
    assert json.loads((tmp_path / "killed" / "results.json").read_text("utf-8"))["steps"] == 6
    file = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    weights = [load_file(tmp_path / name / file) for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_sigterm_ends_a_run_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_feedback_recipe(tmp_path)
    run_preference_tuning(path, "dpo", [f"run.out={tmp_path / 'whole'}"])
    step_begins = trl_run.LogCallback.on_step_begin

    def terminate(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_begins(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = [f"run.out={tmp_path / 'stopped'}"]
    with monkeypatch.context() as patched:
        patched.setattr(trl_run.LogCallback, "on_step_begin", terminate)
        with pytest.raises(StoppedError, match="SIGTERM after step 3; the same command goes on from checkpoint-3"):
            run_preference_tuning(path, "dpo", stopped)
    assert not (tmp_path / "stopped" / "results.json").exists()
    run_preference_tuning(path, "dpo", stopped)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_two_processes_make_the_steps_of_one(stage: str, tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path, optimization={"accumulation": 2, "steps": 3})
    start = {
        "one": [sys.executable, "-m", "gmask"],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "gmask"],
    }
    losses = []
    for name, command in start.items():
        arguments = [*command, stage, path, f"run.out={tmp_path / name}", "run.threads=1"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        losses.append([record["loss"] for record in read_log(tmp_path / name) if "learning_rate" in record])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "batch_size", "accumulation", "expected"),
    [
        ("dpo", 4, 1, (2, 1)),
        ("dpo", 4, 3, (3, 2)),
        ("dpo", 2, 2, (2, 1)),
        ("dpo", 3, 1, "3 pairs .* by 2 processes"),
        ("kto", 2, 2, (2, 1)),
        ("kto", 4, 3, "accumulation is 3, and 2 processes share the passes"),
    ],
)
def test_processes_share_a_step_of_the_same_size(
    stage: Any, batch_size: int, accumulation: int, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found: dict[str, Any] = {}
    monkeypatch.setattr(TRLRun, "_arguments", lambda self, name, **values: found.update(values))
    run = object.__new__(PreferenceTuning)
    run.stage, run.splits = stage, SimpleNamespace(validation=[])  # type: ignore[assignment]
    path = write_feedback_recipe(tmp_path, optimization={"batch_size": batch_size, "accumulation": accumulation})
    run.recipe = load_feedback_recipe(path, stage)
    if isinstance(expected, str):
        with pytest.raises(gmask.GmaskError, match=expected):
            run._make_arguments()
    else:
        run._make_arguments()
        assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == expected
