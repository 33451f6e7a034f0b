"""How well do models answer, before and after feedback? A table for each wording, and what was forgotten.

    python recipes/compare_answers.py data/sums SFT=bundled-chat GRPO=runs/grpo-1/model GRPO=runs/grpo-2/model ...
        [--reward sums:grade] [--general data/chat] [--samples 400] [--out answers-compared.json]

data/sums is what recipes/sums.py or sorting.py wrote; an answer is right if its reward is 1. Models are compared with
the first. Those of the same label are seeds of one method, and share a row. Each answers all questions greedily, and
the first --samples of them eight times at temperature 1.
data/chat is what recipes/chat_data.py wrote: the loss on the replies of its validation file that are no sums tells what
was forgotten. What an earlier call measured is read from --out.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from own_answers import MAX_TARGET, load_reward, read_questions, write_answers

from gmask import load
from gmask.evaluation.rewards import share_of
from gmask.files import read_object, write_json
from gmask.generation.settings import Sampling
from gmask.recipes.tuning import TuningDataSettings
from gmask.tasks.metrics import Rows
from gmask.tasks.records import read_records
from gmask.tasks.task import read_task
from gmask.training.accelerator import make_accelerator, make_arguments
from gmask.training.pipeline_report import score_tokens
from gmask.training.rollouts import Rollout, score_in_batches
from gmask.training.validation import Validator

WORDINGS = {"validation": "taught wordings", "reworded": "new wordings"}
ANSWERS = 8


def is_right(reward: Any, samples: Any, groups: list[list[Rollout]]) -> list[list[bool]]:
    return [
        [found == 1.0 for found in reward([sample.text] * len(group), [one.text for one in group])]
        for sample, group in zip(samples, groups, strict=True)
    ]


def divergence(model: Any, base: Any, tokenizer: Any, rollouts: list[Rollout]) -> float:
    """Nats an answer from the first model."""
    ids = tokenizer.convert_tokens_to_ids(["<|startofpiece|>", tokenizer.pad_token])

    def score(chosen: list[Rollout]) -> torch.Tensor:
        return score_tokens(model, base, chosen, sop=ids[0], pad=ids[1])

    return float(score_in_batches(rollouts, score, lambda one: len(one.actions), batch_size=64)[:, 1].sum()) / len(
        rollouts
    )


def measure(model: Any, tokenizer: Any, base: Any, folder: Path, reward: Any, count: int) -> dict[str, Any]:
    """What a model answers in each wording."""
    found: dict[str, Any] = {}
    for name in filter(lambda name: (folder / f"{name}.jsonl").is_file(), WORDINGS):
        samples = read_questions(folder / f"{name}.jsonl")
        greedy = is_right(reward, samples, write_answers(model, tokenizer, samples))
        groups = write_answers(model, tokenizer, samples[:count], answers=ANSWERS, temperature=1.0)
        sampled = is_right(reward, samples[:count], groups)
        found[name] = {
            "greedy": [one[0] for one in greedy],
            "sampled": sum(map(sum, sampled)) / (ANSWERS * len(sampled)),
            "one_of_8": sum(map(any, sampled)) / len(sampled),
            "kl": divergence(model, base, tokenizer, [group[0] for group in groups]),
        }
    return found


def general_loss(model: Any, tokenizer: Any, folder: Path) -> float:
    """Nats a token of the replies of bundled-chat's validation that are no sums."""
    task = read_task({"use": "chat/messages"})
    records = [one for one in read_records(folder / "validation.jsonl") if "arithmetic" not in one.values["kind"]]
    validator = Validator(
        model, tokenizer, task, TuningDataSettings(train="", max_source=240, max_target=240),
        settings=Sampling(max_tokens=MAX_TARGET), batch_size=16, dtype=model.dtype,
        accelerator=make_accelerator(make_arguments(folder, device="cpu", dtype=torch.float32)),
    )  # fmt: skip
    return validator.loss("chat", task.samples(records, require_answers=True))


def render(name: str, rows: dict[str, list[dict[str, Any]]]) -> Rows:
    """The table of a wording; ``rows``: of each label, what its models answered."""
    before = next(iter(rows.values()))[0]["greedy"]

    def mean(values: list[float], digits: int = 1, factor: float = 100) -> str:
        return f"{factor * sum(values) / len(values):.{digits}f}"

    table = []
    for label, runs in rows.items():
        shares = [share_of([float(one) for one in run["greedy"]]) for run in runs]
        lowest, highest = (limit(shares, key=lambda one: one.share) for limit in (min, max))
        changes = [[(new, old) for new, old in zip(run["greedy"], before, strict=True) if new != old] for run in runs]
        table.append([
            label, str(len(runs)), mean([one.share for one in shares]),
            f"{100 * lowest.low:.1f} to {100 * highest.high:.1f}",
            mean([sum(new for new, _ in change) for change in changes], 0, 1),
            mean([sum(old for _, old in change) for change in changes], 0, 1),
            *(mean([run[key] for run in runs]) for key in ("sampled", "one_of_8")),
            mean([run["kl"] for run in runs], 2, 1),
        ])  # fmt: skip
    columns = [f"{name} ({len(before)} questions)", "seeds", "greedy, %", "95 % interval", "mended", "broken"]
    return Rows([*columns, "at T 1, %", "one of 8, %", "KL"], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("questions", type=Path)
    parser.add_argument("models", nargs="+", metavar="LABEL=MODEL")
    parser.add_argument("--reward", default="sums:grade", help="module:function, beside this file")
    parser.add_argument("--general", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("answers-compared.json"))
    options = parser.parse_args()
    models = [one.partition("=")[::2] for one in options.models]
    found = read_object(options.out) if options.out.is_file() else {}
    reward, base = load_reward(options.reward), None
    for _, name in models:
        if name in found:
            continue
        base = base or load(models[0][1], dtype=torch.float32)
        model, tokenizer = base if name == models[0][1] else load(name, dtype=torch.float32)
        measured = measure(model, tokenizer, base[0], options.questions, reward, options.samples)
        general = None if options.general is None else general_loss(model, tokenizer, options.general)
        found[name] = {**measured, "general": general}
        write_json(options.out, found, indent=None)
    labels = dict.fromkeys(label for label, _ in models)
    runs = {label: [found[name] for one, name in models if one == label] for label in labels}
    for key in filter(next(iter(found.values())).__contains__, WORDINGS):
        print(
            render(WORDINGS[key], {label: [run[key] for run in group] for label, group in runs.items()}).to_markdown()
        )
        print()
    if options.general is not None:
        losses = [[label, " ".join(f"{run['general']:.3f}" for run in group)] for label, group in runs.items()]
        print(Rows(["", "nats a token of other replies, by seed"], losses).to_markdown())


if __name__ == "__main__":
    main()
