"""How does a benchmark talk to a system that lives in a process of its own?

A line on stdin is a command and its numbers, such as ``prefill 256``; the answer is a line of JSON on stdout. The
system is loaded once and waits between the commands, so that several of them can take turns on one machine.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Commands = Mapping[str, Callable[..., Any]]


def serve(commands: Commands, **greeting: Any) -> None:
    """Says ``greeting``, then answers commands until stdin ends. What a library prints to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(greeting), file=answers, flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        print(json.dumps(commands[name](*map(int, numbers))), file=answers, flush=True)


def resident_bytes() -> dict[str, int]:
    """Memory of this process: all that is resident, and what of it no file backs."""
    text = Path("/proc/self/status").read_text()
    found = dict(re.findall(r"(VmRSS|RssAnon):\s+(\d+) kB", text))
    return {"rss": 1024 * int(found["VmRSS"]), "anonymous": 1024 * int(found["RssAnon"])}
