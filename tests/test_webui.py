"""Does the page ask the model for what was typed, and show what it answered, in both languages?"""

import asyncio
import itertools
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gmask
from gmask.cli import main
from gmask.cli.serving import own_names, serve_page
from gmask.errors import GmaskError

gr = pytest.importorskip("gradio", reason="the page needs gmask[webui]")

from gmask.generation.answers import Blank, Choices, Combination, Infilling  # noqa: E402
from gmask.serving import webui  # noqa: E402
from gmask.serving.app import create_app  # noqa: E402
from gmask.serving.backend import Backend, make_backend  # noqa: E402
from gmask.serving.settings import ServerSettings  # noqa: E402
from gmask.serving.webui import LOGIN, create_page, launch_page, mount_page  # noqa: E402
from gmask.serving.webui_parts import (  # noqa: E402
    LABELS,
    MAX_CHARACTERS,
    preferred_language,
    read_seed,
    shown_errors,
)

TEXT = "The old man took his [MASK] and went down to the [MASK]."
GREEDY = dict(temperature=0.0, top_p=1.0, seed="")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return gmask.load("bundled")


@pytest.fixture(scope="module")
def model(loaded: Any) -> Iterator[Backend]:
    backend = make_backend(*loaded, name="bundled")
    yield backend
    backend.close()


def fill(model: Backend, text: str = TEXT, choices: str = "", n: int = 1, max_tokens: int = 6, **values: Any):
    return asyncio.run(webui.fill_text(model, text, choices, n, max_tokens, **{**GREEDY, **values}))


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def is_idle(model: Backend) -> bool:
    counts = model.engine.counts()
    return not (counts.running or counts.waiting or model.worker.waiting)


def made_of(*answers: str, logprob: float = -1.0) -> Infilling:
    """The text "<answer>, <answer>"."""
    text, blanks = "", []
    for answer in answers:
        text += ", " if text else ""
        blanks.append(Blank(answer, logprob, (), None, "end", len(text), len(text) + len(answer)))
        text += answer
    return Infilling(text, tuple(blanks), logprob * len(answers))


def test_the_page_fills_as_the_library_does(model: Backend, loaded: Any) -> None:
    assert fill(model, n=3) == gmask.infill(*loaded, TEXT, n=3, max_tokens=6)  # beams
    greedy, alone = fill(model), gmask.infill(*loaded, TEXT, max_tokens=6)
    assert (greedy.text, greedy.alternatives) == (alone.text, ())
    assert greedy.logprob == pytest.approx(alone.logprob, abs=1e-3)
    drawn = fill(model, n=2, temperature=1.2, top_p=0.9, seed=" 7 ")
    alone = gmask.infill(*loaded, TEXT, n=2, max_tokens=6, temperature=1.2, top_p=0.9, seed=7)
    assert [drawn.text, drawn.alternatives[0].text] == [alone.text, alone.alternatives[0].text]


def test_choices_are_scored_whatever_the_temperature(model: Backend, loaded: Any) -> None:
    chosen = fill(model, choices="hat | head \n\n door｜house|sea\n", n=2, temperature=1.5)
    assert chosen == gmask.infill(*loaded, TEXT, choices=[["hat", "head"], ["door", "house", "sea"]], n=2)
    shares = webui.choice_shares(chosen.choices)
    assert set(shares["candidate"]) == {"1: hat", "1: head", "2: door", "2: house", "2: sea"}
    assert shares.groupby("blank")["probability"].sum().tolist() == pytest.approx([1, 1])
    best = chosen.choices.combinations[0]
    with_hat = sum(found.probability for found in chosen.choices.combinations if found.texts[0] == "hat")
    assert dict(zip(shares["candidate"], shares["probability"], strict=True))["1: hat"] == pytest.approx(with_hat)
    assert webui.rows(chosen)[0] == [1, *best.texts, f"{best.logprob:.2f}", f"{best.probability:.1%}"]


def test_one_blank_needs_no_number_on_its_bars() -> None:
    choices = Choices(True, (Combination(("b",), -1, 0.7), Combination(("a",), -2, 0.3)))
    assert webui.choice_shares(choices).to_dict("list") == {
        "candidate": ["b", "a"],
        "probability": [0.7, 0.3],
        "blank": ["1", "1"],
    }


@given(st.lists(st.text(max_size=5), min_size=1, max_size=5))
def test_highlighted_segments_join_to_the_text(answers: list[str]) -> None:
    filled = made_of(*answers)
    segments = webui.highlight(filled)
    assert "".join(text for text, _ in segments) == filled.text
    assert [text for text, number in segments if number] == answers
    assert [number for _, number in segments if number] == [str(i) for i in range(1, len(answers) + 1)]


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(1.0, "100.0%"), (0.1234, "12.3%"), (0.0123, "1.2%"), (0.00422, "0.42%"), (2.2e-5, "0.0022%"), (1e-9, "<0.0001%")],
)
def test_small_probabilities_keep_two_digits(probability: float, shown: str) -> None:
    assert webui.percent(probability) == shown


def test_a_row_of_a_sorted_table_is_the_alternative_of_its_rank(model: Backend) -> None:
    filled = fill(model, n=3)
    event = gr.SelectData(None, {"index": [0, 1], "value": "", "row_value": ["3", "a", "b"]})
    assert webui.pick_row(filled, event) == webui.highlight(filled.alternatives[1])


def test_what_was_cut_or_searched_is_told(model: Backend) -> None:
    cut = fill(model, "It was [gMASK]", max_tokens=1)
    assert "1 of the answers" in webui.describe_filled(cut, "en")
    assert webui.describe_filled(cut, "zh") == LABELS["cut"][1].format(count=1)
    words = " | ".join(f"word{i}" for i in range(17))
    searched = fill(model, choices=f"{words}\n{words}")  # 289 combinations
    assert webui.describe_filled(searched, "en") == LABELS["beams"][0]
    assert webui.describe_filled(made_of("a"), "en") == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(text="no blank"), "the text has no blank"),
        (dict(text="a" * (MAX_CHARACTERS + 1)), "the page takes 20000"),
        (dict(text="word " * 1000 + "[MASK]"), "the model has only 512 positions"),
        (dict(choices="a | b"), "choices for 1 blanks, but the text has 2"),
        (dict(choices="a |\nb"), "line 1 of the choices has an empty candidate"),
        (dict(choices="a" + "|a" * 64), "line 1 has 65 choices"),
        (dict(choices="a" * (MAX_CHARACTERS + 1)), "the page takes 20000"),
        (dict(temperature=1.0, seed="-1"), "the seed must be a whole number"),
        (dict(temperature=1.0, seed=None), "the seed is None, where a text is expected"),
        (dict(text=None), "the text is None, where a text is expected"),
        (dict(choices=None), "the text is None, where a text is expected"),
        (dict(n=None), "n is None: expected int"),
        (dict(max_tokens=None), "max_tokens is None: expected int"),
        (dict(text="<b>[xMASK]</b>"), "unknown special token [xMASK]"),
    ],
)
def test_a_mistake_is_one_line_on_the_page(model: Backend, values: dict[str, Any], message: str) -> None:
    with pytest.raises(gr.Error) as told, shown_errors("en"):
        fill(model, **values)
    assert message in told.value.message
    assert "\n" not in told.value.message and not told.value.print_exception


def test_a_message_is_escaped_where_gradio_takes_html() -> None:
    with pytest.raises(gr.Error) as told, shown_errors("zh"):
        raise GmaskError("<img src=x>")
    assert told.value.message == "&lt;img src=x&gt;"
    assert told.value.title == LABELS["error"][1]


def test_only_a_shortage_of_memory_is_told_among_other_errors() -> None:
    with pytest.raises(gr.Error, match="not enough memory"), shown_errors("en"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="broken"), shown_errors("en"):
        raise RuntimeError("broken")


@given(st.text(alphabet="<>&;!/?#ab \n\u2060", max_size=30))
def test_a_guarded_text_has_no_markup_and_comes_back(text: str) -> None:
    guarded = webui.guard(text)
    assert not re.search("[<&][a-zA-Z/!?#]", guarded)
    assert webui.guard(guarded) == guarded
    assert webui.unguard(guarded) == webui.unguard(text)


def talk(model: Backend, message: str, history: list[dict[str, Any]], *settings: Any) -> list[tuple[str, str]]:
    async def listen() -> list[tuple[str, str]]:
        return [told async for told in webui.reply_to(model, message, history, *settings, language="en")]

    return asyncio.run(listen())


def test_the_page_chats_as_the_library_does(model: Backend, loaded: Any) -> None:
    chat = gmask.Chat(*loaded, max_tokens=8, temperature=0.9, top_p=0.8, seed=3)
    history = [
        {"role": role, "content": [{"type": "text", "text": webui.guard(text)}]}
        for role, text in [("user", "never answered"), ("user", "a < <b>"), ("assistant", "c & d")]
    ]
    chat.rounds = [("never answered\na < <b>", "c & d")]
    told = talk(model, "<i>&amp;", history, 8, 0.9, 0.8, "3")
    reply = chat.ask("<i>&amp;")
    texts = [text for text, _ in told]
    assert texts[-1] == reply.text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert told[-1][1].startswith(f"Prompt: {reply.prompt_tokens} tokens. Reply: {reply.reply_tokens} tokens.")
    assert {note for _, note in told[:-1]} == {""}


def test_a_reply_that_is_left_ends(model: Backend) -> None:
    async def leave() -> None:
        async with aclosing(webui.reply_to(model, "hello", [], 400, 0.9, 0.8, "1", language="en")) as reply:
            await anext(reply)
            assert not is_idle(model)

    asyncio.run(leave())
    wait_until(lambda: is_idle(model))
    assert model.engine.counts().ends["cancelled"] == 1


@pytest.mark.parametrize("kind", [dict(temperature=0.9), dict(n=16), dict(n=16, choices="a|b|c\nd|e|f")])
def test_a_fill_that_is_stopped_ends(model: Backend, kind: dict[str, Any]) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        time.sleep(0.01)

    async def stop() -> int:
        settings = {**dict(n=1, choices=""), **GREEDY, **kind}
        choices, n = settings.pop("choices"), settings.pop("n")
        filling = asyncio.create_task(webui.fill_text(model, TEXT, choices, n, 400, **settings))
        while not passes:
            await asyncio.sleep(0.005)
        filling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await filling
        return passes

    hook = model.model.base_model.register_forward_pre_hook(count)
    stopped = asyncio.run(stop())
    wait_until(lambda: is_idle(model))
    hook.remove()
    assert passes <= stopped + 3


def test_users_of_the_page_are_answered_together(model: Backend) -> None:
    async def ask(seed: int) -> int:
        settings = (40, 0.9, 0.8, str(seed))
        busiest = 0
        async for _ in webui.reply_to(model, "hello", [], *settings, language="en"):
            busiest = max(busiest, model.engine.counts().running)
        return busiest

    async def ask_all() -> list[int]:
        return await asyncio.gather(*map(ask, range(3)))

    assert max(asyncio.run(ask_all())) == 3


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh-Hant-TW", "zh"),
        ("de-DE, ZH;q=0.5", "zh"),
        ("en-GB,zh;q=0.1", "en"),
        ("fr", "en"),
        ("*", "en"),
        (None, "en"),
    ],
)
def test_the_browser_chooses_the_language(header: str | None, language: str) -> None:
    assert preferred_language(header) == language


def test_both_languages_say_the_same_values() -> None:
    for english, chinese in LABELS.values():
        assert english and chinese
        assert sorted(re.findall("{.*?}", english)) == sorted(re.findall("{.*?}", chinese))


def test_seeds() -> None:
    assert [read_seed(text) for text in ("", "  ", "0", " 12 ")] == [None, None, 0, 12]
    for text in ("1.5", "-1", "x", "9" * 30):
        with pytest.raises(GmaskError):
            read_seed(text)


@pytest.fixture
def draw(loaded: Any) -> Callable[[str], dict[str, Any]]:
    """Builds a page, inside of an event loop: outside of one, Gradio opens its own and leaves them open."""

    async def build(language: str) -> dict[str, Any]:
        return create_page(*loaded, name="bundled", language=language).get_config_file()

    return lambda language: asyncio.run(build(language))


def test_a_page_of_two_models_names_each_on_its_tab(model: Backend, loaded: Any) -> None:
    async def build() -> dict[str, Any]:
        talks = make_backend(*loaded, name="talker")
        try:
            return webui.draw_page(model, chat_backend=talks).get_config_file()
        finally:
            talks.close()

    parts = {part["props"].get("elem_id"): part["props"].get("value") for part in asyncio.run(build())["components"]}
    assert parts["title"] == "# gmask"
    assert parts["fill-model"] == f"`{model.settings.model_name}`" and parts["chat-model"] == "`talker`"


def test_the_page_is_private_bounded_and_plain(draw: Callable[[str], dict[str, Any]]) -> None:
    config = draw("zh")
    assert all(event["api_visibility"] != "public" for event in config["dependencies"])
    kinds = {part["type"] for part in config["components"]}
    assert "html" not in kinds
    properties = {part["props"].get("elem_id"): part["props"] for part in config["components"]}
    conversation = properties["chat-conversation"]
    assert conversation["sanitize_html"] and not conversation["render_markdown"]
    assert conversation["latex_delimiters"] == []
    assert properties["infill-alternatives"]["datatype"] == "str"
    assert properties["chat-message"]["max_length"] == MAX_CHARACTERS
    assert properties["infill-run"]["value"] == LABELS["run"][1]


def test_a_model_that_only_talks_has_no_blanks(
    monkeypatch: pytest.MonkeyPatch, draw: Callable[[str], dict[str, Any]]
) -> None:
    monkeypatch.setattr(Backend, "blanks", [])
    tabs = [part["props"]["label"] for part in draw("en")["components"] if part["type"] == "tabitem"]
    assert tabs == ["Chat"]


def test_the_command_refuses_an_unknown_language(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["gmask", "webui", "--language", "fr"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "'fr' is not one of 'en', 'zh', 'auto'" in capsys.readouterr().err


def test_the_page_answers_to_its_own_names(model: Backend) -> None:
    """A page of another site could else give itself this machine's address, and talk to the model."""
    page = webui.draw_page(model)
    address, _ = launch_page(page, own_names("127.0.0.1"))
    try:
        for path in ("", "config"):
            for name, status in (("127.0.0.1:7860", 200), ("localhost", 200), ("evil.example", 400)):
                assert httpx.get(f"{address}{path}", headers={"Host": name}).status_code == status, (path, name)
    finally:
        page.close(verbose=False)


HALVES = {
    "headers": b"GET /config HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b",
    "a body": b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n"
    b"Content-Type: application/json\r\n\r\n{",
}


def test_the_page_does_not_wait_for_ever_for_half_a_request(model: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webui, "ServerSettings", lambda: ServerSettings(body_seconds=0.5))
    page = webui.draw_page(model)
    address, _ = launch_page(page, own_names("127.0.0.1"))
    try:
        for half in HALVES.values():
            with socket.create_connection(("127.0.0.1", int(address.rstrip("/").rpartition(":")[2])), 60) as client:
                client.sendall(half)
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        assert httpx.get(f"{address}config", timeout=300).status_code == 200
    finally:
        page.close(verbose=False)


@pytest.mark.parametrize(
    ("host", "share", "names"),
    [
        ("127.0.0.1", False, ("127.0.0.1", "localhost", "[::1]")),
        ("0.0.0.0", False, ("*",)),
        ("127.0.0.1", True, ("*",)),
    ],
)
def test_the_command_says_by_which_names_the_page_is_called(host: str, share: bool, names: tuple[str, ...]) -> None:
    class Page:
        def launch(self, **options: Any) -> None:
            middleware, _ = options["app_kwargs"]["middleware"]
            assert middleware.kwargs["hosts"] == names
            raise OSError("it is taken")

    with pytest.raises(GmaskError, match="port 7860 of"):
        serve_page(Page(), host, 7860, share=share)


def visit(loaded: Any, settings: ServerSettings, steps: Callable[[httpx.AsyncClient], Any]) -> Any:
    async def run() -> Any:
        app = mount_page(create_app(*loaded, settings=settings))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client,
        ):
            return await steps(client)

    return asyncio.run(run())


def test_the_server_shows_the_page_beside_its_own_endpoints(loaded: Any) -> None:
    async def ask(client: httpx.AsyncClient) -> list[int]:
        return [(await client.get(path)).status_code for path in ("/ui/", "/v1/models", "/ready")]

    assert visit(loaded, ServerSettings(model_name="bundled"), ask) == [200, 200, 200]


def test_a_server_with_keys_shows_the_page_to_who_gives_one(loaded: Any) -> None:
    async def log_in(client: httpx.AsyncClient) -> list[int]:
        async def look() -> list[int]:
            paths = ("/ui/config", "/ui/gradio_api/info", "/v1/models")
            return [(await client.get(path)).status_code for path in paths]

        async def give(key: str) -> int:
            return (await client.post("/ui/login", data={"username": "anybody", "password": key})).status_code

        page = (await client.get("/ui/")).text
        assert '"auth_required":true' in page and LOGIN.split(";")[0] in page and "infill-text" not in page
        return [*await look(), await give("wrong"), *await look(), await give("second"), *await look()]

    settings = ServerSettings(model_name="bundled", api_keys=("first", "second"))
    assert visit(loaded, settings, log_in) == [401, 401, 401, 400, 401, 401, 401, 200, 200, 200, 401]


def test_one_model_may_fill_and_another_talk(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Backend] = {}
    monkeypatch.setattr(webui, "build_infill", lambda model, *_: asked.update(fill=model))
    monkeypatch.setattr(webui, "build_chat", lambda model, *_: asked.update(chat=model))
    limits = ServerSettings(max_tokens=7, request_seconds=3.0)
    fills = make_backend(*loaded, name="bundled")
    talks = make_backend(*gmask.load("bundled-chat"), name="bundled-chat", settings=limits)
    try:
        webui.draw_page(fills, chat_backend=talks)
        assert (asked["fill"], asked["chat"]) == (fills, talks)
        assert (talks.settings.max_tokens, talks.settings.request_seconds) == (7, 3.0)
        assert talks.settings.model_name == "bundled-chat"
    finally:
        talks.close()
        fills.close()
