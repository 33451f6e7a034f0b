"""Does the gmask of this environment fill blanks without its sources, and with the C++ library that it was built with?

The release workflow runs it where nothing but a wheel, or the sdist, was installed.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

TEXTS = {
    "The old man took his [MASK] and went down to the [MASK].": 2,
    "中华人民共和国[MASK]法，由[MASK]公布。": 2,
}
"""Texts, and how many blanks each has."""

LIBRARY = """
import gmask.native.ops as ops
print(ops.__file__)
print(*ops.instruction_sets())
"""


def run(*command: str) -> str:
    """What a command prints, in an empty folder, without a hub and without what Python's environment may add."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    settings = {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env={**own, **settings}, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


def main() -> None:
    program = shutil.which("gmask", path=sysconfig.get_path("scripts"))
    if program is None:
        sys.exit("there is no command gmask in this environment")
    said = run(program, "--version").strip()
    if said != f"gmask {version('gmask')}":
        sys.exit(f"gmask --version says {said!r}, the metadata {version('gmask')}")
    place, sets = run(sys.executable, "-c", LIBRARY).splitlines()
    if Path(__file__).resolve().parents[1] in Path(place).resolve().parents and "site-packages" not in place:
        sys.exit(f"{place}: these are the sources, not an installed package")
    if not sets:
        sys.exit("the C++ library was not built, or cannot be opened")
    for line, (text, blanks) in zip(run(program, "infill", "--json", *TEXTS).splitlines(), TEXTS.items(), strict=True):
        filled = json.loads(line)
        answers = [blank["text"].strip() for blank in filled["blanks"]]
        if len(answers) != blanks or not all(answers) or "[MASK]" in filled["text"]:
            sys.exit(f"{text!r} became {filled['text']!r}")
        print(filled["text"])
    print(f"{said} with {sets}, at {Path(place).parents[1]}")


if __name__ == "__main__":
    main()
