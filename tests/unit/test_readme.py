"""README.md and the code say the same: commands, configuration keys, events and their facts, variables."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpci import config
from vpci.cli import COMMANDS
from vpci.config_text import allowed
from vpci.models import find_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SOURCES = [*sorted((ROOT / "vpci").rglob("*.py")), ROOT / "cffi_build.py"]
TELLERS = {"Report", "event", "tell", "_put", "_write"}  # functions that are called with an event's name first


def blocks(language: str) -> list[str]:
    """The fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def code() -> str:
    """What stands in shell blocks and between backticks outside of any block."""
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks("sh"), *re.findall(r"`([^`]+)`", prose)])


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    text = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    """The words between backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


# -- the first two commands ------------------------------------------------------------------------------------------


def test_the_first_two_commands_are_one_line_each_and_need_nothing_before_them():
    demo, tests = blocks("sh")[0].splitlines()
    for line, end in ((demo, ".venv/bin/vpci demo"), (tests, ".venv/bin/pytest")):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert line.endswith(f" && {end}")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with .ci/run and no README.md yet."""
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/run", tmp_path / ".ci/run")
    return tmp_path


def ci_run(checkout: Path, readme: str) -> subprocess.CompletedProcess[str]:
    """.ci/run in a checkout with this README.md, started from elsewhere and with something to read."""
    (checkout / "README.md").write_text(readme)
    return subprocess.run([checkout / ".ci/run"], cwd="/", input="input", capture_output=True, text=True, timeout=60)


def test_ci_runs_the_second_command_in_the_checkout_without_input(checkout):
    shell = "# why\necho no\npwd; cat; echo closing line; exit 3\n"
    done = ci_run(checkout, f"# x\n```text\necho no\n```\n```sh\n{shell}```\n")
    assert (done.returncode, done.stdout) == (3, f"{checkout}\nclosing line\n")


def test_ci_would_run_the_tests_of_this_readme(checkout):
    """The venv's programs are doubles that say how they were called."""
    for name in ("pip", "pytest"):
        program = checkout / f".venv/bin/{name}"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    done = ci_run(checkout, README.replace("python3 -m venv .venv", "true"))
    assert (done.returncode, done.stdout) == (0, "pip install -q .[test]\npytest\n")


def test_ci_fails_when_there_is_no_second_command(checkout):
    assert ci_run(checkout, "```sh\necho one\n```\n").returncode != 0


def test_ci_run_can_be_executed():
    assert os.access(ROOT / ".ci/run", os.X_OK)


# -- names -----------------------------------------------------------------------------------------------------------


def test_every_command_is_named_and_every_named_command_exists():
    found = re.findall(r"(?:^|[\s/])vpci ([a-z]+)", code(), re.MULTILINE)
    assert set(found) == set(COMMANDS)
    assert [names(cell)[0].split()[1] for cell, *_ in rows("Commands")] == list(COMMANDS)


def sections() -> dict[str, list[str]]:
    """Section -> its keys, of every model's configuration."""
    models = {name: find_model(name).Section for name in config.model_names()}
    structs = {**config.SECTIONS, **models}
    return {name: list(struct.__struct_fields__) for name, struct in structs.items()}


def test_every_named_key_exists():
    known = {f"{section}.{key}" for section, keys in sections().items() for key in keys}
    dotted = re.findall(r"\b(([a-z_]+)\.[a-z_]+)\b", code())
    found = {name for name, section in dotted if section in sections() and not name.endswith((".toml", ".sock"))}
    assert found
    assert found <= known


@pytest.mark.parametrize("name", config.model_names())
def test_the_sample_explains_every_key(name):
    model = find_model(name)
    text = config.sample(name)
    for section, struct in {**config.SECTIONS, model.name: model.Section}.items():
        assert f"\n[{section}]\n" in text
        for key in struct.__struct_fields__:
            assert re.search(rf"^# .+\n(# )?{key} = ", text, re.MULTILINE), f"{section}.{key}"
            assert allowed(struct, key)


def told() -> Iterator[tuple[str, set[str]]]:
    """Every event in the code with the facts beside it: keyword arguments, and keys of dicts in the same function."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            nodes = list(ast.walk(function))
            keys = {key.value for node in nodes if isinstance(node, ast.Dict) for key in node.keys if is_text(key)}
            for call in (node for node in nodes if isinstance(node, ast.Call) and called(node) in TELLERS):
                if call.args and is_text(call.args[0]) and call.args[0].value:
                    yield call.args[0].value, keys | {word.arg for word in call.keywords if word.arg}
            if "event" in keys and (name := re.search(r'"event": "(\w+)"', ast.unparse(function).replace("'", '"'))):
                yield name[1], set()


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def test_every_event_is_documented_with_its_facts():
    found: dict[str, set[str]] = defaultdict(set)
    for event, facts in told():
        found[event] |= facts
    documented = {event: set(names(facts)) for events, facts, _ in rows("Events") for event in names(events)}
    assert documented.keys() == found.keys()
    del found["demo"], documented["demo"]  # its facts are made in another function
    assert documented == found


def test_every_variable_is_documented():
    pattern = re.compile(r"environ(?:\.get\(|\[)\s*\"((?:VPCI|XDG)_\w+)\"")
    read = {name for path in SOURCES for name in pattern.findall(path.read_text())}
    assert {name for row in rows("Environment") for cell in row for name in names(cell) if name.isupper()} == read
