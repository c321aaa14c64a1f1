"""Every launcher's command that README.md and docs/cluster.md quote has options that the launchers know."""

import re
import shlex

import pytest

from launchers import status
from launchers.launch import parse, parser
from launchers.slurm import slurm_parser
from tests.conftest import ROOT


def quoted() -> list[list[str]]:
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/cluster.md"))
    indented = re.findall(r"^ {4}(python -m launchers\..*)$", text, re.MULTILINE)
    inline = [" ".join(one.split()) for one in re.findall(r"`(python -m launchers\.\w+ [^`]+)`", text)]
    return [shlex.split(command, comments=True)[2:] for command in [*indented, *inline]]


@pytest.mark.parametrize("words", quoted(), ids=" ".join)
def test_its_options_exist(words, monkeypatch):
    module, *arguments = words
    if module == "launchers.slurm":
        assert parse(slurm_parser(), arguments, None).config[0].startswith("configs/")
    elif module == "launchers.local":
        parse(parser("local", ""), arguments, None)
    elif module == "launchers.status" and arguments[0] == "resume":
        parse(slurm_parser(), arguments[2:], None)
    elif module == "launchers.sweep":
        from launchers import sweep

        slurm_options = arguments[arguments.index("--slurm") + 1]
        parse(slurm_parser(), shlex.split(slurm_options), None)
        with pytest.raises(ValueError, match="CONFIG"):  # the last of its checks: all options were known
            sweep.main(arguments)
    else:
        assert module == "launchers.status" and (arguments[0] == "cancel" or arguments[1:] in ([], ["--watch"])), words
        assert arguments[0] in status.__doc__ or not arguments[0].startswith("-")


def test_commands_are_found():
    assert {words[0] for words in quoted()} == {f"launchers.{name}" for name in ("slurm", "local", "status", "sweep")}
