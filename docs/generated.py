"""The generated pages: the verbs, the modules' docstrings and the model cards, when the site is built."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from gmask.cli import app

VERBS = "<!-- verbs -->"
CARD = "<!-- card -->"
CHAT_CARD = "<!-- chat card -->"
MODULES = "<!-- modules -->"
PACKAGE = Path(__file__).parents[1] / "src" / "gmask"
PRETRAINED = PACKAGE / "pretrained"


def on_files(files: Files, config: Any) -> Files:
    """A hook of mkdocs: the cards' pictures belong to the site."""
    for name, folder in (("curves.png", PRETRAINED), ("chat-curves.png", PRETRAINED / "chat")):
        files.append(File.generated(config, f"reference/{name}", abs_src_path=str(folder / "curves.png")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A hook that mkdocs calls for every page: a marker becomes one section a verb, a list of modules, or a card."""
    if VERBS in markdown:
        return markdown.replace(VERBS, "\n".join(describe_verbs()))
    if MODULES in markdown:
        return markdown.replace(MODULES, "\n".join(describe_modules()))
    if CHAT_CARD in markdown:
        return markdown.replace(CHAT_CARD, read_card(PRETRAINED / "chat").replace("curves.png", "chat-curves.png"))
    return markdown.replace(CARD, read_card(PRETRAINED)) if CARD in markdown else markdown


def read_card(folder: Path) -> str:
    """A bundled model's card without its front matter and title."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\A---\n.*?\n---\n|^# .*\n", "", text, flags=re.S | re.M)


def describe_modules() -> Iterator[str]:
    """One table a folder: each module and the first sentence of its docstring."""
    for folder in [PACKAGE, *sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))]:
        yield f"\n## {folder.relative_to(PACKAGE.parent).as_posix()}/\n\n| module | what it holds |\n|---|---|"
        for path in sorted(folder.glob("*.py")):
            said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
            yield f"| `{path.name}` | {escape_cell(said)} |"


def describe_verbs() -> Iterator[str]:
    program = typer.main.get_command(app)
    context = typer.Context(program, info_name="gmask")
    for name in program.list_commands(context):
        yield from describe_verb(program.get_command(context, name), parent=context)


def describe_verb(verb: Any, *, parent: typer.Context) -> Iterator[str]:
    context = typer.Context(verb, info_name=verb.name, parent=parent)
    usage = " ".join([context.command_path, *verb.collect_usage_pieces(context)])
    yield f"## {verb.name}\n\n```\n{usage}\n```\n\n{verb.help}\n"
    yield "| option | meaning |\n|---|---|"
    for parameter in verb.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            option, meaning = (escape_cell(text) for text in record)
            yield f"| `{option}` | {meaning} |"
    yield ""


def escape_cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return text.replace("\n", " ").replace("\\", "\\\\").replace("|", "\\|")
