"""Settings as dataclasses: YAML in, values checked against the types and rules beside the fields, one-line errors.

A field says by its type what it may be: ``Annotated[float, Range(0, below=1)]``, ``Literal["adamw", "muon"]``,
``str | None``, ``tuple[str, ...]``, another dataclass. `build` makes an instance of plain values, such as YAML has;
`check_fields`, in a ``__post_init__``, holds what Python code gave to the same rules. A type that is none of these is
not looked at.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    runtime_checkable,
)

import yaml

from gmask.errors import GmaskError, nearest
from gmask.files import read_text

T = TypeVar("T")
MOST_NODES = 1_000_000
"""Values of a YAML text, each counted as often as anchors repeat it."""


@runtime_checkable
class Rule(Protocol):
    """What a value has to keep, beside its type; stands in ``Annotated``."""

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, behind its name; None if nothing is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Where a number lies: ``least`` and ``most`` belong to it, ``above`` and ``below`` do not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def fault(self, value: Any) -> str | None:
        fits = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        return None if fits else f"is {show(value)}: it must be {self}"

    def __str__(self) -> str:
        if self.above is not None and self.below is not None:
            return f"between {self.above} and {self.below}"
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        if self.least is not None and self.below is not None:
            return f"from {self.least} to below {self.below}"
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class Choices:
    """A few values; for those that are not known when the code is written, else ``Literal`` says them."""

    values: Collection[Any]

    def fault(self, value: Any) -> str | None:
        fits = any(value is one or (type(value) is type(one) and value == one) for one in self.values)
        return None if fits else f"is {show(value)}: choose {_list(self.values)}"


@dataclasses.dataclass(frozen=True, slots=True)
class NotEmpty:
    """A text, a list or a mapping that holds something."""

    def fault(self, value: Any) -> str | None:
        return None if value else "is empty"


Count = Annotated[int, Range(above=0)]
Whole = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, below=1)]
Part = Annotated[float, Range(above=0, below=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
RunSeed = Annotated[int, Range(0, 2**32 - 1)]
"""NumPy's global generator takes no higher one."""


def build(kind: type[T], values: Any, where: str = "", *, title: str = "") -> T:
    """An instance of a settings class from plain values. A number may be written as a text, as YAML has ``1e-3``.

    Args:
        where: the dotted key that the values stand at, for errors; what ends with a space stands before the keys as is.
        title: what they are called where that is no key: "the recipe".

    Raises:
        GmaskError: an unknown key (the nearest one is named), a missing one, a value that does not fit.
    """
    hints = hints_of(kind)
    found = read_values(values, hints, where, title=title)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in found]
    for name in list(missing):
        if _is_settings(hints[name]):  # a section that is left out, and may have no key that is needed
            found[name] = build(hints[name], {}, _join(where, name))
            missing.remove(name)
    if missing:
        raise GmaskError(f"{title or where}: {', '.join(missing)} is missing")
    return kind(**found)


def read_values(values: Any, hints: Mapping[str, Any], where: str = "", *, title: str = "") -> dict[str, Any]:
    """Plain values as the types of their keys want them; see `build`."""
    check_mapping(values, title or where)
    check_keys(values, list(hints), title or where)
    found = dict(values)
    for name, value in values.items():
        is_section = _is_settings(hints[name]) or _is_mapping(hints[name])
        given = {} if value is None and is_section else value  # a section whose keys are all left out
        found[name] = _read(given, hints[name], _join(where, name), exact=False)
    return found


def check_fields(settings: Any, where: str = "") -> None:
    """Holds an instance of a settings class to its fields; for its ``__post_init__``. Lists become tuples.

    Args:
        where: the dotted key that stands before the names of the fields, for errors.

    Raises:
        GmaskError: a value that does not fit.
    """
    for name, hint in hints_of(type(settings)).items():
        value = getattr(settings, name)
        read = _read(value, hint, _join(where, name), exact=True)
        if read is not value:
            object.__setattr__(settings, name, read)


def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields; of those that are written as texts, in transformers, the plain ones."""
    return {field.name: _evaluate(field.type) for field in dataclasses.fields(kind)}


def field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def check_mapping(values: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        raise GmaskError(f"{where}: expected key: value pairs, not {show(values)}")


def check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises `GmaskError` for a key that is not known, naming the nearest."""
    for key in values:
        if key not in known:
            raise GmaskError(f"{where} has no key {key!r}; the nearest is {nearest(key, known)!r}")


def check_choice(value: Any, choices: Collection[Any], where: str) -> None:
    """Raises `GmaskError` for a value that is none of the choices."""
    if fault := Choices(choices).fault(value):
        raise GmaskError(f"{where} {fault}")


def show(value: Any) -> str:
    """A value in an error, not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class _OtherTypeError(GmaskError):
    """A value of another type than is wanted."""


def _read(value: Any, hint: Any, where: str, *, exact: bool) -> Any:
    """A value as its type wants it; ``exact``: a number is not read from a text."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _read(value, arguments[0], where, exact=exact)
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and (fault := rule.fault(value)):
                raise GmaskError(f"{where} {fault}")
        return value
    if origin is Literal:
        check_choice(value, arguments, where)
        return value
    if origin in (Union, UnionType):
        return _read_union(value, arguments, where, exact=exact)
    if origin is tuple:
        return _read_tuple(value, arguments, where, exact=exact)
    if _is_mapping(hint):
        check_mapping(value, where)
        key_kind, value_kind = arguments or (Any, Any)
        read = {
            _read(key, key_kind, where, exact=exact): _read(one, value_kind, _join(where, str(key)), exact=exact)
            for key, one in value.items()
        }
        return value if exact else read
    if _is_settings(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if hint in READERS:
        try:
            return READERS[hint](value, exact)
        except (TypeError, ValueError, OverflowError) as error:
            raise _OtherTypeError(f"{where} is {show(value)}: expected {_describe(hint)}") from error
    return value


def _read_union(value: Any, kinds: Sequence[Any], where: str, *, exact: bool) -> Any:
    """A value of the first type that takes it; the error is that of the one whose rule it breaks, if there is one."""
    if value is None and NoneType in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not NoneType]
    if len(kinds) == 1:
        return _read(value, kinds[0], where, exact=exact)
    broken: GmaskError | None = None
    for kind in kinds:
        try:
            return _read(value, kind, where, exact=exact)
        except _OtherTypeError:
            continue
        except GmaskError as error:
            broken = broken or error
    wanted = ", or ".join(_describe(kind) for kind in kinds)
    raise broken or _OtherTypeError(f"{where} is {show(value)}: expected {wanted}")


def _read_tuple(value: Any, kinds: Sequence[Any], where: str, *, exact: bool) -> tuple[Any, ...]:
    is_open = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, list | tuple) or (not is_open and len(value) != len(kinds)):
        raise _OtherTypeError(f"{where} is {show(value)}: expected {'a list' if is_open else f'{len(kinds)} values'}")
    if is_open:
        kinds = [kinds[0]] * len(value)
    return tuple(_read(one, kind, where, exact=exact) for one, kind in zip(value, kinds, strict=True))


def _is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) in (dict, Mapping) or hint is dict


def _evaluate(annotation: Any) -> Any:
    if not isinstance(annotation, str):
        return annotation
    plain = {kind.__name__: kind for kind in TYPE_NAMES}
    kind = plain.get(annotation.removesuffix(" | None"), Any)
    return kind | None if annotation.endswith(" | None") and kind is not Any else kind


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where and not where.endswith(" ") else f"{where}{name}"


def _list(words: Collection[Any]) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def _describe(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        kind, rule = get_args(hint)[:2]
        if isinstance(rule, Choices):
            return _list(rule.values)
        return f"{_describe(kind).replace('finite ', '')} {rule}" if isinstance(rule, Range) else _describe(kind)
    if get_origin(hint) is Literal:
        return _list(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list"
    return "key: value pairs" if _is_mapping(hint) else TYPE_NAMES.get(hint, "something else")


def _read_float(value: Any, exact: bool) -> float:
    """YAML has texts for numbers such as ``1e-3``."""
    if isinstance(value, bool) or (exact and not isinstance(value, int | float)) or not math.isfinite(float(value)):
        raise ValueError
    return value if exact else float(value)


def _read_int(value: Any, exact: bool) -> int:
    if isinstance(value, bool) or (exact and not isinstance(value, int)):
        raise ValueError
    if not isinstance(value, int) and int(value) != float(value):
        raise ValueError
    return int(value)


def _read_bool(value: Any, exact: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_str(value: Any, exact: bool) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


READERS: Mapping[Any, Callable[[Any, bool], Any]] = {
    float: _read_float, int: _read_int, bool: _read_bool, str: _read_str,
}  # fmt: skip
TYPE_NAMES = {float: "a finite number", int: "int", bool: "bool", str: "str"}


def load_tree(path: Path | str, overrides: Sequence[str], sections: Sequence[str]) -> dict[str, Any]:
    """The plain values of a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, no YAML, or not a mapping of ``sections``.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise GmaskError(f"{path}: a recipe is a YAML mapping with the sections {', '.join(sections)}")
    for override in overrides:
        _apply(tree, override)
    return tree


def read_yaml(path: Path | str) -> Any:
    """The value of a YAML file. Raises `GmaskError` as `read_text` and `parse_yaml`, with the path."""
    text = read_text(path)
    try:
        return parse_yaml(text)
    except GmaskError as error:
        raise GmaskError(f"{path}: {error}") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Anchors and merge keys are read, as long as they do not multiply.

    Raises:
        GmaskError: not YAML, a key that stands twice in a mapping, a value that holds itself.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_nodes(node, {}) > MOST_NODES:
            raise GmaskError(
                "not read, since its anchors (&, *, <<) unfold into too many values: write it without them"
            )
        return loader.construct_document(node)
    except GmaskError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date or a number that cannot be
        raise GmaskError(f"not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise GmaskError("not read, since its values are nested too deeply") from error


def _count_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node unfolds into; ``counted`` remembers that by node, 0 for those that are being counted."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise GmaskError(f"not read, since a value holds itself (line {node.start_mark.line + 1})")
        return counted[id(node)]
    counted[id(node)] = 0
    size = 1
    if isinstance(node, yaml.MappingNode):
        seen = set[tuple[str, str]]()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise GmaskError(
                        f"not read, since the key {key.value!r} is there twice (line {key.start_mark.line + 1})"
                    )
                seen.add((key.tag, key.value))
            size += _count_nodes(key, counted) + _count_nodes(value, counted)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_count_nodes(one, counted) for one in node.value)
    counted[id(node)] = size
    return size


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
        tree[name] = parse_yaml(text)
    except GmaskError as error:
        raise GmaskError(f"{override}: {error}") from error
