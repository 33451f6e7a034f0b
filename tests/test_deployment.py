"""Do replicas under Ray Serve answer, stream, outlive a killed one and change without a lost request?

The cluster is a real one on this machine, and the commands are those of docs/how-to/deploy.md.
"""

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import gmask

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own configuration classes
]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TOKEN = secrets.token_hex(32)  # without one, Ray takes or makes that of the user's home
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
}
MAX_TOKENS = 8
PROMPTS = [
    "The old man walked down to the",
    "She opened the door and saw",
    "In the middle of the night",
    "The children went to the river",
    "从前有一个",
    "今天的天气",
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, *, timeout: float = 600) -> Any:
    """The first true value of ``condition``, asked until then."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"in {timeout:.0f} s: not {what}"
        time.sleep(0.2)
    return value


def send(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}  # which only Ray asks for
        connection.request(method, path, body and json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()


def completion(prompt: str, **others: Any) -> dict[str, Any]:
    return {"model": "bundled", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, **others}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of one machine with one application."""

    dashboard: int  # its port
    port: int  # of the application
    folder: Path

    def deploy(self, *, args: dict[str, Any] | None = None, **options: Any) -> None:
        """``serve deploy`` with the shipped file, changed where a test on a small machine needs it."""
        config = yaml.safe_load((ROOT / "docker/ray-serve.yaml").read_text("utf-8"))
        config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        (application,) = config["applications"]
        application["args"].update(args or {})
        (deployment,) = application["deployments"]
        if "num_replicas" in options:
            del deployment["autoscaling_config"]
        deployment.update(options)
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config), "utf-8")
        command = [BIN / "serve", "deploy", "-a", f"http://127.0.0.1:{self.dashboard}", path]

        def is_taken() -> bool:  # a machine that is busy with a start is given time
            return subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 0

        wait_for(is_taken, "a deployment that the cluster takes")

    def application(self) -> dict[str, Any]:
        status, body, _ = send(self.dashboard, "GET", "/api/serve/applications/")
        assert status == 200, body
        return dict(json.loads(body)["applications"].get("gmask", {}))

    def replicas(self) -> set[int]:
        """The process ids of the running replicas; none while the application is not up as it was asked for."""
        application = self.application()
        if application.get("status") != "RUNNING":
            return set()
        found = application["deployments"]["gmask"]["replicas"]
        return {replica["pid"] for replica in found if replica["state"] == "RUNNING"}

    def wait_for_replicas(self, count: int, *, other_than: set[int] = frozenset()) -> set[int]:
        """Their process ids, once so many run and none is one of those."""

        def are_there() -> set[int] | None:
            pids = self.replicas()
            return pids if len(pids) == count and not pids & other_than else None

        return set(wait_for(are_there, f"{count} replicas"))


def start_ray(folder: str, dashboard: int) -> subprocess.Popen[bytes]:
    command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus", "4"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(free_port()), "--dashboard-port", str(dashboard)]
    command += ["--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())]
    command += ["--object-store-memory", "100000000", "--temp-dir", folder]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def end(ray: subprocess.Popen[bytes]) -> None:
    """Ends a cluster and, at the latest after a minute, every process of it."""
    processes = psutil.Process(ray.pid).children(recursive=True)
    ray.terminate()
    try:
        ray.wait(timeout=600)
    except subprocess.TimeoutExpired:
        ray.kill()
        ray.wait()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two replicas of the bundled model."""
    # Not pytest's own folder: the path of a Unix socket has room for 107 bytes, and Ray takes most of them.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(dashboard=free_port(), port=free_port(), folder=Path(folder))
        ray = start_ray(folder, cluster.dashboard)
        try:
            wait_for(lambda: is_listening(cluster.dashboard), "a cluster")
            cluster.deploy(num_replicas=2)
            cluster.wait_for_replicas(2)
            yield cluster
        finally:
            end(ray)


def is_listening(port: int) -> bool:
    try:
        return send(port, "GET", "/api/serve/applications/")[0] == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What the model writes after each prompt, without a server."""
    model, tokenizer = gmask.load("bundled", device="cpu")
    filled = gmask.infill(model, tokenizer, [f"{prompt}[gMASK]" for prompt in PROMPTS], max_tokens=MAX_TOKENS)
    return {prompt: one.blanks[0].text for prompt, one in zip(PROMPTS, filled, strict=True)}


@dataclass
class Load:
    """Clients that ask without a pause, and again if they are refused or cut off."""

    port: int
    expected: dict[str, str]
    clients: int = 4
    outcomes: Counter[str] = field(default_factory=Counter)  # of single tries: the status, or the name of an error
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # not answered in 60 tries
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._ask_on, args=(k,)) for k in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_answers(self, count: int) -> None:
        """Until so many more requests were answered."""
        goal = self.outcomes["200"] + count
        wait_for(lambda: self.outcomes["200"] >= goal, f"{count} more answers: {self.outcomes}")

    def _ask_on(self, client: int) -> None:
        turn = client
        while not self._is_over.is_set():
            self._ask(PROMPTS[turn % len(PROMPTS)])
            turn += 1

    def _ask(self, prompt: str) -> None:
        for _ in range(60):
            try:
                status, body, _headers = send(self.port, "POST", "/v1/completions", completion(prompt))
            except (OSError, http.client.HTTPException) as error:
                self.outcomes[type(error).__name__] += 1
            else:
                self.outcomes[str(status)] += 1
                if status == 200:
                    text = json.loads(body)["choices"][0]["text"]
                    if text != self.expected[prompt]:
                        self.wrong.append(f"{prompt!r}: {text!r}")
                    return
            time.sleep(0.5)
        self.lost.append(prompt)


def test_both_replicas_give_the_answers_of_the_model_alone(cluster: Cluster, expected: dict[str, str]) -> None:
    with Load(cluster.port, expected) as load:
        load.wait_for_answers(24)
    assert (load.wrong, load.lost) == ([], [])
    assert set(load.outcomes) == {"200"}


def test_an_answer_streams_through_the_proxy(cluster: Cluster, expected: dict[str, str]) -> None:
    prompt = PROMPTS[0]
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=600)
    body = json.dumps(completion(prompt, stream=True))
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.headers.get_content_type() == "text/event-stream"
    events = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    connection.close()
    assert events.pop() == b"[DONE]"
    pieces = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == expected[prompt]


def test_a_killed_replica_loses_no_request_and_is_replaced(cluster: Cluster, expected: dict[str, str]) -> None:
    before = cluster.wait_for_replicas(2)
    victim = min(before)
    with Load(cluster.port, expected) as load:
        load.wait_for_answers(8)
        os.kill(victim, signal.SIGKILL)
        load.wait_for_answers(8)  # of the other one
        cluster.wait_for_replicas(2, other_than={victim})
        load.wait_for_answers(24)
    assert (load.wrong, load.lost) == ([], [])
    failed = sum(count for outcome, count in load.outcomes.items() if outcome != "200")
    assert failed <= load.clients, f"more than what the dead replica held: {load.outcomes}"


def test_an_update_replaces_all_replicas_without_a_failed_request(cluster: Cluster, expected: dict[str, str]) -> None:
    before = cluster.wait_for_replicas(2)
    with Load(cluster.port, expected) as load:
        load.wait_for_answers(8)
        cluster.deploy(args={"max_samples": 8}, num_replicas=2)
        cluster.wait_for_replicas(2, other_than=before)
        load.wait_for_answers(8)
    assert (load.wrong, load.lost) == ([], [])
    assert set(load.outcomes) == {"200"}


def test_what_is_too_much_is_refused_with_a_time_to_come_back(cluster: Cluster, expected: dict[str, str]) -> None:
    cluster.deploy(num_replicas=1, max_ongoing_requests=1, max_queued_requests=1)
    cluster.wait_for_replicas(1)
    with Load(cluster.port, expected, clients=6) as load:
        wait_for(lambda: load.outcomes["429"], "a refusal")
        refusals = [send(cluster.port, "POST", "/v1/completions", completion(PROMPTS[0])) for _ in range(20)]
    assert (load.wrong, load.lost) == ([], [])
    assert set(load.outcomes) == {"200", "429"}
    assert {headers.get("retry-after") for status, _, headers in refusals if status == 429} == {"1"}


def test_a_mistaken_argument_is_told_with_the_nearest_name() -> None:
    from gmask.serving.ray import build

    with pytest.raises(gmask.GmaskError, match="no argument 'num_replica'; the nearest is 'num_replicas'"):
        build({"num_replica": "2"})
    with pytest.raises(gmask.GmaskError, match=r"Ray Serve does not take an option: .*num_replicas"):
        build({"num_replicas": "-3"})
    with pytest.raises(gmask.GmaskError, match="max_rows is 0: it must be above 0"):
        build({"max_rows": "0"})
    with pytest.raises(gmask.GmaskError, match="cannot be read as YAML"):
        build({"ray_actor_options": "{num_cpus: 1"})
    with pytest.raises(gmask.GmaskError, match="no argument 'api_keys'"):  # Ray would show it
        build({"api_keys": "[secret]"})


def test_an_engine_is_healthy_while_it_writes_and_no_longer(
    build_glm: Callable[..., gmask.GLMForConditionalGeneration], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gmask.generation.engine import Engine
    from gmask.serving import ray as deployment

    _, tokenizer = gmask.load("bundled", device="cpu")
    model = build_glm(vocab_size=len(tokenizer))
    engine = Engine(model, tokenizer)
    probe = deployment.EngineProbe(engine)
    try:
        probe.check()
        probe.check()
        assert engine.counts().answer_tokens == 2

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(model, "forward", fail)
        with pytest.raises(RuntimeError, match="the engine writes no token: failed"):
            probe.check()
    finally:
        engine.close(drain=False)
    with pytest.raises(gmask.GmaskError, match="closed"):
        probe.check()
