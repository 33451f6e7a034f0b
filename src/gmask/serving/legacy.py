"""How does the API answer that came with ChatGLM-6B, for the programs that still speak it?

Source: THUDM/ChatGLM-6B api.py. As there, the answer's ``status`` repeats the HTTP status, and ``time`` is local. A
temperature of 0 is greedy here; it became 0.95 there.
"""

import asyncio
import time
from contextlib import closing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from gmask.generation.chat import DEFAULTS
from gmask.generation.sampling import SamplingParameters
from gmask.serving.backend import Backend
from gmask.serving.logs import note
from gmask.serving.prompts import fit_chat
from gmask.serving.samples import SampleReader
from gmask.serving.schema import PublishedRequest, Round

router = APIRouter(tags=["ChatGLM-6B"])

MAX_LENGTH = 2048
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class PublishedReply(BaseModel):
    """The reply, and the history with it."""

    response: str
    history: list[Round]
    status: int
    time: str


@router.post("/", responses={200: {"model": PublishedReply}})
async def reply(request: Request, body: PublishedRequest) -> JSONResponse:
    """The reply to a prompt behind its history."""
    backend: Backend = request.app.state.backend
    rounds = [(asked, answered) for asked, answered in body.history or ()]
    longest = min(body.max_length or MAX_LENGTH, backend.positions)
    prompt = await asyncio.to_thread(fit_chat, body.prompt, rounds, backend, longest=longest, max_tokens=None)
    stated = {name: value for name in ("temperature", "top_p") if (value := getattr(body, name)) is not None}
    max_tokens = min(longest - prompt.length, backend.longest_answer)
    sampling = SamplingParameters(**{**DEFAULTS, **stated, "max_tokens": max_tokens})
    if backend.settings.log_prompts:
        note(request, prompt=body.prompt)
    clean = backend.format.clean
    reader = SampleReader(backend.tokenizer, [lambda text, _: clean(text)], (), logprobs=False)
    with closing(backend.submit(request, [prompt.context], sampling)) as job:
        (progress,) = (await job.results()).values()
    text = "".join(piece.text for piece in reader.read(progress, {}))
    answer = progress.done[0] if progress.done else progress.open
    note(request, prompt_tokens=job.prompt_tokens, completion_tokens=len(answer.ids))
    now = time.strftime(TIME_FORMAT)
    history = [*rounds, (body.prompt, text)]
    return JSONResponse({"response": text, "history": history, "status": 200, "time": now})
