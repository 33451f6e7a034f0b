"""Do settings keep the types and the rules beside their fields, and does YAML say what it seems to say?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gmask.config import (
    Count,
    Fraction,
    NotEmpty,
    OneOf,
    Part,
    Positive,
    Range,
    RunSeed,
    build_settings,
    check_fields,
    load_tree,
    parse_yaml,
    plain_values,
    read_yaml,
    to_yaml,
)
from gmask.errors import GmaskError


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: Annotated[str, NotEmpty()]
    size: Count = 1


@dataclass(frozen=True, kw_only=True)
class Section:
    depth: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    rate: Positive = 1.0
    share: Fraction | None = None
    count: Count = 1
    plain: int = 0
    seed: RunSeed = 0
    flag: bool = False
    word: Literal["adamw", "muon"] = "adamw"
    letter: Annotated[str, OneOf(("a", "b"))] = "a"
    betas: tuple[Fraction, Fraction] = (0.5, 0.5)
    files: str | Part | None = None
    targets: Annotated[str, OneOf(("all", "one"))] | tuple[str, ...] = "all"
    inner: tuple[Inner, ...] = ()
    section: Section = Section()
    table: Mapping[str, float] = field(default_factory=dict)
    odd: Any = None


@dataclass(frozen=True, kw_only=True)
class Checked(Settings):
    __slots__ = ()

    def __post_init__(self) -> None:
        check_fields(self, "ours")


GOOD: list[dict[str, Any]] = [
    {"rate": 3, "share": None, "count": 2, "flag": True, "word": "muon"},
    {"betas": [0, 0.25], "files": "a.txt", "targets": ["x", "y"], "odd": object},
    {"files": 0.5, "targets": "one", "seed": 2**32 - 1, "table": {"a": 1}},
]
BAD: list[tuple[str, Any, str]] = [
    ("rate", 0.0, "is 0.0: it must be above 0"),
    ("rate", True, "is True: expected a finite number"),
    ("rate", None, "is None: expected a finite number"),
    ("rate", float("nan"), "is nan: expected a finite number"),
    ("rate", float("-inf"), "is -inf: expected a finite number"),
    ("rate", "fast", "is 'fast': expected a finite number"),
    ("share", 1.0, "is 1.0: it must be from 0 to below 1"),
    ("share", -0.5, "is -0.5: it must be from 0 to below 1"),
    ("count", 0, "is 0: it must be above 0"),
    ("count", 1.5, "is 1.5: expected int"),
    ("count", False, "is False: expected int"),
    ("count", [1], "is [1]: expected int"),
    ("seed", 2**32, "is 4294967296: it must be from 0 to 4294967295"),
    ("flag", 1, "is 1: expected bool"),
    ("word", "adam", "is 'adam': choose adamw or muon"),
    ("word", ["adamw"], "is ['adamw']: choose adamw or muon"),
    ("letter", "c", "is 'c': choose a or b"),
    ("letter", 3, "is 3: expected str"),
    ("betas", 3, "is 3: expected 2 values"),
    ("betas", [0.5], "is [0.5]: expected 2 values"),
    ("betas", [0.5, 1.5], "is 1.5: it must be from 0 to below 1"),
    ("files", True, "is True: expected str, or a number between 0 and 1"),
    ("files", 1.5, "is 1.5: it must be between 0 and 1"),
    ("targets", "two", "is 'two': choose all or one"),
    ("targets", 2, "is 2: expected all or one, or a list"),
    ("targets", ["a", 1], "is ['a', 1]: expected all or one, or a list"),
    ("table", [1], ": expected key: value pairs, not [1]"),
    ("table", {"a": "b"}, ".a is 'b': expected a finite number"),
    ("odd", None, ""),
]


@pytest.mark.parametrize("values", GOOD)
def test_values_that_fit_are_taken_by_both_ways(values: dict[str, Any]) -> None:
    built, made = build_settings(Settings, values), Checked(**values)
    for name, value in values.items():
        wanted = tuple(value) if isinstance(value, list) else value
        assert getattr(built, name) == wanted
        assert getattr(made, name) == wanted and type(getattr(made, name)) is type(wanted)


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_value_that_does_not_fit_is_named_alike_by_both_ways(name: str, value: Any, message: str) -> None:
    for make in (lambda: build_settings(Settings, {name: value}, "ours"), lambda: Checked(**{name: value})):
        if not message:
            make()
            continue
        with pytest.raises(GmaskError) as caught:
            make()
        assert str(caught.value) == f"ours.{name}{'' if message[0] in '.:' else ' '}{message}"


def test_plain_values_may_be_written_as_yaml_has_them_and_those_of_code_not() -> None:
    built = build_settings(Settings, {"rate": "1e-3", "count": 4.0, "betas": ["1e-1", 0], "share": "0.5"})
    assert (built.rate, built.count, built.betas, built.share) == (1e-3, 4, (0.1, 0.0), 0.5)
    assert type(built.count) is int and type(built.betas[1]) is float
    for values in ({"rate": "1e-3"}, {"count": 4.0}):
        with pytest.raises(GmaskError, match="expected"):
            Checked(**values)


def test_large_whole_numbers_stay_whole() -> None:
    assert build_settings(Settings, {"plain": 2**53 + 1}).plain == 2**53 + 1


def test_sections_are_built_and_may_be_empty() -> None:
    built = build_settings(
        Settings, {"inner": [{"name": "a"}, {"name": "b", "size": "3"}], "section": None, "table": None}
    )
    assert built == Settings(inner=(Inner(name="a"), Inner(name="b", size=3)))
    assert parse_yaml(to_yaml(built)) == plain_values(built)
    assert build_settings(Settings, plain_values(built)) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratte": 1}, "the settings has no key 'ratte'; the nearest is 'rate'"),
        ({1: 1}, "the settings has no key 1; the nearest is "),
        ({"section": {"dept": 1}}, "section has no key 'dept'; the nearest is 'depth'"),
        ({"section": 3}, "section: expected key: value pairs, not 3"),
        ({"inner": [{"size": 1}]}, "inner: name is missing"),
        ({"inner": [{"name": ""}]}, "inner.name is empty"),
        ([1], "the settings: expected key: value pairs, not [1]"),
        ({"word": "x" * 1000}, f"word is '{'x' * 199}...: choose adamw or muon"),
    ],
)
def test_keys_and_sections_are_named(values: Any, message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        build_settings(Settings, values, title="the settings")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Range(0), "at least 0"), (Range(above=0), "above 0"), (Range(most=3), "at most 3"),
        (Range(below=3), "below 3"),
        (Range(0, 3), "from 0 to 3"), (Range(0, below=3), "from 0 to below 3"),
        (Range(above=0, below=3), "between 0 and 3"), (Range(above=0, most=3), "above 0 and at most 3"),
    ],
)  # fmt: skip
def test_a_range_holds_what_it_says(limits: Range, words: str) -> None:
    assert str(limits) == words
    for value in (-1, 0, 1, 3, 4):
        inside = (
            (limits.least is None or limits.least <= value) and (limits.above is None or limits.above < value)
            and (limits.most is None or value <= limits.most) and (limits.below is None or value < limits.below)
        )  # fmt: skip
        assert (limits.fault(value) is None) == inside


# --- YAML -------------------------------------------------------------------------------------------------------------


def test_anchors_and_merge_keys_are_read_and_own_keys_come_first() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(text)["b"] == {"x": 1, "y": 3}
    assert parse_yaml("") is None and parse_yaml("# nothing") is None


DOUBLED = {
    "merge": "a0: &m0 {x: 1}\n" + "".join(f"a{i}: &m{i}\n  <<: [*m{i - 1}, *m{i - 1}]\n" for i in range(1, 25)),
    "alias": "a0: &m0 [x]\n" + "".join(f"a{i}: &m{i} [*m{i - 1}, *m{i - 1}]\n" for i in range(1, 25)),
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DOUBLED["merge"], "not read, since its anchors (&, *, <<) unfold into too many values: write it without"),
        (DOUBLED["alias"], "not read, since its anchors (&, *, <<) unfold into too many values: write it without"),
        ("a: &a [1, *a]", "not read, since a value holds itself (line 1)"),
        ("x: 1\nrun: {out: a}\nrun: {seed: 1}\n", "not read, since the key 'run' is there twice (line 3)"),
        ("a: [1", "not YAML ("),
        ("a: 2024-13-45", "not YAML ("),
        ("a: \x07", "not YAML ("),
        ("a: !!python/object:os.system {}", "not YAML ("),
        ("? [a]\n: 1", "not YAML ("),
        ("[" * 5000, "not read, since its values are nested too deeply"),
        ("a: 1\n---\nb: 2", "not YAML ("),
        ('{"a": 1,\n"b": ["x \\ud83d"]}', r"a text holds half of a character (a lone surrogate)"),
        ('"\\ude00": 1', "a text holds half of a character"),
    ],
)
def test_yaml_that_is_none_or_means_no_good_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(GmaskError) as named:
        read_yaml(path)
    assert str(named.value) == f"{path}: {caught.value}"


def test_an_override_changes_a_section_where_it_is_named_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: &common {steps: 2, sizes: [{a: 1}]}\nother: *common\n", "utf-8")
    tree = load_tree(path, ["run.steps=3"], ["run"])
    assert (tree["run"]["steps"], tree["other"]["steps"]) == (3, 2)
    assert tree["other"] == {"steps": 2, "sizes": [{"a": 1}]}


def test_a_character_in_two_escaped_halves_is_one_as_in_json() -> None:
    tree = {"😀": ["a😀b", {"c": "\U0001f431"}], "天": "é"}
    assert parse_yaml(json.dumps(tree)) == tree
    assert json.dumps(tree).isascii()


@pytest.mark.parametrize("half", ["\udcff", "\ud83d"])
def test_half_of_a_character_in_an_override_is_called_so(tmp_path: Path, half: str) -> None:
    (tmp_path / "a.yaml").write_text("run: {out: a}")
    with pytest.raises(GmaskError, match="the text holds half of a character"):
        load_tree(tmp_path / "a.yaml", [f"run.out=x{half}"], ["run"])


def test_a_mark_and_the_line_ends_of_other_systems_are_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun:\r\n  out: a\r\n")
    assert load_tree(path, ["run.seed=3", "model.size=[1, 2]"], ["run"]) == {
        "run": {"out": "a", "seed": 3}, "model": {"size": [1, 2]},
    }  # fmt: skip
    path.write_bytes("run: {out: 天}".encode("gbk"))
    with pytest.raises(GmaskError, match=r"a\.yaml, line 1: not UTF-8 text"):
        load_tree(path, [], ["run"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "steps: write an override as section.key=value"),
        ("run.out.deep=1", "run.out.deep: out has no keys of its own"),
        ("run.seed=[1", "run.seed=[1: not YAML ("),
    ],
)
def test_an_override_that_is_none_is_named(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text("run: {out: a}")
    with pytest.raises(GmaskError) as caught:
        load_tree(tmp_path / "a.yaml", [override], ["run"])
    assert str(caught.value).startswith(message)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(PLAIN, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4)))
def test_what_yaml_writes_is_read_back(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text) == yaml.safe_load(text)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(GmaskError, match=r"a\.yaml: has 1,024 MB, and no such file is as large"):
        read_yaml(tmp_path / "a.yaml")
