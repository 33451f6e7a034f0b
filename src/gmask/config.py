"""Settings out of YAML: a tree of dataclasses, and a mistake in it as one line that names the nearest key."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gmask.errors import GmaskError, nearest

T = TypeVar("T")
MAX_SEED = 2**32 - 1
"""NumPy's global generator, which a Trainer seeds, takes no higher one."""


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
    converted = convert(kind, values, where)
    needed = [
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in values]:
        raise GmaskError(f"{where}: {', '.join(missing)} is missing")
    return kind(**converted)


def convert(kind: Any, values: Any, where: str) -> dict[str, Any]:
    """Keywords of a settings class, checked against its annotated types."""
    check_mapping(values, where)
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    check_keys(values, list(types), where)
    return {name: _convert(value, types[name], f"{where}.{name}") for name, value in values.items()}


def check_mapping(values: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        raise GmaskError(f"{where}: expected key: value pairs, not {values!r}")


def check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises `GmaskError` for a key that is not known, naming the nearest."""
    for key in values:
        if key not in known:
            raise GmaskError(f"{where} has no key {key!r}; the nearest is {nearest(key, known)!r}")


def check_choice(value: str | None, choices: Sequence[str], where: str) -> None:
    """Raises `GmaskError` for a word that is none of the choices."""
    if value not in choices:
        raise GmaskError(f"{where} is {value}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_numbers(
    values: Mapping[str, Any], where: str, *, positive: Sequence[str] = (), not_negative: Sequence[str] = ()
) -> None:
    """Raises `GmaskError` for a number that is too low; one that is absent or None is not looked at."""
    for name in (*positive, *not_negative):
        value = values.get(name)
        if value is not None and (value < 0 or (value == 0 and name in positive)):
            raise GmaskError(f"{where}.{name} is {value}: it must be {'above 0' if name in positive else 'at least 0'}")


def check_run(run: Mapping[str, Any]) -> None:
    """What every recipe's section ``run`` is held to."""
    check_numbers(run, "run", positive=("threads", "log_every"))
    if not 0 <= run["seed"] <= MAX_SEED:
        raise GmaskError(f"run.seed is {run['seed']}: it must be from 0 to {MAX_SEED}")


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
    """The value as its field wants it; fields of other types than those of `CONVERTERS` are checked elsewhere."""
    annotation = str(kind.__name__ if isinstance(kind, type) else kind)
    wanted = annotation.removesuffix(" | None")
    if wanted not in CONVERTERS or (value is None and wanted != annotation):
        return value
    try:
        return CONVERTERS[wanted](value)
    except (TypeError, ValueError, OverflowError) as error:
        words = "a finite number" if wanted == "float" else wanted
        raise GmaskError(f"{where} is {value!r}: expected {words}") from error


def _read_float(value: Any) -> float:
    """YAML has strings for numbers such as ``1e-3``."""
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "float": _read_float,
    "int": _read_int,
    "bool": _read_bool,
    "str": _read_str,
}
"""By the annotation of a field."""
