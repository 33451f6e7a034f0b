"""Is a training sequence built from the same spans the published one, id for id and place for place?"""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmask.infilling.blanks import BlankTokens, InfillingExample, blank_out, cut_suffix
from gmask.infilling.spans import find_documents, find_sentences, mark_sentence_ends

HERE = Path(__file__).parent
CASE = json.loads((HERE / "golden" / "blockmask" / "case.json").read_text())
IDS = CASE["ids"]
SPECIAL = BlankTokens(
    mask=IDS["MASK"],
    smask=IDS["sMASK"],
    gmask=IDS["gMASK"],
    sop=IDS["sop"],
    eop=IDS["eop"],
    pad=IDS["pad"],
    cls=IDS["ENC"],
    eos=IDS["eos"],
    dblock=IDS["dBLOCK"],
)
MARKS = {43361: "。", 43369: ".", 43383: ":", 43389: "?", 43460: "!", 43475: ";"}  # of cog-pretrain.model
PIECES = [MARKS.get(i, "x") if i < IDS["eos"] else "" for i in range(50_048)]
SENTENCE_ENDS = mark_sentence_ends(PIECES)
OBJECTIVE_OF_MODE = {"bert": "token", "sentence": "sentence", "gpt": "document"}
RECORDS = [
    pytest.param(name, setting["kwargs"], example, id=f"{name}-{example['input']}-{example['count']}")
    for name, setting in CASE["settings"].items()
    for example in setting["examples"]
]


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", HERE.parent / "benchmarks" / "infilling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PlainInfilling = load_benchmark().PlainInfilling


class Record:
    """A published training sequence, read back."""

    def __init__(self, example: dict[str, Any]) -> None:
        out = example["out"]
        self.tokens = np.array(CASE["inputs"][example["input"]]["text"])
        self.input_ids = np.array(out["text"][0])
        self.loss_mask = np.array(out["loss_mask"][0])
        self.layout = np.array(out["position_id"][0])
        self.layout[0] -= self.layout[0, 0]  # `random_position` only moves the whole row
        self.context_length = out["attention_mask"][0]
        self.targets = np.array(out["target"][0])
        self.labels = np.where(self.loss_mask == 1, self.targets, -100)
        self.objective = OBJECTIVE_OF_MODE[out["mode"]]

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Spans, left to right, and the order of their answers; from the answers' places and ends."""
        answer_places, targets = self.layout[0, self.context_length :], self.targets[self.context_length :]
        ends = np.flatnonzero(targets == SPECIAL.eop)
        lengths = np.diff(ends, prepend=-1) - 1
        masks = answer_places[ends]
        order = masks.argsort().argsort()
        lengths, masks = lengths[masks.argsort()], np.sort(masks)
        starts = masks + np.cumsum(lengths - 1) - (lengths - 1)
        return np.stack((starts, starts + lengths), axis=1), order

    def rebuild(self, mask: int) -> InfillingExample:
        if self.targets[-1] != SPECIAL.eop:
            special = SPECIAL if mask == SPECIAL.gmask else SPECIAL.with_one_mask()
            return cut_suffix(self.tokens, len(self.targets) - self.context_length, special=special)
        spans, order = self.spans()
        return blank_out(self.tokens, spans, mask=mask, special=SPECIAL, objective=self.objective, order=order)


def mask_of(objective: str, task_mask: bool) -> int:
    special = SPECIAL if task_mask else SPECIAL.with_one_mask()
    return {"token": special.mask, "sentence": special.smask, "document": special.gmask}[objective]


@pytest.mark.parametrize(("name", "kwargs", "example"), RECORDS)
def test_the_same_spans_give_the_published_sequence(name: str, kwargs: dict[str, Any], example: dict[str, Any]) -> None:
    record = Record(example)
    ours = record.rebuild(mask_of(record.objective, kwargs["task_mask"]))
    # A flat second row is what a model without block positions is given; it is never read there.
    layout = ours.layout.clip(max=[[999], [1 if name == "token_no_block_position" else 999]])
    hidden = record.input_ids == SPECIAL.dblock
    assert ours.context_length == record.context_length
    assert ours.objective == record.objective
    np.testing.assert_array_equal(ours.labels, record.labels)
    np.testing.assert_array_equal(layout, record.layout)
    np.testing.assert_array_equal(np.where(hidden, SPECIAL.dblock, ours.input_ids), record.input_ids)
    assert not hidden.any() or {"block_mask_prob", "context_mask_ratio"} & set(kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "example"),
    [record for record in RECORDS if record.values[0] != "token_random_position"],  # draws the offset in between
)
def test_the_plain_program_gives_the_published_record_from_its_seed(
    name: str, kwargs: dict[str, Any], example: dict[str, Any]
) -> None:
    record = Record(example)
    plain = PlainInfilling(
        SPECIAL if kwargs["task_mask"] else SPECIAL.with_one_mask(),
        PIECES,
        min_ratio=kwargs.get("gpt_min_ratio", 0.5),
        suffix_prob=kwargs.get("gpt_infill_prob", 0.5),
        block_mask_prob=kwargs.get("block_mask_prob", 0.0),
        context_mask_ratio=kwargs.get("context_mask_ratio", 0.0),
        shuffle=kwargs.get("shuffle_blocks", True),
    )
    rng, hide_rng = random.Random(example["count"]), random.Random(example["count"])
    rng.random()  # whether the row is split
    single_span = rng.random() < kwargs.get("single_span_prob", 0.0)
    if not single_span:
        rng.random()  # which objective
    if record.objective == "token":
        made = plain.token(record.tokens, rng, hide_rng, single_span=single_span)
    else:
        made = getattr(plain, record.objective)(record.tokens, rng)
    assert made.context_length == record.context_length
    np.testing.assert_array_equal(made.input_ids, record.input_ids)
    np.testing.assert_array_equal(made.labels, record.targets)
    np.testing.assert_array_equal(made.loss_mask, record.loss_mask)
    np.testing.assert_array_equal(
        made.layout.clip(max=[[999], [1 if name == "token_no_block_position" else 999]]), record.layout
    )


@st.composite
def texts_with_spans(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text, spans in it (some touch), and an order of their answers."""
    pieces = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=12))
    gaps, lengths = np.array(pieces).T
    ends = np.cumsum(gaps + lengths)
    tokens = np.arange(100, 101 + ends[-1] + draw(st.integers(0, 5)))
    spans = 1 + np.stack((ends - lengths, ends), axis=1)
    return tokens, spans, np.array(draw(st.permutations(range(len(pieces)))))


@given(texts_with_spans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_fast_construction_equals_the_plain_one(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    tokens, spans, order = case
    ours = blank_out(tokens, spans, mask=SPECIAL.mask, special=SPECIAL, objective="token", order=order)
    plain = PlainInfilling(SPECIAL, PIECES).build(tokens, spans[order].tolist(), SPECIAL.mask)
    assert ours.context_length == plain.context_length
    np.testing.assert_array_equal(ours.input_ids, plain.input_ids)
    np.testing.assert_array_equal(ours.labels, np.where(plain.loss_mask == 1, plain.labels, -100))
    np.testing.assert_array_equal(ours.layout, plain.layout)


@given(st.lists(st.sampled_from([20, 21, 43361, 43369, SPECIAL.eos, SPECIAL.cls]), min_size=1, max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_documents_and_sentences_are_those_of_the_plain_program(body: list[int]) -> None:
    tokens = np.array([SPECIAL.cls, *body])
    starts_document = np.append(True, tokens[:-1] == SPECIAL.eos)
    tokens[(tokens == SPECIAL.cls) & ~starts_document] = 22  # `[CLS]` stands at the start of a document only
    plain = PlainInfilling(SPECIAL, PIECES)
    documents = [(start, start + size) for start, size in plain.documents(tokens)]
    assert find_documents(tokens, special=SPECIAL) == sorted(documents, key=lambda d: d[1] - d[0])
    # Ours leaves out the `[CLS]` that the published code takes into the first sentence of a later document.
    sentences = [(start + int(tokens[start] == SPECIAL.cls), end) for start, end in plain.sentences(tokens)]
    ours = find_sentences(tokens, sentence_ends=SENTENCE_ENDS, special=SPECIAL)
    assert [tuple(span) for span in ours.tolist()] == [span for span in sentences if span[0] < span[1]]
