"""What does the page say, in English and in Chinese?"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import gradio as gr

LANGUAGES = {"en": "English", "zh": "中文"}

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
"""Each text in the order of `LANGUAGES`."""

Component = TypeVar("Component")


def say(key: str, language: str, **values: object) -> str:
    """A text of the page."""
    return LABELS[key][list(LANGUAGES).index(language)].format(**values)


def preferred_language(accepted: str | None) -> str:
    """The first language of an ``Accept-Language`` header that the page speaks; English if there is none."""
    spoken = re.findall(r"(?:^|,)\s*([A-Za-z]+)", accepted or "")
    return next((language.lower() for language in spoken if language.lower() in LANGUAGES), "en")


class Labelled:
    """The components of a page whose texts change with the language."""

    def __init__(self, language: str) -> None:
        self.language = language  # of the page as it is first drawn
        self.components: list[Any] = []
        self.keys: list[Mapping[str, str]] = []

    def make(self, component: Callable[..., Component], keys: Mapping[str, str], **properties: Any) -> Component:
        """A component; ``keys`` are the labels of those of its properties that are text."""
        made = component(**{name: say(key, self.language) for name, key in keys.items()}, **properties)
        self.add(made, keys)
        return made

    def add(self, component: Any, keys: Mapping[str, str]) -> None:
        """Takes in a component that was made elsewhere, with its first texts."""
        self.components.append(component)
        self.keys.append(keys)

    def updates(self, language: str) -> list[dict[str, Any]]:
        """What changes in each of ``components`` for a language."""
        texts: list[dict[str, Any]] = [{name: say(key, language) for name, key in keys.items()} for keys in self.keys]
        return [gr.update(**properties) for properties in texts]
