"""What does a conversation with `gmask chat` look like? Types one at a terminal and writes it into the documentation.

    python tests/chat_session.py

test_chat_session.py holds the page to what the program shows now.
"""

import re
import sys
import tempfile
from pathlib import Path

from terminal import Terminal

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "chat.md"
SETTINGS = ["--set", "temperature=0", "--max-tokens", "40"]
SHOWN = re.compile(rf"(?<=^```\n)\$ gmask chat {' '.join(SETTINGS)}\n.*?(?=^```$)", re.M | re.S)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
TYPED = (
    "Hello!",
    "What is\\",
    "20 + 22?",
    "/undo",
    "你是谁？",
    "/save talk.json",
    "clear",
    "/load talk.json",
    "/sing",
    "stop",
)


def record() -> str:
    """The command, and all that is typed and shown until it ends."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "gmask", "chat", *SETTINGS]
        own = {"HOME": name, "XDG_CONFIG_HOME": name, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        terminal = Terminal(command, folder=folder, **own)
        try:
            screen = terminal.read_until_prompt()
            for line in TYPED:
                sign = "." if screen.endswith("\\\n") else ">"
                screen += f"{sign} {line}\n"
                terminal.press(f"{line}\r")
                terminal.read_until("\x1b[?2004l")  # the line has been read
                if line != TYPED[-1]:
                    screen += CONTROL.sub("", terminal.read_until_prompt())
            assert terminal.process.wait(timeout=600) == 0
        finally:
            terminal.close()
    return f"$ gmask chat {' '.join(SETTINGS)}\n{CONTROL.sub('', screen)}"


def shown() -> str:
    """The session on the page."""
    (found,) = SHOWN.findall(PAGE.read_text("utf-8"))
    return str(found)


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text.replace(shown(), record()), "utf-8")
