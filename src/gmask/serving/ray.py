"""Several replicas of a model, on one machine or on many: Ray Serve.

Ray Serve starts the replicas, replaces those that die and spreads the requests; each replica is a process that holds a
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
from gmask.generation.engine import Engine, Request
from gmask.generation.prompts import find_format
from gmask.generation.settings import Sampling
from gmask.serving.app import create_app
from gmask.serving.settings import ServerSettings, called, environment_keys

LOADING = frozenset(inspect.signature(load).parameters) - {"name", "model_class"} | {"model"}
# No keys: Ray shows the arguments of a deployment to everybody who asks.
SERVER_FIELDS = frozenset(field.name for field in fields(ServerSettings)) - {"api_keys"}
OPTIONS = frozenset(
    name
    for name in inspect.signature(Deployment.options).parameters
    if not name.startswith("_") and name not in ("self", "func_or_class", "name", "version")
)

PROBE_SECONDS = 20.0  # that an idle engine may take for one token; Ray waits 30 for a health check
STALL_SECONDS = 120.0  # that a busy one may go without a step: time to read a long batch of contexts on a CPU


class EngineProbe:
    """Whether an engine still answers."""

    def __init__(self, engine: Engine) -> None:
        context = find_format(engine.model, engine.tokenizer).encode("", ())
        sampling = Sampling(max_tokens=1)
        self.engine = engine
        self.request = Request(context=context, sampling=sampling, timeout=PROBE_SECONDS)
        self.work, self.since = (0, 0), time.monotonic()

    def check(self) -> None:
        """Has an idle engine write one token; of a busy one, looks whether it has done anything lately.

        Raises:
            RuntimeError, TimeoutError, GmaskError: it does not answer.
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
        self.settings = ServerSettings(api_keys=environment_keys(), **{"model_name": called(name), **settings})

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray serves; it calls this by its name, and starts and ends the application's lifespan."""
        app = create_app(self.model, self.tokenizer, settings=self.settings)
        self.engine_probe = EngineProbe(app.state.backend.engine)
        return app

    async def check_health(self) -> None:
        """Ray asks this every few seconds, and replaces a replica that has raised an error three times."""
        await asyncio.to_thread(self.engine_probe.check)


DEPLOYMENT: Deployment = serve.deployment(
    Replica,
    name="gmask",
    max_ongoing_requests=64,  # of a replica: twice its engine's rows, so that the engine need not wait for the router
    max_queued_requests=256,  # of a proxy, for all replicas; what comes above is refused at once
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    max_surge_percent=25,  # an update starts a new replica before it stops an old one, even if there is only one
    graceful_shutdown_timeout_s=330,  # longer than a request may take
    health_check_period_s=5,
)


def build(arguments: Mapping[str, Any]) -> Application:
    """What ``serve run gmask.serving.ray:build key=value ...`` and the ``args`` of a Serve config file start.

    An API key is no argument: each replica takes it from ``GMASK_API_KEY`` in its environment.

    Args:
        arguments: of three kinds, told apart by their names: ``model`` and the other arguments of `gmask.load`; the
            fields of `gmask.serving.settings.ServerSettings`; the options of a Ray Serve deployment, such as
            ``num_replicas``, ``autoscaling_config`` or ``ray_actor_options``. Text, as a command line gives it, is
            read as YAML.

    Raises:
        GmaskError: an argument that is none of these, or a value that does not fit.
    """
    known = LOADING | SERVER_FIELDS | OPTIONS
    for name in arguments:
        if name not in known:
            raise GmaskError(f"there is no argument {name!r}; the nearest is {nearest(name, known)!r}")
    values = {name: _read(value) for name, value in arguments.items()}
    settings = {name: values[name] for name in SERVER_FIELDS & values.keys()}
    ServerSettings(**settings)  # a mistake is told here, and not by a process far away
    try:
        deployment = DEPLOYMENT.options(**{name: values[name] for name in OPTIONS & values.keys()})
    except (TypeError, ValueError) as error:
        raise GmaskError(f"Ray Serve does not take an option: {one_line(error)}") from error
    return deployment.bind({name: values[name] for name in LOADING & values.keys()}, settings)


def _read(value: Any) -> Any:
    """``"2"`` is 2, ``"{num_cpus: 4}"`` a mapping, and a list a tuple, as the settings have them."""
    try:
        read = parse_yaml(value) if isinstance(value, str) else value
    except GmaskError as error:
        raise GmaskError(f"{value!r} cannot be read as YAML ({error})") from error
    return tuple(read) if isinstance(read, list) else read
