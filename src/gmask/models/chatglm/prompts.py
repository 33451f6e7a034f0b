"""How does a conversation become ChatGLM's prompt, and how is its reply cleaned up?

Source: published modeling_chatglm.py, ``chat`` and ``process_response``.
"""

import re
from collections.abc import Sequence

History = Sequence[tuple[str, str]]
"""Earlier rounds: what was asked and what was answered."""

TRAINING_TIME = "[[训练时间]]"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
IDEOGRAPH = "[\u4e00-\u9fff]"


def build_prompt(query: str, history: History = ()) -> str:
    """The text that the model continues: the query itself, or behind earlier rounds all of them in order."""
    if not history:
        return query
    rounds = [f"[Round {index}]\n问：{asked}\n答：{answered}\n" for index, (asked, answered) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def clean_reply(text: str) -> str:
    """The reply without white space around it, with full-width marks beside Chinese characters."""
    text = text.strip().replace(TRAINING_TIME, "2023年")
    for mark, wide in FULL_WIDTH.items():
        text = re.sub(f"(?<={IDEOGRAPH}){re.escape(mark)}", wide, text)
        text = re.sub(f"{re.escape(mark)}(?={IDEOGRAPH})", wide, text)
    return text
