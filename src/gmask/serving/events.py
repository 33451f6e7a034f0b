"""How is an answer streamed? As server-sent events, each a JSON object, the last one ``[DONE]``."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from gmask.serving.backend import Job
from gmask.serving.errors import as_api_error

STREAMED: dict[str, Any] = {
    "text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}
}
"""What the documentation says of an answer that may be streamed."""


def stream(job: Job, events: AsyncIterator[Mapping[str, Any]]) -> StreamingResponse:
    """The response of a job. An error on the way is an event of its own, for the status has been sent by then."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_lines(job, events), media_type="text/event-stream", headers=headers)


async def _lines(job: Job, events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    try:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield _line(event)
    except Exception as error:
        yield _line(as_api_error(error).body())
    else:
        yield "data: [DONE]\n\n"
    finally:
        job.close()


def _line(event: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
