"""Infilling and scoring over HTTP: /v1/infill and /v1/score."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gmask.generation.answers import Infilling, assemble_infilling, stable_answer
from gmask.generation.encoding import BlankedText
from gmask.generation.engine import SampleProgress
from gmask.generation.infill import infill
from gmask.generation.score import score
from gmask.generation.settings import Sampling
from gmask.serving.backend import STREAMED, Backend, Job, find_backend, stream
from gmask.serving.middleware import ApiError, log_fields
from gmask.serving.openai import read_sampling
from gmask.serving.replies import IncrementalDetokenizer, count_usage
from gmask.serving.schema import InfillRequest, ScoreRequest

MAX_CHOICES = 1024
"""For all blanks of a text."""

MAX_SCORED = 8192
"""For all texts of a request to score; each answer is tokenized before the first one is scored."""

blanks_router = APIRouter(prefix="/v1", tags=["Blanks"])


@blanks_router.post("/infill", responses={200: {"content": STREAMED}})
async def fill(request: Request, body: InfillRequest) -> Response:
    """A text with its blanks filled, as ``gmask infill --json`` prints it.

    With ``choices``, or for several of the best answers (``n`` or ``num_beams`` without a temperature), the whole
    text is searched at once, by one request at a time; else the engine writes it together with other requests.
    """
    backend = find_backend(request.app.state.backends, body.model)
    adapter = backend.find_adapter(body.model)
    backend.require_blanks("filling blanks")
    _check_answers(body, backend)
    blanked = await asyncio.to_thread(backend.reader.read, body.text, positions=backend.positions)
    sampling = read_sampling(body, {}, backend, max_tokens=body.max_tokens)
    if backend.settings.log_prompts:
        log_fields(request, prompt=body.text)
    if body.choices is not None or body.num_beams > 1 or (body.n > 1 and sampling.temperature == 0):
        return await _search(request, backend, body, sampling, len(blanked.context.ids) + 1)
    if body.stream and body.n > 1:
        raise ApiError(400, "several answers cannot be streamed: the best is known at the end", param="stream")
    job = backend.submit(
        request,
        [blanked.context],
        sampling,
        n=body.n,
        adapter=adapter,
        timeout=body.timeout,
        is_streamed=body.stream,
    )
    if body.stream:
        log_fields(request, prompt_tokens=job.prompt_tokens, streamed=True)
        return stream(job, _fragments(job, blanked, sampling, body, backend))
    best = await read_filled(job, blanked, sampling)
    tokens = _count(best)
    log_fields(request, prompt_tokens=job.prompt_tokens, completion_tokens=tokens)
    return JSONResponse(_write(best, body, backend, job.prompt_tokens, tokens))


def _check_answers(body: InfillRequest, backend: Backend) -> None:
    """Raises `ApiError` for more answers, beams or choices than one request may ask for."""
    if max(body.n, body.num_beams) > backend.settings.max_samples:
        raise ApiError(400, f"n and num_beams may be {backend.settings.max_samples} at most here", param="n")
    lists: Iterable[str | list[str]] = body.choices.values() if isinstance(body.choices, dict) else body.choices or ()
    if sum(1 if isinstance(one, str) else len(one) for one in lists) > MAX_CHOICES:
        raise ApiError(400, f"there are more than {MAX_CHOICES} choices", param="choices")


async def read_filled(job: Job, blanked: BlankedText, sampling: Sampling) -> Infilling:
    """Waits for a job; returns the filled text and its alternatives, best first; errors as of `Job.updates`."""
    with closing(job):
        results = await job.results()
    filled = [_assemble(blanked, progress, sampling, job.backend) for progress in results.values()]
    filled.sort(key=lambda infilling: -infilling.logprob)
    return replace(filled[0], alternatives=tuple(filled[1:]))


async def _search(
    request: Request, backend: Backend, body: InfillRequest, sampling: Sampling, prompt_tokens: int
) -> Response:
    """Scores choices, or searches by beams, on the worker."""
    if body.stream:
        raise ApiError(400, "choices and beams cannot be streamed: the best is known at the end", param="stream")
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"):
        if getattr(body, name) is not None:
            raise ApiError(400, f"{name} goes with drawn or single answers, not with choices or beams", param=name)
    model = backend.require_blanks("filling blanks")
    found = await backend.offline(
        request,
        lambda: infill(
            model,
            backend.tokenizer,
            body.text,
            choices=body.choices,
            n=body.n,
            num_beams=body.num_beams,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
        ),
        adapter=backend.find_adapter(body.model),
        timeout=body.timeout,
    )
    tokens = _count(found)
    log_fields(request, prompt_tokens=prompt_tokens, completion_tokens=tokens)
    return JSONResponse(_write(found, body, backend, prompt_tokens, tokens))


def _assemble(blanked: BlankedText, progress: SampleProgress, sampling: Sampling, backend: Backend) -> Infilling:
    """Returns the filled text of one sample; blanks for which it had no time are empty."""
    answers = [*progress.done]
    if len(answers) < len(blanked.context.blanks):
        answers.append(replace(progress.open, finish="length"))
    missing = len(blanked.context.blanks) - len(answers)
    answers += [replace(answers[-1], ids=(), logprobs=(), end_logprob=None, finish="length")] * missing
    return assemble_infilling(blanked, answers, backend.tokenizer, stops=sampling.stop)


def _count(found: Infilling) -> int:
    return sum(len(blank.tokens) for one in (found, *found.alternatives) for blank in one.blanks)


def _write(found: Infilling, body: InfillRequest, backend: Backend, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    def strip(values: dict[str, Any], infilling: Infilling) -> dict[str, Any]:
        for blank, written in zip(infilling.blanks, values["blanks"], strict=True):
            written.update(finish=blank.finish, start=blank.start, end=blank.end)
            if not body.logprobs:
                del written["tokens"]
        for other, inner in zip(infilling.alternatives, values.get("alternatives", ()), strict=True):
            strip(inner, other)
        return values

    name = body.model or backend.settings.model_name
    head = {"object": "infilling", "model": name}
    return {**head, **strip(found.to_dict(), found), "usage": count_usage(prompt_tokens, tokens).model_dump()}


async def _fragments(
    job: Job, blanked: BlankedText, sampling: Sampling, body: InfillRequest, backend: Backend
) -> AsyncIterator[dict[str, Any]]:
    """Yields parts of the answers as they are written, and the whole at the end."""
    stable_texts = [stable_answer(blanked, blank) for blank in range(len(blanked.context.blanks))]
    reader = IncrementalDetokenizer(backend.tokenizer, stable_texts, sampling.stop, logprobs=False)
    async for key, progress in job.updates():
        for delta in reader.read(progress, job.top_logprobs[key]):
            if delta.text:
                yield {"object": "infilling.fragment", "blank": delta.blank, "text": delta.text}
    found = _assemble(blanked, progress, sampling, backend)
    yield _write(found, body, backend, job.prompt_tokens, _count(found))


@blanks_router.post("/score")
async def rank(request: Request, body: ScoreRequest) -> JSONResponse:
    """Exact log-probabilities of given answers, as ``gmask score --json`` prints them."""
    backend = find_backend(request.app.state.backends, body.model)
    adapter = backend.find_adapter(body.model)
    model = backend.require_blanks("scoring answers to a blank")
    texts = [body.text] if isinstance(body.text, str) else body.text
    if backend.settings.log_prompts:
        log_fields(request, prompt=texts)
    count = len(texts) * len(body.answers) if isinstance(body.answers[0], str) else sum(map(len, body.answers))
    if count > MAX_SCORED:
        raise ApiError(400, f"{count} answers are to be scored; at most {MAX_SCORED} at once", param="answers")
    found = await backend.offline(
        request,
        lambda: score(model, backend.tokenizer, texts, body.answers, normalization=body.normalization),
        adapter=adapter,
    )
    data = [scoring.to_dict() for scoring in found]
    assert all(math.isfinite(answer["score"]) for scored in data for answer in scored["answers"])
    return JSONResponse({"object": "list", "model": body.model or backend.settings.model_name, "data": data})
