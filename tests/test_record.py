"""Does gmask do what it did when its behaviour was recorded? See tests/record/README.md."""

from pathlib import Path
from typing import Any

import pytest

from record import training
from record.compare import differences, settle
from record.record import PARTS, compare, read
from record.session import HAS_VOCABULARIES, Session

REFRESH = "If the change is meant, record it anew: python tests/record/record.py --write"


def expect_none(found: list[str], part: str) -> None:
    if found:
        pytest.fail(
            "\n".join([f"{len(found)} differences from the record:", *found, f"{REFRESH} {part}"]), pytrace=False
        )


@pytest.mark.parametrize("part", PARTS)
def test_it_does_what_is_recorded(part: str, tmp_path: Path) -> None:
    if PARTS[part].needs_vocabularies and not HAS_VOCABULARIES:
        pytest.skip("the published vocabulary files are not beside this checkout")
    expect_none(compare(part, tmp_path), part)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    session = Session(tmp_path)
    session.make_models()
    return session


@pytest.mark.slow
def test_a_tuning_run_that_is_killed_ends_as_recorded(session: Session) -> None:
    name = "chat lora"
    recipe = training.write_run(session, name, training.RUNS[name])
    out = session.folder / Path(recipe).parent / "out"
    assert training.run_killed(session, f"finetune {recipe}", out / "metrics.jsonl", lines=5) >= 5
    session.must(f"finetune {recipe}")
    expect_none(_compare(out, read("tuning")[name]), "tuning")


@pytest.mark.slow
def test_a_pretraining_run_that_is_killed_ends_as_recorded(session: Session) -> None:
    recipe = training.write_pretraining(session)
    out = session.folder / "float32"
    command = f"pretrain {recipe} run.out=float32"
    assert training.run_killed(session, command, out / "metrics.jsonl", lines=6) >= 6
    session.must(command)
    expect_none(_compare(out, read("pretraining")["float32"]), "pretraining")


@pytest.mark.slow
def test_two_processes_make_the_steps_that_are_recorded(session: Session) -> None:
    name = "chat lora"
    recipe = training.write_run(session, name, training.RUNS[name])
    done = training.run_in_two(session, recipe)
    assert done.returncode == 0, done.stderr[-4000:]
    log = training.read_log(session.folder / Path(recipe).parent / "out")
    expect_none(list(differences(read("tuning")[name]["log"], settle(log))), "tuning")


def _compare(out: Path, recorded: dict[str, Any]) -> list[str]:
    """A run's log and files beside the recorded ones."""
    found = settle(training.describe_run(out))
    return list(differences({key: recorded[key] for key in found}, found))
