"""Replicas of a model on one or more machines, by Ray Serve.

Ray Serve starts the replicas, replaces those that die, and distributes the requests. Each replica is a process with a
whole model and the application of `gmask.serving.app`. One command starts them::

serve run gmask.serving.ray:build model=bundled num_replicas=2
"""

import asyncio
import inspect
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment

from gmask.checkpoints.load import load
from gmask.config import parse_yaml
from gmask.errors import GmaskError, nearest, one_line
from gmask.generation.encoding import find_format
from gmask.generation.engine import Engine, Request
from gmask.generation.settings import Sampling
from gmask.serving.app import create_app
from gmask.serving.settings import ServerSettings, default_model_name, environment_keys

LOADING = frozenset(inspect.signature(load).parameters) - {"name", "model_class"} | {"model"}
# No keys: Ray shows the arguments of a deployment to everybody who asks.
SERVER_FIELDS = frozenset(field.name for field in fields(ServerSettings)) - {"api_keys"}
OPTIONS = frozenset(
    name
    for name in inspect.signature(Deployment.options).parameters
    if not name.startswith("_") and name not in ("self", "func_or_class", "name", "version")
)

PROBE_SECONDS = 20.0  # limit on one token of an idle engine; Ray waits 30 s for a health check
STALL_SECONDS = 120.0  # limit on the time between steps of a busy engine; reading long contexts on a CPU takes a while


class EngineProbe:
    """Checks that an engine still answers."""

    def __init__(self, engine: Engine) -> None:
        context = find_format(engine.model, engine.tokenizer).encode("", ())
        sampling = Sampling(max_tokens=1)
        self.engine = engine
        self.request = Request(context=context, sampling=sampling, timeout=PROBE_SECONDS)
        self.work, self.since = (0, 0), time.monotonic()

    def check(self) -> None:
        """Makes an idle engine write one token; checks that a busy one has made a step lately.

        Raises:
            RuntimeError, TimeoutError, GmaskError: the engine does not answer.
        """
        counts = self.engine.counts()
        if not (counts.running or counts.waiting):
            (progress,) = self.engine.submit(self.request).wait(PROBE_SECONDS)
            if progress.end != "complete":
                raise RuntimeError(f"the engine writes no token: {progress.end}") from progress.error
        work = (counts.steps, counts.prompt_tokens)
        if work != self.work:
            self.work, self.since = work, time.monotonic()
        elif time.monotonic() - self.since > STALL_SECONDS:
            raise RuntimeError(f"the engine has {counts.running} rows and has done nothing for {STALL_SECONDS:.0f} s")


@serve.ingress()
class Replica:
    """One process with one model."""

    def __init__(self, loading: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        name = str(loading.get("model", "bundled"))
        others = {key: value for key, value in loading.items() if key != "model"}
        self.model, self.tokenizer = load(name, **others)
        named = {"model_name": default_model_name(name), **settings}
        self.settings = ServerSettings(api_keys=environment_keys(), **named)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the application; Ray calls this method by its name, and runs the application's lifespan."""
        app = create_app(self.model, self.tokenizer, settings=self.settings)
        self.engine_probe = EngineProbe(app.state.backend.engine)
        return app

    async def check_health(self) -> None:
        """Is called by Ray every few seconds; Ray replaces a replica after three errors."""
        await asyncio.to_thread(self.engine_probe.check)


DEPLOYMENT: Deployment = serve.deployment(
    Replica,
    name="gmask",
    max_ongoing_requests=64,  # of a replica: twice its engine's rows, so that requests are always waiting there
    max_queued_requests=256,  # of a proxy, for all replicas; further requests are refused at once
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    max_surge_percent=25,  # an update starts a new replica before it stops an old one, even if there is only one
    graceful_shutdown_timeout_s=330,  # longer than a request may take
    health_check_period_s=5,
)


def build(arguments: Mapping[str, Any]) -> Application:
    """Builds the Ray Serve application, for ``serve run gmask.serving.ray:build key=value ...`` and Serve config files.

    The API key is not an argument: each replica takes it from ``GMASK_API_KEY`` in its environment.

    Args:
        arguments: ``model`` and the other arguments of `gmask.load`; the fields of
            `gmask.serving.settings.ServerSettings`; and the options of a Ray Serve deployment, such as
            ``num_replicas``, ``autoscaling_config`` or ``ray_actor_options``. A text, as a command line gives it, is
            read as YAML.

    Raises:
        GmaskError: an unknown argument, or a value that does not fit.
    """
    known = LOADING | SERVER_FIELDS | OPTIONS
    for name in arguments:
        if name not in known:
            raise GmaskError(f"there is no argument {name!r}; the nearest is {nearest(name, known)!r}")
    values = {name: _read(value) for name, value in arguments.items()}
    settings = {name: values[name] for name in SERVER_FIELDS & values.keys()}
    ServerSettings(**settings)  # so that a mistake is reported here, and not by a remote process
    try:
        deployment = DEPLOYMENT.options(**{name: values[name] for name in OPTIONS & values.keys()})
    except (TypeError, ValueError) as error:
        raise GmaskError(f"Ray Serve does not take an option: {one_line(error)}") from error
    return deployment.bind({name: values[name] for name in LOADING & values.keys()}, settings)


def _read(value: Any) -> Any:
    """Reads a value: ``"2"`` is 2, ``"{num_cpus: 4}"`` a mapping; a list becomes a tuple, as in the settings."""
    try:
        read = parse_yaml(value) if isinstance(value, str) else value
    except GmaskError as error:
        raise GmaskError(f"{value!r} cannot be read as YAML ({error})") from error
    return tuple(read) if isinstance(read, list) else read
