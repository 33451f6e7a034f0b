"""Does an evaluation that is killed go on with the same numbers, and do two processes find those of one?"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation_data import CLOZE, SEQ2SEQ, make_reviews, read_lines, write_lines, write_task
from gmask.errors import GmaskError
from gmask.evaluation.harness import run_tasks
from gmask.evaluation.results import read_report
from gmask.generation.predict import Predictor
from tiny_folder import make_folder

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LOG = Path("mood") / "predictions.jsonl"


@pytest.fixture
def setup(tmp_path: Path) -> tuple[str, str, str]:
    """A model, a task and its records."""
    model = str(make_folder(tmp_path / "tiny"))
    return model, write_task(tmp_path / "mood.yaml", CLOZE), write_lines(tmp_path / "d.jsonl", make_reviews(30))


def run(setup: tuple[str, str, str], out: Path) -> None:
    model, task, data = setup
    run_tasks(model, tasks=[task], data=data, out=str(out), batch_size=4, device="cpu", tables=False)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_numbers(tmp_path: Path, setup: tuple[str, str, str]) -> None:
    run(setup, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, str(TESTS / "evaluation_worker.py"), *setup, str(out), "0.4"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 300
        while not (out / LOG).is_file() or len((out / LOG).read_bytes().splitlines()) < 8:
            assert process.poll() is None and time.monotonic() < until, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    done = (out / LOG).read_bytes()
    assert 8 <= len(done.splitlines()) < 30
    assert not (out / "results.json").exists()
    with (out / LOG).open("ab") as file:
        file.write(b'{"key": "00')  # as if it had been killed while it wrote
    run(setup, out)
    assert (out / LOG).read_bytes() == (tmp_path / "whole" / LOG).read_bytes()
    whole, resumed = (read_report(tmp_path / name).tasks[0] for name in ("whole", "killed"))
    assert resumed.scores == whole.scores
    assert resumed.resumed == len(done.splitlines()) - len(done.splitlines()) % 4
    assert whole.resumed == 0


def test_what_is_done_is_not_asked_again_and_other_settings_are(
    tmp_path: Path, setup: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, data = setup
    asked, answer = [], Predictor.answer

    def count(self: Predictor, questions: list[object], seeds: list[int]) -> object:
        asked.append(len(questions))
        return answer(self, questions, seeds)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "answer", count)
    options = {"tasks": [task], "out": str(tmp_path / "out"), "device": "cpu", "tables": False}
    run_tasks(model, data=data, **options)
    first = (tmp_path / "out" / LOG).read_bytes()
    assert sum(asked) == 30
    run_tasks(model, data=data, **options)
    assert sum(asked) == 30
    run_tasks(model, data=data, normalization="mean", **options)
    assert sum(asked) == 60
    assert len(read_lines(tmp_path / "out" / LOG)) == 30  # those of other settings are gone
    run_tasks(model, data=data, **options)
    assert (sum(asked), (tmp_path / "out" / LOG).read_bytes()) == (90, first)
    more = write_lines(tmp_path / "more.jsonl", [*make_reviews(30), *make_reviews(2, seed=7)])
    run_tasks(model, data=more, batch_size=1, **options)
    assert sum(asked) == 92


def test_a_folder_with_other_predictions_is_refused(tmp_path: Path, setup: tuple[str, str, str]) -> None:
    write_lines(tmp_path / "out" / LOG, [{"text": "something else"}])
    with pytest.raises(GmaskError, match=r"predictions\.jsonl, line 1: no prediction of gmask evaluate: name another"):
        run(setup, tmp_path / "out")


def test_answers_that_are_drawn_are_those_of_their_seed(tmp_path: Path, setup: tuple[str, str, str]) -> None:
    model, _, data = setup
    task = write_task(tmp_path / "write.yaml", SEQ2SEQ)
    options = {"tasks": [task], "data": data, "device": "cpu", "tables": False, "limit": 6}
    drawn = {"temperature": 1.0, "max_tokens": 4}
    for name, size in (("a", 1), ("b", 6)):
        out = str(tmp_path / name)
        report = run_tasks(model, seeds=[3, 4], settings=drawn, batch_size=size, out=out, **options)
        assert report.tasks[0].seeds == (3, 4)
    texts = {
        (name, seed): [
            line["predicted_texts"] for line in read_lines(tmp_path / name / f"write/seed-{seed}/predictions.jsonl")
        ]
        for name in "ab"
        for seed in (3, 4)
    }
    assert texts["a", 3] == texts["b", 3] != texts["a", 4]
    assert run_tasks(model, seeds=[3, 4], settings={"max_tokens": 2}, **options).tasks[0].seeds == (3,)


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(tmp_path: Path, setup: tuple[str, str, str]) -> None:
    run(setup, tmp_path / "one")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(2):  # the second time nothing is left to do
        done = subprocess.run(
            [*start, str(TESTS / "evaluation_worker.py"), *setup, str(tmp_path / "two")],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert (tmp_path / "two" / LOG).read_bytes() == (tmp_path / "one" / LOG).read_bytes()
        one, two = (read_report(tmp_path / name) for name in ("one", "two"))
        assert (two.tasks[0].scores, two.run.processes) == (one.tasks[0].scores, 2)
