"""Parts of the page: requests to the model, labels in English and Chinese, the settings of both tabs.

The requests of the page are batched with those of HTTP clients, and are cancelled when the user stops them.
"""

import asyncio
import html
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeVar

import gradio as gr

from gmask.conversation import Conversation
from gmask.errors import GmaskError, is_shortage
from gmask.files import require_text
from gmask.generation.answers import Infilling
from gmask.generation.chat import DEFAULTS, Reply
from gmask.generation.encoding import Prompt
from gmask.generation.engine import SampleProgress
from gmask.generation.infill import infill
from gmask.generation.settings import Sampling
from gmask.serving.backend import Backend
from gmask.serving.blanks import read_filled
from gmask.serving.middleware import ApiError
from gmask.serving.replies import IncrementalDetokenizer

MAX_CHARACTERS = 20_000
"""The most characters of a text, of its choices, and of a message. The limits of the model are in tokens."""

MAX_ANSWERS = 16
"""The most answers to one text on the page."""


def most_answers(backend: Backend) -> int:
    """Returns the most answers to one text, by the limits of page and server."""
    return min(MAX_ANSWERS, backend.settings.max_samples)


async def fill_blanks(
    backend: Backend, text: str, choices: Sequence[Sequence[str]], n: int, settings: dict[str, Any]
) -> Infilling:
    """Fills the blanks of a text, with ``n - 1`` alternatives; settings as of `gmask.infill`.

    Raises:
        GmaskError: as of `gmask.infill`; also for a text that is too long.
        ApiError: too many requests; a timeout.
    """
    check_length(text)
    if not isinstance(n, int):
        raise GmaskError(f"n is {n!r}: expected int")
    model = backend.require_blanks("filling blanks")
    if choices or (n > 1 and not settings.get("temperature")):
        search = partial(infill, model, backend.tokenizer, text, choices=choices or None, n=n, **settings)
        return await backend.offline(None, search)
    blanked = await asyncio.to_thread(backend.reader.read, text)
    sampling = Sampling(**settings)
    return await read_filled(backend.submit(None, [blanked.context], sampling, n=n), blanked, sampling)


async def stream_reply(
    backend: Backend, conversation: Conversation, settings: dict[str, Any]
) -> AsyncGenerator[tuple[str, Reply | None]]:
    """Yields the reply so far and None, repeatedly, and at the end the reply and its `Reply`.

    Raises:
        GmaskError: as of `gmask.Chat`; also for a message that is too long.
        ApiError: too many requests; a timeout.
    """
    check_length(conversation.require_query())
    prompt = await backend.fit(conversation, longest=backend.positions, max_tokens=settings["max_tokens"])
    sampling = Sampling(**{**DEFAULTS, **settings})
    reader = IncrementalDetokenizer(backend.tokenizer, [backend.format.stable_text], (), logprobs=False)
    text = ""
    with closing(backend.submit(None, [prompt.context], sampling, is_streamed=True)) as job:
        async for _, progress in job.updates():
            text += "".join(delta.text for delta in reader.read(progress, {}))
            yield text, make_reply(text, prompt, progress) if progress.end else None


def make_reply(text: str, prompt: Prompt, progress: SampleProgress) -> Reply:
    """Returns the `Reply` of a sample that has ended; after a timeout its finish is "length"."""
    answer = progress.done[0] if progress.done else progress.open
    finish = answer.finish or "length"
    return Reply(text, finish, prompt.length, len(answer.ids), prompt.rounds_left_out, answer.logprob)


def check_length(text: str) -> None:
    """Raises `GmaskError` for a text of more than `MAX_CHARACTERS`, or what is no text."""
    require_text(text)
    if len(text) > MAX_CHARACTERS:
        raise GmaskError(f"the text has {len(text)} characters, but the page takes {MAX_CHARACTERS}: shorten it")


@contextmanager
def shown_errors(language: str) -> Iterator[None]:
    """Shows errors in a line on the page. Messages may quote the user, and Gradio renders HTML, so they are escaped."""
    try:
        yield
    except (GmaskError, ApiError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        message = "not enough memory: a shorter text, fewer answers or a quantized model need less"
    else:
        return
    raise gr.Error(html.escape(message), title=translate("error", language), print_exception=False)


PAGE_LANGUAGES = {"en": "English", "zh": "中文"}
LABELS = {
    "error": ("This did not work", "未能完成"),
    "settings": ("Settings", "参数"),
    "max_tokens": ("Longest answer", "答案长度上限"),
    "max_tokens_info": ("Tokens of one answer", "每个答案的最多词元数"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("0 takes the most probable words", "0 表示总取概率最大的词"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_info": ("Draw from the words that make up this share", "只从累计概率达到此值的词中抽取"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("Empty: new answers every time", "留空则每次结果不同"),
    # fill blanks
    "fill": ("Fill blanks", "填空"),
    "text": ("Text with blanks", "带空的文本"),
    "text_hint": ("The old man took his [MASK] and went to the [MASK].", "她今年[MASK]岁，在学校里学习[MASK]。"),
    "insert_MASK": ("+ words [MASK]", "+ 词语 [MASK]"),
    "insert_sMASK": ("+ sentence [sMASK]", "+ 句子 [sMASK]"),
    "insert_gMASK": ("+ rest [gMASK]", "+ 后文 [gMASK]"),
    "run": ("Fill", "填空"),
    "stop": ("Stop", "停止"),
    "choices": ("Choices (optional)", "候选答案（可选）"),
    "choices_info": (
        "One line for each blank, candidates between |. They are scored, not written.",
        "每空一行，候选之间用 | 隔开。模型只给候选打分，不另行生成。",
    ),
    "choices_hint": ("sunny | rainy | cold", "晴天 | 雨天 | 阴天"),
    "n": ("Answers to compare", "备选答案数"),
    "n_info": ("Best first", "从好到差"),
    "filled": ("Filled text", "填好的文本"),
    "alternatives": ("Alternatives: click a row to read it above", "备选答案：点击一行即可在上方查看"),
    "rank": ("#", "名次"),
    "blank": ("Blank {number}", "第 {number} 空"),
    "logprob": ("Log-probability", "对数概率"),
    "probability": ("Probability", "概率"),
    "candidate": ("Candidate", "候选"),
    "chart": ("How probable each choice is", "各候选的概率"),
    "cut": ("{count} of the answers were cut at the longest length.", "有 {count} 个答案因达到长度上限而被截断。"),
    "beams": (
        "Too many combinations to score them all: these are the best ones that a search found.",
        "组合太多，未能全部打分：以下为搜索得到的最优组合。",
    ),
    "examples_en": ("English examples", "英文示例"),
    "examples_zh": ("Chinese examples", "中文示例"),
    # chat
    "chat": ("Chat", "对话"),
    "conversation": ("Conversation", "对话内容"),
    "new_chat": ("New chat", "新对话"),
    "greeting": ("Say something to the model.", "和模型说点什么吧。"),
    "message_hint": ("A message; Enter sends it, Shift+Enter is a new line", "输入消息；回车发送，Shift+回车换行"),
    "counts": ("Prompt: {prompt} tokens. Reply: {reply} tokens.", "提示 {prompt} 个词元，回复 {reply} 个词元。"),
    "length": ("The reply was cut at the longest length.", "回复因达到长度上限而被截断。"),
    "left_out": ("The oldest {count} rounds had no room.", "最早的 {count} 轮对话放不下，已略去。"),
}
"""The texts of the page, each in the order of `PAGE_LANGUAGES`."""

Component = TypeVar("Component")


def translate(key: str, language: str, **values: object) -> str:
    """Returns a text of the page in a language."""
    return LABELS[key][list(PAGE_LANGUAGES).index(language)].format(**values)


def preferred_language(accepted: str | None) -> str:
    """Returns the first language of an ``Accept-Language`` header that the page has; English if it has none."""
    spoken = re.findall(r"(?:^|,)\s*([A-Za-z]+)", accepted or "")
    return next((language.lower() for language in spoken if language.lower() in PAGE_LANGUAGES), "en")


class Labelled:
    """The components of a page that have texts in both languages."""

    def __init__(self, language: str) -> None:
        self.language = language  # of the page when it is first drawn
        self.components: list[Any] = []
        self.keys: list[Mapping[str, str]] = []

    def make(self, component: Callable[..., Component], keys: Mapping[str, str], **properties: Any) -> Component:
        """Makes a component; ``keys`` has the label of each of its properties that is a text."""
        made = component(**{name: translate(key, self.language) for name, key in keys.items()}, **properties)
        self.add(made, keys)
        return made

    def add(self, component: Any, keys: Mapping[str, str]) -> None:
        """Adds a component that was made elsewhere."""
        self.components.append(component)
        self.keys.append(keys)

    def updates(self, language: str) -> list[dict[str, Any]]:
        """Returns the updates of ``components`` for a language."""
        texts: list[dict[str, Any]] = [
            {name: translate(key, language) for name, key in keys.items()} for keys in self.keys
        ]
        return [gr.update(**properties) for properties in texts]


def build_sampling(labelled: Labelled, *, max_tokens: int, limit: int, temperature: float, top_p: float) -> list[Any]:
    """Makes the controls of sampling: longest answer, temperature, top-p, seed."""
    return [
        labelled.make(
            gr.Slider,
            {"label": "max_tokens", "info": "max_tokens_info"},
            minimum=1,
            maximum=limit,
            value=max_tokens,
            step=1,
        ),
        labelled.make(
            gr.Slider,
            {"label": "temperature", "info": "temperature_info"},
            minimum=0,
            maximum=2,
            value=temperature,
            step=0.05,
        ),
        labelled.make(
            gr.Slider, {"label": "top_p", "info": "top_p_info"}, minimum=0.05, maximum=1, value=top_p, step=0.05
        ),
        labelled.make(gr.Textbox, {"label": "seed", "info": "seed_info"}, max_length=18, elem_classes="seed"),
    ]


def read_seed(text: str) -> int | None:
    """Reads the seed; None if the box is empty. (Gradio's box for numbers cannot be empty.)

    Raises:
        GmaskError: not a whole number from 0.
    """
    require_text(text, "the seed")
    if not text.strip():
        return None
    if not re.fullmatch("[0-9]{1,18}", text.strip()):
        raise GmaskError(f"the seed must be a whole number from 0, not {text.strip()!r}")
    return int(text)
