"""Where does the time of PPO go, how fast is its sampling beside transformers' generate, and what do its models take?

    python benchmarks/ppo.py [--rollouts 3] [--rounds 5] [--no-memory] [--no-time] [--threads 1] [--json]

The bundled chat model is trained on sums by recipes/ppo-sums.yaml, and a rollout's CPU seconds are divided into
sampling, scoring (policy, reference, values, reward) and training. For sampling alone, the same prompts go in turns
through the house's stepper and through transformers' `generate` of the same model, with the same distribution. For
memory, a GLM of --width x --layers is trained for one rollout, each time in a process of its own: by LoRA on one body,
that is policy, reference and values; in full with a head on its states; and in full with a critic of its own and a
reward model.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from measuring import spread

RECIPES = Path(__file__).parents[1] / "recipes"
MODELS = {
    "LoRA, one body": {"method": {"name": "lora"}},
    "full, a shared body and a reference": {"method": {"name": "full"}},
    "full, four models": {"method": {"name": "full"}, "critic": {"kind": "own"}},
}


def write_recipe(folder: Path, **sections: Any) -> str:
    import yaml

    subprocess.run(
        [sys.executable, str(RECIPES / "sums.py"), str(folder), "--train", "512", "--validation", "8"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    tree = yaml.safe_load((RECIPES / "ppo-sums.yaml").read_text("utf-8"))
    tree["run"] = {"out": str(folder / "run"), "device": "cpu"}
    tree["data"] |= {"root": str(folder), "train": "train.jsonl", "validation": None}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), "utf-8")
    return str(path)


def make_run(path: str) -> Any:
    from gmask.allocator import keep_freed_memory
    from gmask.recipes.ppo import load_ppo_recipe
    from gmask.training.ppo import PPO

    keep_freed_memory()  # as the command does
    return PPO(load_ppo_recipe(path), folders=[RECIPES])


# Time


def split_time(folder: Path, rollouts: int) -> dict[str, float]:
    """CPU seconds of each part, an answer; the first rollout, with its checks, is left out."""
    from gmask.training import ppo
    from gmask.training.loop import Loop
    from gmask.training.run_folder import read_metrics

    trained: dict[int, float] = {}

    class TimedLoop(Loop):
        def step(self, *args: Any, **keywords: Any) -> Any:
            started = time.process_time()
            result = super().step(*args, **keywords)
            number = self.run.rollout  # type: ignore[attr-defined]
            trained[number] = trained.get(number, 0.0) + time.process_time() - started
            return result

    ppo.Loop = TimedLoop  # type: ignore[misc]
    run = make_run(write_recipe(folder, optimization={"rollouts": rollouts + 1, "save_every": 100}))
    type(run).clock = staticmethod(time.process_time)
    run.train()
    records = {record["rollout"]: record for record in read_metrics(folder / "run" / "metrics.jsonl")}
    answers = run.recipe.answers * rollouts
    later = range(2, rollouts + 2)
    parts = {
        "generate": sum(records[number]["generate_seconds"] for number in later),
        "score": sum(records[number]["score_seconds"] for number in later),
        "train": sum(trained[number] for number in later),
    }
    return {name: seconds / answers for name, seconds in parts.items()} | {
        "answers": answers, "tokens": statistics.mean(records[number]["length"] for number in later),
    }  # fmt: skip


def compare_generation(folder: Path, rounds: int) -> dict[str, Any]:
    """Samples in a CPU second, by the stepper and by transformers, in turns on the same prompts."""
    import torch
    from transformers.generation import GenerationConfig

    from gmask.generation.padding import stack_prompts
    from gmask.generation.settings import Sampling

    run = make_run(write_recipe(folder))
    run.prepare()
    settings, special = run.recipe.rollout, run.special
    contexts = run.contexts[: settings.prompts]
    most = run.recipe.data.max_target
    config = GenerationConfig(
        do_sample=True, temperature=settings.temperature, top_k=0, top_p=1.0, max_new_tokens=most,
        num_return_sequences=settings.answers, eos_token_id=special.eop, pad_token_id=special.pad,
        suppress_tokens=list(run.writer.forbidden_ids),
    )  # fmt: skip

    def by_stepper(number: int) -> int:
        sampling = Sampling(n=settings.answers, max_tokens=most, min_tokens=0, temperature=settings.temperature)
        found = run.writer.write(contexts, sampling, seeds=range(number, number + len(contexts)))
        return sum(len(one.actions) for group in found for one in group)

    def by_transformers(number: int) -> int:
        torch.manual_seed(number)
        ids, layout, mask = stack_prompts(contexts, special, run.device)
        given = {} if mask is None else {"attention_mask": mask.long()}
        with torch.inference_mode():
            out = run.policy.generate(ids, layout=layout, generation_config=config, **given)[:, ids.shape[1] :]
        return int((out != special.pad).sum())

    samples, measured = len(contexts) * settings.answers, list[tuple[float, float]]()
    tokens = {"stepper": 0, "transformers": 0}
    for number in range(rounds + 1):
        seconds = {}
        for name in ("stepper", "transformers")[:: -1 if number % 2 else 1]:
            started = time.process_time()
            tokens[name] += (by_stepper if name == "stepper" else by_transformers)(number)
            seconds[name] = time.process_time() - started
        if number:  # the first is warm-up
            measured.append((seconds["stepper"], seconds["transformers"]))
    return {
        "stepper": samples / statistics.median(ours for ours, _ in measured),
        "transformers": samples / statistics.median(theirs for _, theirs in measured),
        "ratio": spread(sorted(theirs / ours for ours, theirs in measured)),
        "tokens": {name: count / (rounds + 1) / samples for name, count in tokens.items()},
    }


# Memory


def train_once(name: str, folder: Path, width: int, layers: int) -> int:
    """Trains one rollout; returns the bytes at the peak, less those before a model was loaded."""
    import torch
    from torch import nn

    import gmask
    from gmask.checkpoints.folder import read_config
    from gmask.checkpoints.load import find_folder, load_tokenizer
    from gmask.models.glm import GLMConfig, GLMForConditionalGeneration, GLMModel, GLMPreTrainedModel
    from gmask.training import rewarded_run

    class Scorer(GLMPreTrainedModel):
        def __init__(self, config: GLMConfig) -> None:
            super().__init__(config)
            self.glm, self.score = GLMModel(config), nn.Linear(config.hidden_size, 1)
            self.post_init()

    def load_scorer(model: str, **keywords: Any) -> Any:
        loaded, tokenizer = gmask.load(model, **keywords)
        with torch.device("meta"):
            scorer = Scorer(loaded.config)
        scorer.glm, scorer.score = loaded.glm, nn.Linear(width, 1)
        return scorer, tokenizer

    rewarded_run.load = load_scorer
    config = read_config(find_folder("bundled-chat"))
    config.update({"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64})
    if not (folder / "model").is_dir():
        GLMForConditionalGeneration(config).float().save_pretrained(folder / "model")
        load_tokenizer(find_folder("bundled-chat")).save_pretrained(folder / "model")
        return 0
    reward = {"model": str(folder / "model")} if "four" in name else {}
    path = write_recipe(
        folder, model={"name": str(folder / "model")}, rollout={"prompts": 8, "answers": 2}, reward=reward,
        ppo={"minibatches": 2, "epochs": 1}, **MODELS[name], data={"max_target": 4},
        optimization={"rollouts": 1, "batch_size": 8},
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = make_run(path)
    run.report = lambda before: None  # the files that are written behind the last step are no part of it
    run.train()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def measure_memory(width: int, layers: int) -> dict[str, Any]:
    """Bytes of each set of models, in multiples of one in float32."""
    found: dict[str, Any] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for _ in ("write", "train"):
                start = [sys.executable, __file__, "--train-once", name, "--folder", folder]
                done = subprocess.run(
                    [*start, "--width", str(width), "--layers", str(layers)], check=True, capture_output=True, text=True
                )
            weights = sum(path.stat().st_size for path in Path(folder, "model").glob("*.safetensors"))
            found[name] = {
                "bytes": int(done.stdout.split()[-1]),
                "of one model": int(done.stdout.split()[-1]) / weights,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train-once", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    if options.train_once:
        print(train_once(options.train_once, options.folder, options.width, options.layers))
        return
    found: dict[str, Any] = {"machine": describe_machine(options.threads)}
    if options.time:
        with tempfile.TemporaryDirectory() as folder:
            found["generation"] = compare_generation(Path(folder), options.rounds)
        with tempfile.TemporaryDirectory() as folder:
            found["rollout"] = split_time(Path(folder), options.rollouts)
    if options.memory:
        found["memory"] = measure_memory(options.width, options.layers)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    if options.time:
        one, split = found["generation"], found["rollout"]
        print(f"sampling: {one['stepper']:.0f} answers in a CPU second by the stepper, {one['transformers']:.0f} by "
              f"transformers' generate: {one['ratio']} times")  # fmt: skip
        total = sum(split[name] for name in ("generate", "score", "train"))
        parts = ", ".join(f"{name} {1000 * split[name]:.1f} ms" for name in ("generate", "score", "train"))
        print(f"PPO: {1 / total:.1f} answers of {split['tokens']:.1f} tokens in a CPU second: {parts} an answer")
    for name, memory in found.get("memory", {}).items():
        print(f"{name}: {memory['bytes'] / 1e9:.2f} GB, {memory['of one model']:.1f} times the weights of one model")


if __name__ == "__main__":
    main()
