"""Does a server stay right, whole and small under mixed and hostile traffic?

    python benchmarks/soak.py [--requests 10000] [--clients 24] [--seed 0] [--json]

Starts ``gmask serve`` with the bundled model and sends it, from many clients at once: texts of all lengths with one to
four blanks, at once or streamed; streams that are read slowly, or left in the middle; connections that break before
the answer; bodies that are no JSON, lack a field, ask for too much, or are too large. Every answer that comes is
compared with `gmask.infill` in this process; the memory of the server is read all along, and in the end no row may run
and no request wait. Ends with 1 if anything is wrong.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import psutil

import gmask
from machine import describe_machine

WORDS = (
    "the",
    "old",
    "man",
    "went",
    "to",
    "a",
    "river",
    "house",
    "and",
    "saw",
    "nothing",
    "was",
    "there",
    "他",
    "今天",
    "天气",
)
KINDS = {"whole": 50, "streamed": 15, "slow": 3, "left": 12, "broken": 8, "malformed": 12}
"""How often each kind of request comes, in hundredths."""


def make_texts(count: int, seed: int) -> list[tuple[str, int]]:
    """Texts with blanks, and how many tokens an answer may have."""
    dice = random.Random(seed)
    texts = []
    for _ in range(count):
        words = dice.choices(WORDS, k=dice.choice((1, 4, 12, 40, 120)))
        for _ in range(dice.randint(1, 4)):
            words.insert(dice.randint(0, len(words)), "[MASK]")
        texts.append((" ".join(words), dice.choice((1, 3, 8, 24))))
    return texts


def answer_offline(texts: Sequence[tuple[str, int]]) -> list[str]:
    model, tokenizer = gmask.load("bundled", device="cpu")
    return [gmask.infill(model, tokenizer, text, max_tokens=most).text for text, most in texts]


class Server:
    """``gmask serve`` in a process of its own."""

    def __init__(self, clients: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "gmask",
            "serve",
            "--port",
            str(self.port),
            "--set",
            f"max_queue={4 * clients}",
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{self.port}"
        until = time.monotonic() + 120
        while not self._is_ready():
            assert time.monotonic() < until and self.process.poll() is None, "the server does not start"
            time.sleep(0.3)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def resident(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b"{", 400),
    (b"[]", 400),
    (b'{"text": 3}', 400),
    (b'{"text": "no blank"}', 400),
    (b'{"text": "[MASK]", "nonsense": 1}', 400),
    (b'{"text": "[MASK]", "n": 100000}', 400),
    (b'{"text": "[MASK]", "max_tokens": 100000000}', 400),
    (b'{"text": "' + b"a " * 4000 + b'[MASK]"}', 400),
    (b"\xff\xfe\x00", 400),
    (b"x" * (2 << 20), 413),
)


class Traffic:
    """The requests of one run."""

    def __init__(self, server: Server, texts: Sequence[tuple[str, int]], answers: Sequence[str], seed: int) -> None:
        self.server, self.texts, self.answers = server, texts, answers
        self.dice = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.left = 0

    async def run(self, requests: int, clients: int) -> list[tuple[int, int]]:
        """Sends all; returns the resident bytes of the server by requests done."""
        self.left = requests
        memory: list[tuple[int, int]] = []
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120, limits=limits) as client:
            workers = [asyncio.create_task(self._work(client)) for _ in range(clients)]
            while not all(worker.done() for worker in workers):
                memory.append((requests - self.left, self.server.resident()))
                await asyncio.sleep(1)
            await asyncio.gather(*workers)
        memory.append((requests, self.server.resident()))
        return memory

    async def _work(self, client: httpx.AsyncClient) -> None:
        while self.left > 0:
            self.left -= 1
            (kind,) = self.dice.choices(list(KINDS), list(KINDS.values()))
            index = self.dice.randrange(len(self.texts))
            try:
                outcome = await getattr(self, f"_send_{kind}")(client, index)
            except httpx.HTTPError as error:
                outcome = f"failed: {type(error).__name__}"
                self.wrong.append(f"{kind}: {error!r}")
            self.outcomes[f"{kind}: {outcome}"] += 1

    def _body(self, index: int, **more: Any) -> dict[str, Any]:
        text, most = self.texts[index]
        return {"text": text, "max_tokens": most, **more}

    def _compare(self, index: int, text: str) -> str:
        if text == self.answers[index]:
            return "right"
        self.wrong.append(f"{self.texts[index]}: {text!r}, not {self.answers[index]!r}")
        return "wrong"

    async def _send_whole(self, client: httpx.AsyncClient, index: int) -> str:
        response = await client.post("/v1/infill", json=self._body(index))
        if response.status_code == 429:
            return "429"
        return self._compare(index, response.json()["text"])

    async def _read_stream(self, client: httpx.AsyncClient, index: int, *, pause: float, most: int | None) -> str:
        text, count = None, 0
        async with client.stream("POST", "/v1/infill", json=self._body(index, stream=True)) as response:
            if response.status_code == 429:
                return "429"
            async for line in response.aiter_lines():
                count += 1
                if most is not None and count > most:
                    return "left"
                await asyncio.sleep(pause)
                if line.startswith("data: {"):
                    text = json.loads(line[6:]).get("text", text)
        assert text is not None, "a stream without an end"
        return self._compare(index, text)

    async def _send_streamed(self, client: httpx.AsyncClient, index: int) -> str:
        return await self._read_stream(client, index, pause=0, most=None)

    async def _send_slow(self, client: httpx.AsyncClient, index: int) -> str:
        return await self._read_stream(client, index, pause=0.05, most=None)

    async def _send_left(self, client: httpx.AsyncClient, index: int) -> str:
        return await self._read_stream(client, index, pause=0, most=self.dice.randint(0, 4))

    async def _send_broken(self, client: httpx.AsyncClient, index: int) -> str:
        """Hangs up before the answer, or within the request."""
        body = json.dumps(self._body(index)).encode()
        lines = ["POST /v1/infill HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        head = "\r\n".join([*lines, "Content-Type: application/json"])
        _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        sent = head.encode() + b"\r\n\r\n" + body
        writer.write(sent[: self.dice.randint(1, len(sent))] if self.dice.random() < 0.5 else sent)
        await writer.drain()
        await asyncio.sleep(self.dice.random() * 0.05)
        writer.transport.abort()
        return "hung up"

    async def _send_malformed(self, client: httpx.AsyncClient, index: int) -> str:
        body, expected = self.dice.choice(MALFORMED)
        response = await client.post("/v1/infill", content=body, headers={"Content-Type": "application/json"})
        if response.status_code != expected or "message" not in response.json()["error"]:
            self.wrong.append(f"{body[:60]!r}: {response.status_code} {response.text[:200]}")
            return "wrong"
        return "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--texts", type=int, default=400, help="different texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = make_texts(options.texts, options.seed)
    answers = answer_offline(texts)
    server = Server(options.clients)
    try:
        traffic = Traffic(server, texts, answers, options.seed)
        started = time.monotonic()
        memory = asyncio.run(traffic.run(options.requests, options.clients))
        seconds = time.monotonic() - started
        time.sleep(2)
        busy = {name: server.metric(name) for name in ("gmask_running_rows", "gmask_queue_length")}
        is_up = server.process.poll() is None
    finally:
        server.process.terminate()
        server.process.wait(60)
    settled = [size for done, size in memory if done >= options.requests // 4] or [memory[-1][1]]
    record = {
        "machine": describe_machine(2),
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(traffic.outcomes.items())),
        "wrong": traffic.wrong[:10],
        "wrong_count": len(traffic.wrong),
        "left_behind": busy,
        "megabytes_after_a_quarter": settled[0] // 10**6,
        "megabytes_at_the_end": settled[-1] // 10**6,
        "server_is_up": is_up,
    }
    print(json.dumps(record, indent=2, ensure_ascii=False))
    sys.exit(bool(traffic.wrong or any(busy.values()) or not is_up))


if __name__ == "__main__":
    main()
