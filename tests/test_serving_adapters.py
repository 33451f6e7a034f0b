"""Is each request answered by the adapter that it names, whatever the others in its batch name?"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import gmask
from gmask.checkpoints.adapters import save_adapter
from gmask.cli.serving import read_adapters
from gmask.errors import GmaskError
from gmask.generation.adapters import AdapterSet
from gmask.generation.encoding import TextReader
from gmask.generation.engine import Engine, Request
from gmask.generation.settings import Sampling
from gmask.models.base import attach_prefix
from gmask.serving.app import create_app
from gmask.serving.settings import ServerSettings
from tiny_folder import make_folder

peft = pytest.importorskip("peft", reason="LoRA needs gmask[train]")

from gmask.checkpoints.adapters import inject  # noqa: E402

TEXTS = ["The [MASK] dog [MASK].", "[MASK]", "The old man took his dog and [gMASK]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    """Two LoRAs of different ranks on different layers, and two prefixes of different lengths, one by a network."""

    def lora(model: Any, rank: int, targets: list[str]) -> None:
        inject(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))

    makers: dict[str, Callable[[Any], Any]] = {
        "first": lambda model: lora(model, 2, ["query_key_value", "dense"]),
        "second.v2": lambda model: lora(model, 4, ["dense_h_to_4h"]),
        "long": lambda model: attach_prefix(model, 7, projection=False),
        "short": lambda model: attach_prefix(model, 3, projection=True),
    }
    made = {}
    for seed, (name, make) in enumerate(makers.items()):
        model, _ = gmask.load(base, device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            make(model)
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.3)
        made[name] = base.parent / name
        save_adapter(model, made[name], base=str(base))
    return made


@pytest.fixture(scope="module")
def alone(base: Path, folders: dict[str, Path]) -> dict[str | None, Any]:
    """The model with each adapter and nothing else."""
    return {name: gmask.load(base, device="cpu", adapter=folder) for name, folder in [(None, None), *folders.items()]}


@pytest.fixture(scope="module")
def client(base: Path, folders: dict[str, Path]) -> Iterator[TestClient]:
    app = create_app(*gmask.load(base, device="cpu"), settings=ServerSettings(model_name="tiny"), adapters=folders)
    with TestClient(app) as client:
        yield client


def ask(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_batch_of_all_adapters_gives_what_each_gives_alone(
    base: Path, folders: dict[str, Path], alone: dict[str | None, Any]
) -> None:
    model, tokenizer = gmask.load(base, device="cpu")
    engine = Engine(model, tokenizer, max_rows=8, max_positions=10_000, adapters=AdapterSet(model, folders))
    reader, sampling = TextReader(tokenizer), Sampling(max_tokens=6, min_tokens=2)
    asked = [(text, name) for text in TEXTS for name in alone] * 2
    tickets = [
        engine.submit(Request(context=reader.read(text).context, sampling=sampling, adapter=name))
        for text, name in asked
    ]
    answers = set()
    for (text, name), ticket in zip(asked, tickets, strict=True):
        (progress,) = ticket.wait(20)
        expected = gmask.infill(*alone[name], text, max_tokens=6, min_tokens=2)
        assert [answer.ids for answer in progress.done] == [
            tuple(token.id for token in blank.tokens) for blank in expected.blanks
        ], (text, name)
        assert sum(answer.logprob for answer in progress.done) == pytest.approx(expected.logprob, abs=1e-3)
        answers.add((text, expected.text))
    assert len(answers) > len(TEXTS) * 3, "the adapters make a difference"
    with pytest.raises(GmaskError, match="no adapter 'other'"):
        engine.submit(Request(context=reader.read(TEXTS[0]).context, sampling=sampling, adapter="other"))
    engine.close()


@pytest.mark.parametrize("name", [None, "first", "second.v2", "long", "short"])
def test_every_endpoint_goes_through_the_adapter_that_its_model_names(
    client: TestClient, alone: dict[str | None, Any], name: str | None
) -> None:
    loaded, model = alone[name], "tiny" if name is None else f"tiny:{name}"
    whole = ask(client, "/v1/completions", model=model, prompt="The old", max_tokens=5, temperature=0)
    assert whole["choices"][0]["text"] == gmask.infill(*loaded, "The old[gMASK]", max_tokens=5).blanks[0].text
    messages = [{"role": "user", "content": "The dog?"}]
    chat = ask(client, "/v1/chat/completions", model=model, messages=messages, max_tokens=5, temperature=0)
    reply = gmask.Chat(*loaded, max_tokens=5, temperature=0).ask("The dog?")
    assert chat["choices"][0]["message"]["content"] == reply.text
    beams = ask(client, "/v1/infill", model=model, text=TEXTS[0], n=2, max_tokens=4)
    assert beams["logprob"] == pytest.approx(gmask.infill(*loaded, TEXTS[0], n=2, max_tokens=4).logprob, abs=1e-3)
    scored = ask(client, "/v1/score", model=model, text="The [MASK] dog.", answers=["old", "sunny"])
    expected = gmask.score(*loaded, "The [MASK] dog.", ["old", "sunny"]).to_dict()
    assert scored["data"][0]["answers"][0]["logprob"] == pytest.approx(expected["answers"][0]["logprob"], abs=1e-3)
    embedded = ask(client, "/v1/embeddings", model=model, input=["The dog.", "我"])
    for row, vector in zip(gmask.embed(*loaded, ["The dog.", "我"]), embedded["data"], strict=True):
        assert np.allclose(row, vector["embedding"], atol=1e-4)
    body = dict(model=model, prompt="The old man", echo=True, logprobs=1, max_tokens=0)
    echoed = ask(client, "/v1/completions", **body)["choices"][0]["logprobs"]["token_logprobs"]
    assert sum(echoed) == pytest.approx(gmask.score(*loaded, "[gMASK]", ["The old man"]).best.logprob, abs=1e-3)


def test_models_are_the_base_and_its_adapters(client: TestClient, folders: dict[str, Path]) -> None:
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["tiny", *(f"tiny:{name}" for name in folders)]
    assert client.get("/v1/models/tiny:second.v2").json()["id"] == "tiny:second.v2"
    for name in ("first", "tiny:", "tiny:other"):
        refused = client.post("/v1/completions", json={"model": name, "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "'tiny:first'" in refused.json()["error"]["message"]


def test_what_cannot_be_chosen_by_request_is_refused(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    model, _ = gmask.load(base, device="cpu", adapter=folders["long"])
    with pytest.raises(GmaskError, match="an adapter for good"):
        AdapterSet(model, {"a": folders["first"]})
    model, _ = gmask.load(base, device="cpu")
    inject(model, peft.LoraConfig(r=2, target_modules=["dense"], use_dora=True))
    save_adapter(model, tmp_path / "dora", base=str(base))
    for folder, message in ((tmp_path / "dora", "only LoRA and prefixes"), (tmp_path / "none", "no such folder")):
        with pytest.raises(GmaskError, match=message):
            AdapterSet(gmask.load(base, device="cpu")[0], {"a": folder})


def test_adapters_are_named_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert read_adapters([]) == (None, {})
    assert read_adapters(["folder"]) == (Path("folder"), {})
    assert read_adapters([f"{tmp_path}/a=b"]) == (tmp_path / "a=b", {})
    assert read_adapters(["one=x", "two=y=z"]) == (None, {"one": Path("x"), "two": Path("y=z")})
    for values, message in (
        (["x", "y"], "need names"),
        (["x", "one=y"], "need names"),
        (["=x"], "empty"),
        (["one=x", "one=y"], "given twice"),
    ):
        with pytest.raises(GmaskError, match=message):
            read_adapters(values)
