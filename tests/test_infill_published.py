"""Does infilling give what the original code gave, and what a plain recomputation gives?"""

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import gmask
from gmask.checkpoints.load import load_model
from gmask.generation.answers import Answer, Hypothesis
from gmask.generation.decode import make_decoder
from gmask.generation.encoding import Context, TextReader
from gmask.generation.infill import Infiller
from gmask.generation.sampling import Sampler
from gmask.generation.settings import Sampling
from gmask.infilling.blanks import BlankTokens
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.tokenizers.folder import read_tokenizer
from published_vocabularies import SHARED, needs_vocabularies

GOLDEN = Path(__file__).parent / "golden" / "thudm-glm-tiny"
CASE = json.loads((GOLDEN / "case.json").read_text("utf-8"))
TINY = BlankTokens(mask=5, smask=6, gmask=7, sop=8, eop=9, pad=0, cls=2, eos=1)


@pytest.fixture(scope="module")
def published() -> GLMForConditionalGeneration:
    model = GLMForConditionalGeneration(GLMConfig(**CASE["config"], hidden_act="gelu_pytorch_tanh"))
    checkpoint = torch.load(GOLDEN / "ckpt" / "1234" / "mp_rank_00_model_states.pt", weights_only=True)
    model.glm.load_state_dict(checkpoint["module"])
    return model.eval()


def published_tokens() -> BlankTokens:
    ids = CASE["tokenizer"]["ids"]
    return BlankTokens(
        mask=ids["MASK"], smask=ids["sMASK"], gmask=ids["gMASK"], sop=ids["sop"], eop=ids["eop"],
        pad=ids["pad"], cls=ids["ENC"], eos=ids["eos"],
    )  # fmt: skip


def decode(
    model: GLMForConditionalGeneration,
    contexts: list[Context],
    sampling: Sampling,
    sampler: Sampler,
    special: BlankTokens,
) -> list[list[Hypothesis]]:
    decoder = make_decoder(model, None, sampler, special, sampling, batch_size=1000)  # type: ignore[arg-type]
    return decoder.run(contexts, sampling, seeds=range(len(contexts)))


def greedy(
    model: GLMForConditionalGeneration,
    contexts: list[Context],
    sampling: Sampling,
    sampler: Sampler,
    special: BlankTokens,
) -> list[Hypothesis]:
    return [hypothesis for (hypothesis,) in decode(model, contexts, sampling, sampler, special)]


def fed(answer: Answer) -> list[int]:
    """What the original keeps of an answer: all its tokens, its start, but no end."""
    return [published_tokens().sop, *answer.ids]


@pytest.mark.parametrize("end", ["real_end", "forced_end"])
def test_greedy_ids_are_those_of_the_original_code(published: GLMForConditionalGeneration, end: str) -> None:
    """All texts in one batch, though their blanks differ in number and their answers in length."""
    by_end: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for case in CASE["blank_filling"]:
        by_end.setdefault(tuple(case[end]["end_tokens"]), []).append(case)
    for end_ids, cases in by_end.items():
        contexts = [Context(tuple(case["context_ids"]), tuple(case["mask_positions"])) for case in cases]
        sampling = Sampling(max_tokens=cases[0]["out_seq_length"], min_tokens=0)
        found = greedy(published, contexts, sampling, Sampler(end_ids), published_tokens())
        for case, hypothesis in zip(cases, found, strict=True):
            assert [fed(answer) for answer in hypothesis.done] == case[end]["per_mask"], case["raw_text"]


@needs_vocabularies
def test_texts_are_read_as_the_original_code_read_them() -> None:
    """`[CLS]` before, `<|endoftext|>` behind unless `[gMASK]` is the last; that is added where there is no blank."""
    reader = TextReader(read_tokenizer(SHARED / "hf-glm-tiny" / "model"))
    for case in CASE["blank_filling"]:
        context = reader.read(with_blank(case["raw_text"])).context
        assert context == Context(tuple(case["context_ids"]), tuple(case["mask_positions"]))


@needs_vocabularies
def test_infill_gives_the_greedy_answers_of_the_original_code(published: GLMForConditionalGeneration) -> None:
    """From text to text, with the published vocabulary, the weights of the original checkpoint, and no settings."""
    tokenizer = read_tokenizer(SHARED / "hf-glm-tiny" / "model")
    cases = CASE["blank_filling"]
    (length,) = {case["out_seq_length"] for case in cases}
    found = gmask.infill(published, tokenizer, [with_blank(case["raw_text"]) for case in cases], max_tokens=length)
    for case, infilling in zip(cases, found, strict=True):
        answers = [[published_tokens().sop, *(token.id for token in blank.tokens)] for blank in infilling.blanks]
        assert answers == case["real_end"]["per_mask"]
        assert infilling.text.startswith(case["raw_text"].split("[")[0])


@needs_vocabularies
def test_infill_on_a_published_folder_follows_the_same_rule() -> None:
    folder = SHARED / "hf-glm-tiny" / "model"
    model, tokenizer = load_model(folder), read_tokenizer(folder)
    for case in CASE["blank_filling"]:
        text = with_blank(case["raw_text"])
        infiller = Infiller(model, tokenizer, Sampling(max_tokens=6))  # type: ignore[arg-type]
        context = Context(tuple(case["context_ids"]), tuple(case["mask_positions"]))
        sampler = infiller.decoder().sampler  # type: ignore[attr-defined]
        plain = plain_greedy(model, context, infiller.sampling, sampler, sop=published_tokens().sop)  # type: ignore[arg-type]
        (infilling,) = infiller.fill([text])
        assert [tuple(token.id for token in blank.tokens) for blank in infilling.blanks] == [ids for ids, _ in plain]
        assert [blank.logprob for blank in infilling.blanks] == pytest.approx([total for _, total in plain], abs=2e-5)


def with_blank(text: str) -> str:
    """The original program's own addition to a text without a blank."""
    return text if "MASK]" in text else f"{text} [gMASK]"


def recompute(
    model: GLMForConditionalGeneration, context: Context, answers: list[tuple[int, ...]], *, sop: int
) -> list[torch.Tensor]:
    """Log-probabilities ``[len + 1, V]`` at ``<sop>`` and each token of the answers: one pass, no cache."""
    ids, layout = list(context.ids), [[*range(len(context.ids))], [0] * len(context.ids)]
    starts = []
    for place, answer in zip(context.blanks, answers, strict=False):
        starts.append(len(ids))
        ids += [sop, *answer]
        layout[0] += [place] * (len(answer) + 1)
        layout[1] += range(1, len(answer) + 2)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), layout=torch.tensor([layout])).logits[0]
    logprobs = logits.log_softmax(-1)
    return [logprobs[start : start + len(answer) + 1] for start, answer in zip(starts, answers, strict=False)]


def plain_greedy(
    model: GLMForConditionalGeneration, context: Context, sampling: Sampling, sampler: Sampler, *, sop: int
) -> list[tuple[tuple[int, ...], float]]:
    """The answers and their log-probabilities, each token from a pass over everything so far."""
    kept: list[tuple[int, ...]] = []  # what later answers see: a cut answer lacks its last token
    found = []
    for _ in context.blanks:
        ids: tuple[int, ...] = ()
        total = 0.0
        while len(ids) < sampling.max_tokens:
            logprobs = recompute(model, context, [*kept, ids], sop=sop)[-1][-1]
            banned = [*sampler.forbidden_ids, *(sampler.end_ids if len(ids) < sampling.min_tokens else ())]
            token = int(logprobs.index_fill(0, torch.tensor(banned, dtype=torch.long), -torch.inf).argmax())
            total += float(logprobs[token])
            if token in sampler.end_ids:
                break
            ids += (token,)
        kept.append(ids[:-1] if len(ids) == sampling.max_tokens and token not in sampler.end_ids else ids)
        found.append((ids, total))
    return found


CONTEXTS = [
    Context((2, 20, 5, 21, 22, 5, 1), (2, 5)),
    Context((2, 6, 1), (1,)),
    Context((2, 30, 31, 5, 32, 6, 33, 34, 35, 7), (3, 5, 9)),
]


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_memory_and_batching_change_nothing(build_glm: Callable[..., Any], min_tokens: int) -> None:
    model = build_glm(seed=3)
    sampler, sampling = Sampler(range(9, 24), (0, 2, 5, 6, 7, 8)), Sampling(max_tokens=5, min_tokens=min_tokens)
    batch = greedy(model, CONTEXTS, sampling, sampler, TINY)
    endings = set()
    for context, hypothesis in zip(CONTEXTS, batch, strict=True):
        plain = plain_greedy(model, context, sampling, sampler, sop=TINY.sop)
        assert [answer.ids for answer in hypothesis.done] == [ids for ids, _ in plain]
        assert [answer.logprob for answer in hypothesis.done] == pytest.approx([total for _, total in plain], abs=2e-5)
        (alone,) = greedy(model, [context], sampling, sampler, TINY)
        assert [answer.ids for answer in alone.done] == [answer.ids for answer in hypothesis.done]
        assert alone.logprob == pytest.approx(hypothesis.logprob, abs=1e-5)
        endings |= {answer.finish for answer in hypothesis.done}
    assert endings == {"end", "length"}, "the test should see both"


def all_fillings(
    model: GLMForConditionalGeneration, context: Context, sampler: Sampler, max_tokens: int, tokens: list[int]
) -> Iterator[float]:
    """Joint log-probabilities of every way to answer all blanks with at most two tokens."""
    answers = [(first, *rest) for first in tokens for rest in ((), *((second,) for second in tokens))]
    for filling in product(answers, repeat=len(context.blanks)):
        kept = [ids[: max_tokens - 1] if len(ids) == max_tokens else ids for ids in filling]
        total = 0.0
        for ids, logprobs in zip(filling, recompute(model, context, list(kept), sop=TINY.sop), strict=True):
            total += sum(float(logprobs[place, token]) for place, token in enumerate(ids))
            if len(ids) < max_tokens:
                total += float(logprobs[len(ids), list(sampler.end_ids)].max())
        yield total


def test_a_wide_beam_ranks_all_fillings_exactly(build_glm: Callable[..., Any]) -> None:
    model = build_glm(seed=5)
    tokens = [20, 21, 22]
    sampler = Sampler((9, 1), set(range(48)) - {9, 1, *tokens})
    contexts = CONTEXTS[:2]
    found = decode(model, contexts, Sampling(num_beams=144, max_tokens=2), sampler, TINY)
    for context, complete in zip(contexts, found, strict=True):
        expected = sorted(all_fillings(model, context, sampler, 2, tokens), reverse=True)
        assert [hypothesis.logprob for hypothesis in complete] == pytest.approx(expected, abs=2e-5)
        assert len({tuple(answer.ids for answer in hypothesis.done) for hypothesis in complete}) == len(expected)


def test_narrow_beams_score_exactly_and_do_not_depend_on_the_batch(build_glm: Callable[..., Any]) -> None:
    model = build_glm(seed=5)
    sampler = Sampler(range(9, 24), (0, 2, 5, 6, 7, 8))

    def best(contexts: list[Context]) -> list[list[Hypothesis]]:
        return decode(model, contexts, Sampling(num_beams=4, max_tokens=6), sampler, TINY)

    together = best(CONTEXTS)
    for context, complete in zip(CONTEXTS, together, strict=True):
        (alone,) = best([context])
        assert [hypothesis.done for hypothesis in alone] and len(complete) == 4
        for one, other in zip(complete, alone, strict=True):
            assert [answer.ids for answer in one.done] == [answer.ids for answer in other.done]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        scores = [hypothesis.logprob for hypothesis in complete]
        assert scores == sorted(scores, reverse=True)
        for hypothesis in complete:
            kept = [answer.ids[:-1] if answer.finish == "length" else answer.ids for answer in hypothesis.done]
            rows = recompute(model, context, kept, sop=TINY.sop)
            for answer, logprobs in zip(hypothesis.done, rows, strict=True):
                total = sum(float(logprobs[place, token]) for place, token in enumerate(answer.ids))
                if answer.finish == "end":
                    total += float(logprobs[len(answer.ids), list(sampler.end_ids)].max())
                assert answer.logprob == pytest.approx(total, abs=2e-5)
