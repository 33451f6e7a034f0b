"""Are files scored and embedded line by line, resumed, counted, and kept apart from what a program reads?"""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import gmask
from gmask.cli import generation as verbs
from gmask.generation.embed import Embedder, embed
from gmask.generation.files import FileReport, count_correct, embed_file, score_file
from gmask.generation.score import Scorer, score
from tiny_folder import make_folder

TASKS = [
    {"text": "The [MASK] dog.", "answers": ["sunny", "old"], "label": "old"},
    {"text": "It was [MASK].", "answers": ["a sunny day", "over", "rainy"], "label": 2},
    {"text": "我[MASK]苹果", "answers": ["买了", "喜欢"]},
    {"text": "river [sMASK]", "answers": ["down", "went to the market"], "label": "down"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(folder: Path):
    return gmask.load(folder, device="cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(task, ensure_ascii=False) + "\n" for task in TASKS), "utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) if line else {} for line in path.read_text("utf-8").split("\n")[:-1]]


def test_each_line_is_what_a_single_run_gives_and_labels_are_counted(pair, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert score_file(Scorer(*pair, "mean", 3), source, target) == FileReport(lines=4, resumed=0, skipped=0)
    lines = read(target)
    right = ["old", "rainy", None, "down"]
    for task, line, label in zip(TASKS, lines, right, strict=True):
        alone = score(*pair, task["text"], task["answers"], normalization="mean")
        assert (line["text"], line["best"], line.get("label")) == (task["text"], alone.best.text, label)
        assert [a["score"] for a in line["answers"]] == pytest.approx([a.score for a in alone.answers], abs=1e-5)
        assert line.get("correct") == (None if label is None else alone.best.text == label)
        for answer in line["answers"]:
            assert list(answer) == ["text", "logprob", "score", "probability", "tokens", "end_logprob"]
    assert count_correct(target) == (sum(line.get("correct", False) for line in lines), 3)


def test_a_stopped_run_goes_on_and_counts_what_it_had_scored(
    pair, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(*pair, batch_size=1)
    score_file(scorer, source, tmp_path / "whole.jsonl")
    original, seen = Scorer.score, []

    def stop_at_the_third(self: Scorer, questions):
        seen.append(questions[0].text)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, questions)

    monkeypatch.setattr(Scorer, "score", stop_at_the_third)
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_file(scorer, source, target)
    assert not target.exists()
    assert score_file(scorer, source, target) == FileReport(lines=4, resumed=2, skipped=0)
    assert seen[3:] == [task["text"] for task in TASKS[2:]]
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert count_correct(target)[1] == 3


def test_a_run_with_another_normalization_or_other_answers_starts_anew(pair, source: Path, tmp_path: Path) -> None:
    with source.open("a") as file:
        file.write("{")
    for scorer in (Scorer(*pair), Scorer(*pair, "mean")):
        with pytest.raises(gmask.GmaskError, match="line 5"):
            score_file(scorer, source, tmp_path / "out.jsonl")
    with pytest.raises(gmask.GmaskError, match="line 5"):
        score_file(Scorer(*pair), source, tmp_path / "out.jsonl", answers=["a", "b"])
    assert len(list(tmp_path.glob("*.partial"))) == 3


BAD_LINES = {
    '{"text": "no blank", "answers": ["a"]}': "no blank",
    '{"text": "[MASK] [MASK]", "answers": ["a"]}': "2 blanks",
    '{"text": "[MASK]"}': 'no "answers"',
    '{"text": "[MASK]", "answers": "a|b"}': "list of texts",
    '{"text": "[MASK]", "answers": 3}': "list of texts",
    '{"text": "[MASK]", "answers": [1]}': "list of texts",
    '{"text": "[MASK]", "answers": ["a", "b"], "label": "c"}': "label",
    '{"text": "[MASK]", "answers": ["a", "b"], "label": 2}': "label",
    '{"text": "[MASK]", "answers": ["a", "b"], "label": true}': "label",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_an_error_with_its_number_or_is_skipped_and_counted(
    pair, source: Path, tmp_path: Path, bad: str
) -> None:
    lines = source.read_text("utf-8").splitlines()
    source.write_text("\n".join([lines[0], "", bad, *lines[1:]]), "utf-8")
    target = tmp_path / "out.jsonl"
    with pytest.raises(gmask.GmaskError, match=rf"tasks.jsonl, line 3: .*{BAD_LINES[bad]}"):
        score_file(Scorer(*pair), source, target)
    assert score_file(Scorer(*pair), source, target, skip_bad_lines=True) == FileReport(6, resumed=2, skipped=1)
    scored = read(target)
    assert list(scored[2]) == ["error"] and scored[1] == {}
    assert count_correct(target)[1] == 3


def test_answers_for_all_lines_serve_those_without_their_own(pair, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("a [MASK] dog\nthe [MASK]\n", "utf-8")
    score_file(Scorer(*pair), source, tmp_path / "out.jsonl", answers=["old", "sunny"])
    assert [[answer["text"] for answer in line["answers"]] for line in read(tmp_path / "out.jsonl")] == [
        ["old", "sunny"]
    ] * 2


def test_vectors_of_a_file_are_those_of_single_runs_in_either_form(pair, tmp_path: Path) -> None:
    source, texts = tmp_path / "texts.txt", ["The old man", "我喜欢", "a [MASK] dog"]
    source.write_text("\n".join([texts[0], "", *texts[1:], "[XMASK]"]) + "\n", "utf-8")
    embedder = Embedder(*pair, batch_size=2)
    for name in ("out.npy", "out.jsonl"):
        report = embed_file(embedder, source, tmp_path / name, skip_bad_lines=True)
        assert report == FileReport(lines=5, resumed=0, skipped=1)
    array = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert (array.shape, array.dtype) == ((5, 32), np.float32)
    assert np.isnan(array[[1, 4]]).all(), "an empty and a bad line"
    np.testing.assert_allclose(array[[0, 2, 3]], embed(*pair, texts), atol=1e-5)
    lines = read(tmp_path / "out.jsonl")
    assert [line.get("text") for line in lines] == [texts[0], None, *texts[1:], None]
    np.testing.assert_array_equal(np.array([lines[i]["embedding"] for i in (0, 2, 3)], np.float32), array[[0, 2, 3]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.npy", "texts.txt"]


def test_an_empty_file_becomes_an_empty_array(pair, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("", "utf-8")
    embed_file(Embedder(*pair), tmp_path / "none.txt", tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").shape == (0, 32)


@pytest.fixture
def run(folder: Path):
    app = typer.Typer(rich_markup_mode=None)
    app.command("score")(verbs.score)
    app.command("embed")(verbs.embed)

    def run(*arguments: object, stdin: str = ""):
        return CliRunner().invoke(app, [*map(str, arguments), "-m", str(folder)], input=stdin)

    return run


def test_scores_are_printed_best_first_with_tabs_in_a_pipe(pair, run) -> None:
    texts = ["The [MASK] dog.", "It was\ta [MASK]"]
    done = run("score", *texts, "--answers", "old|sunny|a rainy day", "--normalization", "mean")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert (done.exit_code, done.stderr, len(rows)) == (0, "", 6)
    for text, found in zip(texts, (rows[:3], rows[3:]), strict=True):
        expected = score(*pair, text, ["old", "sunny", "a rainy day"], normalization="mean")
        ranked = sorted(expected.answers, key=lambda answer: -answer.score)
        for row, answer in zip(found, ranked, strict=True):
            assert row[:2] == [text.replace("\t", " "), answer.text]
            assert [float(cell) for cell in row[2:]] == pytest.approx([answer.score, answer.probability], abs=1e-4)
    piped = run("score", "--answers", "old|sunny", "--json", stdin="The [MASK] dog.\n")
    assert json.loads(piped.stdout)["answers"][0]["text"] == "old"


def test_a_scored_file_tells_its_accuracy_and_nothing_else(run, source: Path, tmp_path: Path) -> None:
    done = run("score", "--input", source, "--output", tmp_path / "out.jsonl")
    correct, labelled = count_correct(tmp_path / "out.jsonl")
    assert done.stdout == f"accuracy {correct / labelled:.4f} ({correct} of {labelled})\n"
    assert "4 lines" in done.stderr


def test_vectors_are_printed_as_json(pair, run) -> None:
    done = run("embed", "The old man", "--pooling", "last", "--layer", 1, "--no-normalize")
    values = json.loads(done.stdout)
    expected = embed(*pair, ["The old man"], pooling="last", layer=1, normalize=False)[0]
    assert values["text"] == "The old man"
    np.testing.assert_allclose(np.array(values["embedding"], np.float32), expected, atol=1e-6)


def test_mistakes_are_named(run) -> None:
    for arguments, message in (
        (["score", "[MASK]"], "there are no answers"),
        (["score", "[MASK]", "--answers", "a||b"], "--answers 'a||b': a candidate is empty"),
        (["score", "--answers", "a"], "standard input is empty"),
        (["score", "[MASK]", "--answers", "a", "--normalization", "x"], "sum, mean, unconditional"),
        (["embed", "x", "--input", "y"], "--input and --output go together"),
        (["embed", "x", "--pooling", "cls"], "mean, first, last, mask"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, gmask.GmaskError), done
        assert message in str(done.exception)
        assert done.stdout == ""
