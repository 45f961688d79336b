"""The documents agree with the code: commands, config keys, metrics, alerts, log actions, links.

What a user can type, set, scrape or be woken by is found in the code and must be named in
docs/reference/ (alerts: in a runbook). The checks read the real command groups, config types and
rule files, so that a new option fails here until it is written down.
"""

import ast
import functools
import importlib
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import pytest
import yaml

from tests.test_house import ROOT, modules, none_of, shipped, tracked_files

REFERENCE: Final = ROOT / "docs" / "reference"
COMMANDS: Final = {
    "flopledger-agent": "flopledger_agent.cli",
    "flopledger": "flopledger_collector.cli",
}
CONFIGS: Final = {
    "AgentConfig": "flopledger_agent.config",
    "CollectorConfig": "flopledger_collector.config",
}
# What Prometheus appends to a family's name on the page.
_SUFFIXES: Final = re.compile(r"_(total|sum|count|bucket|created)$")
# Base units only, spelled out: no scaled unit ends a metric's name.
_SCALED: Final = re.compile(
    r"_(ms|us|ns|milliseconds|mj|kj|kwh|wh|mw|kw|mhz|khz|kib|mib|gib|kb|mb|gb|percent|pct)(_|$)"
)


@functools.cache
def documents(folder: Path) -> str:
    """All Markdown below a folder, as one text."""
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.md")))


def mentions(text: str, word: str) -> bool:
    """Whether a text names a word exactly, not as a part of a longer one."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


# --- commands ------------------------------------------------------------------------------------


def commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command and everything below it, hidden ones left out, by what one types."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in sorted(command.commands.items()):
            if not inner.hidden:
                yield from commands(f"{path} {name}", inner)


def undocumented_commands(program: str, main: click.Command, text: str) -> Iterator[str]:
    """Commands, options and missing help texts that the reference does not name."""
    for path, command in commands(program, main):
        if not mentions(text, path):
            yield f"`{path}` is not in docs/reference/"
        if not (command.help or "").strip():
            yield f"`{path}` has no help text"
        if "\\" in (command.help or ""):
            yield f"`{path} --help` shows a backslash: click's mark \\b must not be in a raw string"
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                names = [n for n in parameter.opts if n.startswith("--")] or parameter.opts
                if not any(mentions(text, name) for name in names):
                    yield f"`{path} {names[0]}` is not in docs/reference/"


@pytest.mark.parametrize(("program", "module"), sorted(COMMANDS.items()))
def test_every_command_is_documented(program: str, module: str) -> None:
    """Each command and option a user can type is in the reference and has a help text."""
    main: Any = importlib.import_module(module).main
    none_of(undocumented_commands(program, main, documents(REFERENCE)))


def test_an_undocumented_option_is_found() -> None:
    """The check itself can fail."""

    @click.command(help="x")
    @click.option("--depth")
    def main(depth: str) -> None:
        """Do nothing."""

    assert list(undocumented_commands("prog", main, "prog --depth-max")) == [
        "`prog --depth` is not in docs/reference/"
    ]


def test_a_mark_of_click_that_would_be_printed_is_found() -> None:
    """A raw docstring keeps the escape as two characters, and people would read them."""

    @click.command(help=r"Example: \b x")
    def main() -> None:
        """Do nothing."""

    (found,) = undocumented_commands("prog", main, "prog")
    assert "backslash" in found


# --- configuration -------------------------------------------------------------------------------


def structs_in(annotation: object) -> Iterator[type[msgspec.Struct]]:
    """Every Struct type inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        yield annotation
    if typing.get_origin(annotation) in (
        typing.Union,
        types.UnionType,
        typing.Annotated,
        tuple,
        list,
        dict,
    ):
        for part in typing.get_args(annotation):
            yield from structs_in(part)


def config_keys(struct: type[msgspec.Struct], table: str = "") -> Iterator[tuple[str, str]]:
    """Every (table, key) a config file may hold."""
    for field in msgspec.structs.fields(struct):
        inner = list(structs_in(field.type))
        path = f"{table}.{field.encode_name}".lstrip(".")
        if not inner:
            yield table, field.encode_name
        for one in inner:
            yield from config_keys(one, path)


def undocumented_keys(struct: type[msgspec.Struct], text: str) -> Iterator[str]:
    """Keys that the reference does not name, in full or under their table's name."""
    for table, key in config_keys(struct):
        dotted = f"{table}.{key}".lstrip(".")
        in_table = mentions(text, f"[{table}]") or mentions(text, f"[[{table}]]") or not table
        if not (f"`{dotted}`" in text or (in_table and f"`{key}`" in text)):
            yield f"config key `{dotted}` is not in docs/reference/"


@pytest.mark.parametrize(("name", "module"), sorted(CONFIGS.items()))
def test_every_config_key_is_documented(name: str, module: str) -> None:
    """Each key a config file may hold is in the reference, and unknown keys are refused."""
    struct = getattr(importlib.import_module(module), name)
    none_of(undocumented_keys(struct, documents(REFERENCE)))
    assert list(config_keys(struct))
    none_of(f"{one.__name__} accepts unknown keys" for one in _tolerant(struct))


def _tolerant(struct: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    if not struct.__struct_config__.forbid_unknown_fields:
        yield struct
    for field in msgspec.structs.fields(struct):
        for inner in structs_in(field.type):
            yield from _tolerant(inner)


def test_an_undocumented_key_is_found() -> None:
    """The check itself can fail."""

    class Web(msgspec.Struct, frozen=True, kw_only=True):
        listen_address: str

    class Config(msgspec.Struct, frozen=True, kw_only=True):
        web: Web | None = None

    assert list(undocumented_keys(Config, "`listen`"))
    assert not list(undocumented_keys(Config, "[web] `listen_address`"))


# --- metrics and alerts --------------------------------------------------------------------------


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string constant of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def emitted() -> dict[str, str]:
    """Metric family name (without Prometheus's suffixes) -> the module that emits it."""
    names: dict[str, str] = {}
    for module in shipped():
        if module.path.name == "exposition.py" or "exposition" in module.path.parts:
            for text in strings(module.tree):
                if re.fullmatch(r"flopledger_[a-z0-9_]*[a-z0-9]", text):
                    names[_SUFFIXES.sub("", text)] = str(module.path)
    return names


def queried() -> Iterator[tuple[str, str]]:
    """(file, metric family) for every metric in a dashboard, a rule or an alert."""
    for path in tracked_files():
        where = path.relative_to(ROOT)
        if where.parts[0] == "dashboards" and path.suffix in {".json", ".yml", ".yaml"}:
            for name in set(
                re.findall(r"\bflopledger_[a-z0-9_]+\b", path.read_text(encoding="utf-8"))
            ):
                yield str(where), name


def test_every_metric_is_documented_in_base_units() -> None:
    """Each metric a Prometheus can scrape is in the reference, and its name ends in a base unit."""
    text, names = documents(REFERENCE), emitted()
    assert any("agent" in path for path in names.values())
    assert any("collector" in path for path in names.values())
    none_of(
        f"{path}: {name} is not in docs/reference/"
        for name, path in sorted(names.items())
        if not any(mentions(text, name + suffix) for suffix in ("", "_total", "_sum", "_count"))
    )
    none_of(f"{name}: not a base unit" for name in sorted(names) if _SCALED.search(name))
    assert _SCALED.search("flopledger_power_mw")


def test_every_documented_metric_exists() -> None:
    """The reference promises no metric that nothing emits."""
    page = REFERENCE / "metrics.md"
    promised = set(re.findall(r"`(flopledger_[a-z0-9_]+)", page.read_text(encoding="utf-8")))
    packages = {"flopledger_core", "flopledger_agent", "flopledger_collector"}
    known = emitted().keys()
    none_of(
        f"docs/reference/metrics.md: nothing emits {name}"
        for name in sorted(promised - packages)
        if name not in known and _SUFFIXES.sub("", name) not in known
    )


def test_every_panel_and_rule_asks_for_a_metric_that_exists() -> None:
    """A renamed metric breaks this test and not a dashboard."""
    known, asked = emitted().keys(), list(queried())
    assert asked
    none_of(
        f"{where}: nothing emits {name}"
        for where, name in sorted(asked)
        if name not in known and _SUFFIXES.sub("", name) not in known
    )


def alerts() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, rule) for every alerting rule."""
    for path in tracked_files():
        if path.relative_to(ROOT).parts[0] == "dashboards" and path.suffix in {".yml", ".yaml"}:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            for group in content.get("groups", []) if isinstance(content, dict) else []:
                for rule in group.get("rules", []):
                    if "alert" in rule:
                        yield str(path.relative_to(ROOT)), rule


def test_every_alert_has_a_runbook_and_says_what_it_means() -> None:
    """Whoever is woken finds a section with the alert's name, a severity and a description."""
    headings = set(
        re.findall(
            r"^#+ +`?(\w+)`?",
            documents(ROOT / "docs") + "\n" + documents(ROOT / "dashboards"),
            re.MULTILINE,
        )
    )
    found = list(alerts())
    assert len(found) >= 2
    for where, rule in found:
        name = rule["alert"]
        assert name in headings, f"{where}: {name} has no runbook section"
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, name
        assert {"summary", "description"} <= rule["annotations"].keys(), name


# --- log actions, links, shape -------------------------------------------------------------------


def logged_actions() -> Iterator[tuple[str, str]]:
    """(place, action) for every `extra={"action": ...}` of a log call."""
    for module in shipped():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "action":
                        for action in strings(value):
                            yield f"{module.path}:{node.lineno}", action


def test_every_log_action_is_documented() -> None:
    """An operator can look up any line of the log."""
    text = documents(REFERENCE)
    none_of(
        f"{at}: `{a}` is not in docs/reference/"
        for at, a in logged_actions()
        if f"`{a}`" not in text
    )


def prose(path: Path) -> str:
    """A document without its fenced code."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_links_inside_the_repository_lead_somewhere() -> None:
    """Every relative link of every document points at a file that exists."""
    documents = [path for path in tracked_files() if path.suffix == ".md"]
    none_of(
        f"{path.relative_to(ROOT)}: {target}"
        for path in documents
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", prose(path))
        if not (path.parent / target.split("#")[0]).exists()
    )


def test_each_document_has_one_title() -> None:
    """A document opens with its title and has no second one."""
    for path in tracked_files():
        if path.suffix == ".md":
            assert len(re.findall(r"^# ", prose(path), re.MULTILINE)) == 1, path.relative_to(ROOT)


def test_every_test_says_its_promise() -> None:
    """A failing test's docstring tells what was promised."""
    none_of(
        module.at(node, f"{node.name} has no docstring")
        for module in modules("tests")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    )
