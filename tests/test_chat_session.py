"""Is the conversation in the documentation what `gmask chat` says?

`python tests/chat_session.py` records it at a terminal, which takes seconds; here the same lines are typed without one.
"""

import io
import sys
from pathlib import Path

import prompt_toolkit
import pytest

from chat_session import SETTINGS, TYPED, shown
from gmask.checkpoints import load
from gmask.cli import main


class TypedLines:
    """Stands for a prompt at which somebody types the lines of the session."""

    lines = iter(TYPED)

    def __init__(self, **settings: object) -> None: ...

    def __class_getitem__(cls, _: object) -> type["TypedLines"]:
        return cls

    def prompt(self, sign: str) -> str:
        line = next(self.lines)
        print(f"{sign}{line}")
        return line


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_session_on_the_page_is_what_the_program_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prompt_toolkit, "PromptSession", TypedLines)
    monkeypatch.setattr(load, "best_device", lambda: "cpu")
    monkeypatch.setattr(sys, "argv", ["gmask", "chat", *SETTINGS])
    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert f"$ gmask chat {' '.join(SETTINGS)}\n{capsys.readouterr().out}" == shown()
