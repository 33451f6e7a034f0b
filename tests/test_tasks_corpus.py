"""The shipped tasks read the published samples of their datasets whole."""

from pathlib import Path

import pytest

from gmask.errors import GmaskError
from gmask.tasks.records import read_records
from gmask.tasks.task import load_task

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the published samples are not beside this checkout")


@pytest.mark.parametrize(
    ("task", "place", "samples"),
    [
        ("superglue/boolq", "eval/superglue/BoolQ/train.jsonl", 32),
        ("superglue/copa", "eval/superglue/COPA/train.jsonl", 32),
        ("superglue/wsc", "eval/superglue/WSC/train.jsonl", 32),
        ("superglue/cb", "nc/superglue/CB/train.jsonl", 32),
        ("superglue/rte", "nc/superglue/RTE/train.jsonl", 32),
        ("superglue/wic", "nc/superglue/WiC/train.jsonl", 32),
        ("superglue/multirc", "nc/superglue/MultiRC/train.jsonl", None),
        ("superglue/record", "nc/superglue/ReCoRD/train.jsonl", None),
        ("clue/bustm", "nc/fewclue/bustm/*.json", None),
        ("clue/chid", "nc/fewclue/chid/*.json", None),
        ("clue/cluewsc", "nc/fewclue/cluewsc/t*.json", None),
        ("clue/csl", "nc/fewclue/csl/*.json", None),
        ("clue/csldcp", "nc/fewclue/csldcp/*.json", None),
        ("clue/eprstmt", "nc/fewclue/eprstmt/*.json", None),
        ("clue/iflytek", "nc/fewclue/iflytek/*.json", None),
        ("clue/ocnli", "nc/fewclue/ocnli/*.json", None),
        ("clue/ocnli", "nc/ocnli/dev_300.json", None),
        ("clue/tnews", "nc/fewclue/tnews/t*.json", None),
        ("clue/cmrc", "eval/cmrc2018/cmrc2018_dev_150.json", None),
        ("seq2seq/adgen", "nc/adgen/dev_400.json", 400),
        ("chat/adgen", "nc/adgen/train_like_600.json", 600),
        ("chat/alpaca", "nc/llamafactory/alpaca_zh_demo_200.json", 200),
        ("chat/messages", "sft/multiturn.train.jsonl", None),
        ("seq2seq/alpaca", "sft/translation.train.jsonl", 7840),
    ],
)
def test_published_files_are_read_whole(task: str, place: str, samples: int | None) -> None:
    records = read_records(CORPUS / place)
    found = load_task(task).samples(records)
    assert len(found) == samples if samples else len(found) >= 0.95 * len(records)
    assert all(sample.answers for sample in found)
    assert all(sample.label is not None for sample in found) or load_task(task).label is None


@pytest.mark.parametrize(
    ("task", "place"),
    [
        ("superglue/copa", "eval/superglue/COPA/unlabeled_sample.jsonl"),
        ("superglue/wsc", "eval/superglue/WSC/unlabeled_sample.jsonl"),
        ("superglue/wic", "nc/superglue/WiC/unlabeled_sample.jsonl"),
        ("superglue/multirc", "nc/superglue/MultiRC/unlabeled_sample.jsonl"),
    ],
)
def test_published_lines_without_labels_are_questions(task: str, place: str) -> None:
    samples = load_task(task).samples(read_records(CORPUS / place), require_answers=False)
    assert samples
    assert all(sample.label is None for sample in samples)


def test_the_empty_questions_of_a_published_file_can_be_left_out() -> None:
    records = read_records(CORPUS / "eval/cmrc2018/cmrc2018_trial.json")
    told: list[GmaskError] = []
    samples = load_task("clue/cmrc").samples(records, on_bad=told.append)
    assert [str(error).rpartition(", ")[2] for error in told] == [
        f"line {line}: column 'question' is empty" for line in (9690, 10556)
    ]
    questions = [
        question for record in records for paragraph in record.values["paragraphs"] for question in paragraph["qas"]
    ]
    assert len(samples) == len(questions) - 2


def test_every_entity_that_answers_a_published_query_is_a_candidate() -> None:
    for sample in load_task("superglue/record").samples(read_records(CORPUS / "nc/superglue/ReCoRD/train.jsonl")):
        assert set(sample.references) <= set(sample.answers)
        assert sample.label is not None
        assert sample.answers[sample.label] in sample.references
