from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from sixfold import config
from sixfold.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    steps: int = 5
    rate: float = 0.1
    clip: float | None = 1.0
    flag: bool = False


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name must not be bad")


def made(**values):
    return config.build(Outer, values, "run.toml")


def test_values_reach_their_fields_and_the_rest_keeps_its_defaults():
    assert made(inner={"steps": 7, "rate": 1}) == Outer(inner=Inner(steps=7, rate=1.0))
    assert type(made(inner={"rate": 1}).inner.rate) is float
    assert made(inner={"clip": None}).inner.clip is None
    assert made(inner={"clip": "none"}).inner.clip is None
    assert made(name="none").name == "none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"nam": "y"},
            "run.toml: unknown key 'nam'; choose from: inner, name, options. Did you mean 'name'",
        ),
        ({"inner": {"step": 1}}, "unknown key of inner 'step'.*Did you mean 'steps'"),
        ({"inner": {"steps": "many"}}, "inner.steps must be an integer, got 'many'"),
        ({"inner": {"steps": 1.5}}, "inner.steps must be an integer, got 1.5"),
        ({"inner": {"steps": True}}, "inner.steps must be an integer, got True"),
        ({"inner": {"flag": 1}}, "inner.flag must be true or false, got 1"),
        ({"inner": {"clip": "no"}}, "inner.clip must be a number or none, got 'no'"),
        ({"inner": 3}, "inner must be a table, got 3"),
        ({"options": 3}, "options must be a table, got 3"),
        ({"name": "bad"}, "run.toml: name must not be bad"),
    ],
)
def test_what_cannot_be_meant_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        made(**values)


def test_toml_and_json_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text('name = "y"\n[inner]\nsteps = 3\n')
    (tmp_path / "a.json").write_text(json.dumps({"name": "y", "inner": {"steps": 3}}))
    assert config.read(tmp_path / "a.toml") == config.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "name = \nx = 1", r"a\.toml: .*line 1"),
        ("a.json", "{", r"a\.json: .*line 1"),
        ("a.json", "[1]", "a configuration is a table, not list"),
        ("a.yaml", "", "a .toml or a .json file"),
    ],
)
def test_a_file_that_does_not_parse_says_where(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.toml: No such file"):
        config.read(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("1e-3", 1e-3), ("true", True), ("none", "none"), ("abc", "abc"), ('"5"', "5"),
     ("[1, 2]", [1, 2]), ('{name = "window", width = 8}', {"name": "window", "width": 8})],
)  # fmt: skip
def test_overrides_are_read_as_toml_or_as_text(text, value):
    assert config.override({"a": {"c": 1}}, f"a.b={text}") == {"a": {"c": 1, "b": value}}


@pytest.mark.parametrize("text", ["a.b", "=3", ""])
def test_what_is_no_override_is_refused(text):
    with pytest.raises(ConfigError, match="section.key=value"):
        config.override({}, text)


def test_options_are_checked_against_a_signature():
    def build(*, width: int, name: str = "x", **rest):
        return width, name, rest

    assert config.check_call(build, {"width": 3}, "s", "data") == {"width": 3}
    with pytest.raises(ConfigError, match="unknown key of data 'widht'.*Did you mean 'width'"):
        config.check_call(build, {"widht": 3}, "s", "data")
    with pytest.raises(ConfigError, match=r"data\.width must be an integer"):
        config.check_call(build, {"width": "3"}, "s", "data")
