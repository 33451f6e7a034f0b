"""Which texts does a run of the tests see in a `GmaskError`, and do they differ from the recorded ones?

GMASK_RECORD_ERRORS=FOLDER pytest ...           collects, a file for each process
python tests/record/errors.py FOLDER            compares with errors.txt
python tests/record/errors.py FOLDER --write    replaces errors.txt

This is a reference for developers; no test compares it.
"""

import argparse
import difflib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

VARIABLE = "GMASK_RECORD_ERRORS"
HERE = Path(__file__).parent
RECORDED = HERE / "errors.txt"


def start(folder: str) -> None:
    """Collects the errors of this process, and of the processes that it starts."""
    folder = os.path.abspath(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = folder
    paths = [str(HERE / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    watch(folder)


def watch(folder: str) -> None:
    """Notes every error of this process, as soon as there is a `GmaskError`; imports nothing of gmask."""
    if "gmask.errors" in sys.modules:
        _wrap(sys.modules["gmask.errors"].GmaskError, folder)
    else:
        sys.meta_path.insert(0, _Watcher(folder))


class _Watcher:
    """A finder that steps aside after it has wrapped the class."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(self, name: str, *_: object) -> Any:
        if name != "gmask.errors":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            _wrap(module.GmaskError, self.folder)

        spec.loader.exec_module = execute_and_wrap
        return spec


def _wrap(error: type[Exception], folder: str) -> None:
    seen: set[str] = set()
    construct = error.__init__

    def construct_and_note(self: Exception, *arguments: object) -> None:
        construct(self, *arguments)
        text = " ".join(map(str, arguments))
        if text not in seen:
            seen.add(text)
            with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")

    error.__init__ = construct_and_note  # type: ignore[method-assign]


HEADER = """\
# The texts of gmask.errors.GmaskError that the tests meet, sorted. A reference for developers, which no test compares:
# tests/record/README.md says how a later run is held against it.
# <path>: all folders before a name. <test>: the folder of a test. <n>: a number.
"""
PLACE = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
TEST = re.compile(r"<path>/test_\w+")
CUT = re.compile(r"'<path>/[^']*'")  # a file's content of which only the start is shown
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?![\w-])")
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def settle(text: str) -> str:
    """A text without what differs from run to run; half characters are escaped, for they cannot be written."""
    text = text.encode("utf-8", "backslashreplace").decode()
    text = TEST.sub("<path>/<test>", PLACE.sub("<path>/", " ".join(text.split())))
    text = CUT.sub("'<path>'", text)
    return NUMBER.sub("<n>", ADDRESS.sub("<n>", text))


def gather(folder: Path) -> list[str]:
    """The texts of all processes, each once."""
    lines = (line for path in folder.glob("*.jsonl") for line in path.read_text("utf-8").splitlines())
    return sorted({settle(json.loads(line)) for line in lines})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+", help="what GMASK_RECORD_ERRORS named in a run of the tests")
    parser.add_argument("--write", action="store_true", help="replace errors.txt")
    arguments = parser.parse_args()
    found = sorted({text for folder in arguments.folder for text in gather(folder)})
    if arguments.write:
        RECORDED.write_text(HEADER + "\n".join(found) + "\n", "utf-8")
        print(f"{RECORDED.name}: {len(found)} texts")
        return
    recorded = [line for line in RECORDED.read_text("utf-8").splitlines() if not line.startswith("# ")]
    changes = [line for line in difflib.ndiff(recorded, found) if not line.startswith("  ")]
    print(*changes, f"{len(recorded)} texts recorded, {len(found)} found", sep="\n")
    sys.exit(bool(changes))


if __name__ == "__main__":
    main()
