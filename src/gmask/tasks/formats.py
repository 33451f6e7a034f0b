"""Published formats: nested records into plain ones, and conversations into samples."""

import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gmask.config import read_yaml
from gmask.conversation import read_conversation
from gmask.errors import GmaskError
from gmask.files import parse_json, read_text
from gmask.tasks.detokenize import detokenize_gigaword, detokenize_wikitext
from gmask.tasks.records import Record, Sample, Values
from gmask.tasks.templates import count_words, escape_blanks


def flatten(reader: str, record: Record) -> Iterator[Record]:
    """The plain records of one record of a published format, each with the file and line of that record.

    Args:
        reader: a name of `READERS`.

    Raises:
        GmaskError: the record is not of that format.
    """
    try:
        is_split = reader in RECORD_READERS
        for values in RECORD_READERS[reader](record) if is_split else FORMAT_READERS[reader](record.values):
            yield replace(record, values=dict(values))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        columns = ", ".join(record.values)
        raise GmaskError(f"not of the format {reader!r}: {what}; the columns are {columns}") from error


def _read_plain(values: Values) -> Iterator[Values]:
    yield values


def _read_copa(values: Values) -> Iterator[Values]:
    """Adds ``joiner``, the word between the premise and its cause or effect."""
    yield {**values, "joiner": {"cause": " because", "effect": ", so"}[values["question"]]}


def _read_multirc(values: Values) -> Iterator[Values]:
    """Makes a record of each answer; the answers to a question share their ``group``. The hub has one row an answer."""
    if "paragraph" in values:
        place = values["idx"]
        yield {**values, "passage": values["paragraph"], "group": f"{place['paragraph']}-{place['question']}"}
        return
    for question in values["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "passage": values["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "group": f"{values['idx']}-{question['idx']}",
                **_known(answer, "label"),
            }


def _read_record(values: Values) -> Iterator[Values]:
    """Makes a record of each query: the texts ``before`` and ``after`` its blank, the ``candidates`` and ``answers``.

    As published, the candidates are the different entities of the passage, and the highlights of the passage become a
    list. The label is that of the first right answer. The hub has one row a query.
    """
    if "query" in values:
        text, entities, place = values["passage"], values["entities"], values["idx"]
        queries = [(values["query"], values.get("answers", ()), f"{place['passage']}-{place['query']}")]
    else:
        text = values["passage"]["text"]
        entities = [text[entity["start"] : entity["end"] + 1] for entity in values["passage"]["entities"]]
        queries = [
            (query["query"], [answer["text"] for answer in query.get("answers", ())], f"{values['idx']}-{query['idx']}")
            for query in values["qas"]
        ]
    candidates = list(dict.fromkeys(entities))
    for query, right, group in queries:
        before, _, after = query.partition("@placeholder")
        answers = list(dict.fromkeys(right))
        labels = [candidates.index(answer) for answer in answers if answer in candidates]
        yield {
            "passage": text.replace("@highlight\n", "- "),
            "before": before.rstrip(),
            "after": after,
            "candidates": candidates,
            "answers": answers,
            "group": group,
            **({"label": labels[0]} if labels else {}),
        }


def _read_wsc(values: Values) -> Iterator[Values]:
    """Adds ``marked``, the text with asterisks at the pronoun, and the texts ``pronoun`` and ``span``.

    ``span2_index`` counts words and misses its pronoun by one in some published lines: the nearest one is marked.
    """
    target = values if "span2_text" in values else values["target"]  # the hub has no inner object
    words = values["text"].split()
    pronoun, index = target["span2_text"], target["span2_index"]
    found = [position for position, word in enumerate(words) if word.strip(string.punctuation) == pronoun]
    found = found or [position for position, word in enumerate(words) if word.startswith(pronoun)]
    if not found:
        raise GmaskError(f"the pronoun {pronoun!r} is not in the text")
    nearest = min(found, key=lambda position: abs(position - index))
    words[nearest] = words[nearest].replace(pronoun, f"*{pronoun}*", 1)
    yield {**values, "marked": " ".join(words), "pronoun": pronoun, "span": target["span1_text"]}


def _read_wsc_referent(values: Values) -> Iterator[Values]:
    """Reads as `_read_wsc`, and leaves out spans that the pronoun does not refer to: the rest can be learnt as text."""
    if values.get("label", True):
        yield from _read_wsc(values)


def _read_cluewsc(values: Values) -> Iterator[Values]:
    """Adds what `_read_wsc` adds; here the indices count characters, and brackets mark the pronoun."""
    target, text = values["target"], values["text"]
    pronoun, index = target["span2_text"], target["span2_index"]
    found = [position for position in range(len(text)) if text.startswith(pronoun, position)]
    if not pronoun or not found:
        raise GmaskError(f"the pronoun {pronoun!r} is not in the text")
    nearest = min(found, key=lambda position: abs(position - index))
    marked = f"{text[:nearest]}【{pronoun}】{text[nearest + len(pronoun) :]}"
    yield {**values, "marked": marked, "pronoun": pronoun, "span": target["span1_text"]}


def _read_squad(values: Values) -> Iterator[Values]:
    """Makes a record of each question but the impossible ones, with the first ``answer`` and all ``answers``.

    The hub has one row a question.
    """
    if "question" in values:
        answers = list(dict.fromkeys(values["answers"]["text"]))
        yield {**values, "answers": answers, **({"answer": answers[0]} if answers else {})}
        return
    for paragraph in values["paragraphs"]:
        for question in paragraph["qas"]:
            answers = list(dict.fromkeys(answer["text"] for answer in question.get("answers", ())))
            if not question.get("is_impossible"):
                known = {"answer": answers[0], "answers": answers} if answers else {}
                yield {"context": paragraph["context"], "question": question["question"], **known}


def _read_chid(values: Values) -> Iterator[Values]:
    """Adds the texts ``before`` and ``after`` the missing idiom."""
    before, mark, after = values["content"].partition("#idiom#")
    if not mark:
        raise GmaskError("the content has no #idiom#")
    yield {**values, "before": before, "after": after}


ELSEWHERE = "……"
"""Stands for the blanks of a passage that another question is about: an ellipsis."""


def _read_clue_chid(record: Record) -> Iterator[Values]:
    """Makes a record of each ``#idiomN#`` of the passages, with the ten candidates that they share.

    The answers of CLUE's ``dev.json`` are in ``dev_answer.json`` beside it; those of the hub's records in the record.
    """
    values = record.values
    marks = re.findall(r"#idiom\d+#", "".join(values["content"]))
    if "answers" in values:
        known = dict(zip(marks, values["answers"]["candidate_id"], strict=False))
    else:
        known = _read_answers(record.path.with_name(f"{record.path.stem}_answer.json"))
    for passage in values["content"]:
        for match in re.finditer(r"#idiom\d+#", passage):
            before, after = (re.sub(r"#idiom\d+#", ELSEWHERE, part) for part in _around(passage, match))
            answer = {"answer": known[match.group()]} if match.group() in known else {}
            yield {"before": before, "after": after, "candidates": values["candidates"], **answer}


@lru_cache(maxsize=4)
def _read_answers(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    answers: dict[str, int] = parse_json(read_text(path), path)
    return answers


def _around(text: str, match: re.Match[str]) -> tuple[str, str]:
    return text[: match.start()], text[match.end() :]


def _read_cmrc_sentences(values: Values) -> Iterator[Values]:
    """Makes a record of each ``[BLANKN]`` of a passage of CMRC 2019, whose sentence is among the ``choices``."""
    passage = values["context"]
    for match in re.finditer(r"\[BLANK(\d+)\]", passage):
        before, after = (re.sub(r"\[BLANK\d+\]", ELSEWHERE, part) for part in _around(passage, match))
        answers = values.get("answers") or ()
        answer = {"answer": answers[int(match.group(1)) - 1]} if answers else {}
        group = values["context_id"]
        yield {"before": before, "after": after, "candidates": values["choices"], "group": group, **answer}


def _read_c3(values: Values) -> Iterator[Values]:
    """Makes a record of each question: ``context`` of its lines, ``candidates``, and the index of the right one.

    CLUE's files hold arrays (lines, questions, name), the hub's a record for each question.
    """
    if "items" in values:
        lines, questions = values["items"][:2]
    else:
        lines, questions = values["context"], [values]
    for question in questions:
        candidates = list(dict.fromkeys(question["choice"]))
        answer = question.get("answer")
        label = {"label": candidates.index(answer)} if answer in candidates else {}
        yield {"context": "\n".join(lines), "question": question["question"], "candidates": candidates, **label}


def _read_exam(record: Record) -> Iterator[Values]:
    """Adds the ``subject``, its ``group`` "category/subject" of C-Eval or MMLU, and the choices as A, B, C and D.

    The subject is a column, or the name of the file: ``accountant_val.csv``. The right answer is a letter or an index.
    """
    values = dict(record.values)
    subject = values.get("subject") or re.sub(r"_(dev|val|validation|test)$", "", record.path.stem)
    choices = values.get("choices") or [values[letter] for letter in "ABCD"]
    answer = values.get("answer")
    if isinstance(answer, int):
        answer = "ABCD"[answer]
    category = exam_categories().get(subject, "Other")
    yield {
        "question": values["question"],
        **dict(zip("ABCD", choices, strict=True)),
        "subject": subject.replace("_", " "),
        "group": f"{category}/{subject}",
        **({"answer": answer} if answer not in (None, "") else {}),
    }


@lru_cache(maxsize=1)
def exam_categories() -> dict[str, str]:
    """The category of each subject of C-Eval and MMLU."""
    tree = read_yaml(Path(__file__).with_name("subjects.yaml"))
    return {
        subject: category for exam in tree.values() for category, names in exam.items() for subject in names.split()
    }


def _read_pretokenized(values: Values) -> Iterator[Values]:
    """THUDM's jsonl of multiple choice, without the spaces around its texts."""
    choices = [choice.strip() for choice in values["choices_pretokenized"]]
    yield {"text": values["inputs_pretokenized"].strip(), "candidates": choices, **_known(values, "label")}


def _read_last_word(values: Values) -> Iterator[Values]:
    """Splits a text before its last word, as LAMBADA is asked: what follows the last white space."""
    word = values["text"].split()[-1]
    yield {"before": values["text"][: values["text"].rfind(word)].strip(), "word": word}


def _read_wikitext(values: Values) -> Iterator[Values]:
    """Undoes WikiText's tokenization; ``words`` counts before that, as published."""
    yield {"text": detokenize_wikitext(values["text"]), "words": count_words(values["text"])}


def _read_blanked(values: Values) -> Iterator[Values]:
    """A text with ``<blank>`` marks and the whole one: a text with blanks and its ``answers``.

    Where words repeat, the shortest answers that fit are taken; the whole text is the same.
    """
    pieces = [piece.split() for piece in values["source"].replace("_UNK", "[UNK]").split("<blank>")]
    target = values["target"].replace("_UNK", "[UNK]").split()
    pattern = r"((?:\S+ )+?)".join("".join(f"{re.escape(word)} " for word in piece) for piece in pieces)
    match = re.fullmatch(pattern, "".join(f"{word} " for word in target))
    if match is None:
        raise GmaskError("the whole text is not the text with its blanks filled")
    text = " [MASK] ".join(escape_blanks(" ".join(piece)) for piece in pieces).strip()
    yield {"text": text, "answers": [answer.strip() for answer in match.groups()]}


SUMMARY_COLUMNS = (("source", "target"), ("article", "highlights"), ("document", "summary"))
"""Of the published files, and of CNN/DailyMail and of XSum and Gigaword on the hub."""


def _read_summary(values: Values) -> Iterator[Values]:
    """The text and its summary as ``source`` and ``target``, from the columns of `SUMMARY_COLUMNS`."""
    source, target = next(names for names in SUMMARY_COLUMNS if names[0] in values or names == SUMMARY_COLUMNS[-1])
    yield {"source": values[source], **({"target": values[target]} if values.get(target) else {})}


def _read_gigaword(values: Values) -> Iterator[Values]:
    """As `_read_summary`, with brackets and signs in place of their names."""
    for summary in _read_summary(values):
        yield {name: detokenize_gigaword(text) for name, text in summary.items()}


def _read_csl(values: Values) -> Iterator[Values]:
    """Adds the list ``keyword`` as one text, ``keywords``."""
    yield {**values, "keywords": "、".join(values["keyword"])}


def _read_ocnli(values: Values) -> Iterator[Values]:
    """Leaves out sentences with the label "-", on which the annotators did not agree."""
    if values.get("label") != "-":
        yield values


def _read_trl(values: Values) -> Iterator[Values]:
    """TRL's columns of supervised tuning as ``prompt``, ``response`` and ``history``.

    ``messages`` become a record for each reply. Of ``prompt`` and ``completion``, texts or messages, the completion is
    learnt alone, as TRL does; earlier replies in the prompt are context.
    """
    if "messages" in values:
        for sample in samples_of(values["messages"], require_answers=True):
            yield {"prompt": sample.text, "response": sample.answers[0], "history": list(sample.history)}
        return
    prompt, completion = values["prompt"], values["completion"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    *rounds, last = samples_of([*asked, *reply], require_answers=True)
    if len(rounds) > sum(message["role"] == "assistant" for message in asked):
        raise GmaskError("the completion has several replies: put such a conversation into messages")
    yield {"prompt": last.text, "response": last.answers[0], "history": list(last.history)}


def _known(values: Values, column: str) -> Values:
    return {column: values[column]} if column in values else {}


FORMAT_READERS: Mapping[str, Callable[[Values], Iterator[Values]]] = {
    "plain": _read_plain,
    "copa": _read_copa,
    "multirc": _read_multirc,
    "record": _read_record,
    "wsc": _read_wsc,
    "wsc-referent": _read_wsc_referent,
    "cluewsc": _read_cluewsc,
    "squad": _read_squad,
    "chid": _read_chid,
    "csl": _read_csl,
    "ocnli": _read_ocnli,
    "trl": _read_trl,
    "cmrc-sentences": _read_cmrc_sentences,
    "c3": _read_c3,
    "pretokenized": _read_pretokenized,
    "last-word": _read_last_word,
    "wikitext": _read_wikitext,
    "blanked": _read_blanked,
    "summary": _read_summary,
    "gigaword": _read_gigaword,
}

RECORD_READERS: Mapping[str, Callable[[Record], Iterator[Values]]] = {"clue-chid": _read_clue_chid, "exam": _read_exam}
"""Readers that need the name of the file, too."""

READERS = (*FORMAT_READERS, *RECORD_READERS)


def samples_of(messages: Any, *, require_answers: bool) -> list[Sample]:
    """The samples of a conversation: one for each reply to the user, with the rounds before it as history.

    A context is read in both directions, so each reply needs a sample of its own.

    Args:
        messages: as of `gmask.conversation.read_conversation`.
        require_answers: if false, a last message of the user is a sample without an answer.

    Raises:
        GmaskError: not a conversation, an empty reply, or no reply.
    """
    conversation = read_conversation(messages)
    rounds = conversation.rounds
    samples = []
    for index in range(int(conversation.is_greeted), len(rounds)):
        prompt, reply = rounds[index]
        if not reply.strip():
            raise GmaskError(f"reply {index + 1} of the assistant is empty")
        samples.append(Sample(text=prompt, answers=(reply.strip(),), history=rounds[:index]))
    if conversation.query is not None and not require_answers:
        samples.append(Sample(text=conversation.query, history=rounds))
    if not samples:
        raise GmaskError("the conversation has no reply of the assistant to the user")
    return samples
