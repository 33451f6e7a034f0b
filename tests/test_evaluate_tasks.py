"""Does `gmask evaluate --tasks` measure what the predictions file holds, and say in one line what is wrong?"""

import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation_data import CLOZE, SEQ2SEQ, WORDS, make_reviews, read_lines, write_lines, write_task
from gmask.cli import main
from gmask.errors import GmaskError
from gmask.evaluation import harness
from gmask.evaluation.harness import run_tasks
from gmask.evaluation.results import EvaluationReport, TaskResult, read_report
from gmask.evaluation.suite import match_tasks
from gmask.generation.predict import Predictor
from gmask.tasks.records import Prediction, Sample
from tiny_folder import make_folder

REVIEWS = [
    {"text": "I liked it very much.", "label": "good"},
    {"text": "It was a waste of time.", "label": "bad"},
    {"text": "A great joy for all of us.", "label": "good"},
    {"text": "他说这很好。", "label": "good"},
    {"text": "Never again.", "label": "bad"},
]
MODEL = {"device": "cpu", "tables": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def mood(tmp_path: Path) -> str:
    """A task whose records are in ``tmp_path``."""
    write_lines(tmp_path / "mood" / "val.jsonl", REVIEWS)
    write_lines(tmp_path / "mood" / "train.jsonl", make_reviews(6, seed=5))
    return write_task(tmp_path / "mood.yaml", CLOZE)


def only(report: EvaluationReport) -> TaskResult:
    (task,) = report.tasks
    assert report.refused == []
    return task


def test_scores_are_those_of_the_predictions_that_are_written(tiny: str, mood: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run_tasks(tiny, tasks=[mood], data=str(tmp_path), out=str(out), batch_size=2, **MODEL)
    found, lines = only(report), read_lines(out / "mood" / "predictions.jsonl")
    assert [line["label"] for line in lines] == [0, 1, 0, 0, 1]
    assert [line["text"] for line in lines] == [f"{review['text']} It was [MASK]." for review in REVIEWS]
    assert all(line["scores"][line["predicted_label"]] == max(line["scores"]) for line in lines)
    right = sum(line["label"] == line["predicted_label"] for line in lines)
    accuracy = found.scores["accuracy"]
    assert accuracy.value == 100 * right / 5
    assert accuracy.low <= accuracy.value <= accuracy.high  # type: ignore[operator]
    # the majority is "good": 3 of 5; F1 of it 2 * 3 / (2 * 3 + 2), of "bad" 0
    assert found.majority == {"accuracy": 60.0, "macro-f1": pytest.approx(100 * (6 / 8 + 0) / 2)}
    assert found.chance == 0.5
    assert sorted(path.name for path in out.iterdir()) == ["mood", "report.html", "report.md", "results.json"]
    assert read_report(out).to_dict() == json.loads(json.dumps(report.to_dict()))


def test_batches_samples_that_are_read_at_once_and_the_order_change_nothing(
    tiny: str, mood: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "many.jsonl", make_reviews(40))
    first = run_tasks(tiny, tasks=[mood], data=data, out=str(tmp_path / "a"), batch_size=1, **MODEL)
    monkeypatch.setattr(harness, "WINDOW", 7)
    second = run_tasks(tiny, tasks=[mood], data=data, out=str(tmp_path / "b"), batch_size=5, **MODEL)
    one, two = (read_lines(tmp_path / name / "mood" / "predictions.jsonl") for name in "ab")
    assert [line["text"] for line in one] == [line["text"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-4)
    assert only(first).scores == only(second).scores


def test_written_answers_follow_the_settings_and_have_no_majority(tiny: str, tmp_path: Path) -> None:
    task, data = write_task(tmp_path / "write.yaml", SEQ2SEQ), write_lines(tmp_path / "dev.jsonl", REVIEWS[:3])
    out = tmp_path / "out"
    report = only(run_tasks(tiny, tasks=[task], data=data, out=str(out), settings={"max_tokens": 2}, **MODEL))
    lines = read_lines(out / "write" / "predictions.jsonl")
    right = sum(line["predicted_texts"][0].split() == line["answers"][0].split() for line in lines)
    assert report.scores["exact-match"].value == pytest.approx(100 * right / 3)
    assert (report.majority, report.chance) == ({}, None)
    assert report.settings["max_tokens"] == 2


def test_given_answers_are_measured_without_writing(tiny: str, tmp_path: Path) -> None:
    task = write_task(
        tmp_path / "t.yaml", SEQ2SEQ, kind="likelihood", template="{text} It was [MASK]", metrics=["accuracy", "nats"]
    )
    found = only(run_tasks(tiny, tasks=[task], data=write_lines(tmp_path / "d.jsonl", make_reviews(5)), **MODEL))
    assert found.scores["nats"].value > 0
    assert found.scores["nats"].low < found.scores["nats"].high  # type: ignore[operator]


def test_without_answers_there_are_predictions_and_no_scores(
    tiny: str, mood: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "test.jsonl", [{"text": line["text"]} for line in REVIEWS])
    out = str(tmp_path / "out")
    found = only(run_tasks(tiny, tasks=[mood], data=data, out=out, limit=2, device="cpu"))
    assert (found.samples, found.scores, found.majority) == (2, {}, {})
    assert ["predicted_label" in line for line in read_lines(tmp_path / "out/mood/predictions.jsonl")] == [True] * 2
    assert "2 samples without answers, so there is nothing to measure" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_measured_is_told_before_the_model_is_loaded(
    mood: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(harness, "load", lambda *arguments, **keywords: loaded.append(arguments))
    data = write_lines(tmp_path / "dev.jsonl", REVIEWS)
    wrong = write_task(tmp_path / "wrong.yaml", SEQ2SEQ, metrics=["accuracy"])
    write = write_task(tmp_path / "write.yaml", SEQ2SEQ)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "label": "good"}\n{"text": "b", "lab', "utf-8")
    half = write_lines(tmp_path / "half.jsonl", [REVIEWS[0], {"text": "", "label": "bad"}])
    other = write_lines(tmp_path / "other.jsonl", [{"text": "a", "label": "so-so"}])
    partly = write_lines(tmp_path / "partly.jsonl", [*REVIEWS, {"text": "x"}])
    renamed = write_lines(tmp_path / "renamed.jsonl", [{"review": "a", "label": "good"}])
    short = {"train": write_lines(tmp_path / "short.jsonl", REVIEWS[:2]), "shots": 3}
    for tasks, file, options, message in (
        ([wrong], data, {}, "a text was written and nothing chosen"),
        ([mood], partly, {}, r"partly\.jsonl, line 6: the answer is not known.* 1 samples of 6"),
        ([mood], str(broken), {}, r"broken\.jsonl, line 2: not JSON"),
        ([mood], half, {}, r"half\.jsonl, line 2: column 'text' is empty"),
        ([mood], other, {}, r"other\.jsonl, line 1: the label 'so-so' is none of the choices: good, bad"),
        ([mood], renamed, {}, r"renamed\.jsonl, line 1: no column 'text'.* nearest is 'review'|no column 'text'"),
        ([mood], str(tmp_path / "no.jsonl"), {}, "no text file at .*no.jsonl"),
        ([mood], str(tmp_path / "model"), {}, "no text file at"),
        (["superglue/rt"], data, {}, "there is no task superglue/rt: the nearest of gmask's is superglue/rte"),
        (["superglu/*"], data, {}, "no task matches superglu/"),
        ([], None, {"suite": "superglu"}, "there is no suite superglu: the nearest of gmask's is superglue"),
        ([mood, write], data, {}, "is no folder; several tasks take the folder"),
        ([write], str(tmp_path), {}, "the task does not say where its records are: name their file"),
        ([mood], None, {}, "no folder of data is named: get them from https://example.org/mood .licence: CC0.; looked"),
        ([write], data, {"settings": {"max_token": 2}}, "no setting 'max_token'; the nearest is 'max_tokens'"),
        ([write], data, {"shuffle_labels": True}, "labels are shuffled of tasks that choose"),
        ([write], data, {"shots": 1}, "the task does not say where its training records"),
        ([mood], data, {"batch_size": 0}, "batch_size must be at least 1, or auto, not 0"),
        ([mood], data, {"seeds": [0, 0]}, "seeds are 0, 0: give different numbers"),
        ([mood], data, {"shots": -1}, "shots is -1"),
        ([mood], data, {"limit": 0}, "limit"),
        ([mood], data, {"out": data}, "is a file; name a folder for the results"),
    ):
        with pytest.raises(GmaskError, match=message):
            run_tasks(tasks=tasks, data=file, **options)
    assert loaded == []
    assert short  # used below, with a model


def test_records_that_cannot_be_used_are_left_out_if_asked(tiny: str, mood: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [REVIEWS[0], {"text": "", "label": "bad"}, *REVIEWS[1:3], {"x": 1}])
    report = only(run_tasks(tiny, tasks=[mood], data=data, skip_bad_lines=True, **MODEL))
    assert (report.samples, report.left_out) == (3, 2)
    assert "2 records could not be used and are left out" in report.notes
    with pytest.raises(GmaskError, match="there is no sample in it, and 1 records cannot be used"):
        run_tasks(tiny, tasks=[mood], data=write_lines(tmp_path / "x.jsonl", [{"x": 1}]), skip_bad_lines=True)


def test_one_task_that_cannot_be_measured_does_not_stop_the_others(tiny: str, mood: str, tmp_path: Path) -> None:
    broken = write_task(tmp_path / "broken.yaml", CLOZE, name="broken", choices={"good": "great", "evil": "awful"})
    report = run_tasks(tiny, tasks=[mood, broken, "superglue/rte"], data=str(tmp_path), **MODEL)
    assert [task.name for task in report.tasks] == ["mood"]
    assert [(one.name, one.is_missing) for one in report.refused] == [("broken", False), ("superglue/rte", True)]
    assert "val.jsonl, line 2: the label 'bad' is none of the choices" in report.refused[0].reason
    with pytest.raises(
        GmaskError, match="none of the 2 tasks can be measured; the first: superglue/rte: no records in"
    ):
        run_tasks(tiny, tasks=["superglue/rte", "superglue/cb"], data=str(tmp_path))


def test_f1_without_a_positive_and_texts_that_are_cut_are_noted(tiny: str, tmp_path: Path) -> None:
    task = write_task(tmp_path / "t.yaml", CLOZE, choices={"bad": "bad", "good": "great"}, metrics=["f1"])
    data = write_lines(tmp_path / "d.jsonl", [{"text": "The old man. " * 60, "label": "bad"}] * 2)
    found = only(run_tasks(tiny, tasks=[task], data=data, **MODEL))
    assert found.scores["f1"].value == 0.0
    assert any("no sample is of class 1" in note for note in found.notes)
    assert any(note.startswith("of 2 samples 2 were cut to 96 tokens") for note in found.notes)


# Examples in front of the texts


def test_examples_stand_in_front_as_the_model_reads_them(tiny: str, mood: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run_tasks(tiny, tasks=[mood], data=str(tmp_path), shots=2, seeds=[0, 1], out=str(out), **MODEL)
    found = only(report)
    assert (found.name, found.seeds, len(found.by_seed)) == ("mood, 2-shot", (0, 1), 2)
    values = [scores["accuracy"] for scores in found.by_seed]
    assert found.scores["accuracy"].value == pytest.approx(sum(values) / 2)
    assert found.scores["accuracy"].deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    train = [f"{one['text']} It was {CLOZE['choices'][one['label']]}." for one in make_reviews(6, seed=5)]
    texts = [
        [line["text"] for line in read_lines(out / "mood-2-shot" / f"seed-{seed}" / "predictions.jsonl")]
        for seed in (0, 1)
    ]
    for drawn in texts:
        parts = [text.split("\n\n") for text in drawn]
        assert [part[2] for part in parts] == [f"{review['text']} It was [MASK]." for review in REVIEWS]
        assert len({tuple(part[:2]) for part in parts}) == 1  # the same for all samples
        assert set(parts[0][:2]) <= set(train)
    assert texts[0] != texts[1]


def test_a_sample_is_never_its_own_example(tiny: str, mood: str, tmp_path: Path) -> None:
    records = make_reviews(3, seed=9)
    data, out = write_lines(tmp_path / "d.jsonl", records), tmp_path / "out"
    run_tasks(tiny, tasks=[mood], data=data, train=data, shots=2, out=str(out), **MODEL)
    for line in read_lines(out / "mood-2-shot" / "predictions.jsonl"):
        *examples, asked = line["text"].split("\n\n")
        others = {record["text"] for record in records} - {asked.removesuffix(" It was [MASK].")}
        assert {example.partition(" It was")[0] for example in examples} == others
    with pytest.raises(GmaskError, match="has 2 samples, too few for 3 examples"):
        run_tasks(tiny, tasks=[mood], data=data, train=data, shots=3, **MODEL)


def test_examples_that_do_not_fit_are_refused(tiny: str, mood: str, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "long.jsonl", [{"text": "The old man went. " * 12, "label": "good"}] * 5)
    with pytest.raises(
        GmaskError, match=r"val\.jsonl:1: with 5 examples in front the text does not fit into 96 tokens"
    ):
        run_tasks(tiny, tasks=[mood], data=str(tmp_path), train=train, shots=5, **MODEL)
    text = write_task(tmp_path / "text.yaml", {"use": "language-model/text"})
    with pytest.raises(GmaskError, match="takes no examples: a whole text is scored"):
        run_tasks(tiny, tasks=[text], data=write_lines(tmp_path / "t.jsonl", [{"text": "a b"}]), shots=1)


def test_rounds_of_a_chat_are_its_examples(tiny: str, tmp_path: Path) -> None:
    task = write_task(
        tmp_path / "c.yaml", {"kind": "chat", "template": "{q}", "target": "{a}", "metrics": ["exact-match"]}
    )
    data, out = write_lines(tmp_path / "d.jsonl", [{"q": "dog", "a": "man"}]), tmp_path / "out"
    train = write_lines(tmp_path / "t.jsonl", [{"q": "river", "a": "boat"}])
    run_tasks(tiny, tasks=[task], data=data, train=train, shots=1, out=str(out), settings={"max_tokens": 1}, **MODEL)
    (line,) = read_lines(out / "c-1-shot" / "predictions.jsonl")
    assert (line["history"], line["text"]) == ([["river", "boat"]], "dog")


# Chance


def test_a_random_model_and_shuffled_labels_are_at_chance(tiny: str, tmp_path: Path) -> None:
    """Four candidates, of which the right one has a random place: a quarter is right."""
    task = write_task(
        tmp_path / "t.yaml",
        {"kind": "multiple-choice", "template": "{text} [MASK].", "label": "label", "candidates": "c",
         "metrics": ["accuracy"]},
    )  # fmt: skip

    rng = random.Random(3)
    records = []
    for review in make_reviews(200):
        label = rng.randrange(4)
        records.append({"text": review["text"], "c": rng.sample(WORDS, 4), "label": label})
    data = write_lines(tmp_path / "d.jsonl", records)
    for shuffled in (False, True):
        found = only(run_tasks(tiny, tasks=[task], data=data, shuffle_labels=shuffled, **MODEL))
        accuracy = found.scores["accuracy"]
        assert accuracy.low <= 25 <= accuracy.high  # type: ignore[operator]
        assert (found.chance, found.shuffled_labels) == (0.25, shuffled)
        assert 8 < accuracy.high - accuracy.low < 16  # type: ignore[operator]  # 2 * 1.96 * sqrt(.25 * .75 / 200): 12


def test_shuffled_labels_take_what_a_model_knows(
    tiny: str, mood: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_reviews(200)
    data = write_lines(tmp_path / "d.jsonl", records)
    right = [["good", "bad"].index(record["label"]) for record in records]
    monkeypatch.setattr(Predictor, "answer", lambda self, asked, seeds: [Prediction(label=right[i]) for i in seeds])
    assert only(run_tasks(tiny, tasks=[mood], data=data, **MODEL)).scores["accuracy"].value == 100.0
    found = only(run_tasks(tiny, tasks=[mood], data=data, shuffle_labels=True, **MODEL)).scores["accuracy"]
    assert found.low <= 50 <= found.high  # type: ignore[operator]


# Memory


def test_a_batch_that_is_too_large_is_halved(
    tiny: str, mood: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, answer, sizes = write_lines(tmp_path / "d.jsonl", make_reviews(20)), Predictor.answer, []

    def answer_few(self: Predictor, questions: Any, seeds: Any) -> Any:
        if len(questions) > 3:
            raise RuntimeError("CUDA out of memory")
        sizes.append(len(questions))
        return answer(self, questions, seeds)

    expected = only(run_tasks(tiny, tasks=[mood], data=data, batch_size=1, **MODEL)).scores
    monkeypatch.setattr(Predictor, "answer", answer_few)
    assert only(run_tasks(tiny, tasks=[mood], data=data, **MODEL)).scores == expected
    assert (sum(sizes), max(sizes)) == (20, 2)  # 32 rows, 16, 8, 4, 2
    with pytest.raises(RuntimeError, match="out of memory"):
        run_tasks(tiny, tasks=[mood], data=data, batch_size=8, **MODEL)


@pytest.mark.slow
def test_many_records_are_held_in_a_window(
    tiny: str, mood: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20,000 samples at most a window is in memory, and one more that is read."""
    data = write_lines(tmp_path / "d.jsonl", make_reviews(20_000))
    held = []

    def answer(self: Predictor, questions: Any, seeds: Any) -> Any:
        if len(held) < 12 and seeds[0] > 5_000 * len(held):
            held.append(sum(type(one) is Sample for one in gc.get_objects()))
        return [Prediction(label=0, scores=(0.0, -1.0))] * len(questions)

    monkeypatch.setattr(Predictor, "answer", answer)
    found = only(run_tasks(tiny, tasks=[mood], data=data, out=str(tmp_path / "out"), batch_size=512, **MODEL))
    assert found.samples == 20_000
    assert found.scores["accuracy"].value == found.majority["accuracy"] or found.scores["accuracy"].value < 51
    assert held and max(held) <= harness.WINDOW + 64, held


# The verb


def run_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, ...]:
    monkeypatch.setattr(sys, "argv", ["gmask", "evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return (ended.value.code or 0, *capsys.readouterr())


def test_the_verb_prints_a_table_or_json(
    tiny: str, mood: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [tiny, "--tasks", mood, "--data", str(tmp_path)]
    code, shown, _ = run_verb(monkeypatch, capsys, *arguments, "--json")
    (report,) = json.loads(shown)["tasks"]
    assert (code, report["samples"], report["majority"]["accuracy"]) == (0, 5, 60.0)
    monkeypatch.setenv("COLUMNS", "120")
    code, table, _ = run_verb(monkeypatch, capsys, *arguments)
    row = next(line for line in table.splitlines() if "accuracy" in line)
    score = report["scores"]["accuracy"]
    interval = [f"{score['low']:.2f}", "to", f"{score['high']:.2f}"]
    assert (code, row.split()) == (0, ["mood", "accuracy", f"{score['value']:.2f}", *interval, "60.00", "50.00", "-"])
    code, _, _ = run_verb(monkeypatch, capsys, tiny, "--tasks", f"{mood},superglue/rte", "--data", str(tmp_path))
    assert code == 0  # a set that is not here is told, and no mistake
    broken = write_task(tmp_path / "broken.yaml", CLOZE, choices={"good": "great", "evil": "awful"})
    code, out, _ = run_verb(monkeypatch, capsys, tiny, "--tasks", f"{mood},{broken}", "--data", str(tmp_path))
    assert code == 2
    assert "not measured: " in out


def test_tasks_are_listed_with_their_licence_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "RTE" / "val.jsonl", [{}])
    code, shown, _ = run_verb(
        monkeypatch, capsys, "--list", "--tasks", "superglue/*", "--data", str(tmp_path), "--json"
    )
    found = {row["task"]: row for row in json.loads(shown)}
    assert code == 0
    assert found["superglue/rte"]["records"] == str(tmp_path / "RTE" / "val.jsonl")
    assert found["superglue/wic"]["records"] == "hub: aps/super_glue"
    assert found["superglue/wic"]["licence"] == "CC BY-NC 4.0"
    code, shown, _ = run_verb(monkeypatch, capsys, "--list")
    assert (code, "superglue/copa" in shown) == (0, True)


def test_options_that_miss_each_other_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--adapter", "folder"], "--adapter: for tasks; name some with --tasks"),
        (["--set", "max_tokens=2", "--limit", "3"], "--set and --limit: for tasks"),
        (["one", "two"], "one model is measured at a time"),
        (["--compare", "one"], "--compare sets several runs side by side: name two"),
        (["--compare", "one", "two"], "one: holds no results.json"),
        (["--tasks", "superglue/rte", "--seeds", "a"], "--seeds a: write numbers, such as 0,1,2"),
        (["--tasks", "superglue/rte", "--batch-size", "all"], "--batch-size all: write auto, or a number"),
        (["--list", "--tasks", "nothing/*"], "no task matches nothing/*"),
    ):
        code, out, error = run_verb(monkeypatch, capsys, *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert message in error


# Reports


def test_reports_hold_scores_hashes_and_published_numbers(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(
        tmp_path / "RTE" / "val.jsonl",
        [{"premise": "It rained.", "hypothesis": "It was wet.", "label": "entailment"}] * 2,
    )
    runs = []
    for name in ("one", "two"):
        runs.append(str(tmp_path / name))
        run_tasks(tiny, tasks=["superglue/rte"], data=str(tmp_path), out=runs[-1], **MODEL)
    report, page = ((tmp_path / "one" / name).read_text("utf-8") for name in ("report.md", "report.html"))
    results = read_report(tmp_path / "one")
    (digest,) = only(results).hashes.values()
    for text in (report, page):
        assert "GLM-10B 93.10 (tuned, dev set)" in text
        assert digest in text
    assert "<svg" in page
    assert "published, not measured here" in page
    assert not any(mark in page for mark in ('src="http', "<link", "<script"))
    assert set(results.run.weights) == {"config.json", "model.safetensors"}
    assert results.run.versions["torch"]
    code, table, _ = run_verb(monkeypatch, capsys, "--compare", *runs, "--out", str(tmp_path / "both"))
    assert (code, "superglue/rte" in table) == (0, True)
    both = (tmp_path / "both" / "report.md").read_text("utf-8")
    assert "tiny (one)" in both
    assert (tmp_path / "both" / "report.html").is_file()
    (tmp_path / "one" / "results.json").write_text('{"tasks": [{}]}', "utf-8")
    with pytest.raises(GmaskError, match="not the results of this version"):
        read_report(tmp_path / "one")


def test_a_task_is_called_by_the_end_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert match_tasks(["lambada", "superglue/w*"]) == [
        "language-model/lambada", "superglue/wic", "superglue/wsc", "superglue/wsc-referent",
    ]  # fmt: skip
    assert match_tasks(["text"]) == ["text"], "several are called so"
    (tmp_path / "lambada").write_text("a file", "utf-8")
    assert match_tasks(["lambada"]) == ["lambada"]
