"""``gmask infill``, ``gmask score``, ``gmask embed`` and ``gmask chat``."""

import functools
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gmask.cli.options import (
    AdapterFolder,
    AsJson,
    Dtype,
    InputFile,
    KVCache,
    ModelName,
    OutputFile,
    Pairs,
    Quantize,
    SkipBadLines,
    base_of,
    load_glm,
    merge_settings,
    output_option,
    read_candidates,
    read_files,
    texts_or_stdin,
)
from gmask.cli.printing import (
    print_file_report,
    print_infilling,
    print_json,
    print_stream,
    print_tabbed,
    print_table,
)
from gmask.cli.startup import quick_start
from gmask.config import MOST
from gmask.cores import share_cores
from gmask.errors import GmaskError
from gmask.generation.settings import Sampling, ScoreNormalization

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

    from gmask.generation.chat import Chat, Reply
    from gmask.generation.infill import Infiller
    from gmask.generation.reward import RewardScorer
    from gmask.generation.score import Scorer, Scoring


InfillTexts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Texts with [MASK], [sMASK] or [gMASK]; \\[MASK] is meant as text. Without any, the lines of standard"
        " input; on a terminal, a prompt.",
        show_default=False,
    ),
]

Alternatives = Annotated[
    int | None,
    typer.Option("-n", "--n", help="Alternatives of a text, best first.", show_default=str(Sampling().n)),
]

Candidates = Annotated[
    list[str] | None,
    typer.Option(help="Candidates of a blank, as 'sunny|rainy'; once for each blank.", show_default=False),
]

Processes = Annotated[
    int, typer.Option(min=1, help="Processes that fill the lines of --input, each with a model of its own.")
]

AnswerTokens = Annotated[
    int | None, typer.Option(help="Longest answer, in tokens.", show_default=str(Sampling().max_tokens))
]


def infill(
    texts: InfillTexts = None,
    model: ModelName = "bundled",
    n: Alternatives = None,
    choices: Candidates = None,
    max_tokens: AnswerTokens = None,
    source: InputFile = None,
    target: OutputFile = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = False,
    adapter: AdapterFolder = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    pairs: Pairs = None,
    processes: Processes = 1,
) -> None:
    """Fill the blanks of texts, from left to right, each answer with the earlier ones in sight."""
    from gmask.generation.settings import make_sampling

    settings = make_sampling(merge_settings(pairs, n=n, max_tokens=max_tokens))
    candidates = [read_candidates(choice) for choice in choices or []] or None
    files = read_files(texts, source, target)
    if processes > 1 and not files:
        raise GmaskError("--processes is for the lines of --input")
    is_interactive = not files and not texts and sys.stdin.isatty()
    texts = [] if files or is_interactive else texts_or_stdin(texts)
    make = functools.partial(_make_infiller, model, adapter, dtype, quantize, kv_cache, settings)
    infiller = make()
    if files:
        load = make if processes > 1 else None
        _fill_file(infiller, *files, candidates, skip_bad_lines, processes, load)
    elif is_interactive:
        fill_interactively(infiller, candidates, as_json=as_json)
    else:
        _fill_texts(infiller, texts, candidates, as_json=as_json)


def _fill_texts(
    infiller: "Infiller", texts: Sequence[str], candidates: list[list[str]] | None, *, as_json: bool
) -> None:
    filled = infiller.fill(texts, candidates)
    for infilling in filled:
        if as_json:
            print_json(infilling.to_dict())
        else:
            print_infilling(infilling)
    cut = sum(not blank.finished for infilling in filled for blank in infilling.blanks)
    if cut:
        limit = infiller.sampling.max_tokens
        print(f"note: {cut} answer(s) cut at {limit} tokens; --max-tokens sets the limit", file=sys.stderr)
    if any(infilling.choices and not infilling.choices.exact for infilling in filled):
        print("note: too many combinations of choices to score all; searched by beams", file=sys.stderr)


def _make_infiller(
    model: str, adapter: Path | None, dtype: str | None, quantize: str | None, kv_cache: str | None, settings: Sampling
) -> "Infiller":
    pair = load_glm(model, adapter, dtype, quantize, kv_cache)
    from gmask.generation.infill import Infiller

    return Infiller(*pair, settings)


def _fill_file(
    infiller: "Infiller",
    source: Path,
    target: Path,
    candidates: list[list[str]] | None,
    skip_bad_lines: bool,
    processes: int,
    load: Callable[[], "Infiller"] | None,
) -> None:
    from gmask.generation.files import fill_file

    report = fill_file(
        infiller,
        source,
        target,
        choices=candidates,
        skip_bad_lines=skip_bad_lines,
        progress=sys.stderr.isatty(),
        processes=processes,
        load=load,
    )
    print_file_report(report, target, participle="filled")


INFILL_GREETING = "A text with [MASK], [sMASK] or [gMASK], please. Arrow up recalls earlier ones; Ctrl-D ends."


def fill_interactively(infiller: "Infiller", candidates: list[list[str]] | None, *, as_json: bool) -> None:
    """Asks for texts and fills them. Ctrl-C drops the current one; Ctrl-D ends."""

    def fill(text: str) -> bool:
        fill_and_print(infiller, text, candidates, as_json=as_json)
        return True

    prompt_for_texts(INFILL_GREETING, fill, history="history", read=lambda session: session.prompt("> ").strip())


def prompt_for_texts(
    greeting: str, answer: Callable[[str], bool], *, history: str, read: "Callable[[PromptSession[str]], str]"
) -> None:
    """Asks for one text after the other, until ``answer`` returns False or Ctrl-D ends it.

    Args:
        answer: handles a text, if it is not empty.
        history: the name of the file with earlier texts.
        read: asks for a text.
    """
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(history=open_history(history_file(history)))
    print(greeting)
    while True:
        try:
            text = read(session)
            if text and not answer(text):
                return
        except GmaskError as error:
            print(f"gmask: {error}")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def fill_and_print(infiller: "Infiller", text: str, candidates: list[list[str]] | None, *, as_json: bool) -> None:
    """Fills one text and prints it; if there is only one alternative, while it is written."""
    from gmask.generation.infill import stream_answers

    if as_json:
        print_json(infiller.fill([text], candidates)[0].to_dict())
    elif candidates or infiller.sampling.n > 1 or infiller.sampling.beams > 1:
        print_infilling(infiller.fill([text], candidates)[0])
    else:
        print_stream(infiller.read(text).pieces, stream_answers(infiller, text))


def history_file(name: str) -> Path:
    """Returns the path of the file with earlier texts of one kind."""
    return Path(typer.get_app_dir("gmask")) / name


def open_history(path: Path) -> "History":
    """Opens the history of earlier texts; it is in memory if the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


BlankedTexts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Texts with one [MASK], [sMASK] or [gMASK]; without any, the lines of standard input.",
        show_default=False,
    ),
]

PlainTexts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Texts, with blanks or without; without any, the lines of standard input.",
        show_default=False,
    ),
]

Answers = Annotated[str | None, typer.Option(help="The answers to every text, as 'sunny|rainy'.", show_default=False)]
ScoreName = Annotated[
    str,
    typer.Option(
        metavar="sum|mean|unconditional",
        help="Log-probability of an answer; for each of its tokens; or less that of the answer without the text.",
    ),
]

RewardModel = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A reward model, which scores instead.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(help="Texts that are read together.")]
EmbeddedFile = Annotated[Path | None, output_option("Where the vectors of --input go: .npy (float32) or .jsonl.")]
PoolingName = Annotated[
    str,
    typer.Option(metavar="mean|first|last|mask", help="Of all tokens; of the first, the last, or the first blank."),
]

Layer = Annotated[int, typer.Option(help="Which layer's hidden states; -1 is the last, 0 the embeddings.")]
Normalize = Annotated[bool, typer.Option(help="Scale every vector to length 1.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long instead of refusing them.")]


def score(
    texts: BlankedTexts = None,
    model: ModelName = "bundled",
    answers: Answers = None,
    normalization: ScoreName = "sum",
    source: InputFile = None,
    target: OutputFile = None,
    batch_size: BatchSize = 16,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = False,
    adapter: AdapterFolder = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    reward: RewardModel = None,
) -> None:
    """Score given answers to the blank of a text by their exact log-probabilities, best first.

    A line of a .jsonl file has a "text", its "answers" unless --answers gives them, and perhaps a "label": the right
    answer, or its index from 0. To a reward model the texts are prompts.
    """
    candidates = None if answers is None else read_candidates(answers, option="--answers")
    files = read_files(texts, source, target)
    if not files and candidates is None:
        raise GmaskError("there are no answers: give them as --answers 'sunny|rainy'")
    texts = [] if files else texts_or_stdin(texts)
    if reward is not None:
        _score_by_reward(_load_reward(reward, adapter, dtype, quantize, batch_size), texts, candidates, files, as_json)
        return
    pair = load_glm(model, adapter, dtype, quantize)
    from gmask.generation.score import Scorer

    scorer = Scorer(*pair, cast(ScoreNormalization, normalization), batch_size)
    if files:
        _score_file(scorer, *files, candidates, skip_bad_lines)
        return
    for scored in scorer.score([scorer.read(text, candidates or []) for text in texts]):
        if as_json:
            print_json(scored.to_dict())
        else:
            print_scoring(scored)


def embed(
    texts: PlainTexts = None,
    model: ModelName = "bundled",
    pooling: PoolingName = "mean",
    layer: Layer = -1,
    normalize: Normalize = True,
    truncate: Truncate = False,
    source: InputFile = None,
    target: EmbeddedFile = None,
    skip_bad_lines: SkipBadLines = False,
    adapter: AdapterFolder = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Turn texts into vectors: a model's hidden states, pooled. Prints a JSON object for each text.

    A model that fills blanks was not trained to put like texts near each other: these are features to train on, and
    poor sentence vectors to search with.
    """
    settings: dict[str, Any] = {"pooling": pooling, "layer": layer, "normalize": normalize, "truncate": truncate}
    files = read_files(texts, source, target)
    texts = [] if files else texts_or_stdin(texts)
    pair = load_glm(model, adapter, dtype, quantize)
    from gmask.generation.embed import Embedder, as_floats

    embedder = Embedder(*pair, **settings)
    if files:
        from gmask.generation.files import embed_file

        report = embed_file(embedder, *files, skip_bad_lines=skip_bad_lines, progress=sys.stderr.isatty())
        print_file_report(report, files[1], participle="embedded")
        return
    vectors = embedder.embed([embedder.read(text) for text in texts])
    for text, vector in zip(texts, vectors, strict=True):
        print_json({"text": text, "embedding": as_floats(vector)})


def _score_file(
    scorer: "Scorer", source: Path, target: Path, candidates: Sequence[str] | None, skip_bad_lines: bool
) -> None:
    from gmask.generation.files import count_correct, score_file

    progress = sys.stderr.isatty()
    report = score_file(scorer, source, target, answers=candidates, skip_bad_lines=skip_bad_lines, progress=progress)
    print_file_report(report, target, participle="scored")
    correct, labelled = count_correct(target)
    if labelled:
        print(f"accuracy {correct / labelled:.4f} ({correct} of {labelled})")


def _load_reward(
    model: str, adapter: Path | None, dtype: str | None, quantize: str | None, batch_size: int
) -> "RewardScorer":
    from gmask.checkpoints.hub import check_name

    check_name(model)  # before torch is imported, which takes seconds
    from gmask.checkpoints.load import load
    from gmask.generation.reward import RewardScorer

    return RewardScorer(*load(model, dtype=dtype, quantize=quantize, adapter=adapter), batch_size)


def _score_by_reward(
    scorer: "RewardScorer",
    texts: Sequence[str],
    candidates: Sequence[str] | None,
    files: tuple[Path, Path] | None,
    as_json: bool,
) -> None:
    if files:
        from gmask.generation.files import reward_file

        report = reward_file(scorer, *files, answers=candidates, progress=sys.stderr.isatty())
        print_file_report(report, files[1], participle="scored")
        return
    for found in scorer.rank([scorer.read(text, candidates or []) for text in texts]):
        if as_json:
            print_json(found.to_dict())
        else:
            print_tabbed((found.text, answer, f"{score:.4f}") for answer, score in found.ranked)


def print_scoring(scoring: "Scoring") -> None:
    """Prints the answers to a text, best first: as a table on a terminal, else as tab-separated lines."""
    rows = [(answer.text, f"{answer.score:.4f}", f"{answer.probability:.4f}") for answer in scoring.ranked]
    if not sys.stdout.isatty():
        print_tabbed((scoring.text, *row) for row in rows)
        return
    from rich.text import Text

    print_table(
        ("answer", "score", "probability"),
        rows,
        figures=("score", "probability"),
        wrapped=("answer", "score", "probability"),
        title=Text(scoring.text),
        title_justify="left",
        box=None,
        pad_edge=True,
        header_style="table.header",
        row_styles=["bold green"] + [""] * (len(rows) - 1),
    )


CHAT_GREETING = "A message, please; /help lists the commands, Ctrl-D ends."
CHAT_COMMANDS = """\
/clear       begin anew (also: clear)
/undo        take the last round back
/save FILE   write the conversation to a JSON file
/load FILE   go on with one
/stop        end (also: stop, Ctrl-D)
Ctrl-C stops the reply that is being written and keeps what was said; \\ at the end of a line goes on with the next."""

Messages = Annotated[
    list[str] | None, typer.Argument(metavar="MESSAGE...", help="Answer these in turn and end.", show_default=False)
]

ContextLength = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and reply together.", show_default="what the model was trained on"),
]

ReplyTokens = Annotated[int | None, typer.Option(help="Tokens of a reply.", show_default="half of the context")]
ChatModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or name of a model, or bundled, or bundled-chat.",
        show_default="bundled-chat, or the bundled model that the adapter is for",
    ),
]

HistoryFile = Annotated[
    Path | None, typer.Option("--load", help="Go on with the conversation in this file.", show_default=False)
]


def chat(
    texts: Messages = None,
    model: ChatModelName = None,
    context_length: ContextLength = None,
    max_tokens: ReplyTokens = None,
    history: HistoryFile = None,
    adapter: AdapterFolder = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    pairs: Pairs = None,
) -> None:
    """Talk with a model: ChatGLM-6B, or another GLM by questions and answers."""
    from gmask.checkpoints.hub import check_name
    from gmask.generation.settings import make_sampling

    settings = merge_settings(pairs, max_tokens=max_tokens)
    make_sampling({"max_tokens": MOST, **settings})  # a mistake is reported before the model is loaded
    chosen = model or (base_of(adapter, "bundled-chat") if adapter else "bundled-chat")
    check_name(chosen)  # before torch is imported, which takes seconds
    share_cores()
    with quick_start(adapter is None):
        from gmask.checkpoints.load import load
        from gmask.generation.chat import Chat

        network, tokenizer = load(chosen, dtype=dtype, quantize=quantize, adapter=adapter, kv_cache=kv_cache)
    conversation = Chat(network, tokenizer, context_length=context_length, **settings)
    _note_context(conversation.chatter.context_length, network.config.max_position_embeddings)
    if history is not None:
        conversation.load(history)
    if texts or not sys.stdin.isatty():
        for text in texts_or_stdin(texts):
            reply = conversation.ask(text)
            print(reply.text, flush=True)
            _note_limits(reply)
    else:
        converse(conversation)


def converse(conversation: "Chat") -> None:
    """Asks for messages and replies to them until the user ends it."""
    prompt_for_texts(CHAT_GREETING, lambda text: answer_message(conversation, text), history="chat", read=read_message)


def read_message(session: "PromptSession[str]") -> str:
    """Asks for a message; a backslash at the end of a line continues it on the next."""
    lines = [session.prompt("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(session.prompt(". "))
    return "\n".join(lines).strip()


def answer_message(conversation: "Chat", text: str) -> bool:
    """Runs a command or replies to a message; returns False if the conversation is to end."""
    name, _, argument = text.partition(" ")
    if text in ("stop", "/stop", "/exit", "/quit"):
        return False
    if text == "clear":
        name = "/clear"
    command = _commands(conversation).get(name)
    if command is not None:
        print(command(argument.strip()))
    elif text.startswith("/"):
        raise GmaskError(f"there is no command {name}; /help lists them")
    else:
        print_reply(conversation.stream(text))
    return True


def _commands(conversation: "Chat") -> dict[str, Callable[[str], str]]:
    def clear(_: str) -> str:
        conversation.clear()
        return "the conversation begins anew"

    def undo(_: str) -> str:
        return "the last round is taken back" if conversation.undo() else "there is nothing to take back"

    def save(name: str) -> str:
        if not name:
            raise GmaskError("/save needs the name of a file")
        conversation.save(Path(name).expanduser())
        return f"{name}: {len(conversation.messages)} messages"

    def load(name: str) -> str:
        if not name:
            raise GmaskError("/load needs the name of a file")
        conversation.load(Path(name).expanduser())
        return f"{len(conversation.messages)} messages"

    return {"/clear": clear, "/undo": undo, "/save": save, "/load": load, "/help": lambda _: CHAT_COMMANDS}


def print_reply(fragments: Generator[str, None, "Reply"]) -> None:
    """Prints a reply while it is written. Ctrl-C ends it; the text so far stays in the conversation."""
    try:
        while True:
            print(next(fragments), end="", flush=True)
    except StopIteration as done:
        print()
        _note_limits(done.value)
    except KeyboardInterrupt:
        fragments.close()
        print(" ...")
    except GmaskError:
        print()  # so that the error is on a line of its own
        raise


def _note_context(wanted: int, trained: int) -> None:
    if wanted > trained:
        print(
            f"note: a context of {wanted} tokens, but the model was trained on at most {trained}: replies get worse "
            "beyond them",
            file=sys.stderr,
        )


def _note_limits(reply: "Reply") -> None:
    if reply.rounds_left_out:
        print(f"note: the oldest {reply.rounds_left_out} round(s) had no room in the context", file=sys.stderr)
    if reply.finish == "length":
        print(f"note: cut at {reply.reply_tokens} tokens; --max-tokens sets the limit", file=sys.stderr)
