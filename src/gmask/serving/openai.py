"""OpenAI's chats, completions and embeddings, and the published `POST /` of ChatGLM-6B.

Shape letters: T tokens of the text, C of a chunk of it, V vocabulary.

Source: THUDM/ChatGLM-6B api.py. As there, the answer's ``status`` repeats the HTTP status, and ``time`` is local. A
temperature of 0 is greedy here; it became 0.95 there.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from gmask.conversation import Conversation, History, read_content, read_conversation
from gmask.errors import GmaskError
from gmask.files import check_characters
from gmask.generation import constraints
from gmask.generation.answers import stable_answer, token_texts
from gmask.generation.chat import DEFAULTS
from gmask.generation.constraints import Constraint
from gmask.generation.embed import Embedder, Vectors, as_floats
from gmask.generation.encoding import Context, encode_plain
from gmask.generation.engine import SampleProgress
from gmask.generation.padding import log_softmax
from gmask.generation.settings import Sampling
from gmask.serving import replies
from gmask.serving.backend import STREAMED, Backend, Job, Key, find_backend, stream
from gmask.serving.middleware import ApiError, log_fields
from gmask.serving.replies import (
    ChatBuilder,
    CompletedSample,
    CompletionBuilder,
    IncrementalDetokenizer,
    ReplyBuilder,
    ScoredToken,
    StableText,
    json_response,
    spell_tokens,
)
from gmask.serving.schema import (
    Bookkeeping,
    ChatRequest,
    CompletionRequest,
    Constrained,
    EmbeddingRequest,
    PublishedRequest,
    RoundTexts,
    Sampled,
    StreamOptions,
)

openai_router = APIRouter(prefix="/v1", tags=["OpenAI"])
Readers = Mapping[Key, IncrementalDetokenizer]


@openai_router.get("/models", responses={200: {"model": replies.ModelList}})
async def list_models(request: Request) -> Response:
    """The model that is served, and it with each of its adapters."""
    backends: Sequence[Backend] = request.app.state.backends
    models = [_describe_model(backend, name) for backend in backends for name in backend.model_names]
    return json_response(replies.ModelList(object="list", data=models))


@openai_router.get("/models/{name:path}", responses={200: {"model": replies.Model}})
async def show_model(request: Request, name: str) -> Response:
    """The model of a name."""
    backend = find_backend(request.app.state.backends, name, wants="anything")
    return json_response(_describe_model(backend, name))


def _describe_model(backend: Backend, name: str) -> replies.Model:
    return replies.Model(id=name, object="model", created=backend.began, owned_by="gmask")


@openai_router.post("/chat/completions", responses={200: {"model": replies.ChatCompletion, "content": STREAMED}})
async def chat(request: Request, body: ChatRequest) -> Response:
    """The reply to a conversation."""
    backend = find_backend(request.app.state.backends, body.model, for_chat=True)
    backend.check_samples(body.n or 1)
    messages = [{"role": message.role, "content": message.content} for message in body.messages]
    conversation = read_question(messages, param="messages")
    wanted = body.max_completion_tokens or body.max_tokens
    longest = backend.positions
    if wanted is not None and wanted >= longest:
        raise ApiError(400, f"max_tokens {wanted} leaves no room for a prompt in {longest} tokens", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    prompt = await backend.fit(conversation, longest=longest, max_tokens=wanted)
    sampling = read_sampling(
        body,
        DEFAULTS,
        backend,
        max_tokens=wanted or min(longest - prompt.length, backend.longest_answer),
        top_logprobs=body.top_logprobs or 0,
        constraint=await asyncio.to_thread(read_constraint, body, backend),
    )
    if backend.settings.log_prompts:
        log_fields(request, prompt=[read_content(message["content"]) for message in messages])
    question = ApiPrompt(prompt.context, backend.format.stable_text)
    builder = ChatBuilder(_name(body, backend), logprobs=bool(body.logprobs), rounds_left_out=prompt.rounds_left_out)
    return await _answer(request, backend, body, builder, [question], sampling, n=body.n or 1)


def read_question(history: History | None, query: str | None = None, *, param: str) -> Conversation:
    """Reads a conversation that ends with a question. Raises `ApiError`, with the parameter, for anything else."""
    try:
        conversation = read_conversation(history, query)
        conversation.require_query()
    except GmaskError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error
    return conversation


@openai_router.post("/completions", responses={200: {"model": replies.Completion, "content": STREAMED}})
async def complete(request: Request, body: CompletionRequest) -> Response:
    """What follows a prompt or, with a suffix, what stands between the two.

    ``echo`` puts the prompt before the answer. With ``logprobs`` its tokens are scored from left to right, behind
    ``[gMASK] <sop>``: a context that is read in both directions has no chain of probabilities. The answer still reads
    the prompt in both directions.
    """
    backend = find_backend(request.app.state.backends, body.model)
    n = body.n or 1
    samples = max(body.best_of or n, n)
    backend.check_samples(samples * count_prompts(body))
    questions = await asyncio.to_thread(read_prompts, body, backend)
    if backend.settings.log_prompts:
        log_fields(request, prompt=[question.text for question in questions])
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 goes with echo: there is nothing to answer", param="max_tokens")
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
    builder = CompletionBuilder(
        _name(body, backend),
        logprobs=body.logprobs is not None,
        prompts=[question.text for question in questions],
        echoes=await _score_prompts(request, backend, questions, body) if body.echo else None,
    )
    if max_tokens == 0:
        assert builder.echoes is not None, "nothing is answered to a prompt that is echoed alone"
        prompt_tokens = sum(len(echo) + 2 for echo in builder.echoes)
        empty = [CompletedSample("", (), "length", 0, 0.0)] * (len(questions) * n)
        return json_response(builder.whole(empty, n=n, prompt_tokens=prompt_tokens))
    return await _answer(request, backend, body, builder, questions, sampling, n=n, samples=samples)


@dataclass(frozen=True, slots=True)
class ApiPrompt:
    """A prompt for the engine, and how its answer becomes text."""

    context: Context
    stable_text: StableText
    text: str = ""  # of the prompt, for echo
    ids: tuple[int, ...] = ()  # of this text

    def without_space(self) -> "ApiPrompt":
        """Returns the same without the leading space that a constraint permits before the answer."""
        return replace(self, stable_text=lambda text, is_whole: self.stable_text(text, is_whole).removeprefix(" "))


async def _score_prompts(
    request: Request, backend: Backend, questions: Sequence[ApiPrompt], body: CompletionRequest
) -> list[tuple[ScoredToken, ...]]:
    """Returns the tokens of the prompts with their log-probabilities; none if log-probabilities were not asked for."""
    if body.logprobs is None:
        return [()] * len(questions)
    scorings = [partial(score_text, backend, question.ids, top=body.logprobs) for question in questions]
    adapter = backend.find_adapter(body.model)
    return await backend.offline(
        request, lambda: [score() for score in scorings], adapter=adapter, timeout=body.timeout
    )


def _name(body: Bookkeeping, backend: Backend) -> str:
    return body.model or backend.settings.model_name


async def _answer(
    request: Request,
    backend: Backend,
    body: ChatRequest | CompletionRequest,
    builder: ReplyBuilder,
    questions: Sequence[ApiPrompt],
    sampling: Sampling,
    *,
    n: int,
    samples: int | None = None,
) -> Response:
    """Lets the engine write ``samples`` answers to each prompt, and sends the best ``n``, whole or streamed."""
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
        (context, sample): IncrementalDetokenizer(
            backend.tokenizer, [question.stable_text], sampling.stop, logprobs=builder.logprobs
        )
        for context, question in enumerate(questions)
        for sample in range(samples)
    }
    if body.stream:
        log_fields(request, prompt_tokens=job.prompt_tokens, streamed=True)
        return stream(job, _chunks(job, readers, builder, body.stream_options, n=n))
    with closing(job):
        found = read_samples(await job.results(), readers, job, n=n)
    log_fields(request, prompt_tokens=job.prompt_tokens, completion_tokens=sum(sample.count for sample in found))
    return json_response(builder.whole(found, n=n, prompt_tokens=job.prompt_tokens))


def read_samples(results: Mapping[Key, SampleProgress], readers: Readers, job: Job, *, n: int) -> list[CompletedSample]:
    """Returns the answers to every context; of more than ``n`` those with the highest log-probability per token."""
    found: dict[int, list[CompletedSample]] = {}
    for key, progress in results.items():
        deltas = list(readers[key].read(progress, job.top_logprobs[key]))
        answer = progress.done[0] if progress.done else progress.open
        found.setdefault(key[0], []).append(
            CompletedSample(
                "".join(delta.text for delta in deltas),
                tuple(token for delta in deltas for token in delta.tokens),
                deltas[-1].finish or "length",
                len(answer.ids),
                answer.logprob / max(1, len(answer.logprobs) + (answer.end_logprob is not None)),
            )
        )
    return [sample for context in sorted(found) for sample in _best(found[context], n)]


def _best(samples: Sequence[CompletedSample], n: int) -> Sequence[CompletedSample]:
    return samples if len(samples) == n else sorted(samples, key=lambda sample: -sample.mean_logprob)[:n]


async def _chunks(
    job: Job, readers: Readers, builder: ReplyBuilder, options: StreamOptions | None, *, n: int
) -> AsyncIterator[BaseModel]:
    for chunk in builder.openings(len(readers)):
        yield chunk
    counts: dict[Key, int] = {}
    async for key, progress in job.updates():
        index = key[0] * n + key[1]
        counts[key] = sum(len(answer.ids) for answer in (*progress.done, progress.open))
        for delta in readers[key].read(progress, job.top_logprobs[key]):
            if delta.text or delta.tokens:
                yield builder.chunk(index, key[0], delta)
            if delta.finish:
                yield builder.ending(index, delta.finish)
    if options and options.include_usage:
        yield builder.usage(job.prompt_tokens, sum(counts.values()))


@openai_router.post("/embeddings", responses={200: {"model": replies.Embeddings}})
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """A vector for each text: pooled hidden states of a model that fills blanks."""
    backend = find_backend(request.app.state.backends, body.model)
    model = backend.require_blanks("an embedding")
    size = model.config.hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(400, f"this model's vectors have {size} dimensions", param="dimensions")
    texts = [body.input] if isinstance(body.input, str) else body.input
    if backend.settings.log_prompts:
        log_fields(request, prompt=texts)

    def read() -> tuple[Vectors, int]:
        embedder = Embedder(model, backend.tokenizer, body.pooling, body.layer)
        contexts = [embedder.read(text) for text in texts]
        return embedder.embed(contexts), sum(len(context.ids) for context in contexts)

    vectors, tokens = await backend.offline(request, read, adapter=backend.find_adapter(body.model))
    is_binary = body.encoding_format == "base64"
    data = [
        replies.Embedding(
            object="embedding",
            index=index,
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_binary else as_floats(vector),
        )
        for index, vector in enumerate(vectors)
    ]
    usage = replies.Usage(prompt_tokens=tokens, total_tokens=tokens)
    return json_response(replies.Embeddings(object="list", data=data, model=_name(body, backend), usage=usage))


SAMPLED = ("temperature", "top_p", "top_k", "min_tokens", "seed", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "logit_bias")  # fmt: skip
"""Parameters that are passed to `Sampling` as they are."""


def read_sampling(
    request: Sampled, defaults: Mapping[str, Any], backend: Backend, *, max_tokens: int, **others: Any
) -> Sampling:
    """Returns the sampling settings of a request, with the endpoint's defaults for missing parameters.

    Raises:
        ApiError: more tokens than the server writes, a bias on a token that is not in the vocabulary, or another value
            that does not fit.
    """
    if max_tokens > backend.longest_answer:
        raise ApiError(
            400,
            f"max_tokens is {max_tokens}, but an answer has at most {backend.longest_answer} here",
            param="max_tokens",
        )
    size = len(backend.tokenizer)
    if unknown := [token for token in request.logit_bias or {} if not 0 <= token < size]:
        raise ApiError(400, f"token {unknown[0]} is not one of the {size} of this vocabulary", param="logit_bias")
    stated = {name: getattr(request, name) for name in SAMPLED if getattr(request, name) is not None}
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    values = {**defaults, **stated, "max_tokens": max_tokens, "stop": stop, **others}
    try:
        return Sampling(**values)
    except GmaskError as error:  # its text begins with the name of the parameter
        name = str(error).partition(" ")[0]
        raise ApiError(400, str(error), param=name if name in values else None) from error


def read_constraint(request: Constrained, backend: Backend) -> Constraint | None:
    """Compiles the constraint on an answer, if there is one. It may take a while: call it in a thread.

    Raises:
        GmaskError: a schema or pattern that is not supported.
        ApiError: several constraints.
    """
    tokenizer, size = backend.tokenizer, backend.model.config.vocab_size
    wanted = request.response_format if request.response_format and request.response_format.type != "text" else None
    if sum(one is not None for one in (wanted, request.guided_regex, request.guided_choice)) > 1:
        raise ApiError(400, "response_format, guided_regex and guided_choice exclude each other: give one")
    if request.guided_regex is not None:
        return constraints.regex(tokenizer, request.guided_regex, vocabulary_size=size)
    if request.guided_choice is not None:
        return constraints.choices(tokenizer, request.guided_choice, vocabulary_size=size)
    if wanted is None:
        return None
    if wanted.type == "json_object":
        return constraints.json_schema(tokenizer, {"type": "object"}, vocabulary_size=size)
    if wanted.json_schema is None:
        raise ApiError(400, "response_format of type json_schema needs a json_schema", param="response_format")
    return constraints.json_schema(tokenizer, wanted.json_schema.schema_, vocabulary_size=size)


def count_prompts(request: CompletionRequest) -> int:
    """Counts the prompts that `read_prompts` will return."""
    is_one = isinstance(request.prompt, str) or (bool(request.prompt) and isinstance(request.prompt[0], int))
    return 1 if is_one else len(request.prompt)


def read_prompts(request: CompletionRequest, backend: Backend) -> list[ApiPrompt]:
    """Reads the prompts of a completion: one, or several of the same kind."""
    prompts = request.prompt
    if isinstance(prompts, str):
        return [_read_text(prompts, request.suffix, backend)]
    if not prompts:
        raise ApiError(400, "prompt: there is none", param="prompt")
    if isinstance(prompts[0], int):
        return [_read_ids(prompts, request.suffix, backend)]
    if isinstance(prompts[0], str):
        return [_read_text(text, request.suffix, backend) for text in prompts]
    return [_read_ids(ids, request.suffix, backend) for ids in prompts]


def _read_text(text: str, suffix: str | None, backend: Backend) -> ApiPrompt:
    for one in (text, suffix or ""):
        check_characters(one, backend.positions, backend.tokenizer)
    ids = tuple(encode_plain(backend.tokenizer, text))
    if not backend.fills_blanks:
        if suffix is not None:
            backend.require_blanks("suffix")
        return ApiPrompt(backend.format.encode(text, ()), lambda reply, _: reply, text, ids)
    blank = "[MASK]" if suffix is not None or "[gMASK]" not in backend.reader.blank_ids else "[gMASK]"
    blanked = backend.reader.read(escape(text, backend) + blank + escape(suffix or "", backend))
    return ApiPrompt(blanked.context, stable_answer(blanked, 0), text, ids)


def escape(text: str, backend: Backend) -> str:
    """Escapes special tokens in a text, and backslashes at its end, behind which a blank may follow."""
    escaped = backend.reader.pattern.sub(lambda match: 2 * match[1] + "\\" + match[2], text)
    return escaped + "\\" * (len(text) - len(text.rstrip("\\")))


def _read_ids(ids: Sequence[int], suffix: str | None, backend: Backend) -> ApiPrompt:
    if suffix is not None:
        raise ApiError(400, "suffix goes with a prompt that is text", param="suffix")
    if len(ids) > backend.positions:
        raise ApiError(
            400, f"a prompt has {len(ids)} tokens; the model has {backend.positions} positions", param="prompt"
        )
    size = len(backend.tokenizer)
    if unknown := [token for token in ids if token >= size]:
        raise ApiError(400, f"token {unknown[0]} is not one of the {size} of this vocabulary", param="prompt")
    special = backend.format.special
    if forbidden := set(ids) & {special.mask, special.smask, special.gmask, special.sop, special.eop}:
        raise ApiError(400, f"token {min(forbidden)} is a blank or an end, which the server sets", param="prompt")
    head = (special.cls,) if backend.fills_blanks and ids[0] != special.cls else ()
    context = Context((*head, *ids, special.gmask), (len(head) + len(ids),))
    text = backend.tokenizer.decode(list(ids), skip_special_tokens=True)
    return ApiPrompt(context, lambda answer, _: answer, text, tuple(ids))


published_router = APIRouter(tags=["ChatGLM-6B"])
MAX_LENGTH = 2048
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class PublishedReply(BaseModel):
    """The reply, and the history with it."""

    response: str
    history: list[RoundTexts]
    status: int
    time: str


@published_router.post("/", responses={200: {"model": PublishedReply}})
async def reply(request: Request, body: PublishedRequest) -> Response:
    """The reply to a prompt behind its history."""
    backend = find_backend(request.app.state.backends, None, for_chat=True)
    conversation = read_question(body.history, body.prompt, param="history")
    longest = min(body.max_length or MAX_LENGTH, backend.positions)
    prompt = await backend.fit(conversation, longest=longest, max_tokens=None)
    stated = {name: value for name in ("temperature", "top_p") if (value := getattr(body, name)) is not None}
    max_tokens = min(longest - prompt.length, backend.longest_answer)
    sampling = Sampling(**{**DEFAULTS, **stated, "max_tokens": max_tokens})
    if backend.settings.log_prompts:
        log_fields(request, prompt=body.prompt)
    with closing(backend.submit(request, [prompt.context], sampling)) as job:
        reader = IncrementalDetokenizer(backend.tokenizer, [backend.format.stable_text], (), logprobs=False)
        (sample,) = read_samples(await job.results(), {(0, 0): reader}, job, n=1)
    log_fields(request, prompt_tokens=job.prompt_tokens, completion_tokens=sample.count)
    history = [[*texts] for texts in (*conversation.rounds, (conversation.require_query(), sample.text))]
    now = time.strftime(TIME_FORMAT)
    return json_response(PublishedReply(response=sample.text, history=history, status=200, time=now))


CHUNK = 64
"""Tokens whose log-probabilities over the whole vocabulary are in memory at a time: 32 MiB for a ChatGLM-6B."""


def score_text(backend: Backend, ids: Sequence[int], *, top: int) -> tuple[ScoredToken, ...]:
    """Scores a text as the answer to a lone blank: ``[gMASK] <sop> text``, with ``[CLS]`` before it for a GLM.

    Args:
        ids: of the T tokens of the text.
        top: the number of most probable tokens to return beside each one.

    Raises:
        GmaskError: more tokens than the model has positions.
    """
    special, model = backend.format.special, backend.model
    if len(ids) >= backend.positions:
        raise GmaskError(f"the text has {len(ids)} tokens; the model's {backend.positions} positions hold fewer")
    if not ids:
        return ()
    head = [*([special.cls] if backend.fills_blanks else []), special.gmask, special.sop]
    scored: list[ScoredToken] = []
    texts = iter(token_texts(ids, backend.tokenizer))
    with torch.inference_mode():
        input_ids = torch.tensor([[*head, *ids[:-1]]], device=model.device)
        layout = model.read_prompt_layout(input_ids, None)
        outputs = model.base_model(input_ids=input_ids, layout=layout, use_cache=False)
        states = outputs.last_hidden_state[0, len(head) - 1 :]
        targets = torch.tensor(ids, device=model.device)
        for chunk, wanted in zip(torch.split(states, CHUNK), torch.split(targets, CHUNK), strict=True):
            logprobs = log_softmax(model.lm_head(chunk))  # C V
            chosen = logprobs.gather(-1, wanted[:, None])[:, 0].tolist()
            best = logprobs.topk(top, dim=-1)
            for logprob, row, values in zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True):
                tokens = spell_tokens(zip(row, values, strict=True), backend.tokenizer)
                scored.append(ScoredToken(next(texts), logprob, tokens))
    return tuple(scored)
