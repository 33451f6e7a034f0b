"""Is a reward model's loss the one that is stated, for any padding, and does its run resume bit for bit?"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import gmask
from conftest import EOP, GMASK, PAD, SOP
from feedback_data import PAIRS, write_feedback_recipe
from gmask.cli import main
from gmask.generation.reward import RewardScorer
from gmask.models.glm_heads import GLMForReward
from gmask.recipes.feedback import RewardSettings
from gmask.tasks.preferences import Question
from gmask.training.feedback import EncodedPair
from gmask.training.loop import Loop
from gmask.training.reward import as_reward_model, collate_pairs, exchange_prompts, reward_loss, run_reward
from test_reward_models import CLASSES, build, restate
from tuning_data import read_log, write_lines


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int], margin: float = 0.0) -> EncodedPair:
    return EncodedPair(tuple(prompt), tuple(chosen), tuple(rejected), margin, "all", "here")


TOKENS = [
    pair_of([20, 21, 22, GMASK, SOP], [30, 31, EOP], [30, 33, 34, 35, EOP], 0.5),
    pair_of([40, GMASK, SOP], [41, 42, 43, EOP], [44, EOP]),
    pair_of([17, 18, 19, 20, 21, 22, GMASK, SOP], [30, EOP], [31, EOP], 1.0),
]


def restate_all(model: Any, row: list[int], start: int) -> torch.Tensor:
    """The rewards of every token of one row from ``start`` on: each by the row up to it."""
    return torch.stack([restate(model, row[: end + 1]) for end in range(start, len(row))])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_loss_of_the_last_tokens_is_the_stated_one(kind: str, dtype: torch.dtype, close: float) -> None:
    model = build(kind, dtype)
    found = reward_loss(model, collate_pairs(TOKENS, pad=PAD), RewardSettings(center=0.1))
    expected = torch.tensor(0.0, dtype=torch.float64)
    for pair in TOKENS:
        chosen, rejected = (restate(model, [*pair.prompt, *ids]) for ids in (pair.chosen, pair.rejected))
        expected += -F.logsigmoid(chosen - rejected - pair.margin) + 0.1 * (chosen + rejected) ** 2
    assert abs(found.double().item() - expected.item()) < close


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_published_loss_compares_every_token_from_the_first_that_differs(
    kind: str, dtype: torch.dtype, close: float
) -> None:
    model = build(kind, dtype)
    found = reward_loss(model, collate_pairs(TOKENS, pad=PAD), RewardSettings(loss="per-token"))
    expected = torch.tensor(0.0, dtype=torch.float64)
    for pair in TOKENS:
        same = next(i for i, (a, b) in enumerate(zip(pair.chosen, pair.rejected, strict=False)) if a != b)
        start = len(pair.prompt) + same
        both = [restate_all(model, [*pair.prompt, *ids], start) for ids in (pair.chosen, pair.rejected)]
        longest = max(map(len, both))
        chosen, rejected = (torch.cat([one, one[-1:].expand(longest - len(one))]) for one in both)
        expected += -F.logsigmoid(chosen - rejected - pair.margin).mean()
    assert abs(found.double().item() - expected.item()) < close


def test_a_long_difference_does_not_underflow() -> None:
    """The published code took the logarithm of a sigmoid, which is minus infinity from a difference of -104 on."""

    class Fixed(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return type("Out", (), {"logits": torch.tensor([[-500.0], [500.0]])})

    batch = collate_pairs(TOKENS[1:2], pad=PAD)
    assert reward_loss(Fixed(), batch, RewardSettings()).item() == 1000.0


def test_prompts_are_exchanged_for_others() -> None:
    assert all(other != pair.prompt for other, pair in zip(exchange_prompts(TOKENS), TOKENS, strict=True))
    assert exchange_prompts(TOKENS[:1]) == [TOKENS[0].prompt]


@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "lora", "rank": 8, "targets": "all-linear"}])
def test_a_run_learns_reports_and_is_loaded_again(method: dict[str, Any], tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path, method=method, optimization={"steps": 60, "learning_rate": 1e-2})
    folder = run_reward(path)
    log = read_log(tmp_path / "out")
    assert log[-1]["loss"] < 0.3 < log[0]["loss"]
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert set(results["accuracy"]) == {"other", "cut", "all"}
    assert results["accuracy"]["all"]["accuracy"] == 1.0
    assert results["pairs"]["train"] == {"read": 8, "used": 8, "dropped": {}, "cut": {}}
    assert (folder.parent / "README.md").read_text("utf-8").count("| all |") == 1
    predictions = [json.loads(line) for line in (folder.parent / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == 8
    if method["name"] == "full":
        model, tokenizer = gmask.load(folder)
    else:
        model, tokenizer = gmask.load(tmp_path / "base", adapter=folder)
    assert isinstance(model, GLMForReward)
    scorer = RewardScorer(model, tokenizer)
    for record in PAIRS[::-1][:4]:
        scores = scorer.score(Question(record["prompt"]), [record["chosen"], record["rejected"]])
        found = [one["score"] for one in predictions if one["prompt"].startswith(f"问：{record['prompt']}答")]
        assert scores == pytest.approx(found, abs=1e-5)


def test_integers_with_an_adapter_learn_rewards(tmp_path: Path) -> None:
    model = {"name": str(tmp_path / "base"), "quantize": "int8"}
    path = write_feedback_recipe(tmp_path, method={"name": "qlora", "rank": 4})
    folder = run_reward(path, [f"model.quantize={model['quantize']}"])
    again, tokenizer = gmask.load(tmp_path / "base", quantize="int8", adapter=folder)
    scores = RewardScorer(again, tokenizer).score(Question("the old man"), ["took his dog", "the river"])
    assert len(set(scores)) == 2


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_feedback_recipe(tmp_path, method={"name": "lora", "rank": 4, "dropout": 0.3})
    run_reward(path, [f"run.out={tmp_path / 'whole'}"])
    honest = Loop.step

    def stop_at_four(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return honest(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loop, "step", stop_at_four)
        run_reward(path, [f"run.out={tmp_path / 'stopped'}"])
    run_reward(path, [f"run.out={tmp_path / 'stopped'}"])
    logs = [
        [(one["step"], one["loss"], one["gradient_norm"], one.get("validation")) for one in read_log(tmp_path / name)]
        for name in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path)
    run_reward(path)
    with pytest.raises(gmask.GmaskError, match=r"reward\.center differs"):
        run_reward(path, ["reward.center=0.1"])
    write_lines(tmp_path / "train.jsonl", PAIRS[:6])
    with pytest.raises(gmask.GmaskError, match=r"the content of train\.jsonl differs"):
        run_reward(path)


def test_what_is_too_long_is_counted_before_the_start_or_cut(tmp_path: Path) -> None:
    long = {"prompt": "the old man " * 40, "chosen": "a", "rejected": "b"}
    wordy = {"prompt": "the", "chosen": "the river " * 20, "rejected": "b"}
    rounds = [{"role": role, "content": "the old man"} for _ in range(8) for role in ("user", "assistant")]
    talk = {"prompt": [*rounds, {"role": "user", "content": "the"}], "chosen": "dog", "rejected": "day"}
    path = write_feedback_recipe(tmp_path, records=[*PAIRS, long, wordy, talk])
    run_reward(path, ["optimization.steps=1"])
    start = (tmp_path / "out" / "start.txt").read_text("utf-8")
    assert "11  pairs read" in start and " 9  pairs used" in start
    assert "1  dropped: the prompt has more than 48 tokens (data.max_source) (first in" in start
    assert "1  dropped: an answer has more than 32 tokens (data.max_target)" in start
    assert "1  cut: earlier rounds were left out" in start
    run_reward(path, ["optimization.steps=1", "data.long_answers=cut", f"run.out={tmp_path / 'cut'}"])
    assert "1  cut: an answer lost its end" in (tmp_path / "cut" / "start.txt").read_text("utf-8")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.max_source=97", "max_source is 97, but the model has only 96 positions"),
        ("data.max_target=97", "max_target is 97, but the model has only 96 positions"),
        ("method.name=p-tuning", "method.name is p-tuning: reward takes"),
        ("trl={beta: 0.1}", "trl has options of DPO and KTO"),
        ("reward.los=per-token", "the nearest is 'loss'"),
        ("data.max_source=2", "nothing is left to learn from"),
        ("data.validation=0.999", "none is left to train on"),
    ],
)
def test_mistakes_are_one_line(override: str, reason: str, tmp_path: Path) -> None:
    path = write_feedback_recipe(tmp_path)
    with pytest.raises(gmask.GmaskError, match=reason):
        run_reward(path, [override])


def test_plain_ids_are_refused_before_the_start(tmp_path: Path) -> None:
    """Silent error 3: a row without <sop> is context alone, and nothing of it is learnt."""
    path = write_feedback_recipe(
        tmp_path, records=[{"prompt_ids": [20, 21], "chosen_ids": [30, 9], "rejected_ids": [31, 9]}]
    )
    with pytest.raises(gmask.GmaskError, match=r"line 1: prompt_ids have no blank and no <sop>"):
        run_reward(path)


def test_a_reward_model_is_built_in_one_dtype(tmp_path: Path) -> None:
    from tiny_folder import make_folder

    model, _ = gmask.load(make_folder(tmp_path), dtype="bfloat16")
    made = as_reward_model(model)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert as_reward_model(made) is made


def test_answers_are_scored_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_reward(write_feedback_recipe(tmp_path))
    capsys.readouterr()

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["gmask", "score", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        return out

    out = run("--reward", str(folder), "the old man", "--answers", "took his dog|the river", "--json")
    found = json.loads(out)
    model, tokenizer = gmask.load(folder)
    expected = RewardScorer(model, tokenizer).score(Question("the old man"), ["took his dog", "the river"])
    assert [one["score"] for one in found["answers"]] == pytest.approx(expected, abs=1e-6)
    source, target = (
        write_lines(tmp_path / "in.jsonl", [{"text": "the", "answers": ["a", "b"]}]),
        tmp_path / "out.jsonl",
    )
    run("--reward", str(folder), "--input", str(source), "--output", str(target))
    (line,) = [json.loads(text) for text in target.read_text("utf-8").splitlines()]
    assert line["best"] in ("a", "b") and len(line["answers"]) == 2
