"""The plot of the README: gmask beside its peers, from the ratios in peers.yaml.

python benchmarks/draw_peers.py [--output docs/images/peers.png]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import yaml
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def draw(ratios: list[dict[str, object]], output: Path) -> None:
    """One bar a ratio, on a logarithmic axis, the peer at 1."""
    names = [f"{entry['what']}\nbeside {entry['peer']}" for entry in ratios]
    values = [float(str(entry["ratio"])) for entry in ratios]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(values) + 1), layout="constrained")
    bars = axes.barh(names, [value - 1 for value in values], left=1, color="#3b82f6", height=0.6)
    axes.bar_label(bars, [f"{value:.1f}×" if value >= 2 else f"{value:.2f}×" for value in values], padding=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["the peer", "2×", "4×", "8×"])
    axes.set_xlim(1, 14)
    axes.invert_yaxis()
    axes.set_title("How many times as fast as the peer, same machine, same run, two CPU cores", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "images" / "peers.png")
    arguments = parser.parse_args()
    draw(yaml.safe_load((HERE / "peers.yaml").read_text("utf-8")), arguments.output)


if __name__ == "__main__":
    main()
