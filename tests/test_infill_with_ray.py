"""Does the script for a Ray cluster write what one machine writes, and go on after a stop?"""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import gmask
from gmask.generation.files import fill_file
from gmask.generation.infill import Infiller
from gmask.generation.settings import make_sampling

pytest.importorskip("ray.data")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own configuration classes
]

SCRIPT = Path(__file__).parents[1] / "recipes/infill_with_ray.py"
TEXTS = b"""{"text": "The dog ran after the [MASK]."}
{"text": "She went to the [MASK] and [MASK]."}

not json
{"text": "\xe5\xb0\x8f\xe7\x8c\xab\xe5\x96\x9c\xe6\xac\xa2[MASK]\xe3\x80\x82"}
{"text": "no end of the line [gMASK]"}"""


@pytest.fixture(scope="module")
def script() -> Any:
    specification = importlib.util.spec_from_file_location("infill_with_ray", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_the_parts_are_the_lines_behind_those_that_are_done(script: Any, tmp_path: Path, size: int) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_bytes(TEXTS)
    for start in range(8):
        parts = list(script.read_parts(source, start=start, size=size))
        assert b"".join(part["lines"] for part in parts) == b"".join(TEXTS.splitlines(keepends=True)[start:])
        assert [part["first"] for part in parts] == list(range(start, 6, size))


def test_a_line_that_was_cut_is_done_again(script: Any, tmp_path: Path) -> None:
    partial = tmp_path / "filled.partial"
    assert script.keep_whole_lines(partial) == 0
    partial.write_bytes(b'{"text": "a"}\n\n{"te')
    assert script.keep_whole_lines(partial) == 2
    assert partial.read_bytes() == b'{"text": "a"}\n\n'


def test_a_stopped_run_goes_on_to_the_file_of_one_machine(script: Any, tmp_path: Path) -> None:
    source, target, alone = tmp_path / "texts.jsonl", tmp_path / "filled.jsonl", tmp_path / "alone.jsonl"
    source.write_bytes(TEXTS)
    settings = {"seed": 7, "max_tokens": 6, "temperature": 0.8}
    infiller = Infiller(*gmask.load("bundled", device="cpu"), make_sampling(settings))
    fill_file(infiller, source, alone, skip_bad_lines=True)

    run = Namespace(source=source, target=target, model="bundled", quantize=None)
    script.name_partial(run, settings).write_bytes(b'{"kept": true}\n{"cut')
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, SCRIPT, source, target, "--lines", "2", *pairs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # not that of the user's home
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 lines filled, 1 of them could not be read" in done.stdout

    first, *rest = target.read_text("utf-8").splitlines()
    _, *expected = alone.read_text("utf-8").splitlines()
    assert first == '{"kept": true}'
    assert [read(line) for line in rest] == [read(line) for line in expected]
    assert list(tmp_path.glob("*.partial")) == []


def read(line: str) -> Any:
    """What was answered; the last digits of log-probabilities hang on how many lines were filled together."""
    values = json.loads(line) if line else {}
    return values.get("text"), [blank["text"] for blank in values.get("blanks", [])], values.get("error")


def test_an_output_is_never_overwritten(script: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_bytes(TEXTS)
    with pytest.raises(gmask.GmaskError, match="is there already"):
        script.fill(Namespace(source=source, target=source, lines=2), {})
