"""How does ``gmask infill`` talk to somebody at a terminal?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gmask.errors import GmaskError

if TYPE_CHECKING:
    from prompt_toolkit.history import History

    from gmask.generation.infill import Infiller

GREETING = "A text with [MASK], [sMASK] or [gMASK], please. Arrow up recalls earlier ones; Ctrl-D ends."


def converse(infiller: "Infiller", candidates: list[list[str]] | None, *, as_json: bool) -> None:
    """Fills one text after the other. Ctrl-C drops the current one; Ctrl-D ends."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(history=open_history(history_file("history")))
    print(GREETING)
    while True:
        try:
            text = session.prompt("> ").strip()
            if text:
                answer(infiller, text, candidates, as_json=as_json)
        except GmaskError as error:
            print(f"gmask: {error}")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def answer(infiller: "Infiller", text: str, candidates: list[list[str]] | None, *, as_json: bool) -> None:
    """Fills one text and prints it; as it is being written where there is only one alternative."""
    from gmask.cli.rendering import print_infilling, print_stream
    from gmask.generation.streaming import stream_answers

    if as_json:
        print(json.dumps(infiller.fill([text], candidates)[0].to_dict(), ensure_ascii=False))
    elif candidates or infiller.settings.n > 1 or infiller.settings.beams > 1:
        print_infilling(infiller.fill([text], candidates)[0])
    else:
        print_stream(infiller.read(text).pieces, stream_answers(infiller, text))


def history_file(name: str) -> Path:
    """Where earlier texts of one kind are kept."""
    return Path(typer.get_app_dir("gmask")) / name


def open_history(path: Path) -> "History":
    """Earlier texts, kept in a file; in memory alone where that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
