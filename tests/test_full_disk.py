"""Does a disk that fills end every verb that writes in one line, with the file and the reason, and no half-made output?

A limit on the size of a file stands for the full disk.
"""

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gmask
from feedback_data import write_feedback_recipe
from gmask.checkpoints.adapters import save_adapter
from gmask.cli import main
from gmask.recipes.tuning import MethodSettings
from gmask.training.methods import apply_method
from gmask.training.run_folder import MetricsLog
from ppo_data import write_ppo_recipe
from tiny_folder import make_folder
from tuning_data import write_lines, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")

TEXTS = 16 * "The old man took his [MASK] to the river.\n"


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


Verb = Callable[..., str]


@pytest.fixture
def gmask_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Runs a verb on a disk that is full beyond ``size``; returns its last line of standard error."""

    def run(*arguments: object, size: int) -> str:
        monkeypatch.setattr(sys, "argv", ["gmask", *map(str, arguments)])
        capsys.readouterr()
        with full_at(size), pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in told, told
        return told.splitlines()[-1]

    return run


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


REASON = r"\((File too large|the file could not take all of it: the disk may be full)\)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("full") / "model")


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        (("infill", "--max-tokens", 4), "out.jsonl"),
        (("score", "--answers", "dog|old man"), "out.jsonl"),
        (("embed",), "out.jsonl"),
        (("embed",), "out.npy"),
    ],
)
def test_a_file_of_answers_is_kept_as_far_as_it_came(
    gmask_fails: Verb, folder: Path, tmp_path: Path, verb: tuple[object, ...], name: str
) -> None:
    (tmp_path / "in.txt").write_text(TEXTS)
    told = gmask_fails(*verb, "-m", folder, "--input", tmp_path / "in.txt", "--output", tmp_path / name, size=1500)
    assert re.fullmatch(rf"gmask: {tmp_path}/{name}: cannot be written {REASON}; what is done is kept", told)
    assert not (tmp_path / name).exists()
    (partial,) = files_of(tmp_path) - {"in.txt"}
    assert partial.startswith(name) and partial.endswith(".partial")


@pytest.mark.parametrize("verb", [("convert", "--to", "megatron"), ("quantize", "--bits", 8)])
def test_a_rewritten_folder_is_whole_or_not_there(
    gmask_fails: Verb, folder: Path, tmp_path: Path, verb: tuple[object, ...]
) -> None:
    name, *options = verb
    told = gmask_fails(name, folder, tmp_path / "made", *options, size=20_000)
    assert told.startswith(f"gmask: {tmp_path}/made") and re.search(REASON, told), told
    assert files_of(tmp_path) == set()


def test_a_merged_folder_is_whole_or_not_there(gmask_fails: Verb, folder: Path, tmp_path: Path) -> None:
    model, _ = gmask.load(folder, device="cpu")
    torch.manual_seed(1)
    apply_method(model, MethodSettings(rank=4, targets="all-linear"))
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    before = files_of(tmp_path)
    told = gmask_fails("merge", folder, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", size=20_000)
    assert told.startswith(f"gmask: {tmp_path}/merged") and re.search(REASON, told), told
    assert files_of(tmp_path) == before


def test_an_evaluation_that_cannot_be_written_names_its_file(gmask_fails: Verb, folder: Path, tmp_path: Path) -> None:
    task = {"name": "mood", "kind": "cloze", "template": "{text} It was [MASK].", "label": "label",
            "choices": {"good": "good", "bad": "bad"}, "metrics": ["accuracy"]}  # fmt: skip
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    write_lines(tmp_path / "data.jsonl", [{"text": "a fine day", "label": "good"}] * 20)
    before = files_of(tmp_path)
    told = gmask_fails(
        "evaluate", folder, "--tasks", tmp_path / "task.yaml", "--data", tmp_path / "data.jsonl",
        "-o", tmp_path / "out", size=600,
    )  # fmt: skip
    written = "out/mood/predictions.jsonl"
    assert re.fullmatch(rf"gmask: {tmp_path}/{written}: cannot be written {REASON}; what is done is kept", told), told
    assert files_of(tmp_path) - before <= {"out", "out/mood", written}


# Runs: what is written last, their weights, and what is written on the way


WORDS = "the small brown dog ran over a green hill and down to an old wooden table with his book"


def pretraining(folder: Path) -> str:
    words = WORDS.split()
    texts = [" ".join(words[(k * (n + 1)) % len(words)] for k in range(40)) for n in range(12)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "train.jsonl").write_text("\n".join(lines))
    tree = {
        "run": {"out": str(folder / "out"), "threads": 1, "save_every": 2, "validate_every": 2},
        "tokenizer": {"vocab_size": 380},
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128},
        "optimization": {"steps": 2, "rows_per_step": 2, "rows_per_pass": 2, "warmup_steps": 1, "dtype": "float32"},
        "data": {"root": str(folder), "cache": str(folder / "cache"), "row_length": 64,
                 "sources": [{"name": "toy", "train": "train.jsonl"}]},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def tuning(folder: Path) -> str:
    return write_recipe(folder, model={"name": str(make_folder(folder / "base"))})


RUNS: dict[str, Callable[[Path], str]] = {
    "pretrain": pretraining, "finetune": tuning, "reward": write_feedback_recipe, "dpo": write_feedback_recipe,
    "kto": write_feedback_recipe, "ppo": write_ppo_recipe,
}  # fmt: skip


@pytest.mark.parametrize("verb", RUNS)
def test_the_weights_of_a_run_are_written_whole_or_not_at_all(
    gmask_fails: Verb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    """A checkpoint is refused first; then the weights of the finished run, which goes on where it was."""
    if verb in ("dpo", "kto"):
        pytest.importorskip("trl")
    recipe, out = RUNS[verb](tmp_path), tmp_path / "out"
    told = gmask_fails(verb, recipe, size=60_000)
    assert re.search(rf"{out}/\S+: cannot be written .*; the last complete checkpoint is kept$", told), told
    left = files_of(out)
    assert not [name for name in left if re.search(r"checkpoint-\d+|partial", name)], left
    monkeypatch.setattr(sys, "argv", ["gmask", verb, recipe])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    size = max(path.stat().st_size for path in (out / "model").iterdir()) - 1
    shutil.rmtree(out / "model")
    (out / "results.json").unlink(missing_ok=True)
    before = files_of(out)
    told = gmask_fails(verb, recipe, size=size)
    assert re.search(rf"{out}/\S*: cannot be written .*; the run, to be resumed, is kept$", told), told
    assert not [name for name in files_of(out) - before if "model" in name or "partial" in name]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the command keeps it silent
@pytest.mark.parametrize("fault", [None, RuntimeError("of the run itself")])
def test_a_log_that_cannot_grow_is_named(tmp_path: Path, fault: Any) -> None:
    expected = "of the run itself" if fault else rf"{tmp_path}/metrics.jsonl: cannot be written {REASON}; the last comp"
    with pytest.raises(Exception, match=expected), MetricsLog(tmp_path, after_step=0) as log, full_at(400):
        for step in range(20):
            if fault is not None and step == 2:
                raise fault
            log.add({"step": step, "loss": 1.0})
    assert log.file.closed
