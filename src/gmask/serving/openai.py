"""How are OpenAI's chats, completions and embeddings answered?"""

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gmask.generation.chat import DEFAULTS
from gmask.generation.embed import as_floats, embed
from gmask.generation.requests import Progress
from gmask.generation.sampling import SamplingParameters
from gmask.serving import replies
from gmask.serving.backend import Backend, Job
from gmask.serving.errors import ApiError
from gmask.serving.events import STREAMED, stream
from gmask.serving.left_to_right import score_text
from gmask.serving.logs import note
from gmask.serving.mailbox import Key
from gmask.serving.prompts import (
    Question,
    fit_chat,
    read_constraint,
    read_messages,
    read_prompts,
    read_sampling,
    settle_reply,
)
from gmask.serving.replies import Choice, Form
from gmask.serving.samples import SampleReader, ToldToken
from gmask.serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Sampled, StreamOptions

router = APIRouter(prefix="/v1", tags=["OpenAI"])

Readers = Mapping[Key, SampleReader]


@router.get("/models", responses={200: {"model": replies.ModelList}})
async def list_models(request: Request) -> JSONResponse:
    """The model that is served, and it with each of its adapters."""
    backend: Backend = request.app.state.backend
    return JSONResponse({"object": "list", "data": [_describe_model(backend, name) for name in backend.model_names]})


@router.get("/models/{name:path}", responses={200: {"model": replies.Model}})
async def show_model(request: Request, name: str) -> JSONResponse:
    """The model of a name."""
    backend: Backend = request.app.state.backend
    backend.find_adapter(name)
    return JSONResponse(_describe_model(backend, name))


def _describe_model(backend: Backend, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": backend.began, "owned_by": "gmask"}


@router.post("/chat/completions", responses={200: {"model": replies.ChatCompletion, "content": STREAMED}})
async def chat(request: Request, body: ChatRequest) -> Response:
    """The reply to a conversation."""
    backend: Backend = request.app.state.backend
    backend.find_adapter(body.model)
    query, rounds = read_messages(body.messages)
    wanted = body.max_completion_tokens or body.max_tokens
    longest = backend.positions
    if wanted is not None and wanted >= longest:
        raise ApiError(400, f"max_tokens {wanted} leaves no room for a prompt in {longest} tokens", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    prompt = await asyncio.to_thread(fit_chat, query, rounds, backend, longest=longest, max_tokens=wanted)
    sampling = read_sampling(
        body,
        DEFAULTS,
        backend,
        max_tokens=wanted or min(longest - prompt.length, backend.longest_answer),
        top_logprobs=body.top_logprobs or 0,
        constraint=await asyncio.to_thread(read_constraint, body, backend),
    )
    if backend.settings.log_prompts:
        note(request, prompt=[message.text for message in body.messages])

    question = Question(prompt.context, settle_reply(backend))
    form = Form("chat", _name(body, backend), logprobs=bool(body.logprobs), rounds_left_out=prompt.rounds_left_out)
    return await _answer(request, body, form, [question], sampling, n=body.n or 1)


@router.post("/completions", responses={200: {"model": replies.Completion, "content": STREAMED}})
async def complete(request: Request, body: CompletionRequest) -> Response:
    """What follows a prompt or, with a suffix, what stands between the two.

    ``echo`` puts the prompt before the answer. With ``logprobs`` its tokens are scored from left to right, behind
    ``[gMASK] <sop>``: a context that is read in both directions has no chain of probabilities. The answer still reads
    the prompt in both directions.
    """
    backend: Backend = request.app.state.backend
    backend.find_adapter(body.model)
    questions = await asyncio.to_thread(read_prompts, body, backend)
    if backend.settings.log_prompts:
        note(request, prompt=[question.text for question in questions])
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 goes with echo: there is nothing to answer", param="max_tokens")
    n = body.n or 1
    samples = max(body.best_of or n, n)
    if body.stream and (samples > n or body.echo):
        raise ApiError(400, "an answer with best_of or echo cannot be streamed", param="stream")
    sampling = read_sampling(
        body,
        {"temperature": 1.0},
        backend,
        max_tokens=max(1, max_tokens),
        top_logprobs=body.logprobs or 0,
        constraint=await asyncio.to_thread(read_constraint, body, backend),
    )
    if sampling.constraint is not None:
        questions = [question.without_space() for question in questions]
    form = Form("text", _name(body, backend), logprobs=body.logprobs is not None)
    form.prompts = [question.text for question in questions]
    if not body.echo:
        return await _answer(request, body, form, questions, sampling, n=n, samples=samples)
    form.echoes = await _score_prompts(request, questions, body)
    if max_tokens == 0:
        usage = sum(len(echo) + 2 for echo in form.echoes)
        choices = [Choice(index, "", (), "length", 0, 0.0) for index in range(len(questions) * n)]
        return JSONResponse(form.whole(choices, n=n, prompt_tokens=usage))
    return await _answer(request, body, form, questions, sampling, n=n, samples=samples)


async def _score_prompts(
    request: Request, questions: Sequence[Question], body: CompletionRequest
) -> list[tuple[ToldToken, ...]]:
    """The tokens of the prompts with their log-probabilities; none where these were not asked for."""
    backend: Backend = request.app.state.backend
    if body.logprobs is None:
        return [()] * len(questions)
    scorings = [partial(score_text, backend, question.ids, top=body.logprobs) for question in questions]
    adapter = backend.find_adapter(body.model)
    return await backend.offline(
        request, lambda: [score() for score in scorings], adapter=adapter, timeout=body.timeout
    )


def _name(body: Sampled, backend: Backend) -> str:
    return body.model or backend.settings.model_name


async def _answer(
    request: Request,
    body: ChatRequest | CompletionRequest,
    form: Form,
    questions: Sequence[Question],
    sampling: SamplingParameters,
    *,
    n: int,
    samples: int | None = None,
) -> Response:
    """Has the engine answer, and tells it at once or bit by bit."""
    backend: Backend = request.app.state.backend
    samples = samples or n
    job = backend.submit(
        request,
        [question.context for question in questions],
        sampling,
        n=samples,
        adapter=backend.find_adapter(body.model),
        timeout=body.timeout,
        is_streamed=bool(body.stream),
    )
    readers = {
        (context, sample): SampleReader(backend.tokenizer, [question.settle], sampling.stop, logprobs=form.logprobs)
        for context, question in enumerate(questions)
        for sample in range(samples)
    }
    if body.stream:
        note(request, prompt_tokens=job.prompt_tokens, streamed=True)
        return stream(job, _chunks(job, readers, form, body.stream_options, n=n))
    with closing(job):
        choices = read_choices(await job.results(), readers, job, n=n)
    note(request, prompt_tokens=job.prompt_tokens, completion_tokens=sum(choice.count for choice in choices))
    return JSONResponse(form.whole(choices, n=n, prompt_tokens=job.prompt_tokens))


def read_choices(results: Mapping[Key, Progress], readers: Readers, job: Job, *, n: int) -> list[Choice]:
    """The answers to every context: all, or of more than ``n`` those of the highest log-probability a token."""
    found: dict[int, list[Choice]] = {}
    for key, progress in results.items():
        pieces = list(readers[key].read(progress, job.tops(key)))
        answer = progress.done[0] if progress.done else progress.open
        found.setdefault(key[0], []).append(
            Choice(
                0,
                "".join(piece.text for piece in pieces),
                tuple(token for piece in pieces for token in piece.tokens),
                replies.FINISHES[pieces[-1].finish or "length"],
                len(answer.ids),
                answer.logprob / max(1, len(answer.logprobs) + (answer.end_logprob is not None)),
            )
        )
    kept = [
        choice
        for context in sorted(found)
        for choice in (found[context] if len(found[context]) == n else sorted(found[context], key=_badness)[:n])
    ]
    return [choice.numbered(index) for index, choice in enumerate(kept)]


def _badness(choice: Choice) -> float:
    return -choice.mean_logprob


async def _chunks(
    job: Job, readers: Readers, form: Form, options: StreamOptions | None, *, n: int
) -> AsyncIterator[dict[str, Any]]:
    for chunk in form.openings(len(readers)):
        yield chunk
    counts: dict[Key, int] = {}
    async for key, progress in job.news():
        index = key[0] * n + key[1]
        counts[key] = sum(len(answer.ids) for answer in (*progress.done, progress.open))
        for piece in readers[key].read(progress, job.tops(key)):
            if piece.text or piece.tokens:
                yield form.chunk(index, key[0], piece)
            if piece.finish:
                yield form.ending(index, replies.FINISHES[piece.finish])
    if options and options.include_usage:
        yield form.usage(job.prompt_tokens, sum(counts.values()))


@router.post("/embeddings", responses={200: {"model": replies.Embeddings}})
async def embeddings(request: Request, body: EmbeddingRequest) -> JSONResponse:
    """A vector for each text: pooled hidden states of a model that fills blanks."""
    backend: Backend = request.app.state.backend
    adapter = backend.find_adapter(body.model)
    model = backend.require_blanks("an embedding")
    size = model.config.hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(400, f"this model's vectors have {size} dimensions", param="dimensions")
    texts = [body.input] if isinstance(body.input, str) else body.input
    if backend.settings.log_prompts:
        note(request, prompt=texts)
    vectors = await backend.offline(
        request,
        lambda: embed(model, backend.tokenizer, texts, pooling=body.pooling, layer=body.layer),
        adapter=adapter,
    )
    is_binary = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_binary else as_floats(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(len(backend.reader.read_any(text).context.ids) for text in texts)
    name = body.model or backend.settings.model_name
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})
