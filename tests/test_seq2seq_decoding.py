"""Does the beam search find what a plain one finds, with length penalties, n-gram bans and limits on length?"""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gmask
from conftest import EOP, GMASK, MASK, ORDINARY, PAD, SOP
from gmask.generation.answers import Hypothesis
from gmask.generation.decode import make_decoder
from gmask.generation.encoding import Context
from gmask.generation.sampling import Sampler, find_repeats
from gmask.generation.settings import Sampling
from gmask.infilling.blanks import BlankTokens
from gmask.models.glm import GLMForConditionalGeneration

CLS, END = 1, 2
SPECIAL = BlankTokens(MASK, MASK, GMASK, SOP, EOP, PAD, CLS, END)
FORBIDDEN = tuple(token for token in range(16) if token not in (EOP, END))


@pytest.fixture(scope="module")
def model(build_glm: Callable[..., GLMForConditionalGeneration]) -> GLMForConditionalGeneration:
    """One that ends some answers by itself."""
    model = build_glm()
    with torch.no_grad():
        model.glm.transformer.final_layernorm.bias += 1.5 * model.glm.word_embeddings.weight[EOP]
    return model


SAMPLER = Sampler((EOP, END), FORBIDDEN)


def find_answers(model, contexts: Sequence[Context], wanted: Sampling, sampler: Sampler) -> list[list[Hypothesis]]:
    decoder = make_decoder(model, None, sampler, SPECIAL, wanted, batch_size=64)  # type: ignore[arg-type]
    return decoder.run(contexts, wanted, seeds=range(len(contexts)))


def make_context(seed: int, blanks: int, length: int = 9) -> Context:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ORDINARY.start, ORDINARY.stop, (length,), generator=generator).tolist()
    places = sorted(torch.randperm(length - 1, generator=generator)[:blanks].add(1).tolist())
    return Context(tuple(MASK if i in places else token for i, token in enumerate(ids)), tuple(places))


@torch.inference_mode()
def predict_next(
    model: GLMForConditionalGeneration, context: Context, answers: Sequence[Sequence[int]], longest: int
) -> torch.Tensor:
    """Log-probabilities behind the answers so far, from one full pass. The last token of a cut one is not fed."""
    ids, layout = list(context.ids), [[*range(len(context.ids))], [0] * len(context.ids)]
    fed = [*(answer[: longest - 1] for answer in answers[:-1]), answers[-1]]
    for place, answer in zip(context.blanks, fed, strict=False):
        ids += [SOP, *answer]
        layout[0] += [place] * (len(answer) + 1)
        layout[1] += range(1, len(answer) + 2)
    logits = model(torch.tensor([ids]), layout=torch.tensor([layout]), use_cache=False).logits[0, -1]
    return logits.log_softmax(-1)


def repeats(answer: Sequence[int], size: int) -> bool:
    grams = [tuple(answer[i : i + size]) for i in range(len(answer) - size + 1)]
    return size > 0 and len(set(grams)) < len(grams)


def search_plainly(model: GLMForConditionalGeneration, context: Context, wanted: Sampling) -> list[tuple[float, list]]:
    """Score and answers of the best beams. Nothing is cached, and nothing stops before the last beam has ended."""
    live: list[tuple[float, int, list[list[int]]]] = [(0.0, 0, [[]])]  # log-probability, tokens, answers
    complete: list[tuple[float, list[list[int]]]] = []
    while live:
        candidates = []
        for total, count, answers in live:
            logprobs = predict_next(model, context, answers, wanted.max_tokens)
            end = max(float(logprobs[EOP]), float(logprobs[END]))
            options = {token: float(logprobs[token]) for token in ORDINARY}
            options = {t: p for t, p in options.items() if not repeats([*answers[-1], t], wanted.no_repeat_ngram)}
            if len(answers[-1]) >= wanted.min_tokens or not options:
                options[EOP] = end
            for token, logprob in options.items():
                grown = [*answers[:-1], [*answers[-1], *([] if token == EOP else [token])]]
                is_over = token == EOP or len(grown[-1]) == wanted.max_tokens
                is_complete = is_over and len(grown) == len(context.blanks)
                grown += [[]] if is_over and not is_complete else []
                candidates.append((total + logprob, count + 1, grown, is_complete))
        live = []
        for total, count, answers, is_complete in sorted(candidates, key=lambda candidate: -candidate[0]):
            if is_complete:
                complete.append((total / count**wanted.length_penalty, answers))
            else:
                live.append((total, count, answers))
            if len(live) == wanted.num_beams:
                break
    return sorted(complete, key=lambda found: -found[0])[: wanted.num_beams]


def search(model: GLMForConditionalGeneration, contexts: Sequence[Context], wanted: Sampling) -> list[list[tuple]]:
    found = find_answers(model, contexts, wanted, SAMPLER)
    return [
        [(one.score(wanted.length_penalty), [list(answer.ids) for answer in one.done]) for one in beams]
        for beams in found
    ]


GRID = [
    dict(num_beams=3, max_tokens=5),
    dict(num_beams=4, max_tokens=6, length_penalty=1.0),
    dict(num_beams=4, max_tokens=6, length_penalty=2.5, no_repeat_ngram=2),
    dict(num_beams=3, max_tokens=6, length_penalty=-1.0, min_tokens=2),
    dict(num_beams=2, max_tokens=7, length_penalty=0.7, no_repeat_ngram=1, min_tokens=4),
    dict(num_beams=3, max_tokens=6, no_repeat_ngram=3, min_tokens=6),
]


@pytest.mark.parametrize("wanted", GRID)
@pytest.mark.parametrize("blanks", [1, 2])
def test_beams_are_those_of_a_plain_search(model, wanted: dict, blanks: int) -> None:
    chosen = Sampling(**wanted)
    for seed in range(3):
        context = make_context(seed, blanks)
        (found,) = search(model, [context], chosen)
        expected = search_plainly(model, context, chosen)
        assert [answers for _, answers in found] == [answers for _, answers in expected]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_the_settings_decide(model) -> None:
    """The grid would prove little if the penalties and bans changed nothing."""
    contexts = [make_context(seed, 1) for seed in range(8)]
    plain = search(model, contexts, Sampling(num_beams=4, max_tokens=8))
    longer = search(model, contexts, Sampling(num_beams=4, max_tokens=8, length_penalty=3.0))
    varied = search(model, contexts, Sampling(num_beams=4, max_tokens=8, length_penalty=3.0, no_repeat_ngram=1))
    lengths = [sum(len(beams[0][1][0]) for beams in found) for found in (plain, longer)]
    assert lengths[0] < lengths[1]
    assert any(repeats(beams[0][1][0], 1) for beams in longer)
    assert not any(repeats(answers[0], 1) for beams in varied for _, answers in beams)


@pytest.mark.parametrize("wanted", GRID)
def test_a_batch_gives_what_single_runs_give(model, wanted: dict) -> None:
    contexts = [make_context(seed, 1 + seed % 2, length=6 + 2 * seed) for seed in range(4)]
    together = search(model, contexts, Sampling(**wanted))
    for context, found in zip(contexts, together, strict=True):
        (alone,) = search(model, [context], Sampling(**wanted))
        assert [answers for _, answers in found] == [answers for _, answers in alone]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_the_best_beam_is_that_of_transformers(model, penalty: float) -> None:
    """With one end token, and an n-gram ban that its prompt does not touch."""
    context = make_context(5, 1)
    wanted = Sampling(num_beams=4, max_tokens=6, min_tokens=0, length_penalty=penalty)
    ((best, *_),) = find_answers(model, [context], wanted, Sampler((EOP,), {*FORBIDDEN, END}))
    layout = [[*range(len(context.ids)), context.blanks[0]], [*[0] * len(context.ids), 1]]
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([[*context.ids, SOP]]),
            layout=torch.tensor([layout]),
            attention_mask=torch.ones(1, len(context.ids) + 1, dtype=torch.long),
            num_beams=4,
            do_sample=False,
            max_new_tokens=6,
            length_penalty=penalty,
            early_stopping="never",
            eos_token_id=EOP,
            pad_token_id=PAD,
            suppress_tokens=sorted({*FORBIDDEN, END}),
            renormalize_logits=False,
        )
    ids = output[0, len(context.ids) + 1 :].tolist()
    assert list(best.done[0].ids) == [token for token in ids if token not in (EOP, PAD)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_path_without_beams_repeats_no_n_gram_either(model, temperature: float) -> None:
    wanted = Sampling(max_tokens=40, min_tokens=40, no_repeat_ngram=2, temperature=temperature)
    free = Sampling(max_tokens=40, min_tokens=40, temperature=temperature)
    contexts = [make_context(seed, 1) for seed in range(3)]
    assert any(repeats(beams[0][1][0], 2) for beams in search(model, contexts, free))
    assert not any(repeats(beams[0][1][0], 2) for beams in search(model, contexts, wanted))


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_that_may_say_nothing_new_ends(model, beams: int) -> None:
    wanted = Sampling(max_tokens=60, min_tokens=60, no_repeat_ngram=1, num_beams=beams)
    ((best, *_),) = search(model, [make_context(0, 1)], wanted)
    assert sorted(best[1][0]) == list(ORDINARY), "each token once, then the end in spite of min_tokens"


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_forbidden_are_the_tokens_that_would_repeat_and_no_others(ids: list[int], size: int) -> None:
    grams = [ids[i : i + size] for i in range(len(ids) - size + 1)]
    for token in range(4):
        last = [*ids, token][-size:]
        assert (token in find_repeats(ids, size)) == (last in grams)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1: it must be at least 0"),
        ({"no_repeat_ngram": 1.5}, "no_repeat_ngram is 1.5: expected int"),
        ({"length_penalty": "long"}, "length_penalty is 'long': expected a finite number"),
        ({"length_penalty": float("inf")}, "finite"),
        ({"length_penalty": float("nan")}, "finite"),
    ],
)
def test_settings_that_mean_nothing_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(gmask.GmaskError, match=message):
        Sampling(**wrong)


def test_reference_and_search_count_the_same_tokens(model) -> None:
    """A penalty of one makes the score the mean over the tokens and the end."""
    wanted = Sampling(num_beams=3, max_tokens=6, length_penalty=1.0)
    (found,) = find_answers(model, [make_context(1, 2)], wanted, SAMPLER)
    for one in found:
        values = list(itertools.chain.from_iterable(answer.logprobs for answer in one.done))
        values += [answer.end_logprob for answer in one.done if answer.end_logprob is not None]
        assert one.predicted == len(values)
        assert one.score(1.0) == pytest.approx(sum(values) / len(values))
