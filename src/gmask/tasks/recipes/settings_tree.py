"""How does a recipe in YAML become typed settings, and a mistake in it one line that names the nearest key?"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gmask.errors import GmaskError

T = TypeVar("T")


def load_tree(path: Path | str, overrides: Sequence[str], sections: Sequence[str]) -> dict[str, Any]:
    """The plain values of a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, no YAML, or not a mapping of ``sections``.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise GmaskError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise GmaskError(f"{path}: not UTF-8 text, so not a recipe in YAML") from error
    except yaml.YAMLError as error:
        raise GmaskError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise GmaskError(f"{path}: a recipe is a YAML mapping with the sections {', '.join(sections)}")
    for override in overrides:
        _apply(tree, override)
    return tree


def build(kind: type[T], values: Any, where: str) -> T:
    """An instance of a settings class, its values checked against the annotated types."""
    if not isinstance(values, Mapping):
        raise GmaskError(f"{where}: expected key: value pairs, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    check_keys(values, list(fields), where)
    needed = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in values]:
        raise GmaskError(f"{where}: {', '.join(missing)} is missing")
    return kind(**{name: _convert(value, fields[name].type, f"{where}.{name}") for name, value in values.items()})


def check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises `GmaskError` for a key that is not known, naming the nearest."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise GmaskError(f"{where} has no key {key!r}; the nearest is {near[0]!r}")


def check_choice(value: str | None, choices: Sequence[str], where: str) -> None:
    """Raises `GmaskError` for a word that is none of the choices."""
    if value not in choices:
        raise GmaskError(f"{where} is {value}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def plain_values(settings: Any) -> dict[str, Any]:
    """The values of nested settings as YAML has them: lists in place of tuples."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return values


def to_yaml(settings: Any) -> str:
    return yaml.safe_dump(plain_values(settings), allow_unicode=True, sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise GmaskError(f"{override}: write an override as section.key=value")
    *sections, name = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise GmaskError(f"{key}: {section} has no keys of its own")
        tree = inner
    try:
        tree[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GmaskError(f"{override}: the value is not YAML") from error


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Numbers as YAML spells them (``1e-3`` is a string to it) into what the field wants."""
    wanted = str(kind.__name__ if isinstance(kind, type) else kind)
    try:
        if wanted.startswith("float") and not isinstance(value, bool):
            return None if value is None else float(value)
        if wanted.startswith("int"):
            if value is None and "None" in wanted:
                return None
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return int(value)
        if wanted == "bool" and not isinstance(value, bool):
            raise ValueError
        if wanted in ("str", "str | None") and not isinstance(value, str) and (value is not None or wanted == "str"):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise GmaskError(f"{where} is {value!r}: expected {wanted.replace(' | None', '')}") from error
    return value
