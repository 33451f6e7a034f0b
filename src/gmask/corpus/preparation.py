"""`gmask prepare`: raw texts into tokenized shards, stage by stage, in any number of processes and machines.

Each stage is a list of tasks, and each task writes its files whole; the last of them says that it is done. So a run
that was killed goes on with the tasks that are left, and a result does not depend on who makes it:

1. read: a block of the sources -> the documents that pass the filters, and their signatures;
2. match: a part of a column of hashes -> the documents that are duplicates of earlier ones;
3. tokenize: a block -> a shard of the documents that are left.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from tokenizers import Tokenizer
from tqdm import tqdm

from gmask.corpus.documents import Block, CorpusFile, block_name, describe_files, find_blocks, read_block
from gmask.corpus.duplicates import (
    EXACT,
    FIRST_BAND,
    BlockSignatures,
    count_parts,
    hash_text,
    match_documents,
    writing_signatures,
)
from gmask.corpus.filters import check_languages, collect_ngrams, cut_units, find_contamination, find_fault
from gmask.corpus.report import DocumentTally, write_preparation_report
from gmask.corpus.shards import (
    MANIFEST_FILE,
    ShardWriter,
    TokenSource,
    hash_tokenizer,
    make_encoder,
    open_shards,
    read_shards_manifest,
    write_shards_manifest,
    writing_shard,
)
from gmask.errors import GmaskError
from gmask.files import read_json_lines, read_object, write_json, write_text, written, written_folder
from gmask.recipes.preparation import PreparationRecipe, load_preparation
from gmask.tasks.records import Source, find_files, hash_file

PREPARED_VERSION = 1
PREPARED_REMEDY = "copy the folder again, or delete it and run gmask prepare again"
SPLIT_NAMES = ("train", "validation")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class StageTask:
    """A part of a stage. It is done when its last file, ``done``, is there."""

    argument: Any
    done: Path
    size: int = 0  # bytes, of a task whose time follows from them


def run_preparation(recipe_path: str, overrides: Sequence[str] = (), *, resume: bool = True) -> Path:
    """Prepares a corpus by a recipe, goes on where a run stopped, and returns the folder of the result.

    Raises:
        GmaskError: a mistake in the recipe or the texts, the work of another recipe in the folder, a full disk.
    """
    recipe = load_preparation(recipe_path, overrides)
    tokenizer = load_encoder(recipe.tokenizer.path)
    if recipe.filters.languages is not None:
        check_languages(recipe.filters.languages)
    files, blocks = find_blocks(recipe.data)
    plan = make_plan(recipe, tokenizer, files)
    if is_finished(recipe.out, plan, resume=resume):
        return recipe.out
    _begin(recipe, plan, resume=resume)
    work, count = recipe.out / "work", len(blocks)
    _run_stage(recipe, "evaluation sets", _collect, [StageTask(None, work / "contamination.npy")])
    tasks = [StageTask(block, work / f"{block_name(block.number)}.read.json", block.size) for block in blocks]
    _run_stage(recipe, "read and filter", _read, tasks)
    parts = count_parts(len(BlockSignatures(work, count, recipe.duplicates)))
    places = [(column, part) for column in _match_columns(recipe) for part in range(parts)]
    tasks = [StageTask((count, *place, parts), _match_file(work, *place)) for place in places]
    _run_stage(recipe, "duplicates", _match, tasks)
    tasks = [
        StageTask((count, block, parts), work / f"{block_name(block.number)}.tokenized.json", block.size)
        for block in blocks
    ]
    _run_stage(recipe, "tokenize", _tokenize, tasks)
    if recipe.run.machine == 0:
        _finish(recipe, plan, blocks)
    return recipe.out


def make_plan(recipe: PreparationRecipe, encoder: Tokenizer, files: Sequence[CorpusFile]) -> dict[str, Any]:
    """All that the result depends on. A run goes on only with the same."""
    sets = [path for pattern in recipe.decontamination.files for path in find_files(_evaluation_path(recipe, pattern))]
    return {
        "version": PREPARED_VERSION,
        "tokenizer": hash_tokenizer(encoder),
        "recipe": recipe.decisive_values(),
        "files": describe_files(files),
        "evaluation": {str(path): hash_file(path) for path in sets},
    }


def _evaluation_path(recipe: PreparationRecipe, pattern: str) -> str:
    return str(Path(recipe.decontamination.root) / pattern)


def is_finished(out: Path, plan: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether the folder holds the result of the same plan. Raises `GmaskError` if it holds that of another one."""
    if not (out / MANIFEST_FILE).is_file():
        return False
    found = read_object(out / MANIFEST_FILE, remedy=PREPARED_REMEDY)
    _compare_plans(found, plan, out)
    if not resume:
        raise GmaskError(f"{out} is prepared already: choose another run.out")
    return True


def _compare_plans(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raises `GmaskError` if two plans differ, and says in what."""
    changed = [key for key in now if key != "recipe" and before.get(key) != now[key]]
    old = before.get("recipe", {})
    changed += [f"{section}" for section, values in now["recipe"].items() if old.get(section) != values]
    if changed:
        raise GmaskError(
            f"{out} was begun with another recipe or other files ({', '.join(changed)} differ): set them as they were, "
            "choose another run.out, or delete that folder"
        )


def _begin(recipe: PreparationRecipe, plan: Mapping[str, Any], *, resume: bool) -> None:
    """Writes the plan, or holds the one that is there against this one."""
    path = recipe.out / "work" / "plan.json"
    if recipe.run.machine > 0:
        _wait_for([path], recipe)
    if path.is_file():
        if not resume:
            raise GmaskError(f"{recipe.out} holds a run already: resume it, or choose another run.out")
        _compare_plans(read_object(path, remedy=PREPARED_REMEDY), plan, recipe.out)
        return
    if recipe.out.is_dir() and any(entry.name != "work" for entry in recipe.out.iterdir()):
        raise GmaskError(f"{recipe.out}: holds other files; name a new folder as run.out")
    write_json(path, plan)


# The tasks: functions of the recipe and an argument, which a process of any machine can call


def _collect(recipe: PreparationRecipe, _: None) -> None:
    with written(recipe.out / "work" / "contamination.npy") as draft, draft.open("wb") as file:
        np.save(file, collect_ngrams(recipe.decontamination))


def _read(recipe: PreparationRecipe, block: Block) -> None:
    """Reads and filters a block; writes NAME.jsonl.zst, the signatures, and NAME.read.json."""
    work, name, tally = recipe.out / "work", block_name(block.number), DocumentTally()
    known = np.load(work / "contamination.npy", mmap_mode="r")
    documents = read_block(
        block,
        recipe.data.field,
        on_bad_line=tally.add_bad_line if recipe.data.skip_bad_lines else None,
        on_bad_file=tally.add_bad_file if recipe.data.skip_bad_files else None,
    )
    with ExitStack() as stack:
        signatures = stack.enter_context(writing_signatures(work, name, recipe.duplicates))
        file = stack.enter_context(stack.enter_context(written(work / f"{name}.jsonl.zst")).open("wb"))
        packed = stack.enter_context(zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False))
        for document in documents:
            units = cut_units(document.text)
            where = f"{document.path}, line {document.line}"
            tally.add(document.text, len(units))
            reason, detail = find_fault(document.text, units, recipe.filters), ""
            if reason is None and (shared := find_contamination(units, recipe.decontamination.ngram, known)):
                reason, detail = "contamination", shared
            if reason is not None:
                tally.drop(reason, document.text, where, detail)
                continue
            line = json.dumps({"text": document.text, "where": where}, ensure_ascii=False)
            packed.write(f"{line}\n".encode())
            signatures.add(document.text, units)
    write_json(work / f"{name}.read.json", tally.to_dict())


def _match(recipe: PreparationRecipe, argument: tuple[int, int, int, int]) -> None:
    count, column, part, parts = argument
    work = recipe.out / "work"
    found = match_documents(BlockSignatures(work, count, recipe.duplicates), column, part, parts)
    with written(_match_file(work, column, part)) as draft, draft.open("wb") as file:
        np.save(file, found)


def _match_file(work: Path, column: int, part: int) -> Path:
    return work / f"{column:03d}-{part:05d}.matches.npy"


def _match_columns(recipe: PreparationRecipe) -> list[int]:
    settings = recipe.duplicates
    return [EXACT] * settings.exact + list(range(FIRST_BAND, FIRST_BAND + settings.bands * settings.near))


def _tokenize(recipe: PreparationRecipe, argument: tuple[int, Block, int]) -> None:
    """Tokenizes what is left of a block; writes its shard, or one for each split, and NAME.tokenized.json."""
    count, block, parts = argument
    work, name, tally = recipe.out / "work", block_name(block.number), DocumentTally()
    first = BlockSignatures(work, count, recipe.duplicates).first[block.number : block.number + 2]
    matches = [_match_file(work, column, part) for column in _match_columns(recipe) for part in range(parts)]
    reasons = _find_duplicates(matches, *first)
    (source,) = (source for source in recipe.data.sources if source.name == block.source)
    share = recipe.data.validation if block.split == "train" and source.validation is None else None
    encoder = load_encoder(recipe.tokenizer.path)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(writing_shard(tokens_folder(recipe.out, source.name, split), name, encoder))
            for split in ((block.split,) if share is None else SPLIT_NAMES)
        }
        lines = read_json_lines(work / f"{name}.jsonl.zst", checked=False)
        for reason, (_, record) in zip(reasons, lines, strict=True):
            text = record["text"]
            if reason:
                tally.drop(reason, text, record["where"])
                continue
            split = block.split
            if share is not None and int.from_bytes(hash_text(text)[8:]) < share * 2**64:
                split = "validation"
            writers[split].add(text)
            tally.add(text, 0)
    for split, writer in writers.items():
        if not writer.entry["tokens"]:
            _remove_shard(tokens_folder(recipe.out, source.name, split), writer)
    entries = {split: writer.entry for split, writer in writers.items()}
    write_json(work / f"{name}.tokenized.json", {**tally.to_dict(), "shards": entries})


def _remove_shard(folder: Path, writer: ShardWriter) -> None:
    for suffix in (".bin", ".npy"):
        (folder / f"{writer.name}{suffix}").unlink()


def _find_duplicates(matches: Iterable[Path], first: int, end: int) -> list[str]:
    """Why each of the documents from ``first`` to ``end`` is dropped, or ""."""
    reasons = [""] * int(end - first)
    for path in sorted(matches, reverse=True):  # the exact ones last, which is the reason that counts
        duplicates = np.load(path, mmap_mode="r")[0]
        reason = "exact_duplicate" if path.name.startswith(f"{EXACT:03d}-") else "near_duplicate"
        for number in duplicates[slice(*duplicates.searchsorted([first, end]))]:
            reasons[number - first] = reason
    return reasons


# The end


def _finish(recipe: PreparationRecipe, plan: Mapping[str, Any], blocks: Sequence[Block]) -> None:
    """Writes the manifests, the tokenizer and the report, and removes the work."""
    out, work = recipe.out, recipe.out / "work"
    encoder = load_encoder(recipe.tokenizer.path)
    tallies = {source.name: DocumentTally() for source in recipe.data.sources}
    shards: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for block in blocks:
        read = read_object(work / f"{block_name(block.number)}.read.json", remedy=PREPARED_REMEDY)
        tokenized = read_object(work / f"{block_name(block.number)}.tokenized.json", remedy=PREPARED_REMEDY)
        tallies[block.source].merge(read, tokenized)
        for split, entry in tokenized["shards"].items():
            shards.setdefault((block.source, split), []).append(entry)
    described = []
    for source in recipe.data.sources:
        values: dict[str, Any] = {"name": source.name, "weight": source.weight, "epochs": source.epochs}
        for split in SPLIT_NAMES:
            entries = [entry for entry in shards.get((source.name, split), []) if entry["tokens"]]
            if not entries:
                continue
            folder = tokens_folder(out, source.name, split)
            manifest = write_shards_manifest(folder, encoder, entries, {})
            values[split] = {
                "documents": manifest["documents"],
                "tokens": manifest["tokens"],
                "shards": len(entries),
                "sha256": hash_file(folder / MANIFEST_FILE),
            }
        if "train" not in values:
            raise GmaskError(f"source {source.name}: no document is left ({tallies[source.name].describe()})")
        described.append(values | {"kind": source.kind})
    folder = Path(recipe.tokenizer.path)
    with written_folder(out / "tokenizer") as draft:
        for name in TOKENIZER_FILES:
            (draft / name).write_bytes((folder / name).read_bytes())
    write_text(out / "recipe.yaml", recipe.to_yaml())
    write_preparation_report(out / "report", tallies, described)
    for draft in [*out.glob(".*.partial"), *(out / "tokens").rglob(".*.partial")]:  # of processes that were killed
        draft.unlink(missing_ok=True)
    write_json(out / MANIFEST_FILE, {**plan, "sources": described})
    if not recipe.run.keep_work:
        shutil.rmtree(work, ignore_errors=True)


def describe_prepared(folder: Path) -> dict[str, Any]:
    """The figures of a prepared folder: documents and tokens of each source. Raises `GmaskError` if it is damaged."""
    found = read_object(folder / MANIFEST_FILE, remedy=PREPARED_REMEDY)
    return {"tokenizer": found["tokenizer"], "sources": found["sources"]}


def open_prepared(
    folder: Path | str,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    weights: Mapping[str, float] | None = None,
    check_hashes: bool = True,
) -> list[TokenSource]:
    """The tokens of a folder that `gmask prepare` wrote; sources without this split are left out.

    Args:
        weights: of the sources, by name, in place of those of the recipe that prepared them.
        check_hashes: as of `open_shards`.

    Raises:
        GmaskError: the folder is not finished, damaged, or of another tokenizer; a weight of no source in it.
    """
    folder, weights = Path(folder), weights or {}
    if not (folder / MANIFEST_FILE).is_file():
        raise GmaskError(f"{folder}: has no {MANIFEST_FILE}; name a folder that gmask prepare has finished")
    manifest = read_object(folder / MANIFEST_FILE, remedy=PREPARED_REMEDY)
    if manifest["tokenizer"] != hash_tokenizer(tokenizer):
        raise GmaskError(f"{folder}: its texts are tokenized by another tokenizer; use the one in {folder}/tokenizer")
    known = [values["name"] for values in manifest["sources"]]
    if unknown := [name for name in weights if name not in known]:
        raise GmaskError(f"data.weights: {folder} has no source {unknown[0]!r}, but {', '.join(known)}")
    opened = []
    for values in manifest["sources"]:
        if split not in values:
            continue
        name, place = values["name"], tokens_folder(folder, values["name"], split)
        found = read_shards_manifest(place, PREPARED_REMEDY)
        if hash_file(place / MANIFEST_FILE) != values[split]["sha256"]:
            raise GmaskError(f"{place / MANIFEST_FILE}: is not the one that was prepared: {PREPARED_REMEDY}")
        shards = open_shards(place, found, remedy=PREPARED_REMEDY, check_hashes=check_hashes)
        weight, epochs = (weights[name], None) if name in weights else (values["weight"], values["epochs"])
        share = Source(name, "", weight=weight, epochs=epochs).share_of(found["tokens"])
        opened.append(TokenSource(name, share, shards))
    return opened


def tokens_folder(out: Path, source: str, split: str) -> Path:
    """Where the shards of a source and split are."""
    return out / "tokens" / source / split


@functools.cache
def load_encoder(folder: str) -> Tokenizer:
    """The tokenizer of a folder, as `make_encoder` has it. Raises `GmaskError` if there is none."""
    for name in TOKENIZER_FILES:
        if not (Path(folder) / name).is_file():
            raise GmaskError(f"{folder}: no {name} there; name a folder that gmask train-tokenizer wrote")
    return make_encoder(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")))


# Stages


def _run_stage(
    recipe: PreparationRecipe, title: str, work: Callable[[PreparationRecipe, Any], None], tasks: Sequence[StageTask]
) -> None:
    """Does this machine's tasks that are not done, and waits for those of others."""
    run = recipe.run
    left = [task for task in tasks[run.machine :: run.machines] if not task.done.is_file()]
    if left:
        sizes = sum(task.size for task in left)
        unit = {"unit": "B", "unit_scale": True} if sizes else {"unit": " parts"}
        with tqdm(total=sizes or len(left), desc=title, file=sys.stderr, **unit) as bar:
            for task in _do_tasks(recipe, work, left):
                bar.update(task.size if sizes else 1)
    _wait_for([task.done for task in tasks], recipe)


def _do_tasks(
    recipe: PreparationRecipe, work: Callable[[PreparationRecipe, Any], None], tasks: Sequence[StageTask]
) -> Iterator[StageTask]:
    """Does the tasks, and gives each when it is done. After an error no further one is begun."""
    if recipe.run.processes == 1:
        for task in tasks:
            work(recipe, task.argument)
            yield task
        return
    # Not forked: threads of the tokenizer and of numpy do not survive that.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(recipe.run.processes, context, initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        todo = iter(tasks)
        running = dict[Future[None], StageTask]()
        while True:
            for task in todo:
                running[pool.submit(work, recipe, task.argument)] = task
                if len(running) == 2 * recipe.run.processes:  # more would only be arguments in memory
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
    except BrokenProcessPool as error:
        raise GmaskError(
            "a process was killed, perhaps for want of memory: lower run.processes; the same command goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """Gives a process one core for its tokenizer, and ends it when its parent was killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait_for(paths: Sequence[Path], recipe: PreparationRecipe) -> None:
    """Waits until other machines have written their files, or have finished."""
    left = [path for path in paths if not path.is_file()]
    if left and recipe.run.machines > 1:
        print(f"machine {recipe.run.machine}: waiting for {len(left)} files of others", file=sys.stderr)
    while left and not (recipe.out / MANIFEST_FILE).is_file():
        time.sleep(POLL_SECONDS)
        left = [path for path in left if not path.is_file()]
