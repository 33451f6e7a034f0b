"""Does the command line do what it says, and say in one line what is wrong?"""

import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

import gmask
from gmask.cli import app, find_extra, generation, main
from gmask.cli.printing import highlight_answers
from gmask.models import base
from gmask.native.ops import instruction_sets
from gmask.quantization.kernels import describe_path
from terminal import Terminal, heed_ctrl_c
from tiny_folder import make_folder

VERBS = list(typer.main.get_command(app).commands)
TEXT = "The [MASK] dog [MASK]."


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object, stdin: str | bytes = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gmask", *map(str, arguments)])
        piped = io.StringIO(stdin) if isinstance(stdin, str) else io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", piped)
        with pytest.raises(SystemExit) as ended:
            main()
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_texts_are_filled_in_plain_text(run: Run, folder: Path) -> None:
    model, tokenizer = gmask.load(folder, device="cpu")
    expected = [infilling.text for infilling in gmask.infill(model, tokenizer, [TEXT, "我[MASK]苹果"], max_tokens=4)]
    assert run("infill", TEXT, "我[MASK]苹果", "-m", folder, "--max-tokens", 4).out.splitlines() == expected
    lines = f"{TEXT}\n\n我[MASK]苹果\n"
    for stdin in (lines, lines.encode(), b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode()):
        piped = run("infill", "-m", folder, "--max-tokens", 4, stdin=stdin)
        assert piped.out.splitlines() == expected
    assert "\x1b" not in piped.out
    assert "cut at 4 tokens" in piped.err


@pytest.mark.parametrize("verb", [("infill", "--json"), ("score", "--json", "--answers", "old|small"), ("embed",)])
def test_integers_answer_as_the_folder_that_gmask_quantize_writes(
    run: Run, folder: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    assert run("quantize", folder, tmp_path / "small", "--bits", "4").code == 0
    text = "The [MASK] dog."
    quantized = run(*verb, text, "-m", folder, "--quantize", "int4").out
    assert quantized == run(*verb, text, "-m", tmp_path / "small").out != run(*verb, text, "-m", folder).out


@pytest.mark.parametrize("verb", [("infill", "--json"), ("score", "--json", "--answers", "old|small"), ("embed",)])
def test_weights_are_read_in_the_precision_that_is_asked_for(run: Run, folder: Path, verb: tuple[str, ...]) -> None:
    shorter = run(*verb, "The [MASK] dog.", "-m", folder, "--dtype", "bfloat16")
    assert shorter.code == 0 and shorter.out != run(*verb, "The [MASK] dog.", "-m", folder).out
    refused = run(*verb, "The [MASK] dog.", "-m", folder, "--dtype", "int3")
    assert refused.code == 2 and "dtype 'int3' is not one of" in refused.err


def test_json_has_the_promised_form(run: Run, folder: Path) -> None:
    done = run("infill", TEXT, "--json", "-m", folder, "--max-tokens", 4)
    values = json.loads(done.out)
    assert list(values) == ["text", "logprob", "blanks"]
    assert len(values["blanks"]) == 2
    for blank in values["blanks"]:
        assert list(blank)[:3] == ["text", "logprob", "tokens"]
        assert blank.get("finished", True) == (len(blank["tokens"]) < 4)
        assert all(list(token) == ["id", "text", "logprob"] for token in blank["tokens"])
    several = json.loads(run("infill", TEXT, "--json", "-m", folder, "-n", 3, "--max-tokens", 4).out)
    assert len(several["alternatives"]) == 2


def test_alternatives_come_best_first_behind_their_scores(run: Run, folder: Path) -> None:
    lines = run("infill", TEXT, "-m", folder, "-n", 3, "--max-tokens", 3).out.splitlines()
    scores = [float(line.split("\t")[0]) for line in lines]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_choices_are_given_once_a_blank_and_shown_with_their_probability(run: Run, folder: Path) -> None:
    options = ("-m", folder, "--choices", "old|sunny", "--choices", "ran|took", "-n", 4)
    lines = [line.split("\t") for line in run("infill", TEXT, *options).out.splitlines()]
    assert sum(float(probability) for probability, _ in lines) == pytest.approx(1, abs=1e-3)
    assert {text for _, text in lines} == {f"The {a} dog {b}." for a in ("old", "sunny") for b in ("ran", "took")}
    values = json.loads(run("infill", TEXT, *options, "--json").out)
    assert values["choices"]["exact"] is True
    assert set(values["choices"]["combinations"][0]) == {"texts", "logprob", "probability"}


def test_settings_pass_through(run: Run, folder: Path) -> None:
    options = ("-m", folder, "--max-tokens", 6, "--set", "temperature=1.5", "--set", "seed=3", "--set", "top_k=50")
    once, again = (run("infill", TEXT, *options).out for _ in range(2))
    other = run("infill", TEXT, *options, "--set", "seed=4").out
    assert once == again != other


def test_a_file_is_filled_and_its_report_is_not_part_of_the_output(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(f"{TEXT}\nno blank\n", "utf-8")
    files = ("--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl")
    bad = run("infill", "-m", folder, *files)
    assert bad.code == 2
    assert "in.txt, line 2: the text has no blank" in bad.err
    done = run("infill", "-m", folder, *files, "--skip-bad-lines")
    assert (done.code, done.out) == (0, "")
    assert "2 lines, 1 of them by an earlier run; 1 could not be filled" in done.err
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 2


GBK = "小猫[MASK]。".encode("gbk")


@pytest.mark.parametrize("verb", [["infill"], ["chat"], ["score", "--answers", "a|b"], ["embed"]])
def test_a_text_that_is_not_utf8_is_one_line(run: Run, folder: Path, verb: list[str]) -> None:
    piped = run(*verb, "-m", folder, stdin=b"fine [MASK]\n" + GBK)
    assert (piped.code, piped.out) == (2, "")
    assert piped.err == "gmask: standard input, line 2: not UTF-8 text; save the file as UTF-8\n"
    typed = run(*verb, "-m", folder, os.fsdecode(GBK))
    assert (typed.code, typed.out) == (2, "") and len(typed.err.splitlines()) == 1
    assert typed.err.startswith(
        "gmask: the text holds half of a character (a lone surrogate), or a byte that is not UTF-8, in '"
    )


MISTAKES = [
    (["infill", "no blank"], "no blank"),
    (["infill", "[XMASK]"], "unknown special token [XMASK]"),
    (["infill", "x " * 300 + "[MASK]"], "96 positions"),
    (["infill", "[MASK]", "--set", "temprature=1"], "nearest is 'temperature'"),
    (["infill", "[MASK]", "--set", "temperature"], "key=value"),
    (["infill", "[MASK]", "--set", "temperature=[1"], "cannot be read"),
    (["infill", "[MASK]", "--set", "max_tokens=5", "--max-tokens", "64"], "--max-tokens and --set max_tokens say the"),
    (["infill", "[MASK]", "--set", "n=2", "-n", "1"], "--n and --set n say the same: give one of them"),
    (["chat", "hello", "--max-tokens", "5", "--set", "max_tokens=5"], "--max-tokens and --set max_tokens say the same"),
    (["chat", "hello", "--set", "context_length=5"], "there is no setting 'context_length'"),
    (["infill", "[MASK]", "--choices", "a||b"], "candidate is empty"),
    (["infill", "[MASK]", "--choices", "a", "--choices", "b"], "choices for 2 blanks"),
    (
        ["infill", "[MASK]", "--choices", "a|\udcd0"],
        "--choices holds half of a character (a lone surrogate), or a byte that is not UTF-8",
    ),
    (["infill", "[MASK]", "--set", "stop=\udcd0"], "--set stop=\\udcd0: the value cannot be read (the text holds half"),
    (["infill", "[MASK]", "--input", "x"], "--input and --output go together"),
    (["infill", "[MASK]", "--input", "x", "--output", "y"], "not both"),
    (["infill", "--input", "no-such-file", "--output", "y"], "no-such-file: cannot be read (No such file"),
    (["infill"], "standard input is empty"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(run: Run, folder: Path, arguments: list[str], message: str) -> None:
    done = run(*arguments, "-m", folder)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


def test_mistakes_in_names_of_models_and_recipes_too(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ["info", "nowhere"],
        ["info", "no/name--of-the-hub"],
        ["estimate", "--method", "lora", "--set", "name=full"],
        ["pretrain", "no.yaml"],
        ["train-tokenizer", "no.txt", "--output", tmp_path],
    ):
        done = run(*arguments)
        assert done.code == 2
        assert len(done.err.splitlines()) == 1


MISTYPED = [
    (["quantize", "bundled", "new", "--bits", "int3"], "'--bits'", "gmask quantize"),
    (["infill", "[MASK]", "--sett", "seed=1"], "No such option: --sett", "gmask infill"),
    (["infill", "[MASK]", "--max-tokens"], "--max-tokens", "gmask"),
    (["convert", "bundled"], "TARGET", "gmask convert"),
    (["info", "a", "b"], "b", "gmask info"),
    (["inffill", "[MASK]"], "No such command 'inffill'", "gmask"),
]


@pytest.mark.parametrize(("arguments", "message", "program"), MISTYPED)
def test_a_mistyped_command_is_one_line_that_names_its_help(run: Run, arguments, message: str, program: str) -> None:
    done = run(*arguments)
    (line,) = done.err.splitlines()
    assert (done.code, done.out) == (2, "")
    assert line.startswith("gmask: ") and message in line and line.endswith(f"; see {program} --help")


def test_without_a_word_the_help_is_shown(run: Run) -> None:
    done = run()
    assert done.code == 2 and all(f"  {verb} " in done.out for verb in VERBS)


def test_a_setting_that_has_an_option_may_be_given_either_way(run: Run, folder: Path) -> None:
    text = ("infill", TEXT, "-m", folder)
    set_alone = run(*text, "--set", "max_tokens=3", "--set", "n=2")
    assert set_alone.out == run(*text, "--max-tokens", 3, "-n", 2).out
    assert "[default: (64)]" in run("infill", "--help").out
    talk = ("chat", "hello", "-m", folder, "--set", "temperature=0")
    assert run(*talk, "--set", "max_tokens=3").out == run(*talk, "--max-tokens", 3).out


MISSING = [
    ("peft", ": pip install 'gmask[train]'"),
    ("gradio.blocks", ": pip install 'gmask[webui]'"),
    ("prometheus_client.core", ": pip install 'gmask[serve]'"),
    ("rouge_chinese", ": pip install 'gmask[metrics]'"),
    ("lm_eval", ": pip install 'gmask[eval]'"),
    ("ray", ": pip install 'gmask[ray]'"),
    ("torch", ""),
    ("scipy", ""),
    ("somebody.elses", ""),
]


@pytest.mark.parametrize(("module", "advice"), MISSING)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, module: str, advice: str
) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    required = [*project["dependencies"]]
    for extra, names in project["optional-dependencies"].items():
        required += [f'{name}; extra == "{extra}"' for name in names]

    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(metadata, "requires", lambda _: required)
    monkeypatch.setattr("gmask.training.pretrain.run_pretraining", fail)
    done = run("pretrain", "r.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"gmask: {module.partition('.')[0]} is not installed{advice}\n"


def test_sources_that_are_not_installed_name_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", fail)
    assert find_extra("peft") is None


def test_a_full_disk_is_one_line_too(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "in.txt").write_text(TEXT, "utf-8")
    monkeypatch.setattr(os, "fsync", fail)
    done = run("infill", "-m", folder, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl")
    told = f"{tmp_path / 'out.jsonl'}: cannot be written (No space left on device); what is done is kept"
    assert (done.code, done.err) == (2, f"gmask: {told}\n")
    assert list(tmp_path.glob("*.partial")), "what was done is kept"


def test_info_tells_size_ids_memory_and_licence(run: Run, folder: Path) -> None:
    model, _ = gmask.load(folder, device="cpu")
    values = json.loads(run("info", folder, "--json").out)
    assert values["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert values["memory_bytes"] == {"float32": 4 * values["parameters"], "bfloat16": 2 * values["parameters"]}
    assert values["special_ids"]["sop"] == 8
    assert values["licence"] is None
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n", "utf-8")
    assert "apache-2.0" in run("info", folder).out


def test_info_tells_what_multiplies_on_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads(run("info", "--machine", "--json").out)
    assert values["C++_kernels"] == list(instruction_sets())
    assert values["int8_and_int4"] == describe_path()
    monkeypatch.setattr(base, "lacks_bfloat16", lambda: False)
    assert "instructions of this CPU" in run("info", "--machine").out
    monkeypatch.setattr(base, "lacks_bfloat16", lambda: True)
    assert ("in float32" in run("info", "--machine").out) == bool(instruction_sets())
    refused = run("info", "--machine", "--zoo")
    assert (refused.code, refused.err) == (2, "gmask: give --zoo or --machine, not both\n")


def test_a_tokenizer_is_learnt_from_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200, "utf-8")
    done = run("train-tokenizer", tmp_path / "text.txt", "--output", tmp_path / "tok", "--vocab-size", 380)
    assert done.code == 0, done.err
    assert "380 tokens" in done.out
    assert (tmp_path / "tok" / "tokenizer.json").is_file()


def test_pretrain_hands_recipe_and_overrides_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from gmask.training import pretrain

    calls = []
    monkeypatch.setattr(
        pretrain, "run_pretraining", lambda *args, **keywords: calls.append((args, keywords)) or Path("model")
    )
    assert run("pretrain", "r.yaml", "run.out=x", "optimization.steps=1", "--no-resume").out == "model\n"
    assert calls == [(("r.yaml", ["run.out=x", "optimization.steps=1"]), {"resume": False})]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_few_options_of_its_own(run: Run, verb: str) -> None:
    done = run(verb, "--help")
    options = [line.split()[0] for line in done.out.splitlines() if line.startswith("  -")]
    assert done.code == 0
    shared = {"--adapter", "--set", "--dtype", "--kv-cache", "--quantize", "--help"}
    # evaluate: tasks, held-out text, comparisons, lists, exports; estimate: inference, tuning, pretraining on many GPUs
    limit = {"evaluate": 18, "estimate": 14}.get(verb, 9)
    assert len(set(options) - shared) <= limit
    assert "[sMASK]" in done.out or verb != "infill"


def test_every_verb_that_runs_a_model_takes_the_options_that_estimate_advises(run: Run) -> None:
    for verb in ("infill", "chat", "score", "embed", "serve", "webui"):
        shown = run(verb, "--help").out
        assert all(f"  {option} " in shown for option in ("--dtype", "--quantize")), verb


def test_serve_shows_every_setting_that_it_takes(run: Run) -> None:
    shown = " ".join(run("serve", "--help").out.split())
    refused = run("serve", "--set", "max_row=1").err
    for name in refused.split("all are ")[1].strip().split(", "):
        assert name in shown


def test_on_a_terminal_answers_are_highlighted(folder: Path) -> None:
    infilling = gmask.infill(*gmask.load(folder, device="cpu"), TEXT, max_tokens=4)
    text = highlight_answers(infilling)
    assert text.plain == infilling.text
    assert [(span.start, span.end) for span in text.spans] == [(blank.start, blank.end) for blank in infilling.blanks]


@pytest.mark.slow
def test_a_conversation_streams_highlights_remembers_and_ends(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gmask", "infill", "-m", str(folder), "--max-tokens", "4"]
    terminal = Terminal(command, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path))
    try:
        terminal.read_until("Ctrl-D ends.")
        terminal.read_until_prompt()
        terminal.press("The [MASK] dog\r")
        terminal.read_until("\x1b[1;32m")  # bold and green
        terminal.read_until(" dog")
        terminal.read_until_prompt()
        terminal.press("no blank\r")
        terminal.read_until("no blank: put")
        terminal.read_until_prompt()
        terminal.press("\x04")
        assert terminal.process.wait(timeout=600) == 0
    finally:
        terminal.close()
    assert "The [MASK] dog" in (tmp_path / "gmask" / "history").read_text("utf-8")


def test_a_conversation_goes_on_after_mistakes_and_ends_with_ctrl_d(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import prompt_toolkit

    from gmask.generation.infill import Infiller
    from gmask.generation.settings import Sampling

    typed = iter(["", TEXT, "no blank", KeyboardInterrupt(), EOFError()])

    class Session:
        def __init__(self, history: object) -> None: ...

        def __class_getitem__(cls, _: object) -> type["Session"]:
            return cls

        def prompt(self, _: str) -> str:
            key = next(typed)
            if isinstance(key, BaseException):
                raise key
            return key

    monkeypatch.setattr(prompt_toolkit, "PromptSession", Session)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    pair = gmask.load(folder, device="cpu")
    generation.fill_interactively(Infiller(*pair, Sampling(max_tokens=4)), None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == gmask.infill(*pair, TEXT, max_tokens=4).text
    assert "no blank" in lines[2]


def test_ctrl_c_is_exit_code_130(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gmask.generation.infill import Infiller

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Infiller, "fill", interrupt)
    done = run("infill", TEXT, "-m", folder)
    assert done.code == 130
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_ctrl_c_stops_a_real_run_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(f"{TEXT}\n" * 5000, "utf-8")
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")]
    command = [sys.executable, "-m", "gmask", "infill", "-m", str(folder), *files]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_the_command_knows_the_bundled_models_without_loading_any() -> None:
    from gmask.checkpoints.hub import BUNDLED_MODELS
    from gmask.cli.options import BUNDLED_NAMES

    assert tuple(BUNDLED_MODELS) == BUNDLED_NAMES


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_console_that_cannot_show_a_character_gets_it_escaped(
    encoding: str, as_json: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    options = ["--json"] if as_json else []
    monkeypatch.setattr(sys, "argv", ["gmask", "infill", "é😀中 [MASK]", "-m", str(folder), "-n", "2", *options])
    monkeypatch.setattr(sys, "stdout", shown)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    text = shown.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    if as_json:
        assert json.loads(text)["text"].startswith("é😀中")
    else:
        assert r"\U0001f600" in text


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are no bytes there")
def test_arguments_are_read_as_utf8_where_the_locale_is_not(run: Run, folder: Path) -> None:
    typed = "我[MASK]".encode().decode("ascii", "surrogateescape")
    assert run("infill", typed, "-m", folder, "--max-tokens", 2).out.startswith("我")
    scored = run("score", typed, "-m", folder, "--answers", typed.replace("[MASK]", "") + "|a").out
    assert "我\t" in scored


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
def test_a_pipe_that_nobody_reads_ends_the_command_silently() -> None:
    command = [sys.executable, "-m", "gmask", "info", "--zoo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["info"], ["--help"]])
def test_standard_output_that_is_full_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "gmask", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.decode() == "gmask: standard output: No space left on device\n"


def test_streams_that_are_closed_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["gmask", "info"])
    with pytest.raises(SystemExit) as ended:
        main()
    for stream in (sys.stdin, sys.stdout):
        stream.close()
    assert not ended.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "100000"], "n is 100000: it must be at most 1000"),
        (["-n", "500"], "n is 500: at most the best 128 are found; set a temperature to draw more"),
        (["--set", "num_beams=100000"], "num_beams is 100000: it must be at most 256"),
        (["--set", "length_penalty=1000000000000000000"], "it must be from -100 to 100"),
        (["--max-tokens", str(10**18)], "max_tokens is 1000000000000000000: it must be at most 1000000000000"),
        (["--set", "temperature=1.0e+300"], "temperature is 1e+300: it must be at most 1000000000000"),
    ],
)
def test_settings_that_nobody_means_are_refused(run: Run, folder: Path, arguments: list[str], message: str) -> None:
    outcome = run("infill", TEXT, "-m", folder, *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err


@pytest.mark.parametrize(
    ("option", "value"), [("--vocab-size", 0), ("--vocab-size", 10**18), ("--seed", -1), ("--sample-bytes", 0)]
)
def test_a_tokenizer_refuses_numbers_that_nobody_means(run: Run, tmp_path: Path, option: str, value: int) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 99)
    outcome = run("train-tokenizer", tmp_path / "text.txt", "-o", tmp_path / "made", option, value)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, "no progress bar in a pipe, either"
    assert not (tmp_path / "made").exists()


def test_pretrain_prints_the_figures_of_the_run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0, "tokens": 10, "seconds": 1.0, "validation": {"news": {"token": 2.5}}},
        {"step": 2, "loss": 2.0, "tokens": 20, "seconds": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("gmask.training.pretrain.run_pretraining", lambda *given, **options: tmp_path)
    printed = json.loads(run("pretrain", "recipe.yaml", "--json").out)
    assert printed == {
        "folder": str(tmp_path),
        **{"step": 2, "tokens": 20, "loss": 2.0, "seconds": 2.0, "validation": {"news": {"token": 2.5}}},
    }


@pytest.mark.parametrize("command", [["infill", "a [MASK]"], ["chat", "hello"]])
def test_another_form_of_keys_and_values_is_refused(command: list[str], run: Run) -> None:
    result = run(*command, "--kv-cache", "int4")
    assert result.code == 2 and "kv_cache 'int4' is not one of int8" in result.err


def test_keys_and_values_in_int8(run: Run) -> None:
    result = run("infill", "--kv-cache", "int8", "--max-tokens", "3", TEXT)
    assert result.code == 0 and "dog" in result.out
    assert run("chat", "--kv-cache", "int8", "--max-tokens", "3", "1+1=?").code == 0
    wide, narrow = (run("estimate", "--json", *more) for more in ((), ("--kv-cache", "int8")))
    assert '"cache"' in wide.out and wide.out != narrow.out
    refused = run("estimate", "--method", "lora", "--kv-cache", "int8")
    assert refused.code == 2 and "--kv-cache is for answering" in refused.err
