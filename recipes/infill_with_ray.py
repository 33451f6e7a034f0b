"""Fill the blanks of a file of texts on all machines of a Ray cluster.

    python recipes/infill_with_ray.py texts.jsonl filled.jsonl --replicas 4 --set max_tokens=32

The input and the output are those of ``gmask infill --input --output``: each line of the output answers the line of the
same number, with the same answers for the same settings. A line that cannot be read has its error in its place. Both
files are on this machine; the others need gmask and the model only. After a stop, the same command goes on.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from gmask.checkpoints.load import load
from gmask.cli.options import read_pairs
from gmask.errors import GmaskError
from gmask.generation.files import fill_file, keep_whole_lines
from gmask.generation.infill import Infiller
from gmask.generation.settings import make_sampling

Part = dict[str, Any]


class Filler:
    """A model in a process of Ray's, which fills one part of the file after another."""

    def __init__(self, model: str, quantize: str | None, settings: Mapping[str, Any], suffix: str) -> None:
        self.model, self.tokenizer = load(model, quantize=quantize)
        self.settings, self.suffix = settings, suffix

    def __call__(self, part: Part) -> Part:
        """``{"first", "lines"}``: the index of the first line, and the lines, as bytes; adds what was ``filled``."""
        settings = make_sampling({**self.settings, "seed": self.settings["seed"] + int(part["first"])})
        infiller = Infiller(self.model, self.tokenizer, settings)
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "texts" + self.suffix), Path(folder, "filled.jsonl")
            source.write_bytes(part["lines"])
            report = fill_file(infiller, source, target, skip_bad_lines=True)
            return {"filled": target.read_bytes(), "lines": report.lines, "skipped": report.skipped}


def read_parts(source: Path, *, start: int, size: int) -> Iterator[Part]:
    """The lines from index ``start`` on, ``size`` of them together."""
    with source.open("rb") as file:
        lines = itertools.islice(file, start, None)
        for first in itertools.count(start, size):
            if not (part := b"".join(itertools.islice(lines, size))):
                return
            yield {"first": first, "lines": part}


def name_partial(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> Path:
    """Where the lines are kept until all are done; runs that must not be joined have different ones."""
    run = json.dumps([str(arguments.source.resolve()), arguments.model, arguments.quantize, settings])
    fingerprint = hashlib.sha256(run.encode()).hexdigest()[:8]
    return Path(f"{arguments.target}.{fingerprint}.partial")


def fill(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Writes the output; how many lines were filled now, and how many of them could not be read."""
    source, target = arguments.source, arguments.target
    if target.exists():
        raise GmaskError(f"{target}: is there already and is not overwritten; remove it, or name another output")
    partial = name_partial(arguments, settings)
    parts = list(read_parts(source, start=keep_whole_lines(partial), size=arguments.lines))
    done = skipped = 0
    with partial.open("ab") as output:
        for part in fill_parts(parts, arguments, settings) if parts else []:
            output.write(part["filled"])
            output.flush()
            done, skipped = done + part["lines"], skipped + part["skipped"]
        os.fsync(output.fileno())
    os.replace(partial, target)
    return done, skipped


def fill_parts(parts: list[Part], arguments: argparse.Namespace, settings: Mapping[str, Any]) -> Iterator[Part]:
    """The filled parts, in order, each as soon as it and those before it are done."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    filled = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        Filler,
        fn_constructor_args=(arguments.model, arguments.quantize, settings, arguments.source.suffix),
        compute=ray.data.ActorPoolStrategy(size=arguments.replicas),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    )
    yield from filled.iter_rows()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="texts, one a line; .jsonl: objects with a text")
    parser.add_argument("target", type=Path, help="where the filled texts go, as .jsonl")
    parser.add_argument("--model", default="bundled", help="a name, or a folder that all machines have")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument(
        "--set", action="append", default=[], dest="pairs", metavar="key=value", help="as of gmask infill"
    )
    parser.add_argument("--replicas", type=int, default=1, help="processes with a model")
    parser.add_argument("--cpus", type=float, default=1, help="of each")
    parser.add_argument("--gpus", type=float, default=0, help="of each")
    parser.add_argument("--lines", type=int, default=256, help="that are handed out, and kept, together")
    arguments = parser.parse_args()
    try:
        settings = {"seed": 0, **read_pairs(arguments.pairs)}
        make_sampling(settings)  # a mistake is told here, and not by a process far away
        done, skipped = fill(arguments, settings)
    except (GmaskError, OSError) as error:
        sys.exit(f"infill_with_ray: {error}")
    print(f"{done} lines filled, {skipped} of them could not be read")


if __name__ == "__main__":
    main()
