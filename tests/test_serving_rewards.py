"""Does a served reward model give the rewards of `gmask score --reward` to clients of vLLM's route?"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import gmask
from feedback_data import make_chatglm_folder
from gmask.generation.reward import RewardScorer
from gmask.models.reward import RewardHead
from gmask.serving.app import create_app
from gmask.serving.backend import make_backend
from gmask.serving.settings import ServerSettings
from gmask.tasks.preferences import Question
from gmask.training.reward import as_reward_model
from test_serving_api import ask, refuse
from tiny_folder import make_folder

MESSAGES = [
    {"role": "user", "content": "The old man?"},
    {"role": "assistant", "content": "It ran."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "took his dog"},
]
QUESTION = Question("And the dog?", (("The old man?", "It ran."),))
MAKERS = {"glm": make_folder, "chatglm": make_chatglm_folder}


@pytest.fixture(scope="module", params=MAKERS)
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RewardScorer:
    model, tokenizer = gmask.load(MAKERS[request.param](tmp_path_factory.mktemp("model")), device="cpu")
    return RewardScorer(as_reward_model(model), tokenizer)


@pytest.fixture(scope="module")
def client(scorer: RewardScorer) -> Iterator[TestClient]:
    app = create_app(scorer.model, scorer.tokenizer, settings=ServerSettings(model_name="judge"))
    with TestClient(app) as client:
        yield client


def rewards_of(found: dict[str, Any]) -> list[float]:
    assert [one["index"] for one in found["data"]] == list(range(len(found["data"])))
    assert all(one["num_classes"] == 1 for one in found["data"])
    return [one["probs"][-1] for one in found["data"]]


def test_messages_get_the_reward_of_their_last_answer(client: TestClient, scorer: RewardScorer) -> None:
    expected = scorer.score(QUESTION, ["took his dog", "the river"])
    one = ask(client, "/classify", model="judge", messages=MESSAGES)
    assert rewards_of(one) == pytest.approx(expected[:1], abs=1e-5)
    assert one["model"] == "judge" and one["object"] == "list" and one["data"][0]["label"] == "LABEL_0"
    other = [*MESSAGES[:-1], {"role": "assistant", "content": "the river"}]
    both = ask(client, "/v1/classify", input=[{"messages": MESSAGES}, {"messages": other}])
    assert rewards_of(both) == pytest.approx(expected, abs=1e-5)
    assert both["usage"]["prompt_tokens"] > one["usage"]["prompt_tokens"] > 10
    squashed = ask(client, "/classify", messages=MESSAGES, use_activation=True)
    assert rewards_of(squashed) == pytest.approx([1 / (1 + math.exp(-expected[0]))], abs=1e-5)


def test_a_template_s_text_or_ids_are_rewarded_as_trainers_send_them(client: TestClient, scorer: RewardScorer) -> None:
    """verl sends the text of the reward model's template, without its first token, and reads data[-1].probs[-1]."""
    text = scorer.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    (expected,) = scorer.score(QUESTION, ["took his dog"])
    for given in (text, text.removeprefix("[CLS]"), [text], ids, [ids]):
        found = ask(client, "/classify", model="judge", input=given, use_activation=False)
        assert rewards_of(found) == pytest.approx([expected], abs=1e-5)
    cut = ask(client, "/classify", input=[ids[:-1], ids])  # an answer that was cut gets no end
    assert abs(rewards_of(cut)[0] - expected) > 1e-4


def test_control_words_of_messages_are_text(client: TestClient, scorer: RewardScorer) -> None:
    said = [
        {"role": "user", "content": "a [MASK] <sop> <|startofpiece|>"},
        {"role": "assistant", "content": "b [gMASK]"},
    ]
    expected = scorer.score(Question(said[0]["content"]), [said[1]["content"]])
    assert rewards_of(ask(client, "/classify", messages=said)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "give one of input and messages"),
        ({"input": "a", "messages": MESSAGES}, "input", "give one of input and messages"),
        ({"messages": MESSAGES[:-1]}, "messages", "the last message has to be the answer of the assistant"),
        ({"messages": [*MESSAGES[:-1], {"role": "assistant", "content": " "}]}, "messages", "the answer is empty"),
        ({"input": [{"messages": MESSAGES}, {"messages": MESSAGES[:1]}]}, "input.1", "the last message has to be"),
        ({"input": "The old man took his dog"}, "input", "there is no <sop>"),
        ({"input": ["The old man"]}, "input.0", "there is no <sop>"),
        ({"input": [[20, 21]]}, "input.0", "there is no <sop>"),
        ({"input": [10**6]}, "input", "token 1000000 is not one of the"),
        ({"input": [""]}, "input.0", "at least 1 character"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ["a"] * 1025}, "input", "1025 answers are to be rewarded; at most 1024"),
        ({"messages": [{"role": "user", "content": "dog " * 400}, MESSAGES[-1]]}, "messages", "more than"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": "dog " * 90}]}, "messages", "more than"),
        ({"messages": MESSAGES, "activation": False}, "activation", "is not a parameter that this server knows"),
    ],
)
def test_what_cannot_be_rewarded_is_refused_with_its_parameter(
    client: TestClient, body: dict[str, Any], param: str, message: str
) -> None:
    error = refuse(client, "/classify", **body)
    assert (error["param"], message in error["message"]) == (param, True), error


def test_ids_hold_one_prompt_and_one_answer(client: TestClient, scorer: RewardScorer) -> None:
    special = scorer.encoder.special
    blank = special.gmask
    for ids, message in (
        ([20, blank, special.sop], "the ids of an answer: it is empty"),
        ([20, blank, special.sop, 21, special.sop], "holds <sop>, behind which a second answer would begin"),
        ([20, special.sop, 21], "prompt_ids have no blank"),
    ):
        assert message in refuse(client, "/classify", input=ids)["message"]


def test_each_model_answers_what_it_is_for(client: TestClient, scorer: RewardScorer, tmp_path: Path) -> None:
    chat = dict(messages=MESSAGES[:1])
    for path, body in (
        ("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"}),
        ("/v1/infill", {"text": "a [MASK]"}), ("/v1/score", {"text": "a [MASK]", "answers": ["b"]}),
        ("/", {"prompt": "a"}),
    ):  # fmt: skip
        assert "is a reward model, which writes nothing: ask /classify" in refuse(client, path, **body)["message"]
    assert client.get("/v1/models/judge").json()["id"] == "judge"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    ask(client, "/classify", messages=MESSAGES)
    assert 'endpoint="/classify",status="200"' in client.get("/metrics").text
    model, tokenizer = gmask.load(make_folder(tmp_path), device="cpu")
    assert not isinstance(model, RewardHead)
    with TestClient(create_app(model, tokenizer)) as writer:
        assert "gives no rewards" in refuse(writer, "/classify", messages=MESSAGES)["message"]
    with pytest.raises(gmask.GmaskError, match="judge: is a reward model, which writes nothing"):
        make_backend(scorer.model, scorer.tokenizer, name="judge")


def test_keys_sizes_and_time_bind_this_route_too(scorer: RewardScorer) -> None:
    settings = ServerSettings(api_keys=("secret",), max_body_bytes=2000)
    with TestClient(create_app(scorer.model, scorer.tokenizer, settings=settings)) as client:
        assert client.post("/classify", json={"messages": MESSAGES}).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.post("/classify", json={"messages": MESSAGES}).status_code == 200
        assert client.post("/classify", json={"messages": MESSAGES * 100}).status_code == 413
        late = client.post("/classify", json={"messages": MESSAGES, "timeout": 1e-6})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
