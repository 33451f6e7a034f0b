"""Do the tasks of an evaluation ask what their papers ask, of the files as they are published?"""

import json
from pathlib import Path
from typing import Any

import pytest

from gmask.errors import GmaskError
from gmask.files import write_json, write_text
from gmask.tasks.detokenize import detokenize_gigaword, detokenize_wikitext
from gmask.tasks.formats import exam_categories
from gmask.tasks.records import Record, Sample, read_records
from gmask.tasks.task import load_task, read_task

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"

COPA = {"premise": "It fell.", "choice1": "It broke.", "choice2": "It flew.", "question": "effect", "label": 1}


def make_samples(task: str, *rows: dict[str, Any], path: str = "a.jsonl", **options: Any) -> list[Sample]:
    return load_task(task).samples([Record(row, Path(path), line) for line, row in enumerate(rows, 1)], **options)


@pytest.mark.parametrize(
    ("text", "before", "word"),
    [
        (
            "He had the sun on the sun",
            "He had the sun on the [MASK]",
            "sun",
        ),  # the last place of the word, not the first
        ("a.\n\n“Yes,” said Ann ", "a.\n\n“Yes,” said [MASK]", "Ann"),  # white space at the end is no word
        ("It is\nso", "It is [MASK]", "so"),
        (" one", " [MASK]", "one"),
        ("a [MASK] b", r"a \[MASK] [MASK]", "b"),
    ],
)
def test_lambada_asks_for_what_follows_the_last_white_space(text: str, before: str, word: str) -> None:
    for name, direction in (("lambada", "both"), ("lambada-left", "left")):
        task = load_task(f"language-model/{name}")
        (sample,) = make_samples(f"language-model/{name}", {"text": text})
        assert (sample.text, sample.answers, task.direction, task.kind) == (before, (word,), direction, "likelihood")


WIKI = (
    " \n = Robert Boulter = \n \n He 's an actor ( and , so on ) . The fans ' guest @-@ starring role ; "
    '1 @,@ 000 @.@ 5 " Craig " : Teddy \' s ! \n = = = Film = = = \n 20 ° C ? N N '
)


def test_wikitext_is_detokenized_as_published_and_its_words_counted_before_that() -> None:
    expected = (
        "\n= Robert Boulter =\n\nHe's an actor (and, so on). The fans' guest-starring role; 1,000.5 "
        '"Craig": Teddy \' s!\n=== Film ===\n20°C? 1 N '
    )
    assert detokenize_wikitext(WIKI) == expected
    for name, direction in (("wikitext2", "both"), ("wikitext103-left", "left")):
        task = load_task(f"language-model/{name}")
        (sample,) = make_samples(f"language-model/{name}", {"text": WIKI})
        assert (sample.answers, sample.words) == ((expected,), len(WIKI.strip().split(" ")))
        settings = task.likelihood
        assert (settings.direction, settings.window, settings.stride, settings.blank) == (direction, 511, 256, "[MASK]")


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the published samples are not beside this checkout")
def test_wikitext_is_detokenized_as_the_evaluation_harness_does_it() -> None:
    other = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    text = (CORPUS / "eval/wikitext2/valid.txt").read_text("utf-8")
    assert detokenize_wikitext(text) == other.wikitext_detokenizer({"page": text})


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name in ("a.txt", "wiki.test.tokens"):
        write_text(tmp_path / name, " one two \n\nthree ")
        (record,) = read_records(tmp_path / name)
        assert record.values == {"text": " one two \n\nthree "}
    (sample,) = load_task("language-model/text").samples([record])
    assert (sample.answers, sample.words) == ((" one two \n\nthree ",), 3), "single spaces separate, as published"


def test_published_multiple_choice_is_asked_without_outer_spaces() -> None:
    row = {"inputs_pretokenized": "Ice is ", "choices_pretokenized": [" hot", " cold"], "label": 1}
    (sample,) = make_samples("multiple-choice/text", row)
    assert (sample.text, sample.answers, sample.label) == ("Ice is [MASK]", ("hot", "cold"), 1)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("cnndm", {"article": "a -lrb- b", "highlights": "c"}),
        ("xsum", {"document": "a -lrb- b", "summary": "c"}),
        ("cnndm", {"source": "a -lrb- b", "target": "c"}),
    ],
)
def test_summaries_have_the_published_prompt_and_either_columns(task: str, row: dict[str, str]) -> None:
    (sample,) = make_samples(f"seq2seq/{task}", row)
    assert (sample.text, sample.answers) == ("[sMASK] Content: a -lrb- b", ("c",))
    del row[list(row)[-1]]
    (sample,) = make_samples(f"seq2seq/{task}", row, require_answers=False)
    assert sample.answers == ()


def test_gigaword_has_signs_in_place_of_their_names() -> None:
    assert detokenize_gigaword("-lrb- a &amp; b -rrb- <unk> UNK &lt;") == "( a & b ) [UNK] [UNK] <"
    (sample,) = make_samples("seq2seq/gigaword", {"document": "a &amp; b", "summary": "-lsb- c -rsb-"})
    assert (sample.text, sample.answers) == ("[sMASK] Content: a & b", ("[ c ]",))


def test_masked_texts_are_read_with_their_whole_texts(tmp_path: Path) -> None:
    (tmp_path / "blank").mkdir()
    write_text(tmp_path / "test.txt", "a b c d e\nthe dog _UNK ran\n")
    write_text(tmp_path / "blank" / "test.maskratio0.5.blank", "a <blank> d <blank>\n<blank> _UNK ran\n")
    records = read_records(tmp_path / "blank" / "*.blank")
    first, second = load_task("infill/yahoo").samples(records)
    assert (first.text, first.answers) == ("a [MASK] d [MASK]", ("b c", "e"))
    assert (second.text, second.answers) == ("[MASK] [UNK] ran", ("the dog",))
    with pytest.raises(GmaskError, match="line 1: the whole text is not the text with its blanks filled"):
        make_samples("infill/yahoo", {"source": "a <blank> x", "target": "a b c"})
    write_text(tmp_path / "other.blank", "a\n")
    with pytest.raises(GmaskError, match=r"other\.txt, are neither beside it nor in the folder above"):
        read_records(tmp_path / "other.blank")


def test_sentences_of_cmrc_2019_are_asked_blank_by_blank() -> None:
    row = {"context_id": "P", "context": "甲[BLANK1]，乙[BLANK2]。", "choices": ["一", "二", "三"], "answers": [2, 0]}
    first, second = make_samples("clue/cmrc2019", row)
    assert (first.text, first.answers, first.label, first.group) == ("甲[sMASK]，乙……。", ("一", "二", "三"), 2, "P")
    assert (second.text, second.label) == ("甲……，乙[sMASK]。", 0)


def test_c3_is_read_from_its_arrays_and_from_the_hub(tmp_path: Path) -> None:
    question = {"question": "谁来了？", "choice": ["2", "1", "3"], "answer": "1"}
    write_json(tmp_path / "d-dev.json", [[["男：我来了。", "女：好。"], [question], "1-1"]])
    hub = {"context": ["男：我来了。", "女：好。"], "id": 0, **question}
    samples = [*load_task("clue/c3").samples(read_records(tmp_path / "d-dev.json")), *make_samples("clue/c3", hub)]
    for sample in samples:
        assert sample.text == "男：我来了。\n女：好。\n问：谁来了？ 答：[MASK]"
        assert (sample.answers, sample.label) == (("2", "1", "3"), 1), "an answer that looks like an index is a text"


def test_idioms_are_read_with_the_answers_beside_them(tmp_path: Path) -> None:
    row = {"content": ["甲#idiom000001#乙#idiom000002#。", "#idiom000003#丙"], "candidates": ["一", "二", "三"]}
    write_text(tmp_path / "dev.json", json.dumps(row, ensure_ascii=False) + "\n")
    answers = {"#idiom000001#": 1, "#idiom000002#": 0, "#idiom000003#": 2}
    write_json(tmp_path / "dev_answer.json", answers)
    expected = [("甲[MASK]乙……。", 1), ("甲……乙[MASK]。", 0), ("[MASK]丙", 2)]
    samples = load_task("clue/chid-clue").samples(read_records(tmp_path / "dev.json"))
    assert [(sample.text, sample.label) for sample in samples] == expected
    hub = make_samples("clue/chid-clue", {**row, "answers": {"text": ["二", "一", "三"], "candidate_id": [1, 0, 2]}})
    assert [(sample.text, sample.label) for sample in hub] == expected
    unanswered = make_samples("clue/chid-clue", row, require_answers=False)
    assert [sample.label for sample in unanswered] == [None] * 3


def test_exams_name_the_subject_by_a_column_or_by_the_file() -> None:
    row = {"question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B", "explanation": ""}
    (sample,) = make_samples("exams/ceval", row, path="val/accountant_val.csv")
    assert sample.text == "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\n答案：[MASK]"
    assert (sample.answers, sample.label, sample.group) == (("A", "B", "C", "D"), 1, "Other/accountant")
    hub = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "abstract_algebra"}
    (sample,) = make_samples("exams/mmlu", hub)
    assert (sample.text.splitlines()[-1], sample.label, sample.group) == ("Answer: [MASK]", 1, "STEM/abstract_algebra")
    (sample,) = make_samples("exams/ceval", {**row, "answer": ""}, path="x_test.csv", require_answers=False)
    assert (sample.label, sample.group) == (None, "Other/x")


def test_every_subject_of_both_exams_has_a_category() -> None:
    categories = exam_categories()
    assert set(categories.values()) == {"STEM", "Humanities", "Social Science", "Other"}
    both = {"college_physics", "college_chemistry", "high_school_geography"} | {
        f"high_school_{name}" for name in ("mathematics", "physics", "chemistry", "biology")
    }
    assert len(categories) == 52 + 57 - len(both)


def test_a_scored_answer_needs_its_blank_and_target() -> None:
    base = {"kind": "likelihood", "template": "{a} [MASK]", "target": "{b}"}
    for change, message in [
        ({"target": None}, "needs target"),
        ({"template": "{a} [MASK] [MASK]"}, "about one blank, and the template has 2"),
        ({"direction": "right"}, "direction is 'right'"),
        ({"metrics": ["rouge-l"]}, "rouge-l does not fit the kind likelihood: the right answer was scored"),
        ({"metrics": ["word-perplexity"]}, "word-perplexity does not fit the kind likelihood"),
        (
            {"kind": "seq2seq", "metrics": ["nats"]},
            "nats does not fit the kind seq2seq: the tokens of",
        ),
        ({"kind": "seq2seq", "metrics": ["infill-bleu"]}, "infill-bleu does not fit the kind seq2seq"),
    ]:
        with pytest.raises(GmaskError, match=message):
            read_task(base | change)


def test_a_task_that_chooses_can_be_one_that_writes() -> None:
    exam = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "abstract_algebra"}
    idiom = {"content": "甲#idiom#", "candidates": ["一", "二"], "answer": 1}
    for used, row, answer, group in [
        ("exams/mmlu", exam, "B", "STEM/abstract_algebra"),
        ("clue/chid", idiom, "二", None),
        ("superglue/copa", COPA, "it flew", None),
    ]:
        task = read_task({"use": used, "kind": "seq2seq", "metrics": ["prefix-match"]})
        (sample,) = task.samples([Record(row, Path("a.jsonl"), 1)])
        assert (sample.answers, sample.label, sample.group) == ((answer,), None, group)
        (chosen,) = make_samples(used, row)
        assert sample.text == chosen.text
        row = {name: value for name, value in row.items() if name not in ("label", "answer")}
        (sample,) = task.samples([Record(row, Path("a.jsonl"), 1)], require_answers=False)
        assert sample.answers == ()
