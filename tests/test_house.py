"""Does the house keep its rules: no import circles, one home a name, a true README, light imports?"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "gmask"
READMES = ["README.md", "README.zh.md"]
FOLDERS = ["src", "tests", "benchmarks", "docs", "docker", "recipes", ".ci", ".github"]  # beside the files of the root


def project_files(*suffixes: str) -> Iterator[Path]:
    """The project's own text files: those of the root and of FOLDERS, caches left out."""
    folders = (path for name in FOLDERS for path in sorted((ROOT / name).rglob("*")))
    for path in [*sorted(ROOT.iterdir()), *folders]:
        if path.is_file() and path.suffix in suffixes and not {"__pycache__", ".git"} & set(path.parts):
            yield path


def python_modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def fenced_blocks(page: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)
    return [text for found, text in blocks if found == language]


def tree_of(readme: str) -> set[str]:
    """The paths below src/gmask of the block that draws the tree; two spaces of indent are one level."""
    (block,) = (text for text in fenced_blocks(readme, "") if text.startswith("src/gmask/\n"))
    paths: set[str] = set()
    parents: list[str] = []
    for line in block.splitlines()[1:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 2 - 1
        parents = [*parents[:depth], name.rstrip("/")]
        paths.add("/".join(parents))
    return paths


def tree_on_disk() -> set[str]:
    """The modules and folders at the top of the package. Below, a README lists the files to begin with."""
    paths = {path.name for path in PACKAGE.glob("*.py")}
    return paths | {path.name for path in PACKAGE.glob("*/") if path.name != "__pycache__" and any(path.iterdir())}


def commands(readme: str) -> list[str]:
    """The lines of the shell and Python blocks, comments left out: those are translated."""
    text = "".join(fenced_blocks(readme, "bash") + fenced_blocks(readme, "python"))
    return [line for line in (line.split("#")[0].rstrip() for line in text.splitlines()) if line]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def top_level_names(tree: ast.Module) -> set[str]:
    """The public names that a module defines; loggers are every module's own."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return {name for name in names if not name.startswith("_")} - {"log", "logger"}


def verbs() -> set[str]:
    """The functions of the command line: each is named as it is typed, which may be the name of what it calls."""
    from gmask.cli import VERBS

    return {verb.__name__ for verb in VERBS}


def import_graph() -> dict[str, set[str]]:
    """Which modules of the package each of them imports, at its top or in a function; not for type checking."""
    trees = {module_name(path): ast.parse(path.read_text("utf-8")) for path in python_modules()}

    def imported(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    yield name if name in trees else str(child.module)
            yield from imported(child)

    return {name: (set(imported(tree)) & trees.keys()) - {name} for name, tree in trees.items()}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = import_graph()
    while free := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in free}
    while unused := left.keys() - set().union(*left.values()):  # those above a circle are no part of it
        left = {name: imports for name, imports in left.items() if name not in unused}
    assert left == {}


def test_each_public_name_is_defined_once() -> None:
    homes: dict[str, list[str]] = {}
    for path in python_modules():
        names = top_level_names(ast.parse(path.read_text("utf-8")))
        if module_name(path).startswith("gmask.cli."):
            names -= verbs()
        for name in sorted(names):
            homes.setdefault(name, []).append(module_name(path))
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_no_test_has_a_time_out_that_a_busy_machine_passes() -> None:
    """Of seconds; those below 2 are the subject of their tests."""
    pattern = re.compile(r"\btimeout=(\d+)\b")
    found = [
        f"{path.name}:{number}: {match[0]}"
        for path in sorted((ROOT / "tests").glob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if (match := pattern.search(line)) and 2 <= int(match[1]) < 300 and "ProxyHandler" not in line
    ]
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(PACKAGE))
        for path in python_modules()
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_in_the_readme_is_true(readme: str) -> None:
    listed, present = tree_of(readme), tree_on_disk()
    assert {path for path in listed if not (PACKAGE / path).exists()} == set(), "listed, but not there"
    assert present - listed == set(), "there, but not listed"


def test_both_readmes_show_the_same_tree_and_commands() -> None:
    english, chinese = READMES
    assert tree_of(english) == tree_of(chinese)
    assert commands(english) == commands(chinese)


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(r"/(?:work|root|home|Users)/\w")
    text_files = project_files(".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", "")
    assert [str(path.relative_to(ROOT)) for path in text_files if place.search(path.read_text("utf-8"))] == []


def test_the_public_names_are_those_of_the_stub() -> None:
    import gmask

    tree = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8"))
    imported = [alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert gmask.__all__ == sorted([*map(str, imported), "__version__"])


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    done = run_python("import sys, gmask; print({'torch', 'transformers', 'numpy'} & set(sys.modules))")
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_help_lists_the_verbs_without_loading_torch() -> None:
    done = run_python(
        "import sys; sys.argv = ['gmask', '--help']\n"
        "from gmask.cli import main\n"
        "try: main()\n"
        "finally: print('torch loaded:', 'torch' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert "torch loaded: False" in done.stdout
    for verb in ["infill", "pretrain", "train-tokenizer", "info"]:
        assert verb in done.stdout


def test_the_version_is_told_without_loading_anything_large() -> None:
    import gmask

    done = run_python(
        "import sys; sys.argv = ['gmask', '--version']\n"
        "from gmask.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules))"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gmask {gmask.__version__}\nset()\n", "")


MISTYPED = [
    "infill [MASK] --model {}", "chat hello --model {}", "score [MASK] --answers a|b --model {}",
    "embed text --model {}", "convert {} new", "quantize {} new", "merge {} --adapter a --output new", "info {}",
    "estimate {}", "evaluate {}", "evaluate {} --tasks superglue/rte --data d.jsonl", "serve {}", "webui {}",
]  # fmt: skip
MISTYPED_TASKS = [
    "evaluate --tasks superglue/rtee", "evaluate --tasks rtee*", "evaluate --suite superglu",
    "evaluate --tasks superglue/rtee --export-lm-eval new",
]  # fmt: skip


def test_a_mistyped_model_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="serving needs gmask[serve]")
    (tmp_path / "file").write_text("not a folder", "utf-8")
    names = ["no such folder", "runs/modle", str(tmp_path / "file")]
    commands = [[part.format(name) for part in line.split()] for line in MISTYPED for name in names]
    commands = [command for command in commands if command[0] not in ("info", "estimate") or command[1] != names[2]]
    done = run_python(
        "import os, sys; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from gmask.cli import main\n"
        f"for command in {commands!r}:\n"
        "    sys.argv = ['gmask', *command]\n"
        "    try: main()\n"
        "    except SystemExit as ended: assert ended.code == 2, command\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), command"
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    for line, command in zip(lines, commands, strict=True):
        assert any(line.startswith(f"gmask: {name}: ") for name in names if name in command), line


def test_a_mistyped_task_is_refused_before_torch_is_imported() -> None:
    done = run_python(
        "import sys\n"
        "from gmask.cli import main\n"
        f"for command in {MISTYPED_TASKS!r}:\n"
        "    sys.argv = ['gmask', *command.split()]\n"
        "    try: main()\n"
        "    except SystemExit as ended: assert ended.code == 2, command\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), command"
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len(lines := done.stderr.splitlines()) == len(MISTYPED_TASKS)
    assert all("the nearest of gmask's is" in line for line in lines), lines


def test_the_worked_example_of_the_documentation_is_what_the_code_computes() -> None:
    import numpy as np
    import torch

    from gmask.infilling.blanks import BlankTokens, blank_out
    from gmask.models.layout import visible_keys

    words = ["[CLS]", "The", "old", "cat", "sat", "on", "it", "eos", "[MASK]", "`<sop>`", "`<eop>`"]
    special = BlankTokens(mask=8, smask=8, gmask=8, sop=9, eop=10, pad=-1, cls=0, eos=7)
    spans, answers_in_order = np.array([[2, 4], [6, 7]]), np.array([1, 0])
    text = np.arange(8)
    example = blank_out(text, spans, mask=8, special=special, objective="token", order=answers_in_order)
    in_context = torch.from_numpy(example.layout[1] == 0)[None]
    visible = visible_keys(in_context, key_length=len(example.input_ids))[0, 0]

    page = (ROOT / "docs/explanation/blank-infilling.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in page.splitlines() if line.startswith("| `")]
    tokens, places, answer_places, labels = rows[:4]
    assert [token.strip("`") for token in tokens] == [words[i].strip("`") for i in example.input_ids]
    assert [list(map(int, places)), list(map(int, answer_places))] == example.layout.tolist()
    assert labels == ["-" if i == -100 else words[i] for i in example.labels]
    picture = [re.findall("[■·]", line) for line in page.splitlines()]
    assert [row for row in picture if row] == [["·■"[seen] for seen in row] for row in visible.int().tolist()]


def test_the_recipes_shown_and_shipped_are_valid() -> None:
    import yaml

    from gmask.recipes.pretraining import load_recipe, read_recipe

    (shown,) = fenced_blocks("docs/how-to/pretrain.md", "yaml")
    assert read_recipe(yaml.safe_load(shown)).run.out == "runs/mine"
    assert load_recipe(ROOT / "recipes" / "bundled.yaml").data.sources
