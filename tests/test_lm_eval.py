"""Does lm-eval's own code find the same numbers with our models, and on our tasks, as `gmask evaluate`?"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gmask
from evaluation_data import make_reviews, read_lines, write_lines, write_task
from gmask.cli import main
from gmask.errors import GmaskError
from gmask.evaluation.export import export_tasks
from gmask.evaluation.harness import run_tasks
from gmask.files import write_json
from gmask.generation.predict import predict
from gmask.generation.settings import Sampling
from gmask.tasks.records import Sample
from gmask.tasks.templates import escape_blanks
from tiny_folder import make_folder
from tuning_models import make_chatglm

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'gmask[eval]'")
datasets = pytest.importorskip("datasets")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gmask.evaluation.lm_eval import GmaskLM  # noqa: E402

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
CHOICE = {"kind": "cloze", "template": "{text} It was [MASK], he said.", "label": "label",
          "choices": {"good": "great", "bad": "not so good"}, "metrics": ["accuracy"]}  # fmt: skip
WRITTEN = {"kind": "seq2seq", "template": "{text} It was [gMASK]", "target": "{label}",
           "metrics": ["exact-match", "squad-f1"]}  # fmt: skip
TEXTS = [
    "The old man took his dog and went down to the river.",
    "It was a sunny day, and the rainy season was over.",
    "The dog ate the [MASK] book \\ of the man.",
    "我今天早上去市场买了 一些苹果。",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def loaded(folder: str) -> Any:
    return gmask.load(folder, device="cpu")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def ask(lm: Any, out: Path, **options: Any) -> dict[str, Any]:
    """What lm-eval finds of the one task in a folder, without its settings."""
    manager = TaskManager(include_path=str(out), include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=[path.stem for path in out.glob("*.yaml")], task_manager=manager, bootstrap_iters=0, **options
    )
    (results,) = found["results"].values()
    return {name.partition(",")[0]: value for name, value in results.items()}


def compare(lm: Any, folder: str, out: Path, *, options: dict[str, Any] | None = None, **run: Any) -> dict[str, Any]:
    """Both results on the same task: {metric: (ours, theirs)}."""
    export_tasks(str(out), **run)
    (ours,) = run_tasks(folder, **run, **(options or {}), device="cpu", tables=False).tasks
    theirs = ask(lm, out)
    names = {"accuracy": "acc", "word-perplexity": "word_perplexity", "nats": "perplexity"}
    return {
        metric: (score.value, theirs[names.get(metric, metric)])
        for metric, score in ours.scores.items()
        if names.get(metric, metric) in theirs
    }


def test_a_choice_in_the_middle_of_a_text(loaded: Any, folder: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "reviews.jsonl", make_reviews(24))
    task = write_task(tmp_path / "mood.yaml", CHOICE)
    run = {"tasks": [task], "data": data}
    found = compare(GmaskLM(*loaded), folder, tmp_path / "out", **run)
    assert found["accuracy"][0] == pytest.approx(100 * found["accuracy"][1])
    # The scores themselves, not only which is the highest
    run_tasks(folder, **run, out=str(tmp_path / "ours"), device="cpu", tables=False)
    ours = [line["scores"] for line in read_lines(tmp_path / "ours/mood/predictions.jsonl")]
    rows = read_lines(tmp_path / "out/gmask_mood.jsonl")
    asked = [request("loglikelihood", row["text"], choice) for row in rows for choice in row["choices"]]
    theirs = GmaskLM(*loaded).loglikelihood(asked, disable_tqdm=True)
    torch.testing.assert_close(
        torch.tensor([logprob for logprob, _ in theirs]).view(-1, 2), torch.tensor(ours), atol=1e-4, rtol=0
    )


def test_examples_in_front_and_scores_without_the_text(loaded: Any, folder: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "reviews.jsonl", make_reviews(12))
    train = write_lines(tmp_path / "train.jsonl", make_reviews(6, seed=3))
    entry = [{"task": {**CHOICE, "name": "mood", "template": "{text} It was [MASK]"}, "shots": 1,
              "normalization": "unconditional"}]  # fmt: skip
    write_json(tmp_path / "suite.yaml", entry)
    run = {"suite": str(tmp_path / "suite.yaml"), "data": data, "train": train}
    export_tasks(str(tmp_path / "out"), **run)
    (path,) = (tmp_path / "out").glob("gmask_mood*.jsonl")
    first = read_lines(path)[0]
    assert first["text"].count("It was") == 2 and first["text"].endswith("It was ") and "MASK" not in first["text"]
    (ours,) = run_tasks(folder, **run, device="cpu", tables=False).tasks
    theirs = ask(GmaskLM(*loaded), tmp_path / "out")
    assert ours.scores["accuracy"].value == pytest.approx(100 * theirs["acc_mutual_info"])


@pytest.mark.parametrize("direction", ["both", "left"])
def test_the_last_word(direction: str, loaded: Any, folder: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    name = "language-model/lambada" + ("" if direction == "both" else "-left")
    found = compare(GmaskLM(*loaded, direction=direction), folder, tmp_path / "out", tasks=[name], data=data)
    assert found["accuracy"][0] == pytest.approx(100 * found["accuracy"][1])
    assert math.exp(found["nats"][0]) == pytest.approx(found["nats"][1], rel=1e-5)


@pytest.mark.parametrize("direction", ["both", "left"])
def test_perplexity_by_windows(direction: str, loaded: Any, folder: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(TEXTS * 6), "utf-8")
    task = {"use": "language-model/text", "direction": direction, "window": 40, "stride": 16}
    path = write_task(tmp_path / "text.yaml", task)
    lm = GmaskLM(*loaded, direction=direction, window=40, stride=16)
    found = compare(lm, folder, tmp_path / "out", tasks=[path], data=str(tmp_path / "text.txt"))
    ours, theirs = found["word-perplexity"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    (perplexity,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", "".join(TEXTS * 6))], disable_tqdm=True)
    expected = gmask.perplexity(*loaded, "".join(TEXTS * 6), window=40, stride=16, direction=direction)
    assert -perplexity == pytest.approx(expected.nats, rel=1e-5)
    arguments = "window=40,stride=16" if direction == "both" else "direction=left,window=40,stride=16"
    assert f"model_args: {arguments}" in (tmp_path / "out/gmask_text.yaml").read_text("utf-8")


def test_written_texts(loaded: Any, folder: str, tmp_path: Path) -> None:
    reviews = make_reviews(8)
    written = gmask.infill(*loaded, [f"{review['text']} It was [gMASK]" for review in reviews], max_tokens=6)
    # What the model writes is the right answer of every other record
    records = [{**review, "label": one.blanks[0].text.strip() if i % 2 else "good"}
               for i, (review, one) in enumerate(zip(reviews, written, strict=True))]  # fmt: skip
    data = write_lines(tmp_path / "reviews.jsonl", records)
    write_json(tmp_path / "suite.yaml", [{"task": {**WRITTEN, "name": "mood"}, "decoding": {"max_tokens": 6}}])
    found = compare(GmaskLM(*loaded, batch_size=3), folder, tmp_path / "out",
                    suite=str(tmp_path / "suite.yaml"), data=data)  # fmt: skip
    assert found["exact-match"] == pytest.approx((50.0, 50.0))
    assert found["squad-f1"][0] == pytest.approx(found["squad-f1"][1]) and found["squad-f1"][0] >= 50


def test_what_follows_a_plain_text(loaded: Any) -> None:
    """Its blank follows the text; a space before the answer stands at either side; special tokens in it are text."""
    lm = GmaskLM(*loaded)
    texts = ["The old man took his dog", "He said <|endoftext|> and [gMASK] [MASK] to", ""]
    pairs = [(text, answer) for text in texts for answer in (" and went", " river")]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    moved = [request("loglikelihood", text + " ", answer.lstrip()) for text, answer in pairs[:4]]
    for one, other in zip(lm.loglikelihood(moved, disable_tqdm=True), found[:4], strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5) and one[1] == other[1]
    scored = gmask.score(*loaded, "The old man took his dog [MASK]", ["and went", "river"])
    assert [logprob for logprob, _ in found[:2]] == pytest.approx([one.logprob for one in scored.answers], abs=1e-5)
    escaped = gmask.score(*loaded, r"He said \<|endoftext|> and \[gMASK] \[MASK] to [MASK]", [" and went"])
    assert found[2][0] == pytest.approx(escaped.answers[0].logprob, abs=1e-5)
    bare = gmask.score(*loaded, "[MASK]", [" and went"])
    assert found[4][0] == pytest.approx(bare.answers[0].logprob, abs=1e-5)
    gmasks = GmaskLM(*loaded, blank="[gMASK]").loglikelihood([request("loglikelihood", *pairs[0])], disable_tqdm=True)
    scored = gmask.score(*loaded, "The old man took his dog [gMASK]", ["and went"])
    assert gmasks[0][0] == pytest.approx(scored.answers[0].logprob, abs=1e-5)


def test_a_chatglm_answers_behind_its_prompt() -> None:
    pair = make_chatglm()
    lm, texts = GmaskLM(*pair), ["The old man", "It was [mask] today:"]
    samples = [Sample(text=f"{escape_blanks(text)} [gMASK]", answers=("took",)) for text in texts]
    found = lm.loglikelihood([request("loglikelihood", text, " took") for text in texts], disable_tqdm=True)
    expected = predict(*pair, "likelihood", samples)
    assert [logprob for logprob, _ in found] == pytest.approx([sum(one.scores) for one in expected], abs=1e-5)
    written = lm.generate_until([request("generate_until", text, {"max_gen_toks": 4}) for text in texts], True)
    assert written == [one.texts[0] for one in predict(*pair, "seq2seq", samples, settings=Sampling(max_tokens=4))]


def test_a_text_is_written_until_a_stop_text(loaded: Any) -> None:
    lm = GmaskLM(*loaded)
    (whole,) = lm.generate_until([request("generate_until", "The old man", {"max_gen_toks": 12, "until": []})], True)
    stop = whole[len(whole) // 2 :][:2]
    asked = [request("generate_until", "The old man", {"max_gen_toks": 12, "until": [stop], "do_sample": False,
                                                       "temperature": 0.0})]  # fmt: skip
    assert lm.generate_until(asked, True) == [whole[: whole.index(stop)]]
    drawn = [request("generate_until", "The old man", {"do_sample": True, "temperature": 2.0})] * 2
    assert len(set(lm.generate_until(drawn, True))) == 2, "repeats of a text differ"
    with pytest.raises(GmaskError, match="'tempratur'; the nearest is 'temperature'"):
        lm.generate_until([request("generate_until", "The", {"tempratur": 1})], True)


def test_lm_eval_keeps_what_was_answered(loaded: Any, folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    data = write_lines(tmp_path / "reviews.jsonl", make_reviews(6))
    export_tasks(str(tmp_path / "out"), tasks=[write_task(tmp_path / "mood.yaml", CHOICE)], data=data)
    cache = str(tmp_path / "cache")
    first = ask(GmaskLM(*loaded), tmp_path / "out", use_cache=cache)
    lm = GmaskLM(*loaded)
    monkeypatch.setattr(lm, "_run", None)  # a model that cannot answer is not asked
    assert ask(lm, tmp_path / "out", use_cache=cache)["acc"] == first["acc"]


@pytest.mark.slow
def test_one_command_of_lm_eval(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "reviews.jsonl", make_reviews(4))
    task, out = write_task(tmp_path / "mood.yaml", CHOICE), tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["gmask", "evaluate", "--tasks", task, "--data", data, "--export-lm-eval", str(out)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and capsys.readouterr().out == "gmask_mood\n"
    command = [sys.executable, "-m", "gmask.evaluation.lm_eval", "--model", "gmask", "--model_args",
               f"pretrained={folder}", "--device", "cpu", "--tasks", "gmask_mood", "--include_path", str(out),
               "--output_path", str(tmp_path / "results.json")]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (path,) = tmp_path.glob("results*.json")
    theirs = json.loads(path.read_text("utf-8"))["results"]["gmask_mood"]["acc,none"]
    (ours,) = run_tasks(folder, tasks=[task], data=data, device="cpu", tables=False).tasks
    assert ours.scores["accuracy"].value == pytest.approx(100 * theirs)


def test_a_task_that_lm_eval_cannot_do_is_one_line(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "reviews.jsonl", make_reviews(4))
    plain = write_task(tmp_path / "plain.yaml", {"kind": "infill", "template": "{text}", "metrics": ["exact-match"]})
    with pytest.raises(GmaskError, match="lm-eval has no tasks of the kind infill"):
        export_tasks(str(tmp_path / "out"), tasks=[plain], data=data)
    mood = write_task(tmp_path / "mood.yaml", CHOICE, metrics=["macro-f1"])
    with pytest.raises(GmaskError, match="lm-eval has none of its metrics: macro-f1"):
        export_tasks(str(tmp_path / "out"), tasks=[mood], data=data)


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.is_dir(), reason="the small sets are not beside this checkout")
@pytest.mark.parametrize("name", ["superglue/copa", "language-model/lambada", "clue/tnews"])
def test_the_small_sets(name: str, tmp_path: Path) -> None:
    files = {
        "superglue/copa": "eval/superglue/COPA/train.jsonl",
        "language-model/lambada": "eval/lambada/lambada_test_1000.jsonl",
        "clue/tnews": "nc/fewclue/tnews/test_public.json",
    }
    run = {"tasks": [name], "data": str(CORPUS / files[name]), "limit": 30}
    found = compare(GmaskLM("bundled", device="cpu"), "bundled", tmp_path / "out", **run)
    assert found["accuracy"][0] == pytest.approx(100 * found["accuracy"][1])
    if "nats" in found:
        assert math.exp(found["nats"][0]) == pytest.approx(found["nats"][1], rel=1e-5)
