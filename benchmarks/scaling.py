"""How does pretraining GLM-10B scale from 8 to 1,024 GPUs, by the model of `gmask.estimation.scaling`?

    python benchmarks/scaling.py [--gpu h100] [--utilization 0.4] [--plots docs/images] [--json]

Nothing is measured here: steps are computed from counted work and stated assumptions. Beside it stand the runs of this
family whose time is published, and the utilization with which the model would come to the same time.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gmask.estimation.gpus import GPUS, find_gpu
from gmask.estimation.pretraining import count_labels, estimate_time
from gmask.estimation.scaling import Assumptions, ParallelLayout
from gmask.recipes.pretraining import PretrainingRecipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes/published"
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
LAYOUTS = ("ddp", "zero2", "fsdp", "fsdp,tp=8")
PUBLISHED: tuple[dict[str, Any], ...] = (
    {
        "run": "GLM-Large, 64 V100", "recipe": "glm-large", "gpu": "v100", "gpus": 64, "parallel": "ddp",
        "seconds": 2.5 * 86400 / 200_000, "source": "paper, appendix A: 200,000 steps in about 2.5 days",
    },
    {
        "run": "GLM-10B-Chinese, 256 A100", "recipe": "glm-10b", "gpu": "a100", "gpus": 256, "parallel": "zero2",
        "seconds": 38.0, "source": "a user of the published code, THUDM/GLM issue 81",
    },
)  # fmt: skip


def as_published(recipe: PretrainingRecipe) -> PretrainingRecipe:
    """The recipe with rows that hold as many tokens of text as the published ones, which do not count blanks."""
    length = round(recipe.data.row_length / count_labels(recipe).text)
    return replace(recipe, data=replace(recipe.data, row_length=length, max_piece=recipe.data.row_length))


def scale(gpu: str, assumed: Assumptions) -> list[dict[str, Any]]:
    """A record for each layout and number of GPUs."""
    recipe, records = load_recipe(RECIPES / "glm-10b.yaml"), []
    for text in LAYOUTS:
        for count in COUNTS:
            layout = ParallelLayout.read(text, count)
            time = estimate_time(recipe, gpu=find_gpu(gpu), layout=layout, assumed=assumed)
            step = {**asdict(time.step), "exposed": time.step.exposed}
            records.append({"parallel": text, "gpus": count, "mfu": time.mfu, "days": time.days, **step})
    return records


def compare_published(assumed: Assumptions) -> list[dict[str, Any]]:
    """A record for each published run."""
    records = []
    for run in PUBLISHED:
        recipe = as_published(load_recipe(RECIPES / f"{run['recipe']}.yaml"))
        layout = ParallelLayout.read(run["parallel"], run["gpus"])
        time = estimate_time(recipe, gpu=GPUS[run["gpu"]], layout=layout, assumed=assumed)
        rest = time.step.exposed + time.step.optimizer
        fitting = assumed.utilization * time.step.products / (run["seconds"] - rest)
        mfu = time.flops / (run["seconds"] * run["gpus"] * GPUS[run["gpu"]].flops)
        computed = {"computed": time.step.total, "fitting_utilization": fitting, "published_mfu": mfu}
        records.append({**run, **computed})
    return records


def draw(records: list[dict[str, Any]], folder: Path, gpu: str) -> None:
    """Writes the two plots: the share of the peak by layout, and the parts of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=100)
    for text in LAYOUTS:
        found = [record for record in records if record["parallel"] == text]
        axes.plot([one["gpus"] for one in found], [100 * one["mfu"] for one in found], marker="o", label=text)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"GPUs ({gpu})")
    axes.set_ylabel("MFU, %")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "scaling-mfu.png")
    pyplot.close(figure)

    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=100)
    found = [record for record in records if record["parallel"] == "fsdp"]
    bottom = [0.0] * len(found)
    for part, label in (("products", "products"), ("exposed", "waits for collectives"), ("optimizer", "update")):
        shares = [100 * one[part] / one["total"] for one in found]
        axes.bar([str(one["gpus"]) for one in found], shares, bottom=bottom, label=label)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_xlabel(f"GPUs ({gpu}), fsdp")
    axes.set_ylabel("of a step, %")
    axes.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(folder / "scaling-step.png")
    pyplot.close(figure)


def print_tables(records: list[dict[str, Any]], published: list[dict[str, Any]]) -> None:
    print("| parallel | GPUs | products, s | collectives, s | of these waited for | update, s | step, s | MFU | days |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for one in records:
        parts = f"{one['products']:.2f} | {one['collectives']:.2f} | {one['exposed']:.2f} | {one['optimizer']:.3f}"
        ends = f"{one['total']:.2f} | {one['mfu']:.1%} | {one['days']:.1f}"
        print(f"| {one['parallel']} | {one['gpus']} | {parts} | {ends} |")
    print("\n| run | published step, s | computed | published MFU | utilization that fits | source |")
    print("|---|---:|---:|---:|---:|---|")
    for one in published:
        figures = f"{one['seconds']:.2f} | {one['computed']:.2f} | {one['published_mfu']:.1%}"
        print(f"| {one['run']} | {figures} | {one['fitting_utilization']:.2f} | {one['source']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--utilization", type=float, default=Assumptions().utilization)
    parser.add_argument("--plots", type=Path, help="folder for two PNGs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    assumed = Assumptions(utilization=options.utilization)
    records, published = scale(options.gpu, assumed), compare_published(assumed)
    if options.plots:
        draw(records, options.plots, options.gpu)
    if options.json:
        print(json.dumps({"assumptions": asdict(assumed), "scaling": records, "published": published}))
        return
    print_tables(records, published)


if __name__ == "__main__":
    main()
