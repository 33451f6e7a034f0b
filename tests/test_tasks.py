"""A task is one YAML: it asks of published records what its paper asks, and a mistake is one line with its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gmask.errors import GmaskError
from gmask.tasks.records import Record, Sample
from gmask.tasks.task import Task, load_task, read_task, task_names

DOCS = Path(__file__).parents[1] / "docs" / "how-to" / "tasks.md"
SUPERGLUE = {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"}

RTE = {"premise": "It rained.", "hypothesis": "It was wet.", "label": "entailment"}
WSC = {
    "text": "Mark told Pete lies, which Pete believed. He, poor man, should have known.",
    "target": {"span1_text": "Pete", "span1_index": 2, "span2_text": "He", "span2_index": 6},
    "label": True,
}
COPA = {"premise": "It fell.", "choice1": "It broke.", "choice2": "It flew.", "question": "effect", "label": 0}
MULTIRC = {
    "idx": 3,
    "passage": {
        "text": "Ann ate.",
        "questions": [
            {"question": "Who ate?", "idx": 7, "answers": [{"text": "Ann.", "label": 1}, {"text": "Bob", "label": 0}]},
            {"question": "Why?", "idx": 8, "answers": [{"text": "?", "label": 0}]},
        ],
    },
}
READING = "Ann met Bob.\n@highlight\nBob and Ann left"
RECORD = {
    "idx": 5,
    "passage": {
        "text": READING,
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}],
    },
    "qas": [
        {"query": "It was @placeholder who left.", "idx": 1, "answers": [{"text": "Bob", "start": 8, "end": 10}]},
        {"query": "@placeholder left.", "idx": 2, "answers": [{"text": "Bob"}, {"text": "Ann"}, {"text": "Bob"}]},
    ],
}
ARTICLE = {
    "paragraphs": [
        {
            "context": "北京是首都。",
            "qas": [
                {"question": "首都是哪里？", "answers": [{"text": "北京"}, {"text": "北京"}, {"text": "北京市"}]},
                {"question": "无解？", "answers": [], "is_impossible": True},
            ],
        }
    ]
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "One"},
    {"role": "user", "content": [{"type": "text", "text": "and one?"}]},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Thanks"},
]


def make_samples(task: Task | str, *rows: dict[str, Any], **options: Any) -> list[Sample]:
    task = load_task(task) if isinstance(task, str) else task
    return task.samples([Record(row, Path("a.jsonl"), line) for line, row in enumerate(rows, 1)], **options)


@pytest.mark.parametrize(
    ("task", "row", "text", "answers", "label"),
    [
        (
            "superglue/boolq",
            {"passage": "Ice is cold.", "question": "is ice cold", "label": True},
            "Ice is cold. Question: is ice cold? Answer: [MASK].",
            ("No", "Yes"),
            1,
        ),
        ("superglue/rte", RTE, '"It was wet"? [MASK], "It rained."', ("Yes", "No"), 0),
        (
            "superglue/cb",
            {**RTE, "label": "neutral"},
            '"It was wet"? [MASK], "It rained."',
            ("Yes", "No", "Maybe"),
            2,
        ),
        (
            "superglue/copa",
            COPA,
            '"it broke" or "it flew"? It fell, so [MASK].',
            ("it broke", "it flew"),
            0,
        ),
        (
            "superglue/wic",
            {"word": "bank", "sentence1": "A bank.", "sentence2": "The banks.", "label": False},
            '"A bank." / "The banks." Similar sense of "bank"? [MASK].',
            ("No", "Yes"),
            0,
        ),
        (
            "superglue/wsc",
            WSC,
            "Mark told Pete lies, which Pete believed. *He*, poor man, should have known. "
            "In the passage above, does the pronoun '*He*' refer to Pete? [MASK].",
            ("No", "Yes"),
            1,
        ),
        (
            "clue/afqmc",
            {"sentence1": "怎么还款", "sentence2": "如何还钱", "label": "1"},
            "“怎么还款”和“如何还钱”的意思[MASK]。",
            ("不同", "相同"),
            1,
        ),
        (
            "clue/cluewsc",
            {
                "text": "小明对他说，他错了。",
                "target": {"span1_text": "小明", "span2_text": "他", "span2_index": 5},
                "label": "false",
            },
            "小明对他说，【他】错了。 其中的“他”[MASK]指“小明”。",
            ("不是", "就是"),
            0,
        ),
        (
            "clue/chid",
            {"content": "他#idiom#。", "candidates": ["一心一意", "三心二意"], "answer": 1},
            "他[MASK]。",
            ("一心一意", "三心二意"),
            1,
        ),
        (
            "clue/csl",
            {"abst": "摘要。", "keyword": ["甲", "乙"], "label": "0"},
            "关键词：甲、乙。这些词[MASK]下文的关键词：摘要。",
            ("不是", "都是"),
            0,
        ),
    ],
)
def test_a_published_line_becomes_its_question(
    task: str, row: dict[str, Any], text: str, answers: tuple[str, ...], label: int
) -> None:
    (sample,) = make_samples(task, row)
    assert (sample.text, sample.answers, sample.label) == (text, answers, label)
    assert (sample.path, sample.line) == (Path("a.jsonl"), 1)


def test_multirc_asks_about_each_answer_and_groups_them_by_question() -> None:
    samples = make_samples("superglue/multirc", MULTIRC)
    assert [(sample.group, sample.label) for sample in samples] == [("3-7", 1), ("3-7", 0), ("3-8", 0)]
    assert samples[0].text == "Ann ate. Question: Who ate? Is it Ann? [MASK]."
    assert samples[2].text == "Ann ate. Question: Why? Is it ? [MASK]."


def test_record_asks_once_a_query_among_the_different_entities() -> None:
    first, second = make_samples("superglue/record", RECORD)
    assert first.text == "Ann met Bob.\n- Bob and Ann left It was [MASK] who left."
    assert (first.answers, first.label, first.references) == (("Ann", "Bob"), 1, ("Bob",))
    assert second.text == "Ann met Bob.\n- Bob and Ann left  [MASK] left."
    assert (second.label, second.references, second.group) == (1, ("Bob", "Ann"), "5-2")


def test_cmrc_asks_each_question_that_has_an_answer() -> None:
    (sample,) = make_samples("clue/cmrc", ARTICLE)
    assert sample.text == "问题：首都是哪里？ 答案：[MASK] 北京是首都。"
    assert (sample.answers, sample.references) == (("北京",), ("北京", "北京市"))


def test_the_referent_of_wsc_is_learnt_from_true_lines_only() -> None:
    (sample,) = make_samples("superglue/wsc-referent", {**WSC, "label": False}, WSC)
    assert (sample.answers, sample.line) == (("Pete",), 2)


@pytest.mark.parametrize(("index", "marked"), [(0, "*it* and it"), (1, "*it* and it"), (3, "it and *it*")])
def test_wsc_marks_the_pronoun_nearest_to_its_index(index: int, marked: str) -> None:
    row = {"text": "it and it", "target": {"span1_text": "x", "span2_text": "it", "span2_index": index}, "label": 1}
    task = read_task({"use": "superglue/wsc", "choices": ["No", "Yes"], "template": "{marked} [MASK]"})
    assert make_samples(task, row)[0].text == f"{marked} [MASK]"


def test_a_conversation_is_one_sample_a_reply() -> None:
    first, second = make_samples("chat/messages", {"messages": MESSAGES})
    assert (first.text, first.answers, first.history) == ("Be brief.\nHi ", ("Hello.",), ())
    assert (second.text, second.answers) == ("One\nand one?", ("Two.",))
    assert second.history == (("Be brief.\nHi ", "Hello."),)


def test_a_conversation_may_end_with_a_question() -> None:
    last = make_samples("chat/messages", {"messages": MESSAGES}, require_answers=False)[-1]
    assert (last.text, last.answers, len(last.history)) == ("Thanks", (), 2)


def test_the_forms_of_a_chat_agree() -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "Add.\n1+1"}, {"from": "gpt", "value": "2"}]}
    rows = {
        "chat/published": {"prompt": "Add.\n1+1", "response": "2", "history": []},
        "chat/alpaca": {"instruction": "Add.", "input": "1+1", "output": "2"},
        "chat/sharegpt": sharegpt,
    }
    samples = {name: make_samples(name, row)[0] for name, row in rows.items()}
    assert len({(sample.text, sample.answers, sample.history) for sample in samples.values()}) == 1
    assert make_samples("chat/alpaca", {"instruction": "Hi", "input": "", "output": "Yo"})[0].text == "Hi"


def test_columns_of_trl_are_read_as_prompts_with_one_reply_to_learn() -> None:
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    last = make_samples("chat/published", {"prompt": "c", "response": "d", "history": [["a", "b"]]})
    assert make_samples("chat/trl", {"prompt": messages[:3], "completion": messages[3:]}) == last
    assert make_samples("chat/trl", {"prompt": messages[:3], "completion": "d"}) == last
    both = make_samples("chat/trl", {"messages": messages})
    assert [(one.text, one.answers) for one in both] == [("a", ("b",)), ("c", ("d",))]
    (plain,) = make_samples("chat/trl", {"prompt": "a", "completion": "b"})
    assert (plain.text, plain.answers, plain.history) == ("a", ("b",), ())
    with pytest.raises(GmaskError, match="several replies"):
        make_samples("chat/trl", {"prompt": "a", "completion": [*messages[1:], *messages[2:]]})


def test_a_published_history_goes_before_the_prompt() -> None:
    (sample,) = make_samples("chat/published", {"prompt": "c", "response": "d", "history": [["a", "b"]]})
    assert (sample.history, sample.text) == ((("a", "b"),), "c")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert make_samples("chat/published", {"prompt": "c", "response": "d", "history": messages}) == [sample]


def test_a_greeting_is_context_and_no_reply_to_learn() -> None:
    greeted = [{"role": "assistant", "content": "Welcome."}, *MESSAGES]
    samples = make_samples("chat/messages", {"messages": greeted})
    assert [sample.answers for sample in samples] == [("Hello.",), ("Two.",)]
    assert samples[0].history == (("", "Welcome."),)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "It is [MASK=sunny] in [sMASK=May, or June]."},
        {"text": "It is [MASK] in [sMASK].", "answers": ["sunny", "May, or June"]},
    ],
)
def test_blanks_are_marked_with_their_answers_or_stand_beside_them(row: dict[str, Any]) -> None:
    (sample,) = make_samples("infill/text", row)
    assert (sample.text, sample.answers) == ("It is [MASK] in [sMASK].", ("sunny", "May, or June"))


def test_a_document_is_its_own_answer() -> None:
    (sample,) = make_samples("language-model/text", {"text": "Once [MASK] upon"})
    assert (sample.text, sample.answers) == ("", ("Once [MASK] upon",))


def test_a_blank_in_the_data_is_no_blank_of_the_question() -> None:
    (sample,) = make_samples("seq2seq/plain", {"source": "What is [MASK]?", "target": "[MASK] is a token."})
    assert (sample.text, sample.answers) == ("What is \\[MASK]? [gMASK]", ("[MASK] is a token.",))


@pytest.mark.parametrize("name", task_names())
def test_every_shipped_task_is_complete(name: str) -> None:
    task = load_task(name)
    assert (task.name, bool(task.source)) == (name, True)
    row = f"| `{name}` | {task.kind} | {', '.join(task.metrics) or 'loss'} | {task.source} |"
    assert row in DOCS.read_text(encoding="utf-8")


def test_all_of_superglue_is_there() -> None:
    assert {name.removeprefix("superglue/") for name in task_names() if name.startswith("superglue/")} >= SUPERGLUE


@pytest.mark.parametrize("name", [name for name in task_names() if load_task(name).plain_template])
def test_a_cloze_task_is_also_a_classification(name: str) -> None:
    task = read_task({"use": name, "kind": "classification"})
    assert "MASK" not in str(task.plain_template)
    assert (task.name, task.metrics, task.choices) == (name, load_task(name).metrics, load_task(name).choices)


def test_a_classification_has_the_labels_of_the_cloze() -> None:
    (sample,) = make_samples(read_task({"use": "superglue/rte", "kind": "classification"}), RTE)
    assert (sample.text, sample.answers, sample.label) == ("It rained.\nIt was wet.", (), 0)


def test_a_blank_in_the_text_of_a_classification_is_plain_text() -> None:
    task = read_task({"use": "superglue/rte", "kind": "classification"})
    (sample,) = make_samples(task, {**RTE, "premise": "What is [MASK], or \\\\[mask]?"})
    assert sample.text == "What is \\[MASK], or \\\\\\\\\\[mask]?\nIt was wet."


@pytest.mark.parametrize("label", [108, "108", 108.0, "108.0", " 108 ", "教育", "教育 "])
def test_a_label_is_the_name_of_a_choice_or_its_text(label: object) -> None:
    assert make_samples("clue/tnews", {"sentence": "x", "label": label})[0].label == 7


def test_a_label_that_is_written_as_a_choice_is_that_one() -> None:
    task = read_task({"use": "superglue/rte", "choices": {"1": "no", "1.0": "yes"}})
    assert [make_samples(task, {**RTE, "label": label})[0].label for label in ("1", "1.0", "1.00")] == [0, 1, 0]


@pytest.mark.parametrize("row", [{"label": None}, {"label": ""}, {"label": " "}, {"label": -1}, {"label": "-1.0"}, {}])
def test_a_line_without_a_label_is_a_question_if_that_is_wanted(row: dict[str, Any]) -> None:
    row = {"premise": "a", "hypothesis": "b", **row}
    assert make_samples("superglue/rte", row, require_answers=False)[0].label is None
    with pytest.raises(GmaskError, match=r"a\.jsonl, line 1: "):
        make_samples("superglue/rte", row)


def test_a_line_without_a_target_is_a_question_if_that_is_wanted() -> None:
    assert make_samples("seq2seq/plain", {"source": "a", "target": ""}, require_answers=False)[0].answers == ()
    assert make_samples("infill/text", {"text": "a [MASK]"}, require_answers=False)[0].answers == ()


def test_a_task_in_a_file_builds_on_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"use": "superglue/rte", "choices": {"entailment": "true", "not_entailment": "no"}}))
    (sample,) = make_samples(load_task(path), RTE)
    assert load_task(path).name == "mine"
    assert sample.answers == ("true", "no")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("superglue/rte", {"premis": "a", "hypothesis": "b", "label": "entailment"}, "the nearest is 'premis'"),
        ("superglue/rte", {**RTE, "premise": ""}, "column 'premise' is empty"),
        ("superglue/rte", {**RTE, "label": "maybe"}, "'maybe' is none of the choices: entailment, not_entailment"),
        ("superglue/multirc", RTE, "not of the format 'multirc': there is no 'passage'; the columns are premise"),
        ("superglue/wsc", {**WSC, "text": "Nobody spoke."}, "the pronoun 'He' is not in the text"),
        ("superglue/record", {**RECORD, "qas": 3}, "not of the format 'record'"),
        ("clue/chid", {"content": "他。", "candidates": ["一心一意"], "answer": 0}, "the content has no #idiom#"),
        ("clue/chid", {"content": "#idiom#", "candidates": ["a", ""], "answer": 0}, "'candidates' holds an empty text"),
        ("clue/chid", {"content": "#idiom#", "candidates": ["a"], "answer": 1}, "'1' is none of the choices: 0"),
        ("clue/chid", {"content": "#idiom#", "candidates": ["a", "b", "a"], "answer": 1}, "are the same text, 'a'"),
        ("superglue/copa", {**COPA, "choice2": "it broke"}, "two candidates are the same text, 'it broke'"),
        ("seq2seq/plain", {"source": "a", "target": " "}, "column 'target' is empty"),
        ("infill/text", {"text": "a [MASK]", "answers": ["b", "c"]}, "1 blanks, and there are 2 answers"),
        ("infill/text", {"text": "a [MASK=b] [MASK]"}, "2 blanks, and there are 1 answers"),
        ("infill/text", {"text": "a"}, "0 blanks, and there are 0 answers"),
        ("chat/messages", {"messages": [{"role": "robot", "content": "a"}]}, "message 1: the role 'robot' is none of"),
        ("chat/messages", {"messages": MESSAGES[:2]}, "no reply of the assistant"),
        ("chat/messages", {"messages": MESSAGES[2:3]}, "no reply of the assistant to the user"),
        (
            "chat/messages",
            {"messages": [*MESSAGES[:2], {"role": "assistant", "content": " "}]},
            "reply 1 of the assistant is empty",
        ),
        ("chat/messages", {"messages": [{"role": "user", "content": None}]}, "message 1: the content is None"),
        ("chat/published", {"prompt": "a", "response": "b", "history": [["a"]]}, "column 'history', message 1: a list"),
        ("chat/published", {"prompt": "a", "response": "b", "history": [["a"]]}, "is not a pair of texts"),
        ("chat/published", {"prompt": "a", "response": "b", "history": [["a", None]]}, "the answer is None"),
    ],
)
def test_a_bad_record_is_one_line_with_its_place(task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        make_samples(task, row)
    assert str(caught.value).startswith("a.jsonl, line 1: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_bad_question_does_not_cost_its_neighbours() -> None:
    told: list[GmaskError] = []
    passage = {"text": "Ann ate.", "questions": [{**MULTIRC["passage"]["questions"][0], "question": ""}]}
    passage["questions"] += MULTIRC["passage"]["questions"]
    samples = make_samples("superglue/multirc", {"idx": 1, "passage": passage}, on_bad=told.append)
    assert (len(samples), len(told)) == (3, 2)


def test_bad_records_can_be_told_and_left_out() -> None:
    told: list[GmaskError] = []
    samples = make_samples("superglue/rte", {**RTE, "label": "?"}, RTE, on_bad=told.append)
    assert [sample.line for sample in samples] == [2]
    assert [str(error).split(":")[0] for error in told] == ["a.jsonl, line 1"]
    with pytest.raises(GmaskError, match="no record gives a sample"):
        make_samples("superglue/rte", {}, on_bad=told.append)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"use": "superglue/rt"}, "the nearest of gmask's is superglue/rte"),
        ({"use": "superglue/rte", "templat": "x"}, "no key 'templat'; the nearest is 'template'"),
        ({"use": "superglue/rte", "kind": "clozes"}, "kind is 'clozes': choose cloze, "),
        ({"use": "superglue/rte", "metrics": ["accurracy"]}, "the nearest is 'accuracy'"),
        ({"use": "superglue/rte", "best": "f1"}, "best is f1: choose loss or one of the metrics"),
        ({"use": "superglue/rte", "language": "fr"}, "language is 'fr': choose en or zh"),
        ({"use": "superglue/rte", "reader": "glue"}, "reader is 'glue': choose"),
        ({"use": "superglue/rte", "template": "{premise"}, "has a single {"),
        ({"use": "superglue/rte", "template": "[MASK] [MASK]"}, "is about one blank, and the template has 2"),
        ({"use": "superglue/rte", "choices": {"entailment": True}}, "put them in quotes"),
        ({"use": "superglue/rte", "choices": "Yes"}, "write label: text pairs"),
        ({"use": "superglue/rte", "choices": {"yes": "so", "no": "so"}}, "two choices have the same answer, 'so'"),
        ({"use": "superglue/rte", "choices": {1: "yes", "1": "no"}}, "two choices have the same label, '1'"),
        ({"use": "superglue/rte", "candidates": "c"}, "needs either choices or candidates"),
        ({"use": "superglue/rte", "metrics": 3}, "metrics is 3: expected a list of names"),
        ({"use": "superglue/rte", "kind": "classification", "metrics": "rouge-l"}, "take accuracy, f1 or macro-f1"),
        (
            {"use": "seq2seq/plain", "metrics": ["accuracy"]},
            "task seq2seq/plain: accuracy does not fit the kind seq2seq: a text was written and nothing chosen: take",
        ),
        ({"use": "superglue/copa", "kind": "classification"}, "the template has 1: give plain_template"),
        ({"use": "superglue/rte", "kind": "seq2seq"}, "accuracy does not fit the kind seq2seq"),
        ({"kind": "chat"}, "task custom: the kind chat needs template and target"),
        ({"template": "x"}, "kind is missing"),
    ],
)
def test_a_bad_task_is_one_line(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        read_task(tree)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_that_uses_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"use": str(path)}))
    with pytest.raises(GmaskError, match="uses itself"):
        load_task(path)
