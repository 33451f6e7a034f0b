"""Are preferences read right from every form in which they are published, and is what teaches nothing counted?"""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gmask
from gmask.tasks.preferences import AnswerPair, Intake, Question, read_judgements, read_preferences
from tuning_data import write_lines

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not here")


def read(folder: Path, *records: dict[str, Any], **options: Any) -> tuple[list[AnswerPair], Intake]:
    intake = Intake()
    return read_preferences(write_lines(folder / "pairs.jsonl", list(records)), intake, **options), intake


def said(*texts: str) -> list[dict[str, str]]:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


SAME = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": said("q"), "chosen": reply("a"), "rejected": reply("b")},
    {"chosen": said("q", "a"), "rejected": said("q", "b")},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "q", "answers": [{"answer": "b", "score": 0}, {"answer": "a", "score": 1}]},
]


@pytest.mark.parametrize("record", SAME)
def test_the_same_pair_in_every_form(record: dict[str, Any], tmp_path: Path) -> None:
    (pair,), intake = read(tmp_path, record)
    assert (pair.question, pair.chosen, pair.rejected) == (Question("q"), "a", "b")
    assert (intake.read, intake.kept) == (1, 1)


def test_rounds_margins_and_ids_are_kept(tmp_path: Path) -> None:
    pairs, _ = read(
        tmp_path,
        {"prompt": said("q", "a", "r"), "chosen": "c", "rejected": "d", "margin": 2, "kind": "sums"},
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    )
    assert pairs[0].question == Question("r", (("q", "a"),))
    assert (pairs[0].margin, pairs[0].kind) == (2.0, "sums")
    assert (pairs[1].question.ids, pairs[1].chosen, pairs[1].rejected) == ((1, 2), (3, 4), (5,))


scores = st.lists(st.integers(-2, 2), min_size=2, max_size=6)


@given(scores)
def test_a_list_in_any_order_gives_all_pairs_or_neighbours(values: list[int]) -> None:
    from tempfile import TemporaryDirectory

    record = {"prompt": "q", "answers": [{"answer": f"a{i}", "score": s} for i, s in enumerate(values)]}
    score_of = {f"a{i}": s for i, s in enumerate(values)}
    levels = sorted(set(values))
    expected = {(better, worse) for better in score_of for worse in score_of if score_of[better] > score_of[worse]}
    near = {
        (better, worse)
        for better, worse in expected
        if levels.index(score_of[better]) - levels.index(score_of[worse]) == 1
    }
    with TemporaryDirectory() as folder:
        for pairing, wanted in (("all", expected), ("neighbours", near)):
            if not wanted:
                with pytest.raises(gmask.GmaskError, match=r"no pair is left.*tie"):
                    read(Path(folder), record, pairing=pairing)
                continue
            pairs, intake = read(Path(folder), record, pairing=pairing)
            assert sorted((pair.chosen, pair.rejected) for pair in pairs) == sorted(wanted)
            assert all(pair.margin == score_of[str(pair.chosen)] - score_of[str(pair.rejected)] for pair in pairs)
            assert intake.kept == len(pairs)


def test_system_and_prefix_of_a_list_stand_around_its_prompt(tmp_path: Path) -> None:
    answers = [{"answer": "a", "score": 1}, {"answer": "b", "score": 0}]
    (pair,), _ = read(tmp_path, {"system": "s", "prompt": "p", "prefix": "x", "answers": answers})
    assert pair.question == Question("s\np\nx")


def test_what_teaches_nothing_is_counted_with_its_reason_and_place(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    pairs, intake = read(
        tmp_path,
        good,
        {**good, "rejected": "a"},
        {**good, "rejected": " "},
        {**good, "margin": -1},
        {"prompt": "q", "answers": [{"answer": "a", "score": 1}]},
        {"prompt": "q", "answers": [{"answer": "a", "score": 1}, {"answer": "b", "score": 1}]},
    )
    assert len(pairs) == 1
    assert intake.dropped == {
        "the answers are equal": 1,
        "an answer is empty": 1,
        "the margin is negative": 1,
        "a list of one answer has no pair": 1,
        "a tie: the scores are equal": 1,
    }
    lines = intake.lines("pairs")
    assert (lines[0], lines[-1]) == ("6  pairs read", "1  pairs used")
    assert "1  dropped: the answers are equal (first in" in lines[1]
    assert intake.first["the answers are equal"].endswith("line 2")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "it needs chosen and rejected"),
        ({"prompt": "q", "answers": ["a", "b"]}, "objects with answer and score"),
        ({"prompt": "q", "answers": [{"answer": "a", "score": "1"}]}, "where a number is expected"),
        ({"prompt": "q", "answers": [{"answer": "a"}]}, "there is no score"),
        ({"prompt": "q", "answers": [{"answer": "a", "score": float("nan")}]}, "holds NaN, which JSON cannot say"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("inf")}, "holds an infinite number"),
        ({"prompt": said("q", "a"), "chosen": "a", "rejected": "b"}, "ends with a message of the user"),
        ({"chosen": said("q", "a"), "rejected": said("r", "b")}, "differ before their last"),
        ({"chosen": "a", "rejected": "b"}, "no transcripts"),
        ({"prompt": [1, 2], "chosen": "a", "rejected": "b"}, "column prompt_ids"),
        ({"prompt_ids": [1], "chosen_ids": "ab", "rejected_ids": [2]}, "not a list of token ids"),
        ({"prompt": "q", "chosen": said("a", "b"), "rejected": "b"}, "one message of the assistant"),
    ],
)
def test_a_record_of_no_form_is_named_with_its_line(record: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(gmask.GmaskError, match=rf"line 1.*{reason}"):
        read(tmp_path, record)


def test_answers_with_labels(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "kto.jsonl",
        [
            {"prompt": "q", "completion": "a", "label": True},
            {"messages": said("q", "b"), "label": False},
            {"prompt_ids": [1], "completion_ids": [2], "label": 1},
            {"prompt": "q", "chosen": "c", "rejected": "d"},
            {"prompt": "q", "completion": " ", "label": True},
        ],
    )
    intake = Intake()
    found = [(one.answer, one.is_good) for one in read_judgements(path, intake)]
    assert found == [("a", True), ("b", False), ((2,), True), ("c", True), ("d", False)]
    assert intake.dropped == {"the answer is empty": 1}


def test_a_label_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "kto.jsonl", [{"prompt": "q", "completion": "a", "label": "good"}])
    with pytest.raises(gmask.GmaskError, match="write true for a good answer"):
        read_judgements(path, Intake())


@needs_corpus
def test_the_corpus_is_read_whole() -> None:
    for name, pairs in (
        ("preference/synthetic_pairs.val.jsonl", 222),
        ("preference/hh_rlhf_harmless_test_filtered.jsonl", 500),
        ("nc/llamafactory/dpo_en_demo_200.json", 200),
        ("nc/llamafactory/dpo_zh_demo_200.json", 200),
    ):
        intake = Intake()
        found = read_preferences(CORPUS / name, intake)
        assert intake.read == pairs, name
        assert len(found) >= 0.97 * pairs, (name, intake.dropped)
    intake = Intake()
    assert len(read_judgements(CORPUS / "nc/llamafactory/kto_en_demo_200.json", intake)) >= 195
