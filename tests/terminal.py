"""How do tests type at a program that talks to a terminal?"""

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path


def heed_ctrl_c() -> None:
    """Has a new process obey SIGINT, which whoever runs the tests in the background has it ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str], *, folder: Path | None = None, **environment: str) -> None:
        self.leader, follower = pty.openpty()
        settings = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=settings, cwd=folder, preexec_fn=heed_ctrl_c
        )
        os.close(follower)
        self.unread = b""

    def press(self, keys: str) -> None:
        os.write(self.leader, keys.encode())

    def read_until(self, text: str, *, seconds: float = 600) -> str:
        """What it shows up to a text, which is read too; an error if that does not come."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.unread:
            ready, _, _ = select.select([self.leader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come, but {self.unread.decode(errors='replace')!r}"
            self.unread += os.read(self.leader, 4096)
        shown, _, self.unread = self.unread.partition(text.encode())
        return shown.decode()

    def read_until_prompt(self) -> str:
        """What it shows before it waits for a line."""
        shown = self.read_until("\x1b[?2004h")  # pasting is switched on when a line begins
        self.read_until("\x1b[?25h")  # the cursor is shown when the prompt has been drawn
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.leader)
