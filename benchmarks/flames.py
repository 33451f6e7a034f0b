"""Draws where the time of a step goes: flame graphs of several profiles, one above the other, on one scale.

    py-spy record --pid PID --rate 150 --duration 14 --format raw --output before.txt
    python benchmarks/flames.py before:17.5:before.txt after:13.0:after.txt --output docs/images/engine-flames.png

An argument is a title, the milliseconds of a step, and the stacks of a profile in py-spy's raw format. Those in
`Stepper.step` count. Frames that only pass calls on (torch's and transformers' wrappers) are left out.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = "Stepper.step"
PASSED_ON = re.compile(r"_wrapped_call_impl|_call_impl|wrapper|forward_with_checkpointing|__init_subclass__|run_blocks")
COLOURS = {"gmask/native": "#f59e0b", "gmask/models/base": "#3b82f6", "gmask": "#93c5fd", "torch": "#fca5a5"}
"""By the start of a frame's file: kernels, products, the rest of gmask, torch; transformers and numpy are grey."""

Stacks = Counter[tuple[str, ...]]


def read_stacks(file: Path) -> Stacks:
    """How often each stack of functions below the root was seen; a function is ``name (file)``."""
    found: Stacks = Counter()
    for line in file.read_text("utf-8").splitlines():
        text, _, count = line.rpartition(" ")
        frames = [re.sub(r":\d+\)", ")", frame) for frame in text.split(";")]
        starts = [index for index, frame in enumerate(frames) if frame.startswith(ROOT)]
        if starts:
            found[tuple(frame for frame in frames[starts[0] :] if not PASSED_ON.search(frame))] += int(count)
    return found


def draw_stacks(axes: Axes, stacks: Stacks, milliseconds: float) -> None:
    """Draws the calls of a function above it, as wide as the time they take."""
    unit = milliseconds / sum(stacks.values())

    def place(group: Stacks, left: float, level: int) -> None:
        by_frame: dict[str, Stacks] = {}
        for stack, count in group.items():
            if len(stack) > level:
                by_frame.setdefault(stack[level], Counter())[stack] += count
        for frame, inside in sorted(by_frame.items(), key=lambda item: -sum(item[1].values())):
            width = sum(inside.values()) * unit
            name, _, file = frame.partition(" (")
            colour = next((colour for start, colour in COLOURS.items() if file.startswith(start)), "#d1d5db")
            axes.barh(level, width, left=left, height=0.94, color=colour, edgecolor="white", linewidth=0.4)
            room = int(width / milliseconds * 120)
            if room >= 6:
                axes.text(left + width / 2, level, name[:room], ha="center", va="center", fontsize=6.5)
            if width / milliseconds > 0.002:
                place(inside, left, level + 1)
            left += width

    place(stacks, 0.0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", metavar="TITLE:MILLISECONDS:FILE")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    profiles = [profile.split(":", 2) for profile in options.profiles]
    figure, rows = plt.subplots(
        len(profiles), figsize=(10, 2.4 * len(profiles)), layout="constrained", sharex=True, squeeze=False
    )
    for (title, milliseconds, file), axes in zip(profiles, rows[:, 0], strict=True):
        draw_stacks(axes, read_stacks(Path(file)), float(milliseconds))
        axes.set_title(f"{title}: {milliseconds} ms a step", fontsize=9, loc="left")
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    rows[-1, 0].set_xlabel("milliseconds", fontsize=8)
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
