"""Print the meaning of every configuration key, from the models in config.py. Used by `--help` and the documentation.

python -m mdmtrain.config_help [SECTION]        the text of `python -m mdmtrain.train --help`
python -m mdmtrain.config_help --markdown       the page docs/configuration.md (`make configuration` writes it)
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from mdmtrain.config import Config, Section

WIDTH = 100
LIMITS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "a multiple of {}"}
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """The description of one configuration key."""

    name: str  # section.key
    kind: str  # type and limits
    default: str | None  # as JSON; None for a required key
    meaning: str


def sections() -> dict[str, type[Section]]:
    """The sections of a configuration, in the order of the file."""
    return {name: cast(type[Section], field.annotation) for name, field in Config.model_fields.items()}


def keys(section: str) -> list[Key]:
    """The keys of a section. Raises ValueError for a section that does not exist."""
    known = sections()
    if section not in known:
        raise ValueError(f"unknown section {section!r} of the configuration: choose from {', '.join(known)}")
    return list(_keys(section, known[section]))


def _keys(prefix: str, model: type[Section]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        default = None if field.is_required() else json.dumps(field.default)
        yield Key(f"{prefix}.{name}", _kind(field), default, field.description or "")
        for inner in get_args(field.annotation):
            if isinstance(inner, type) and issubclass(inner, Section):  # the key is a list of sections
                yield from _keys(f"{prefix}.{name}[]", inner)


def _kind(field: FieldInfo) -> str:
    limits = [
        words.format(getattr(limit, name))
        for limit in field.metadata
        for name, words in LIMITS.items()
        if getattr(limit, name, None) is not None
    ]
    kind, null, _ = _type(field.annotation).partition(" or null")
    return " ".join([kind, ", ".join(limits)]).strip() + null


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    inner = get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if one is NoneType else _type(one) for one in inner)
    if origin is Literal:
        return " | ".join(inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is Annotated:
        return _type(inner[0])
    if issubclass(annotation, Section):
        return "entries"
    return NAMES[annotation]


def text(chosen: str | None = None) -> str:
    """The help of all sections, or of one, for a terminal. Raises ValueError for an unknown section."""
    lines = []
    for name in [chosen] if chosen else sections():
        listed = keys(name)
        lines += ["", f"{name}: {_summary(name)}", ""]
        for key in listed:
            value = "(required)" if key.default is None else f"= {key.default}"
            lines.append(f"  {key.name} {value}    [{key.kind}]")
            lines += textwrap.wrap(key.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def markdown() -> str:
    """The page docs/configuration.md."""
    lines = [
        "# Configuration keys",
        "",
        "<!-- Written by `make configuration` from mdmtrain/config.py: change that file, not this page. -->",
        "",
        "A configuration is one or more YAML files. A later file overrides an earlier one, and `section.key=value` on",
        "the command line overrides them all. An unknown key is an error. `python -m mdmtrain.train --help` prints",
        "this list, and `--help SECTION` one section. In paths, `~` and environment variables are expanded.",
    ]
    for name in sections():
        lines += [
            "",
            f"## {name}",
            "",
            f"{_summary(name)}",
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key in keys(name):
            default = "required" if key.default is None else f"`{key.default}`"
            kind = key.kind.replace(" | ", ", ")  # a bar would end the table's cell
            lines.append(f"| `{key.name}` | {kind} | {default} | {key.meaning} |")
    return "\n".join(lines) + "\n"


def _summary(section: str) -> str:
    return " ".join((sections()[section].__doc__ or "").split())


class HelpAction(argparse.Action):
    """The option --help. It prints the usage and all keys; `--help SECTION` prints the keys of one section."""

    def __init__(self, option_strings: list[str], dest: str):
        shown = "show this message and all configuration keys; with SECTION, only the keys of that section"
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", metavar="SECTION", help=shown)

    def __call__(self, parser, namespace, value, option_string=None):
        print(text(value) if value else f"{parser.format_help()}\nConfiguration keys\n\n{text()}")
        parser.exit()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mdmtrain.config_help", description=__doc__.split("\n\n")[0])
    parser.add_argument("section", nargs="?", choices=list(sections()), help="one section (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/configuration.md")
    args = parser.parse_args(arguments)
    if args.markdown:
        print(markdown(), end="")
    else:
        print(text(args.section))


if __name__ == "__main__":
    main(sys.argv[1:])
