"""Records what gmask does today, by its public names alone, so that a change of its inside can be held against it.

python tests/record/record.py                    compares all parts, and shows what differs
python tests/record/record.py --write            records them anew
python tests/record/record.py --write help       ... some of them
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from record import commands, evaluation, files, interface, serving, training
from record.compare import differences, settle, write_json
from record.session import HAS_VOCABULARIES, Session

DATA = Path(__file__).parent / "data"


class Part(NamedTuple):
    """One file of the record."""

    produce: Callable[[Session], Any]
    needs_vocabularies: bool = False


def record_help(session: Session) -> dict[str, list[str]]:
    """The help of the command, and of every verb that it lists."""
    shown = {"gmask": session.must("--help").out.splitlines()}
    start = shown["gmask"].index("Commands:") + 1
    for line in shown["gmask"][start:]:
        if verb := re.match(r"  ([a-z-]+)  ", line):
            shown[f"gmask {verb[1]}"] = session.must(f"{verb[1]} --help").out.splitlines()
    return shown


def group(name: str) -> Part:
    return Part(lambda session: commands.run_group(session, commands.GROUPS[name]))


PARTS: dict[str, Part] = {
    "help": Part(record_help),
    "names": Part(interface.record_names),
    "calls": Part(interface.record_calls),
    **{name: group(name) for name in commands.GROUPS},
    "published": Part(lambda session: commands.run_group(session, commands.PUBLISHED), needs_vocabularies=True),
    "files": Part(files.record_files),
    "published-files": Part(files.record_published_files, needs_vocabularies=True),
    "openapi": Part(serving.record_openapi),
    "serving": Part(serving.record_answers),
    "tasks": Part(evaluation.record_tasks),
    "held-out": Part(evaluation.record_held_out),
    "pretraining": Part(training.record_pretraining),
    "tuning": Part(training.record_tuning),
}


def produce(name: str, folder: Path) -> Any:
    """A part as it would be recorded now."""
    session = Session(folder)
    session.make_models()
    commands.write_inputs(session)
    return settle(PARTS[name].produce(session))


def read(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text("utf-8"))


def compare(name: str, folder: Path) -> list[str]:
    """What differs from the record."""
    return list(differences(read(name), produce(name, folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--write", action="store_true", help="record anew")
    arguments = parser.parse_args()
    differing = 0
    for name in arguments.parts or PARTS:
        if PARTS[name].needs_vocabularies and not HAS_VOCABULARIES:
            print(f"{name}: left as it is, for the published vocabularies are not beside this checkout")
            continue
        with tempfile.TemporaryDirectory() as folder:
            if arguments.write:
                DATA.mkdir(exist_ok=True)
                (DATA / f"{name}.json").write_text(write_json(produce(name, Path(folder))) + "\n", "utf-8")
                print(f"{name}: written")
                continue
            found = compare(name, Path(folder))
        print(f"{name}: {len(found)} differences", *found, sep="\n  ")
        differing += bool(found)
    sys.exit(min(differing, 1))


if __name__ == "__main__":
    main()
