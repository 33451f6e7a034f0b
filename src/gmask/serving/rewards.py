"""Rewards over HTTP: /classify as of vLLM, and /v1/classify as of SGLang, which trainers such as verl ask for rewards.

Source: vLLM and SGLang, the documentation of their classification API.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gmask.conversation import read_conversation
from gmask.errors import GmaskError
from gmask.files import check_characters
from gmask.generation.reward import RewardScorer
from gmask.serving import replies
from gmask.serving.backend import Backend, find_backend
from gmask.serving.middleware import ApiError, log_fields
from gmask.serving.replies import json_response
from gmask.serving.schema import ChatMessage, ClassifyRequest, RatedConversation
from gmask.tasks.preferences import Question

MAX_RATED = 1024
"""Answers of a request; each is tokenized before the first one is rewarded."""

rewards_router = APIRouter(tags=["Rewards"])


@rewards_router.post("/classify", responses={200: {"model": replies.Classification}})
@rewards_router.post("/v1/classify", responses={200: {"model": replies.Classification}})
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """The reward of each answer, as ``gmask score --reward`` gives it; in ``probs``, where clients look for it."""
    backend = find_backend(request.app.state.backends, body.model, wants="rewards")
    scorer = RewardScorer(backend.model, backend.tokenizer)
    entries = _entries(body)
    if backend.settings.log_prompts:
        log_fields(request, prompt=body.model_dump(include={"input", "messages"}, exclude_unset=True))
    rows = await asyncio.to_thread(lambda: [_read(entry, name, scorer, backend) for name, entry in entries])
    rewards = await backend.offline(request, lambda: scorer.score_ids(rows), timeout=body.timeout)
    tokens = sum(map(len, rows))
    log_fields(request, prompt_tokens=tokens)
    label = (backend.model.config.id2label or {}).get(0)
    data = [
        replies.RatedAnswer(
            index=index, label=label, probs=[sigmoid(value) if body.use_activation else value], num_classes=1
        )
        for index, value in enumerate(rewards)
    ]
    reply = replies.Classification(
        id=f"classify-{uuid.uuid4().hex}",
        object="list",
        created=int(time.time()),
        model=body.model or backend.settings.model_name,
        data=data,
        usage=replies.count_usage(tokens, 0),
    )
    return json_response(reply)


def sigmoid(value: float) -> float:
    """Of a number of any size."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _entries(body: ClassifyRequest) -> list[tuple[str, Any]]:
    """What is to be rewarded, each with the name of its parameter."""
    given = body.input
    if (given is None) == (body.messages is None):
        raise ApiError(400, "give one of input and messages", param="input")
    if given is None:
        return [("messages", body.messages)]
    if isinstance(given, str) or isinstance(given[0], int):
        return [("input", given)]
    if len(given) > MAX_RATED:
        raise ApiError(400, f"{len(given)} answers are to be rewarded; at most {MAX_RATED} at once", param="input")
    return [(f"input.{index}", one) for index, one in enumerate(given)]


def _read(entry: Any, name: str, scorer: RewardScorer, backend: Backend) -> tuple[int, ...]:
    """The row of ids of a prompt with its answer. Raises `ApiError`, with the parameter, for what cannot be one."""
    try:
        if isinstance(entry, RatedConversation):
            return _read_messages(entry.messages, scorer, backend)
        if isinstance(entry, str):
            check_characters(entry, backend.positions, backend.tokenizer)
            return _read_ids(backend.tokenizer(entry, add_special_tokens=False)["input_ids"], scorer, backend)
        if isinstance(entry[0], ChatMessage):
            return _read_messages(entry, scorer, backend)
        return _read_ids(entry, scorer, backend)
    except GmaskError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from error


def _read_messages(messages: Sequence[ChatMessage], scorer: RewardScorer, backend: Backend) -> tuple[int, ...]:
    conversation = read_conversation([{"role": one.role, "content": one.content} for one in messages])
    if conversation.query is not None or not conversation.rounds:
        raise GmaskError("the last message has to be the answer of the assistant, which is rewarded")
    *rounds, (text, answer) = conversation.rounds
    if not answer.strip():
        raise GmaskError("the answer is empty: there is nothing to reward")
    for one in (text, answer):
        check_characters(one, backend.positions, backend.tokenizer)
    return scorer.read_row(Question(text, tuple(rounds)), answer)


def _read_ids(ids: Sequence[int], scorer: RewardScorer, backend: Backend) -> tuple[int, ...]:
    """Of a text that the chat template made, or of its ids: one prompt with its blank and ``<sop>``, and an answer."""
    special, size = scorer.encoder.special, len(backend.tokenizer)
    if unknown := [token for token in ids if token >= size]:
        raise GmaskError(f"token {unknown[0]} is not one of the {size} of this vocabulary")
    if special.sop not in ids:
        raise GmaskError(
            "there is no <sop>, behind which the answer stands: make it by tokenizer.apply_chat_template, or send "
            "messages"
        )
    end = list(ids).index(special.sop) + 1
    head = (special.cls,) if backend.is_glm and ids[0] != special.cls else ()  # clients leave the first token out
    return scorer.read_row(Question(ids=(*head, *ids[:end])), tuple(ids[end:]))
