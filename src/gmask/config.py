"""Settings as dataclasses: YAML in, values checked against the types and rules beside the fields, one-line errors.

A field says by its type what it may be: ``Annotated[float, Range(0, below=1)]``, ``Literal["adamw", "muon"]``,
``str | None``, ``tuple[str, ...]``, another dataclass. `build_settings` makes an instance from plain values, such as
YAML has. `check_fields`, in a ``__post_init__``, holds values from Python code to the same rules. Values of other types
are not checked.
"""

import dataclasses
import functools
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
from gmask.files import check_text, read_text

T = TypeVar("T")
MOST_BYTES = 16 << 20
"""The limit of a YAML file."""

MOST_NODES = 1_000_000
"""The limit of values in a YAML text, each counted as often as anchors repeat it."""


@runtime_checkable
class Rule(Protocol):
    """A condition on a value beside its type; it is written in ``Annotated``."""

    def fault(self, value: Any) -> str | None:
        """The rest of an error that begins with the value's key; None if the value is right."""


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """A range of numbers: ``least`` and ``most`` belong to it, ``above`` and ``below`` do not."""

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
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{name} {limit}" for name, limit in limits.items() if limit is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class OneOf:
    """One of several values, for values that are computed; fixed ones are written as a ``Literal``."""

    values: Collection[Any]

    def fault(self, value: Any) -> str | None:
        fits = any(value is one or (type(value) is type(one) and value == one) for one in self.values)
        return None if fits else f"is {show(value)}: choose {_list(self.values)}"


@dataclasses.dataclass(frozen=True, slots=True)
class NotEmpty:
    """A text, a list or a mapping that is not empty."""

    def fault(self, value: Any) -> str | None:
        return None if value else "is empty"


MOST = 10**12
"""The limit of counts and sizes that have none of their own. Beyond it nothing can be counted, and floats overflow."""

Count = Annotated[int, Range(above=0), Range(most=MOST)]
Steps = Annotated[int, Range(above=0), Range(most=10**8)]
"""Steps of a run."""

Size = Annotated[int, Range(above=0), Range(most=10**6)]
"""Samples or rows of a step, or tokens of a row."""

PassSize = Annotated[int, Range(above=0), Range(most=1 << 14)]
"""Samples or rows of one forward and backward pass, which are in memory together."""

Threads = Annotated[int, Range(above=0), Range(most=1024)]
Whole = Annotated[int, Range(0), Range(most=MOST)]
Fraction = Annotated[float, Range(0, below=1)]
Part = Annotated[float, Range(above=0, below=1)]
Positive = Annotated[float, Range(above=0), Range(most=MOST)]
NotNegative = Annotated[float, Range(0), Range(most=MOST)]
Rate = Annotated[float, Range(above=0), Range(most=100)]
"""A learning rate."""
Weight = Annotated[float, Range(-MOST, MOST)]
RunSeed = Annotated[int, Range(0, 2**32 - 1)]
"""Up to the highest seed that NumPy's global generator takes."""


def build_settings(kind: type[T], values: Any, where: str = "", *, title: str = "") -> T:
    """An instance of a settings class from plain values. A number may be a text: YAML reads ``1e-3`` as one.

    Args:
        where: the dotted key of the values, for errors. If it ends with a space, no dot is put behind it.
        title: the name of the values if they have no key: "the recipe".

    Raises:
        GmaskError: an unknown key (the nearest one is named), a missing one, a value that does not fit.
    """
    hints = hints_of(kind)  # type: ignore[arg-type]  # mypy does not take a class for hashable
    found = read_values(values, hints, where, title=title)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in found]
    for name in list(missing):
        if _is_settings(hints[name]):  # a section that is left out; its keys may all have defaults
            found[name] = build_settings(hints[name], {}, _join(where, name))
            missing.remove(name)
    if missing:
        raise GmaskError(f"{title or where}: {', '.join(missing)} is missing")
    return kind(**found)


def read_values(values: Any, hints: Mapping[str, Any], where: str = "", *, title: str = "") -> dict[str, Any]:
    """The plain values of a mapping, converted to the types of their keys; see `build_settings`."""
    check_mapping(values, title or where)
    check_keys(values, list(hints), title or where)
    found = dict(values)
    for name, value in values.items():
        is_section = _is_settings(hints[name]) or _is_mapping(hints[name])
        given = {} if value is None and is_section else value  # a section without keys
        found[name] = _convert(given, hints[name], _join(where, name), exact=False)
    return found


def check_fields(settings: Any, where: str = "") -> None:
    """Checks an instance of a settings class against its fields; for its ``__post_init__``. Lists become tuples.

    Args:
        where: the dotted key before the names of the fields, for errors.

    Raises:
        GmaskError: a value that does not fit.
    """
    hints = hints_of(type(settings))  # type: ignore[arg-type]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is field.default:
            continue
        converted = _convert(value, hints[field.name], _join(where, field.name), exact=True)
        if converted is not value:
            object.__setattr__(settings, field.name, converted)


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields. transformers writes its types as texts: of those, the plain ones are read."""
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
    """Raises `GmaskError` if a value is none of the choices."""
    if fault := OneOf(choices).fault(value):
        raise GmaskError(f"{where} {fault}")


def show(value: Any) -> str:
    """A value as errors show it: its ``repr``, cut after 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class _OtherTypeError(GmaskError):
    """A value has another type than expected."""


def _convert(value: Any, hint: Any, where: str, *, exact: bool) -> Any:
    """The value converted to its type. With ``exact`` a number is not read from a text."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _convert(value, arguments[0], where, exact=exact)
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and (fault := rule.fault(value)):
                raise GmaskError(f"{where} {fault}")
        return value
    if origin is Literal:
        check_choice(value, arguments, where)
        return value
    if origin in (Union, UnionType):
        return _convert_union(value, arguments, where, exact=exact)
    if origin is tuple:
        return _convert_tuple(value, arguments, where, exact=exact)
    if origin is list:
        return list(_convert_tuple(value, (*arguments, Ellipsis), where, exact=exact))
    if _is_mapping(hint):
        check_mapping(value, where)
        key_kind, value_kind = arguments or (Any, Any)
        converted = {
            _convert(key, key_kind, where, exact=exact): _convert(one, value_kind, _join(where, str(key)), exact=exact)
            for key, one in value.items()
        }
        return value if exact else converted
    if _is_settings(hint):
        return value if isinstance(value, hint) else build_settings(hint, value, where)
    if hint in CONVERTERS:
        try:
            return CONVERTERS[hint](value, exact)
        except (TypeError, ValueError, OverflowError) as error:
            raise _OtherTypeError(f"{where} is {show(value)}: expected {_describe(hint)}") from error
    return value


def _convert_union(value: Any, kinds: Sequence[Any], where: str, *, exact: bool) -> Any:
    """The value converted to the first type that accepts it.

    If none does, the error is that of the first type whose rule the value breaks, else it lists all types.
    """
    if value is None and NoneType in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not NoneType]
    if len(kinds) == 1:
        return _convert(value, kinds[0], where, exact=exact)
    broken: GmaskError | None = None
    for kind in kinds:
        try:
            return _convert(value, kind, where, exact=exact)
        except _OtherTypeError:
            continue
        except GmaskError as error:
            broken = broken or error
    expected = ", or ".join(_describe(kind) for kind in kinds)
    raise broken or _OtherTypeError(f"{where} is {show(value)}: expected {expected}")


def _convert_tuple(value: Any, kinds: Sequence[Any], where: str, *, exact: bool) -> tuple[Any, ...]:
    is_open = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, list | tuple) or (not is_open and len(value) != len(kinds)):
        raise _OtherTypeError(f"{where} is {show(value)}: expected {'a list' if is_open else f'{len(kinds)} values'}")
    if is_open:
        kinds = [kinds[0]] * len(value)
    return tuple(_convert(one, kind, where, exact=exact) for one, kind in zip(value, kinds, strict=True))


def _is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) in (dict, Mapping) or hint is dict


def _evaluate(annotation: Any) -> Any:
    """The type of an annotation. Of those written as texts only the plain ones are known; others become Any."""
    if not isinstance(annotation, str):
        return annotation
    plain = {kind.__name__: kind for kind in TYPE_NAMES}
    kind = plain.get(annotation.removesuffix(" | None"), Any)
    return kind | None if annotation.endswith(" | None") and kind is not Any else kind


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where and not where.endswith(" ") else f"{where}{name}"


def _list(values: Collection[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _describe(hint: Any) -> str:
    """The name of a type in errors."""
    if get_origin(hint) is Annotated:
        kind, rule = get_args(hint)[:2]
        if isinstance(rule, OneOf):
            return _list(rule.values)
        return f"{_describe(kind).replace('finite ', '')} {rule}" if isinstance(rule, Range) else _describe(kind)
    if get_origin(hint) is Literal:
        return _list(get_args(hint))
    if get_origin(hint) in (tuple, list):
        return "a list"
    return "key: value pairs" if _is_mapping(hint) else TYPE_NAMES.get(hint, "something else")


def _to_float(value: Any, exact: bool) -> float:
    if isinstance(value, bool) or (exact and not isinstance(value, int | float)) or not math.isfinite(float(value)):
        raise ValueError
    return value if exact else float(value)


def _to_int(value: Any, exact: bool) -> int:
    if isinstance(value, bool) or (exact and not isinstance(value, int)):
        raise ValueError
    if not isinstance(value, int) and int(value) != float(value):
        raise ValueError
    return int(value)


def _check_bool(value: Any, exact: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _check_str(value: Any, exact: bool) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


CONVERTERS: Mapping[Any, Callable[[Any, bool], Any]] = {
    float: _to_float, int: _to_int, bool: _check_bool, str: _check_str,
}  # fmt: skip
TYPE_NAMES = {float: "a finite number", int: "int", bool: "bool", str: "str"}


def load_tree(path: Path | str, overrides: Sequence[str], sections: Sequence[str]) -> dict[str, Any]:
    """The plain values of a recipe; each override is ``section.key=value`` with a YAML value.

    Raises:
        GmaskError: no such file, not YAML, or not a mapping.
    """
    tree: Any = read_yaml(path)
    if not isinstance(tree, dict):
        raise GmaskError(f"{path}: a recipe is a YAML mapping with the sections {', '.join(sections)}")
    if overrides:
        tree = _unfold_anchors(tree)
    found: dict[str, Any] = tree
    for override in overrides:
        _apply(found, override)
    return found


def _unfold_anchors(value: Any) -> Any:
    """The same values without common parts: a section that an anchor repeats is overridden where it is named alone."""
    if isinstance(value, dict):
        return {key: _unfold_anchors(one) for key, one in value.items()}
    return [_unfold_anchors(one) for one in value] if isinstance(value, list) else value


def read_yaml(path: Path | str) -> Any:
    """The value of a YAML file. Raises `GmaskError` as `read_text` and `parse_yaml`, with the path."""
    path = Path(path)
    if path.is_file() and (size := path.stat().st_size) > MOST_BYTES:
        raise GmaskError(f"{path}: has {size >> 20:,} MB, and no such file is as large: name a YAML file")
    text = read_text(path)
    try:
        return parse_yaml(text)
    except GmaskError as error:
        raise GmaskError(f"{path}: {error}") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Anchors and merge keys are read, up to `MOST_NODES` values.

    A character that is escaped by its two halves, as JSON is written, is one character.

    Raises:
        GmaskError: not YAML, too many values, a key that occurs twice in a mapping, a value that contains itself, half
            of a character.
    """
    check_text(text)
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
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes from a date or a number that does not exist
        raise GmaskError(f"not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise GmaskError("not read, since its values are nested too deeply") from error


def _count_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """The number of values that a node unfolds into.

    counted: the numbers that are known, by the node's id; 0 for a node that is being counted.
    """
    if id(node) in counted:
        if not counted[id(node)]:
            raise GmaskError(f"not read, since a value holds itself (line {node.start_mark.line + 1})")
        return counted[id(node)]
    counted[id(node)] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _join_halves(node)
    if isinstance(node, yaml.MappingNode):
        seen = set[tuple[str, str]]()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                _join_halves(key)
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


def _join_halves(node: yaml.ScalarNode) -> None:
    """Joins the halves of characters, which PyYAML reads one by one. Raises `GmaskError` for half a character."""
    if not node.value.isascii():
        node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        try:
            check_text(node.value, "a text")
        except GmaskError as error:
            raise GmaskError(f"{error} (line {node.start_mark.line + 1})") from error


def plain_values(settings: Any) -> dict[str, Any]:
    """The values of nested settings as YAML writes them: lists in place of tuples."""
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
