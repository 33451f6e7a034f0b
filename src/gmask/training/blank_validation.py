"""Blanks of one word or character in held-out sentences: does the model name the first token of what was hidden?

The text on either side of a blank is cut into tokens apart, as it is when a user hides it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from gmask.errors import GmaskError
from gmask.infilling.blanks import NOT_SCORED, BlankTokens, InfillingExample, blank_out
from gmask.infilling.collator import collate
from gmask.models.glm import GLMForConditionalGeneration
from gmask.tasks.heldout import HELD_OUT_LANGUAGES, HeldOutBlank, draw_sentences, hide_span
from gmask.tasks.records import Source, find_files, read_texts

BATCH = 64


@dataclass(frozen=True, slots=True)
class BlankValidation:
    """The blanks of a run, always the same, by group: a language, or a language and a kind of text."""

    examples: Sequence[InfillingExample]
    groups: Mapping[str, Sequence[int]]  # indices of the examples


def choose_blanks(
    sources: Sequence[Source], tokenizer: Tokenizer, special: BlankTokens, *, sentences: int, longest: int
) -> BlankValidation:
    """One blank of one word or character in each of `sentences` held-out sentences of each language.

    A language of which the held-out texts have no usable sentence is left out. longest: tokens of a sentence.
    """
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.encode_special_tokens = True  # a literal "[MASK]" in a text is no blank
    texts = {s.name: list(read_texts(find_files(s.validation))) for s in sources if s.validation}
    weights = {source.name: source.weight or 1.0 for source in sources}
    kinds = {source.name: source.kind for source in sources}
    examples: list[InfillingExample] = []
    groups = defaultdict[str, list[int]](list)
    for number, language in enumerate(HELD_OUT_LANGUAGES):
        rng = np.random.default_rng([number])
        try:
            chosen = draw_sentences(texts, weights, language, sentences, rng=rng)
        except GmaskError:
            continue
        size = next(iter(language.spans.values()))
        for source, sentence in chosen:
            blank = hide_span(sentence, language, size, source=source, rng=rng)
            example = encode_blank(blank, encoder, special)
            if len(example.input_ids) > longest:
                continue
            groups[language.name].append(len(examples))
            if kinds[source] is not None:
                groups[f"{language.name}, {kinds[source]}"].append(len(examples))
            examples.append(example)
    return BlankValidation(examples, dict(groups))


def encode_blank(blank: HeldOutBlank, encoder: Tokenizer, special: BlankTokens) -> InfillingExample:
    """The blank as an example in which the first token of the answer alone is scored.

    The spaces before the blank belong to the answer, as `[MASK]` takes them.
    """
    left = blank.left.rstrip(" ")
    answer = re.match(" *", blank.left[len(left) :])[0] + blank.answer  # type: ignore[index]  # it always matches
    parts = [encoder.encode(text, add_special_tokens=False).ids for text in (left, answer, blank.right)]
    tokens = np.array([special.cls, *parts[0], *parts[1], *parts[2], special.eos], np.int64)
    start = 1 + len(parts[0])
    spans = np.array([[start, start + len(parts[1])]], np.int64)
    example = blank_out(tokens, spans, mask=special.mask, special=special, objective="token")
    example.labels[example.context_length + 1 :] = NOT_SCORED
    return example


@torch.no_grad()
def measure_blanks(
    model: GLMForConditionalGeneration, validation: BlankValidation, *, pad_id: int
) -> dict[str, dict[str, float]]:
    """For each group: the share of blanks whose first token is the most probable one, its mean loss in nats, the count.

    The model is to be in evaluation mode, under the caller's autocast.
    """
    right, nats = [], []
    for start in range(0, len(validation.examples), BATCH):
        rows = [[example] for example in validation.examples[start : start + BATCH]]
        batch = collate(rows, row_length=None, pad_id=pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        states = model.glm(**batch, use_cache=False).last_hidden_state
        scored = labels != NOT_SCORED
        logits = model.lm_head(states[scored]).float()
        nats.append(torch.nn.functional.cross_entropy(logits, labels[scored], reduction="none").cpu())
        right.append((logits.argmax(-1) == labels[scored]).float().cpu())
    if not nats:
        return {}
    all_nats, all_right = torch.cat(nats), torch.cat(right)
    return {
        group: {"top1": float(all_right[index].mean()), "nats": float(all_nats[index].mean()), "blanks": len(index)}
        for group, index in ((name, list(indices)) for name, indices in validation.groups.items())
    }
