"""Read and write YAML with the scalars of version 1.2: 1e-3 is a number, `off` is a string, 010 is ten.

Only the types of JSON are supported. `read` merges several files and section.key=value overrides. A later one overrides
an earlier one.
"""

import re
from pathlib import Path
from typing import Any, cast

import yaml

# The types of YAML 1.2's core schema (decimal numbers only): tag, pattern of a plain scalar, its first characters.
_CORE = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
]
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with only the types of the core schema. A duplicate key is an error."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own class attribute)
    yaml_constructors = {  # noqa: RUF012
        tag: build
        for tag, build in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("bool", "int", "float", "null", "str", "seq", "map")
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that the loader would read as another type."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012


for _name, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))
# YAML 1.1 reads 010 as an octal number and 1:30 as a number in base 60. The core schema has neither.
_Loader.add_constructor(_TAG + "int", lambda loader, node: int(loader.construct_scalar(cast(yaml.ScalarNode, node))))


def dump(tree: dict) -> str:
    """The YAML text of a tree. `parse` returns the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def parse(text: str, where: str) -> Any:
    """The tree of a YAML text. Raises ValueError with one line that starts with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{where}{line}: not valid YAML: {problem}") from None


def read_file(path: str) -> dict:
    """The tree of a file. Raises ValueError if it cannot be read or has no sections."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"cannot read configuration {path}: not UTF-8 text") from None
    tree = parse(text, path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections such as 'run:' at the top level, found {type(tree).__name__}")
    return tree


def read(arguments: list[str]) -> tuple[dict, list[str]]:
    """The merged tree of command-line arguments (files and overrides), and which of them are files.

    Raises ValueError if there is no file, or if one cannot be read.
    """
    overrides = [a for a in arguments if "=" in a and not Path(a).is_file()]
    files = [a for a in arguments if a not in overrides]
    if not files:
        raise ValueError("no configuration file given: name at least one, such as configs/quickstart.yaml")
    tree: dict = {}
    for path in files:
        tree = _overlay(tree, read_file(path))
    for argument in overrides:
        tree = _overlay(tree, _read_override(argument))
    return tree, files


def _overlay(below: dict, above: dict) -> dict:
    """A copy of `below` in which the values of `above` replace those of the same key, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _read_override(argument: str) -> dict:
    key, _, value = argument.partition("=")
    tree = parse(value, f"override {argument!r}")
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree
