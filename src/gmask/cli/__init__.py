"""The command line ``gmask``.

Each verb is one thin function, which imports what it needs when it runs, so that ``gmask --help`` is fast.
"""

import contextlib
import errno
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from gmask import __version__
from gmask.allocator import keep_freed_memory
from gmask.cli.estimate import estimate
from gmask.cli.evaluation import evaluate
from gmask.cli.feedback import dpo, grpo, kto, pipeline, ppo, reward, sft
from gmask.cli.generation import chat, embed, infill, score
from gmask.cli.models import convert, info, merge, quantize
from gmask.cli.serving import serve, webui
from gmask.cli.training import finetune, prepare, pretrain, train_tokenizer
from gmask.errors import GmaskError, StoppedError, is_shortage

app = typer.Typer(
    name="gmask",
    help="Fill in the blanks: the first-generation GLM family on today's PyTorch and transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # else [sMASK] would be markup
)
VERBS = (
    infill, chat, score, embed, serve, webui, convert, quantize, info, estimate, merge, prepare, pretrain, finetune,
    sft, reward, dpo, kto, grpo, ppo, pipeline, evaluate, train_tokenizer,
)  # fmt: skip
for verb in VERBS:
    app.command()(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gmask {__version__}")
        raise typer.Exit


@app.callback()
def take_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """The options that stand before a verb; the help of the program is that of `app`."""


def main() -> None:
    """Runs a verb. A user's mistake is one line on standard error and exit code 2.

    Ctrl-C is exit code 130; output into a pipe that nobody reads any more, as after ``| head -1``, is 1. A run that
    SIGTERM stopped has saved its state, and is 0.
    """
    _prepare_streams()
    _quiet_libraries()
    keep_freed_memory()
    reported = threading.excepthook
    threading.excepthook = partial(_report_thread, reported)
    try:
        status = app(prog_name=app.info.name, standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status)
    except GmaskError as error:
        _fail(str(error))
    except StoppedError as stop:
        print("gmask:", stop, file=sys.stderr)
    except typer.TyperException as error:
        _fail_usage(error)
    except typer.Abort:
        sys.exit(1)
    except ModuleNotFoundError as error:
        _fail_missing(error)
    except BrokenPipeError:
        _discard_output()
        sys.exit(1)  # as typer does where a print meets the closed pipe
    except OSError as error:  # no such file, no permission, disk full
        name = error.filename
        if name is None and error.errno in FULL:  # files are written by gmask.files, which names them
            _discard_output()
            name = "standard output"
        _fail(": ".join(str(part) for part in (name, error.strerror or error) if part))
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        _fail("not enough memory: shorter or fewer texts at a time, or --quantize int4 if it is an option, need less")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        threading.excepthook = reported


def _fail(message: str) -> NoReturn:
    printable = message.encode("utf-8", "backslashreplace").decode()  # bytes of an argument that are not UTF-8
    print("gmask:", " ".join(printable.split()), file=sys.stderr)
    sys.exit(2)


def _fail_missing(error: ModuleNotFoundError) -> NoReturn:
    """Reports a missing package, and the extra of gmask that installs it, if there is one."""
    if error.name is None:
        _fail(str(error))
    package = error.name.partition(".")[0]
    extra = find_extra(package)
    _fail(f"{package} is not installed" + (f": pip install 'gmask[{extra}]'" if extra else ""))


def find_extra(package: str) -> str | None:
    """Returns the extra of gmask that requires a package, by the metadata of the installation; None if none does."""
    from importlib import metadata

    try:
        requirements = metadata.requires("gmask") or []
    except metadata.PackageNotFoundError:  # run from its sources
        return None
    for requirement in requirements:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)", requirement)
        if name and extra and extra[1] != "dev" and name[0].replace("-", "_").lower() == package.lower():
            return extra[1]
    return None


def _fail_usage(error: typer.TyperException) -> NoReturn:
    """Reports wrong arguments. If there are no arguments, typer's message is the help."""
    if len(sys.argv) == 1:
        print(error.format_message())
        sys.exit(error.exit_code)
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context else app.info.name
    _fail(f"{error.format_message().rstrip('.')}; see {command} --help")


def _prepare_streams() -> None:
    """Escapes what a console cannot show. A stream that is closed becomes one that discards or has nothing."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that a program puts in its place may not be
            stream.reconfigure(errors="backslashreplace")


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What the system says when a file cannot grow."""


def _report_thread(report: Callable[[threading.ExceptHookArgs], Any], failed: threading.ExceptHookArgs) -> None:
    """Reports the error of a thread, unless a file could not grow: the next one who writes to it is told."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in FULL):
        report(failed)


def _discard_output() -> None:
    """Discards what is left for standard output, which Python would try to write once more when it ends."""
    with contextlib.suppress(OSError):  # a program may have put a stream without a file in its place
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_libraries() -> None:
    """Turns off the progress bars and the advice of libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
