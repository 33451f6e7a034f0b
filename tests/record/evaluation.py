"""What does `gmask evaluate` measure: every task that comes with gmask on a line or two, and held-out texts?"""

import json
from typing import Any

import yaml

from record.session import TEXTS, Session
from record.training import CLASSES, CLOZE, LONG_CHOICES, MOODS

PAIR = [
    {"premise": "It rained.", "hypothesis": "It was wet.", "label": "entailment"},
    {"premise": "It rained.", "hypothesis": "It was dry.", "label": "contradiction"},
]
WSC = {
    "text": "Mark told Pete lies, which Pete believed. He, poor man, should have known.",
    "target": {"span1_text": "Pete", "span1_index": 2, "span2_text": "He", "span2_index": 6},
    "label": True,
}
READING = {
    "text": "Ann met Bob.\n@highlight\nBob and Ann left",
    "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}],
}
SAME = [
    {"sentence1": "怎么还款", "sentence2": "如何还钱", "label": "1"},
    {"sentence1": "怎么还款", "sentence2": "天气很好", "label": "0"},
]
INSTRUCTION = [
    {"instruction": "Add.", "input": "1+1", "output": "2"},
    {"instruction": "Hi", "input": "", "output": "Yo"},
]
ADVERT = [{"content": "类型#裤", "summary": "这条裤子很好看。"}]

RECORDS: dict[str, list[dict[str, Any]]] = {
    "superglue/boolq": [{"passage": "Ice is cold.", "question": "is ice cold", "label": True}],
    "superglue/cb": [*PAIR, {**PAIR[0], "label": "neutral"}],
    "superglue/copa": [
        {"premise": "It fell.", "choice1": "It broke.", "choice2": "It flew.", "question": "effect", "label": 0},
        {"premise": "It fell.", "choice1": "I broke it.", "choice2": "I let go.", "question": "cause", "label": 1},
    ],
    "superglue/multirc": [{"idx": 3, "passage": {"text": "Ann ate.", "questions": [
        {"question": "Who ate?", "idx": 7, "answers": [{"text": "Ann.", "label": 1}, {"text": "Bob", "label": 0}]},
        {"question": "Why?", "idx": 8, "answers": [{"text": "Who knows", "label": 0}]},
    ]}}],
    "superglue/record": [{"idx": 5, "passage": READING, "qas": [
        {"query": "It was @placeholder who left.", "idx": 1, "answers": [{"text": "Bob", "start": 8, "end": 10}]},
        {"query": "@placeholder left.", "idx": 2, "answers": [{"text": "Bob"}, {"text": "Ann"}]},
    ]}],
    "superglue/rte": [PAIR[0], {**PAIR[1], "label": "not_entailment"}],
    "superglue/wic": [{"word": "bank", "sentence1": "A bank.", "sentence2": "The banks.", "label": False}],
    "superglue/wsc": [WSC, {**WSC, "label": False}],
    "superglue/wsc-referent": [WSC],
    "clue/afqmc": SAME,
    "clue/bustm": SAME,
    "clue/chid": [{"content": "他#idiom#。", "candidates": ["一心一意", "三心二意"], "answer": 1}],
    "clue/cluewsc": [{"text": "小明对他说，他错了。", "label": "false", "target": {
        "span1_text": "小明", "span2_text": "他", "span2_index": 5}}],
    "clue/cmrc": [{"paragraphs": [{"context": "北京是首都。", "qas": [
        {"question": "首都是哪里？", "answers": [{"text": "北京"}, {"text": "北京市"}]}]}]}],
    "clue/csl": [{"abst": "摘要。", "keyword": ["甲", "乙"], "label": "0"}],
    "clue/csldcp": [{"content": "我们研究了数论。", "label": "数学"}],
    "clue/eprstmt": [{"sentence": "东西不错。", "label": "Positive"}],
    "clue/iflytek": [{"sentence": "看新闻", "label": "34"}],
    "clue/ocnli": [{"sentence1": "下雨了", "sentence2": "地湿了", "label": "entailment"}],
    "clue/tnews": [{"sentence": "球队赢了", "label": 103}],
    "chat/adgen": ADVERT,
    "chat/alpaca": INSTRUCTION,
    "chat/messages": [{"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Two."}]}],
    "chat/published": [{"prompt": "c", "response": "d", "history": [["a", "b"]]}],
    "chat/sharegpt": [{"conversations": [{"from": "human", "value": "Add.\n1+1"}, {"from": "gpt", "value": "2"}]}],
    "infill/text": [{"text": "It is [MASK=sunny] in [sMASK=May, or June]."},
                    {"text": "It is [MASK] today.", "answers": ["sunny"]}],
    "language-model/text": [{"text": TEXTS[0]}, {"text": TEXTS[2]}],
    "seq2seq/adgen": ADVERT,
    "seq2seq/alpaca": INSTRUCTION,
    "seq2seq/plain": [{"source": "What is [MASK]?", "target": "A token."}],
}  # fmt: skip
OWN = {"cloze": CLOZE, "multiple-choice": LONG_CHOICES}

HELD_OUT = {
    "run": {"out": "out"},
    "data": {"row_length": 64, "sources": [
        {"name": "en", "train": "en.train.jsonl", "validation": "en.validation.jsonl", "weight": 3},
        {"name": "zh", "train": "zh.train.jsonl", "validation": "zh.validation.jsonl", "weight": 1},
    ]},
    "objective": {"token": 0.5, "sentence": 0.0, "document": 0.5},
    "optimization": {"steps": 1, "dtype": "float32"},
}  # fmt: skip
ENGLISH = [
    f"The {size} {animal} walked down to the river and drank the cold water there. "
    f"Then the {animal} slept under a {size} tree until the moon came up again."
    for size in ("small", "large", "old")
    for animal in ("fox", "bear", "horse", "cat")
]
CHINESE = [
    f"那只{size}{animal}走到河边喝了一口清凉的水。后来它在一棵{size}树下面睡着了，直到月亮升起来。"
    for size in ("小", "大", "老")
    for animal in ("狐狸", "山羊", "白马")
]
TRAINED = [
    {"step": 10, "loss": 5.0, "tokens": 2_000, "labelled_tokens": 400, "seconds": 1.0},
    {"step": 20, "loss": 4.5, "tokens": 4_000, "labelled_tokens": 800, "seconds": 2.0},
]


def record_tasks(session: Session) -> dict[str, Any]:
    """Scores and predictions. The bundled model answers: its context has room for every template."""
    found = {}
    for name, records in RECORDS.items():
        session.write("records.jsonl", records)
        found[name] = _evaluate(session, name, f"--set max_tokens=6 --data records.jsonl --tasks {name}")
    session.write("records.jsonl", MOODS)
    for name, task in OWN.items():
        session.write(f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
        found[name] = _evaluate(session, name, f"--data records.jsonl --tasks {name}.yaml")
    session.write("classes.yaml", yaml.safe_dump(CLASSES, sort_keys=False))
    session.write("pairs.source", "The dog ran to the river.\n")
    session.write("pairs.target", "A dog ran.\n")
    for name, command in {
        "files of lines": "bundled --tasks seq2seq/source-target --data pairs.source --set max_tokens=4",
        "beams": "bundled --tasks seq2seq/plain --data table.csv --set num_beams=3 --set max_tokens=4",
        "an adapter": "tiny --adapter lora --tasks cloze.yaml --data records.jsonl",
        "a model without a head": "tiny --tasks classes.yaml --data records.jsonl",
    }.items():
        session.write("table.csv", "source,target\nWhat is it?,A dog\n")
        outcome = session.run(f"evaluate {command} --json")
        found[name] = {"exit": outcome.code, "report": _read_tasks(outcome.out), "err": outcome.err}
    printed = session.must("evaluate --tasks cloze.yaml --data records.jsonl --limit 2 --export-lm-eval exported").out
    found["for lm-eval"] = {
        "printed": printed.splitlines(),
        **{path.name: path.read_text("utf-8").replace(str(session.folder.resolve()), "FOLDER").splitlines()
           for path in sorted((session.folder / "exported").iterdir())},
    }  # fmt: skip
    found["a table"] = session.must("evaluate tiny --tasks cloze.yaml --data records.jsonl").out.splitlines()
    return found


def _evaluate(session: Session, name: str, options: str) -> dict[str, Any]:
    out = session.folder / "measured" / name
    outcome = session.run(f"evaluate bundled {options} --out {out.relative_to(session.folder)} --json")
    found: dict[str, Any] = {"report": _read_tasks(outcome.out), "err": outcome.err}
    if outcome.code == 0:
        (path,) = out.rglob("predictions.jsonl")
        found["predictions"] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for line in found["predictions"]:
            del line["key"]  # of these weights and settings
        found["files"] = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return found


def _read_tasks(printed: str) -> Any:
    """The results that ``--json`` printed, without what differs from run to run: time, and digests of files."""
    tasks = json.loads(printed)["tasks"] if printed else None
    for task in tasks or ():
        for name in ("seconds", "samples_per_second", "hashes"):
            del task[name]
    return tasks


def record_held_out(session: Session) -> dict[str, Any]:
    """The figures and the tables."""
    for language, texts in (("en", ENGLISH), ("zh", CHINESE)):
        session.write(f"{language}.train.jsonl", [{"text": text} for text in texts[:-3]])
        session.write(f"{language}.validation.jsonl", [{"text": text} for text in texts[-3:]])
    session.write("recipe.yaml", yaml.safe_dump(HELD_OUT))
    session.write("tiny/metrics.jsonl", TRAINED)
    options = "evaluate tiny --recipe recipe.yaml --corpus . --sentences 6"
    figures = json.loads(session.must(f"{options} --out one --json").out)
    tables = session.must(f"{options} --out two").out.splitlines()
    return {"figures": figures, "tables": tables}
