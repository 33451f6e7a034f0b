"""Train on several machines of a Ray cluster: the same verb and recipe as with torchrun, one process a worker.

    python recipes/train_with_ray.py dpo recipes/dpo-chat.yaml --workers 4 --gpu --set run.out=/shared/runs/dpo

Ray starts the workers and joins them (RANK, WORLD_SIZE ...); gmask shares the samples of a step among them.
Recipe, data and run.out lie where every machine reaches them. After a stop, the same command goes on from the run's own
checkpoint, and so does a worker that Ray starts again (--restarts).

Source: Ray, the documentation of `ray.train.torch.TorchTrainer`, `ScalingConfig`, `RunConfig` and `FailureConfig`.
"""

import argparse
from pathlib import Path
from typing import Any

VERBS = ("finetune", "pretrain", "sft", "reward", "dpo", "kto", "ppo")


def train(settings: dict[str, Any]) -> None:
    """What each worker runs: the verb, as the command line does."""
    from gmask.cli import app

    app([settings["verb"], settings["recipe"], *settings["overrides"]], standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--restarts", type=int, default=0, help="of a worker that fails")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    recipe = str(options.recipe.resolve())  # a worker has a working folder of its own
    trainer = TorchTrainer(
        train,
        train_loop_config={"verb": options.verb, "recipe": recipe, "overrides": options.overrides},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=options.restarts)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
