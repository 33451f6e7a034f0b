"""The blanks that a run is validated on are those that a user would see."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import gmask
from gmask.checkpoints.hub import BUNDLED
from gmask.recipes.pretraining import find_blank_tokens
from gmask.tasks.heldout import HeldOutBlank
from gmask.training.validation import BlankSet, encode_blank, score_blanks

BLANKS = [
    HeldOutBlank("a", "She poured a cup of ", "tea", " and sat down.", 1),
    HeldOutBlank("a", "", "They", " sat down by the window.", 1),
    HeldOutBlank("b", "他每天早上七点", "起", "床。", 1),
]


@pytest.mark.parametrize("blank", BLANKS)
def test_the_context_is_the_one_of_infill(blank: HeldOutBlank) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    example = encode_blank(blank, tokenizer, find_blank_tokens(tokenizer))
    assert example.input_ids[: example.context_length].tolist() == tokenizer.encode(blank.text).ids
    scored = np.flatnonzero(example.labels >= 0)
    assert scored.tolist() == [example.context_length]
    first = tokenizer.decode([example.labels[scored[0]]])
    assert first and (blank.left[len(blank.left.rstrip()) :] + blank.answer).startswith(first)


def test_the_first_token_is_measured_as_one_pass_over_each_blank_gives_it() -> None:
    model, tokenizer = gmask.load("bundled", dtype="float32")
    encoder = tokenizer.backend_tokenizer
    special = find_blank_tokens(encoder)
    examples = [encode_blank(blank, encoder, special) for blank in BLANKS]
    found = score_blanks(model, BlankSet(examples, {"all": [0, 1, 2], "last": [2]}), pad_id=special.pad)
    nats, right = [], []
    for example in examples:
        ids = torch.tensor(example.input_ids[: example.context_length + 1])[None]  # up to <sop>
        layout = torch.tensor(example.layout[:, : example.context_length + 1])[None]
        with torch.no_grad():
            logits = model(ids, layout=layout).logits[0, -1]
        label = int(example.labels[example.context_length])
        nats.append(-float(logits.log_softmax(-1)[label]))
        right.append(float(logits.argmax()) == label)
    assert found["all"] == pytest.approx({"top1": np.mean(right), "nats": np.mean(nats), "blanks": 3}, rel=1e-4)
    assert found["last"]["nats"] == pytest.approx(nats[2], rel=1e-4)
