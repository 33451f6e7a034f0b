"""Does the page work in a real browser: blanks, chart, chat, stop, both languages, and nothing from the network?

``GMASK_SCREENSHOTS=docs/images`` writes the pictures of the documentation.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs gmask[webui]")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
PATIENCE = 600_000  # ms, of a busy machine

playwright.expect.set_options(timeout=PATIENCE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no {' or '.join(BROWSERS)} on this machine"),
]

SERVER = """
import socket, sys
connect = socket.socket.connect
def watched(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("OUTSIDE", address, file=sys.stderr, flush=True)
    return connect(self, address)
socket.socket.connect = watched
from gmask.cli import main
main()
"""
"""The command, whose connections to other machines are told."""

MARKUP = (
    "a <b>b</b> &amp; <!-- c -->\n  <img src=x onerror=alert(1)><script>alert(2)</script> "
    "**d** ![e](http://example.com/e.png) $x^2$"
)


@contextmanager
def run(log: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """The address of a command that serves a page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    with log.open("w") as output:
        command = [sys.executable, "-c", SERVER, *arguments, "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            wait_for(f"{url}{'' if arguments[0] == 'webui' else 'health'}", server, log)
            yield url
        finally:
            server.terminate()
            server.wait(30)
    told = log.read_text()
    assert "OUTSIDE" not in told and "Traceback" not in told, told


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where ``gmask webui`` has opened its page."""
    with run(tmp_path_factory.mktemp("webui") / "log", "webui") as url:
        yield url


@pytest.fixture(scope="module")
def rambling_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a page whose model was not tuned to end its replies."""
    with run(tmp_path_factory.mktemp("rambling") / "log", "webui", "bundled") as url:
        yield url


@pytest.fixture(scope="module")
def guarded_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a ``gmask serve`` that asks for a key."""
    with run(tmp_path_factory.mktemp("serve") / "log", "serve", GMASK_API_KEY="the-key") as url:
        yield url


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE / 1000
    while True:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.3)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page in a fresh browser of a language; no error may be on its console, and it may ask nobody else."""
    troubles: list[str] = []
    contexts = []

    def watch(page: Any, address: str, expected: str) -> None:
        def note(message: Any) -> None:
            if message.type == "error" and expected not in message.text:
                troubles.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        own = (address, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or troubles.append(request.url))

    def open_page(locale: str = "en-US", address: str = address, expected: str = "no error") -> Any:
        context = browser.new_context(locale=locale, viewport={"width": 1280, "height": 860})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        watch(page, address.removesuffix("ui/"), expected)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("GMASK_SCREENSHOTS"):
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # the chart draws itself
        page.screenshot(path=Path(folder) / name, full_page=True)


def set_up_chat(page: Any, max_tokens: int, seed: int = 1) -> None:
    page.get_by_role("tab", name="Chat").click()
    chat = page.get_by_role("tabpanel").filter(visible=True)
    chat.get_by_label("number input for Longest answer").fill(str(max_tokens))
    chat.get_by_label("Seed").fill(str(seed))


def say(page: Any, message: str) -> None:
    page.locator("#chat-message textarea").fill(message)
    page.locator("#chat-message textarea").press("Enter")


def messages(page: Any) -> Any:
    return page.locator("#chat-conversation .md")


def wait_for_reply(page: Any, count: int, *, after: str = "") -> str:
    """Waits for so many messages and for the counts of a reply, other ones than ``after``; gives them."""
    page.wait_for_function(
        """([count, after]) => {
            const told = document.querySelector('#chat-status').innerText;
            return document.querySelectorAll('#chat-conversation .md').length === count
                && told.includes('Reply:') && told !== after;
        }""",
        arg=[count, after],
    )
    playwright.expect(page.locator("#chat-message textarea")).to_be_enabled()
    playwright.expect(page.locator("#chat-message .submit-button")).to_be_visible()
    return str(page.locator("#chat-status").inner_text())


def test_blanks_are_filled_in_their_text_and_choices_charted(open_page: Any) -> None:
    page = open_page()
    text = page.locator("#infill-text textarea")
    text.fill("The old man took his  and went.")
    text.evaluate("box => box.setSelectionRange(21, 21)")
    page.get_by_role("button", name="+ words [MASK]").click()
    playwright.expect(text).to_have_value("The old man took his [MASK] and went.")
    page.wait_for_timeout(200)  # the cursor is put behind the blank
    assert text.evaluate("box => [document.activeElement === box, box.selectionStart]") == [True, 27]

    text.fill("She is very [MASK] today, because her [MASK] is here.")
    page.locator("#infill-run").click()
    filled = page.locator("#infill-filled")
    playwright.expect(filled.get_by_text("today, because her")).to_be_visible()
    assert filled.locator(".highlighted").count() == 2
    playwright.expect(page.locator("#infill-chart")).to_be_hidden()

    page.locator("#infill-choices textarea").fill("<b>happy</b> | <i>sad</i>\nfriend | mother")
    page.locator("#infill-run").click()
    playwright.expect(page.locator("#infill-chart")).to_be_visible()
    page.set_viewport_size({"width": 375, "height": 800})  # of a phone
    shown = page.locator("#infill-alternatives .virtual-table-viewport")
    playwright.expect(shown).to_be_visible()
    assert shown.evaluate("table => table.scrollWidth <= table.clientWidth + 1"), "the probability is in sight"
    page.set_viewport_size({"width": 1280, "height": 860})
    third = page.locator("#infill-alternatives").get_by_role("row").filter(has=page.get_by_text("3", exact=True))
    third.get_by_role("gridcell").first.click()
    for answer in third.get_by_role("gridcell").all_inner_texts()[1:3]:  # such as <b>happy</b>, letter by letter
        playwright.expect(filled).to_contain_text(answer.strip())

    page.locator("#infill-choices textarea").fill("happy | sad | angry\nfriend | mother | brother")
    page.locator("#infill-run").click()
    playwright.expect(filled).to_contain_text("happy")
    picture(page, "webui-infill.png")


def test_a_fill_that_is_stopped_gives_way_to_the_next(open_page: Any) -> None:
    page = open_page()
    run, stop = page.locator("#infill-run"), page.locator("#infill-stop")
    playwright.expect(stop).to_be_hidden()
    page.locator("#infill-text textarea").fill("It was [gMASK]")
    page.get_by_label("number input for Answers to compare").fill("16")
    page.get_by_label("number input for Longest answer").first.fill("500")
    run.click()
    playwright.expect(stop).to_be_visible()
    stop.click()
    playwright.expect(stop).to_be_hidden()
    playwright.expect(page.locator("#infill-filled")).to_be_hidden()
    page.get_by_label("number input for Longest answer").first.fill("3")
    run.click()
    playwright.expect(page.locator("#infill-filled")).to_contain_text("It was")
    playwright.expect(stop).to_be_hidden()


def test_a_server_with_keys_lets_in_who_gives_one(open_page: Any, guarded_address: str) -> None:
    page = open_page(address=f"{guarded_address}ui/", expected="401")  # what it asks for before the key is given
    playwright.expect(page.get_by_text("the password is an API key")).to_be_visible()
    page.get_by_label("username").fill("anybody")
    page.get_by_label("password").fill("the-key")
    page.get_by_role("button", name="Login").click()
    page.locator("#infill-text textarea").fill("It was [MASK].")
    page.locator("#infill-run").click()
    playwright.expect(page.locator("#infill-filled")).to_contain_text("It was")


def test_a_mistake_is_shown_and_the_page_goes_on(open_page: Any) -> None:
    page = open_page()
    page.locator("#infill-text textarea").fill("<img src=x onerror=alert(1)> [oMASK]")
    page.locator("#infill-run").click()
    playwright.expect(page.get_by_text("unknown special token [oMASK]")).to_be_visible()
    page.locator("#infill-text textarea").fill("It was [MASK].")
    page.locator("#infill-run").click()
    playwright.expect(page.locator("#infill-filled")).to_be_visible()


@pytest.mark.parametrize("way", ["typed", "retried", "edited"])
def test_a_refused_message_goes_back_into_its_box(open_page: Any, way: str) -> None:
    page = open_page()
    box = page.locator("#chat-message textarea")
    set_up_chat(page, max_tokens=4)
    counts = ""
    if way != "typed":
        say(page, "你好")
        counts = wait_for_reply(page, 2)
    page.get_by_role("tabpanel").filter(visible=True).get_by_label("Seed").fill("none")
    if way == "typed":
        say(page, "Hello!")
    elif way == "retried":
        page.get_by_role("button", name="Retry").click()
    else:
        page.get_by_role("button", name="Edit").first.click()
        page.locator("#chat-conversation textarea").fill("Hello!")
        page.get_by_role("button", name="Submit").click()
    playwright.expect(page.get_by_text("the seed must be a whole number")).to_be_visible()
    playwright.expect(box).to_be_enabled()
    playwright.expect(box).to_have_value("你好" if way == "retried" else "Hello!")
    playwright.expect(page.locator("#chat-conversation")).to_contain_text("Say something to the model.")
    set_up_chat(page, max_tokens=2, seed=2)
    box.press("Enter")
    wait_for_reply(page, 2, after=counts)
    assert messages(page).first.inner_text() == ("你好" if way == "retried" else "Hello!")


def test_a_reply_is_streamed_and_what_was_written_is_no_markup(open_page: Any) -> None:
    page = open_page()
    set_up_chat(page, max_tokens=24)
    say(page, MARKUP)
    counts = wait_for_reply(page, 2)
    assert messages(page).first.inner_text().replace("\u2060", "") == MARKUP
    assert messages(page).locator("*").count() == 0  # no element but text
    written = messages(page).nth(1).inner_text()
    set_up_chat(page, max_tokens=2, seed=2)  # shorter, whatever the model says
    page.get_by_role("button", name="Retry").click()
    counts = wait_for_reply(page, 2, after=counts)
    assert messages(page).nth(1).inner_text() != written

    set_up_chat(page, max_tokens=24)
    page.get_by_role("button", name="Edit").first.click()
    box = page.locator("#chat-conversation textarea")
    assert box.input_value().replace("\u2060", "") == MARKUP
    box.fill("What is 20 + 22?")
    page.get_by_role("button", name="Submit").click()
    counts = wait_for_reply(page, 2, after=counts)
    assert messages(page).first.inner_text() == "What is 20 + 22?"
    say(page, "你是谁？")
    wait_for_reply(page, 4, after=counts)
    picture(page, "webui-chat.png")
    page.get_by_role("button", name="Undo").last.click()
    playwright.expect(messages(page)).to_have_count(2)


def test_a_stopped_reply_stays_and_the_next_one_comes(open_page: Any, rambling_address: str) -> None:
    page = open_page(address=rambling_address)
    set_up_chat(page, max_tokens=400, seed=3)
    say(page, "你好")
    page.wait_for_function("() => document.querySelectorAll('#chat-conversation .md')[1]?.innerText.length > 0")
    page.locator("#chat-message .stop-button").dispatch_event("click")  # at once: the reply may end
    playwright.expect(page.locator("#chat-message .submit-button")).to_be_visible()
    page.wait_for_timeout(1500)
    stopped = messages(page).nth(1).inner_text()
    page.wait_for_timeout(1000)
    assert messages(page).nth(1).inner_text() == stopped != ""
    set_up_chat(page, max_tokens=4)
    say(page, "你好")
    wait_for_reply(page, 4)


def test_the_labels_are_in_the_language_of_the_reader(open_page: Any) -> None:
    page = open_page("zh-CN")
    playwright.expect(page.locator("#infill-run")).to_have_text("填空")
    page.locator("#infill-run").click()
    playwright.expect(page.locator("#infill-alternatives")).to_contain_text("第 1 空")
    page.get_by_text("English", exact=True).click()
    playwright.expect(page.locator("#infill-run")).to_have_text("Fill")
    playwright.expect(page.locator("#infill-alternatives")).to_contain_text("Blank 1")
    playwright.expect(page.get_by_role("tab", name="Chat")).to_be_visible()
