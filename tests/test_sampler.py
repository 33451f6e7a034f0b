"""Does the sampler choose what a plain one chooses, row by row, and does the stepper serve a training loop?"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gmask
from gmask.generation.decode import make_decoder
from gmask.generation.encoding import TextReader
from gmask.generation.engine import Budget, Stepper
from gmask.generation.sampling import Sampler, SamplerState, draw_tokens, first_greatest
from gmask.generation.settings import Sampling
from tiny_folder import make_folder

VOCABULARY, ENDS, FORBIDDEN = 24, (3, 5), (0, 1, 3)


def choose_plainly(logits: list[float], state: SamplerState, answer: tuple[int, ...]) -> int:
    """One row, token by token, in Python's own floats."""
    sampling = state.sampling
    scores = dict(enumerate(logits))
    for token, times in state.counts.items():
        old = scores[token]
        scores[token] = old / sampling.repetition_penalty if old > 0 else old * sampling.repetition_penalty
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    size = sampling.no_repeat_ngram
    seen = {answer[i : i + size] for i in range(len(answer) - size + 1)} if size else set()
    allowed = [
        token
        for token in scores
        if token in ENDS
        or (token not in FORBIDDEN and (*answer, token)[-size:] not in seen)
        or (not size and token not in FORBIDDEN)
    ]
    if len(answer) < sampling.min_tokens and set(allowed) - set(ENDS):
        allowed = [token for token in allowed if token not in ENDS]
    ranked = sorted(allowed, key=lambda token: -scores[token])
    if sampling.temperature == 0:
        return ranked[0]
    ranked = ranked[: sampling.top_k or None]
    weights = [math.exp((scores[token] - scores[ranked[0]]) / sampling.temperature) for token in ranked]
    total, kept, mass = sum(weights), [], 0.0
    for weight in weights:
        if kept and mass / total >= sampling.top_p:
            break
        kept.append(weight)
        mass += weight
    left = float(np.float32(state.generator.random())) * mass
    for token, weight in zip(ranked, kept, strict=False):
        if left < weight:
            return token
        left -= weight
    return ranked[len(kept) - 1]


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_tokens=st.integers(0, 4),
    no_repeat_ngram=st.integers(0, 2),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.2]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-3, 3), max_size=2),
)
rows = st.tuples(samplings, st.lists(st.sampled_from([2, 4, *range(6, VOCABULARY)]), max_size=6), st.integers(0, 99))


@settings(deadline=None, max_examples=300)
@given(st.lists(rows, min_size=1, max_size=6), st.integers(0, 2**31))
def test_each_row_of_a_batch_is_chosen_by_its_own_settings(
    batch: list[tuple[Sampling, list[int], int]], seed: int
) -> None:
    logits = 3 * torch.randn(len(batch), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    answers = [tuple(answer) for _, answer, _ in batch]

    def states() -> list[SamplerState]:
        made = [SamplerState.make(sampling, seed=number, index=0) for sampling, _, number in batch]
        for state, answer in zip(made, answers, strict=True):
            for token in answer:
                state.accept(token, ends_answer=False)
        return made

    tokens, chosen, logprobs = Sampler(ENDS, FORBIDDEN).choose(logits, states(), answers)
    expected = [
        choose_plainly(row, state, answer)
        for row, state, answer in zip(logits.tolist(), states(), answers, strict=True)
    ]
    assert tokens == expected
    assert chosen == pytest.approx(logits.log_softmax(-1)[range(len(batch)), tokens].tolist())
    assert torch.equal(logprobs, logits.log_softmax(-1)), "what is reported is the model's own"


@pytest.fixture
def pair(tmp_path: Any) -> tuple[Any, Any]:
    return gmask.load(make_folder(tmp_path), device="cpu")


def make_stepper(model: Any, tokenizer: Any, **keywords: Any) -> tuple[Stepper, TextReader]:
    reader = TextReader(tokenizer)
    sampler = Sampler.for_model(reader.special, reader.special_ids.values(), tokenizer, model.config.vocab_size)
    return Stepper(model, tokenizer, sampler, reader.special, **keywords), reader


def test_one_stepper_answers_between_the_steps_of_a_training(pair: tuple[Any, Any]) -> None:
    """As a policy does: the weights change between two calls, and nothing of a call is in the way of gradients."""
    model, tokenizer = pair
    stepper, reader = make_stepper(model, tokenizer)
    contexts = [reader.read(text).context for text in ("a [MASK] b [MASK]", "[gMASK]")]
    sampling = Sampling(max_tokens=6, temperature=1.0, n=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    written = []
    for _ in range(3):
        found = stepper.run(contexts, sampling, seeds=[0, 1])
        fresh, _ = make_stepper(model, tokenizer)
        assert found == fresh.run(contexts, sampling, seeds=[0, 1]), "of the weights as they are now"
        written.append([[answer.ids for one in samples for answer in one.done] for samples in found])
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        ids = torch.tensor([[*contexts[0].ids, tokenizer.sop_token_id, *found[0][0].done[0].ids]])
        model(input_ids=ids).logits.square().mean().backward()
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        optimizer.step()
        optimizer.zero_grad()
    assert written[0] != written[2], "the test should see a change"


def test_a_stream_leaves_the_grad_mode_to_its_reader(pair: tuple[Any, Any]) -> None:
    stream = gmask.stream_infill(*pair, "a [MASK]", max_tokens=6, min_tokens=6)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_rows_that_join_and_leave_change_no_answer(pair: tuple[Any, Any]) -> None:
    texts = ["[MASK]", "a b [MASK] c", "[MASK] b c [MASK] g", "one [gMASK]", "a [MASK] b [sMASK] c [MASK]"] * 3
    sampling = Sampling(max_tokens=7)
    alone = [gmask.infill(*pair, text, max_tokens=7) for text in texts]
    for rows in (1, 2, 5, 8):
        stepper, reader = make_stepper(*pair, budget=Budget(rows=rows))
        found = stepper.run([reader.read(text).context for text in texts], sampling, seeds=range(len(texts)))
        for single, (one,) in zip(alone, found, strict=True):
            assert [answer.ids for answer in one.done] == [
                tuple(token.id for token in blank.tokens) for blank in single.blanks
            ]
            assert one.logprob == pytest.approx(single.logprob, abs=1e-4)


def test_a_failure_leaves_nothing_behind(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stepper, reader = make_stepper(*pair)
    contexts = [reader.read("a [MASK]").context]
    expected = stepper.run(contexts, Sampling(), seeds=[0])
    with monkeypatch.context() as patch:
        patch.setattr(stepper.slots.__class__, "begin_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stepper.run(contexts, Sampling(min_tokens=3), seeds=[0])
    assert not stepper.has_work and stepper.slots.lengths == []
    assert stepper.run(contexts, Sampling(), seeds=[0]) == expected


@pytest.mark.parametrize(("sampling", "is_stepped"), [(Sampling(), True), (Sampling(n=2), False)])
def test_beams_search_where_the_best_of_several_is_asked_for(pair: Any, sampling: Sampling, is_stepped: bool) -> None:
    stepper, reader = make_stepper(*pair)
    decoder = make_decoder(*pair, stepper.sampler, reader.special, sampling, batch_size=4)
    assert isinstance(decoder, Stepper) == is_stepped


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 3.0, 30.0]), st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    st.sampled_from([0, 7, 200]), st.booleans(),
)  # fmt: skip
def test_a_token_is_the_one_that_sorting_the_whole_vocabulary_finds(
    seed: int, temperature: float, top_p: float, top_k: int, is_coarse: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(40, 1000, generator=generator)
    if is_coarse:
        scores = scores.round()  # many are equal
    scores[:, ::3] = -torch.inf
    quantiles = torch.rand(40, generator=generator)
    quantiles[:2] = torch.tensor([0.0, 1 - 2**-24])
    found = draw_tokens(scores, quantiles, temperature=temperature, top_k=top_k, top_p=top_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gmask.generation.sampling, "FIRST", 1000)  # then all of them are sorted
        plain = draw_tokens(scores, quantiles, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(found, plain)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), width=st.sampled_from([7, 32, 96, 4096]), seed=st.integers(0, 2**31), kinds=st.data())
def test_of_equal_scores_the_first_is_taken(rows: int, width: int, seed: int, kinds: st.DataObject) -> None:
    values = torch.randint(-3, 3, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    special = kinds.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, width - 1)), max_size=4))
    for row, column in special:
        values[row, column] = kinds.draw(st.sampled_from([-torch.inf, torch.inf, torch.nan]))
    expected = np.argmax(values.numpy(), axis=-1)  # the first, and NaN before all
    assert first_greatest(values).tolist() == expected.tolist()
