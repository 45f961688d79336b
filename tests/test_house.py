"""The house rules, enforced: every checkable practice of CONTRIBUTING.md, on the whole tree.

Each rule lives in tests/house_rules.py as a pure function and is tried here twice: on the tree,
where it must find nothing, and on a small bad snippet, where it must find something. An exception
is a line in a table below, with its reason, and is refused once it is no longer needed.
"""

import ast
import functools
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import pytest

from tests import house_rules as rules
from tests.house_rules import Module

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCE_ROOTS: Final = ("core", "agent", "collector")
OTHER_CODE: Final = ("tests", "benchmarks", "dashboards", "deploy")
OWN_PACKAGES: Final = frozenset({f"flopledger_{root}" for root in SOURCE_ROOTS})
TEXT_SUFFIXES: Final = frozenset(
    ".cfg .conf .css .csv .html .ini .jinja .js .json .md .mako .py .service .sh .sql .toml .txt"
    " .yaml .yml .target".split()
)

# --- exceptions, each with its reason ------------------------------------------------------------

LONG_MODULES: Final[dict[str, str]] = {}

# State of a running thing, private to its module and never handed out.
MUTABLE_VALUE_TYPES: Final[dict[str, str]] = {
    "agent/flopledger_agent/gpus/opened.py::Opened": "remembers what an open device cannot answer",
    "agent/flopledger_agent/gpus/mig_reader.py::_Part": "follows one part through its samples",
    "agent/flopledger_agent/gpus/source.py::_Slot": "follows one device through its samples",
}

# Classes that say the unit for all their fields, and fields whose unit is a neighbouring field's.
UNIT_IN_CLASS: Final[dict[str, str]] = {
    "Bounds": "limits of one quantity, which the field that holds the bounds names",
    "BridgeStep": "bounds in FLOP of one step of the bridge between two policies",
    "CounterDelta": "an amount of whatever the counter counts, said by its holder",
    "Cycles": "every field is SM-cycles of the pipe it is named after",
    "Phase": "ratios of SM-cycles, named as scenario files name them",
    "Profile": "percentiles and shares, all ratios",
    "Ratio": "bounds of one dimensionless ratio",
    "_Rates": "FLOP per SM-cycle, as exact fractions",
}
UNIT_IN_FIELD: Final[dict[str, str]] = {
    "limit": "a budget's limit, in the unit of its `quantity`",
    "threshold": "an instrument's threshold, in the unit of its `quantity`",
}

# Programs of other tools, executed by them and never imported.
NOT_IMPORTED: Final[dict[str, str]] = {
    "collector/flopledger_collector/store/migrations/env.py": "run by Alembic, in its context",
}

# Foreign library, or inner module -> the files that may import it (a trailing slash: the folder).
IMPORTERS: Final[dict[str, tuple[str, ...]]] = {
    "pynvml": (
        "agent/flopledger_agent/gpus/nvml.py",
        "agent/flopledger_agent/gpus/simulated/",
    ),
    "psutil": ("agent/flopledger_agent/attribution/processes.py",),
    "prometheus_client": (
        "agent/flopledger_agent/exposition.py",
        "agent/flopledger_agent/gpus/dcgm.py",  # its parser, for another exporter's page
        "collector/flopledger_collector/exposition.py",
    ),
    "cryptography": ("core/flopledger_core/signing.py",),
    "sqlalchemy": ("collector/flopledger_collector/store/",),
    "alembic": ("collector/flopledger_collector/store/",),
    "psycopg": ("collector/flopledger_collector/store/",),
    "sqlite3": ("collector/flopledger_collector/store/",),
    "litestar": ("collector/flopledger_collector/app.py", "collector/flopledger_collector/web/"),
    "uvicorn": ("collector/flopledger_collector/app.py", "collector/flopledger_collector/cli/"),
    "jinja2": ("collector/flopledger_collector/web/", "collector/flopledger_collector/reports/"),
    "opentelemetry": ("agent/flopledger_agent/otlp.py",),
    "grpc": ("agent/flopledger_agent/attribution/kubelet_resources.py",),
    "click": ("agent/flopledger_agent/cli.py", "collector/flopledger_collector/cli/"),
    "rich": (
        "agent/flopledger_agent/cli.py",
        "collector/flopledger_collector/cli/",
        "collector/flopledger_collector/demo/",
    ),
    "flopledger_agent.cli": ("agent/flopledger_agent/__main__.py",),
    "flopledger_collector.cli": (
        "collector/flopledger_collector/__main__.py",
        "collector/flopledger_collector/cli/",
    ),
    # Development tools never become dependencies by accident.
    **dict.fromkeys(("httpx", "hypothesis", "pytest", "requests", "schemathesis", "yaml"), ()),
}

# What is summed into the ledger, and where it is summed and kept.
EXACT: Final = (
    "core/flopledger_core/records.py",
    "core/flopledger_core/batch.py",
    "core/flopledger_core/identity.py",
    "core/flopledger_core/exact.py",
    "collector/flopledger_collector/journal.py",
    "collector/flopledger_collector/entries.py",
    "collector/flopledger_collector/ledger/",
    "collector/flopledger_collector/store/",
)

_RATE_WORD: Final = re.compile(r"\b[KMGTPEZ]?" + "FLOP" + r"S\b")
RATE_WORD_QUOTED: Final[dict[str, str]] = {
    "CONTRIBUTING.md": "names the word in order to forbid it",
    "docs/concepts/glossary.md": "names the word in order to forbid it",
    "tests/test_house.py": "the rule",
}
_UNFINISHED: Final = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|X" + r"XX)\b")
_MACHINE: Final = re.compile(
    r"(?<![\w.$}-])/(work|root)/\w"
    r"|files\.python" + r"hosted\.org|pypi\." + r"org/simple|registry\.npm" + r"js\.org"
    r"|--(extra-)?index" + r"-url|--find" + r"-links"
)

# --- the tree ------------------------------------------------------------------------------------


@functools.cache
def tracked_files() -> tuple[Path, ...]:
    """What git would commit; in a tree without git, everything but environments and caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60)
        names = [name for name in listing.stdout.decode().split("\0") if name]
        paths = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        skip = re.compile(
            r"(^|/)(\.venv|\.git|__pycache__|\.\w+_cache|\.hypothesis|build|dist)(/|$)"
        )
        paths = [p for p in ROOT.rglob("*") if not skip.search(p.relative_to(ROOT).as_posix())]
    return tuple(sorted(path for path in paths if path.is_file()))


@functools.cache
def modules(*roots: str) -> tuple[Module, ...]:
    """Every Python file below the given top-level folders."""
    return tuple(
        rules.read(ROOT, path)
        for path in tracked_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in roots
    )


def shipped() -> tuple[Module, ...]:
    """The modules a user installs."""
    return modules(*SOURCE_ROOTS)


def everything() -> tuple[Module, ...]:
    """All Python of the repository."""
    return modules(*SOURCE_ROOTS, *OTHER_CODE)


def texts() -> Iterator[tuple[PurePosixPath, str]]:
    """Every tracked text file, by its path."""
    for path in tracked_files():
        if path.suffix in TEXT_SUFFIXES or not path.suffix:
            name = PurePosixPath(path.relative_to(ROOT).as_posix())
            yield name, path.read_text(encoding="utf-8", errors="replace")


def each(rule: Callable[[Module], Iterable[str]], over: Iterable[Module]) -> list[str]:
    """One rule over many modules."""
    return [violation for module in over for violation in rule(module)]


def none_of(violations: Iterable[str]) -> None:
    """Fail with every violation on its own line."""
    found = list(violations)
    assert not found, f"{len(found)} violations\n" + "\n".join(found)


def bad(text: str, path: str = "core/flopledger_core/snippet.py") -> Module:
    """A snippet that breaks the rule under test."""
    return rules.parse(path, text)


# --- shape ---------------------------------------------------------------------------------------


def test_every_module_is_named_after_a_noun() -> None:
    """A name like `utils` says nothing about what is inside."""
    none_of(rules.banned_names(module.path for module in everything()))
    assert list(
        rules.banned_names([PurePosixPath("agent/x/utils.py"), PurePosixPath("a/misc/b.py")])
    )


def test_modules_stay_short() -> None:
    """Nobody reads a thousand lines; the typical module fits in one's head."""
    none_of(rules.long_modules(everything(), LONG_MODULES))
    assert statistics.median(module.line_count for module in shipped()) <= 200
    assert list(rules.long_modules([bad("x = 1\n" * 501)], {}))
    assert list(rules.long_modules([], {"core/gone.py": "stale"}))


def test_functions_fit_a_screen() -> None:
    """No function is longer than a screen, and nearly all are much shorter."""
    none_of(each(rules.long_functions, everything()))
    counts = [count for module in shipped() for _, count in rules.functions(module)]
    assert sum(count <= 50 for count in counts) >= 0.95 * len(counts)
    assert each(rules.long_functions, [bad("def f():\n" + "    x = 1\n" * 70)])


def test_every_module_opens_with_a_room_sign() -> None:
    """The first lines of a module say why it exists."""
    none_of(each(rules.missing_room_sign, everything()))
    assert each(rules.missing_room_sign, [bad("x = 1\n")])


def test_every_error_says_what_happened() -> None:
    """The docstring of an error class is its meaning."""
    none_of(each(rules.undocumented_errors, shipped()))
    assert each(rules.undocumented_errors, [bad("class LostError(Exception):\n    pass\n")])


def test_ports_stay_small() -> None:
    """A Protocol in interface.py asks for at most five methods."""
    ports = [module for module in shipped() if module.path.name == "interface.py"]
    none_of(each(rules.large_ports, ports))
    methods = "".join(f"    def m{i}(self): ...\n" for i in range(6))
    assert each(rules.large_ports, [bad(f"class P(Protocol):\n{methods}")])


# --- imports -------------------------------------------------------------------------------------


def test_each_foreign_library_has_its_importers() -> None:
    """A library's quirks live behind one door; nothing imports a command line."""
    none_of(each(lambda module: rules.foreign_importers(module, IMPORTERS), shipped()))
    for line in ("import pynvml", "from psutil import Process", "def f():\n    import sqlite3"):
        assert each(lambda module: rules.foreign_importers(module, IMPORTERS), [bad(line)])
    relative = bad("from .cli import main", "agent/flopledger_agent/daemon.py")
    assert each(lambda module: rules.foreign_importers(module, IMPORTERS), [relative])


def test_each_listed_importer_exists() -> None:
    """The table of importers names no file that has gone."""
    later = {"otlp.py", "kubernetes.py", "__main__.py", "reports"}
    paths = sorted({path for paths in IMPORTERS.values() for path in paths})
    missing = [p for p in paths if not (ROOT / p).exists() and PurePosixPath(p).name not in later]
    none_of(f"{path}: is in the table of importers but not in the tree" for path in missing)


def test_the_verifier_reads_core_only() -> None:
    """An auditor's checker must not trust the writer's code."""
    checker = [m for m in shipped() if m.path.parts[1:] == ("flopledger_collector", "verify.py")]
    allowed = frozenset({"flopledger_core"})
    none_of(each(lambda module: rules.other_imports(module, allowed, OWN_PACKAGES), checker))
    snippet = bad("from flopledger_collector.store import schema")
    assert list(rules.other_imports(snippet, allowed, OWN_PACKAGES))


def test_backends_share_tests_and_not_code() -> None:
    """The SQLite and PostgreSQL stores never import each other."""
    store = [m for m in shipped() if "store" in m.path.parts]
    for one, other in (("sqlite", "postgres"), ("postgres", "sqlite")):
        for module in store:
            if module.path.stem.startswith(one):
                imported = [name for _, name in rules.imported_names(module)]
                ours = [name for name in imported if name.startswith("flopledger_")]
                assert not [name for name in ours if other in name], module.path


def _module_names() -> list[str]:
    names = []
    for module in shipped():
        if module.path.name != "__main__.py" and str(module.path) not in NOT_IMPORTED:
            dotted = ".".join(module.path.with_suffix("").parts[1:])
            names.append(dotted.removesuffix(".__init__"))
    return names


def _probe(roots: list[Path], names: list[str]) -> subprocess.CompletedProcess[str]:
    program = ROOT / "tests" / "import_probe.py"
    return subprocess.run(
        [sys.executable, "-B", str(program), os.pathsep.join(map(str, roots)), *names],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_nothing_happens_at_import() -> None:
    """Importing any module opens no socket, database, process, thread, GPU library or data file."""
    done = _probe([ROOT / root for root in SOURCE_ROOTS], _module_names())
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "import sqlite3; sqlite3.connect(':memory:')",
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import subprocess; subprocess.run(['true'])",
        "import threading; threading.Thread(target=print).start()",
        "import pynvml; pynvml.nvmlInit()",
        "from pathlib import Path; (Path(__file__).parent / 'data.toml').read_text()",
        "from pathlib import Path; (Path(__file__).parent / 'new.py').write_text('')",
    ],
)
def test_the_import_probe_sees(tmp_path: Path, line: str) -> None:
    """Each kind of work at import is found."""
    (tmp_path / "data.toml").write_text("")
    (tmp_path / "guilty.py").write_text(line + "\n")
    done = _probe([tmp_path], ["guilty"])
    assert done.returncode == 1, line
    assert done.stdout.startswith("guilty: ")


# --- value types ---------------------------------------------------------------------------------


def test_value_types_are_frozen_slotted_and_keyword_only() -> None:
    """A value never changes under the hands of whoever holds it."""
    none_of(rules.thawed_value_types(shipped(), MUTABLE_VALUE_TYPES))
    for text in (
        "@dataclass\nclass A:\n    x: int\n",
        "@dataclasses.dataclass(frozen=True, slots=True)\nclass A:\n    x: int\n",
        "class A(msgspec.Struct, kw_only=True):\n    x: int\n",
        "class A(Struct, frozen=True, kw_only=True):\n    x: int\nclass B(A):\n    y: int\n",
    ):
        assert list(rules.thawed_value_types([bad(text)], {})), text


def test_the_ledger_holds_no_floats() -> None:
    """What is summed is exact."""
    exact = [m for m in shipped() if str(m.path).startswith(EXACT)]
    none_of(each(rules.float_fields, exact))
    assert each(rules.float_fields, [bad("class A(Struct):\n    x: float | None = None\n")])
    assert each(rules.float_fields, [bad("c = sa.Column('x', sa.Float())\n")])


def test_numeric_fields_carry_their_unit() -> None:
    """A reader never guesses whether a number is milliseconds or seconds."""
    none_of(rules.unitless_fields(shipped(), UNIT_IN_FIELD, UNIT_IN_CLASS))
    text = "Count = Annotated[int, Meta(ge=0)]\nclass A(Struct):\n    energy: Count | None\n"
    assert list(rules.unitless_fields([bad(text)], {}, {}))


# --- waiting -------------------------------------------------------------------------------------


def test_nothing_waits_for_ever() -> None:
    """Network, database and process calls name their time limit."""
    none_of(each(rules.unbounded_waits, everything()))
    for text in (
        "import subprocess\nsubprocess.run(['true'])",
        "from urllib.request import urlopen\nurlopen(x)",
        "import httpx\nhttpx.Client()",
        "import socket as s\ns.create_connection(a)",
        "thread.join()",
    ):
        assert each(rules.unbounded_waits, [bad(text)]), text


def test_no_test_sleeps_blindly() -> None:
    """A test that waits polls with a deadline, or moves an injected clock."""
    none_of(each(rules.blind_sleeps, modules("tests")))
    assert each(rules.blind_sleeps, [bad("import time\ndef f():\n    time.sleep(1)\n")])
    assert not each(rules.blind_sleeps, [bad("import time\nwhile x:\n    time.sleep(1)\n")])


def test_fakes_and_recordings_replace_mocks() -> None:
    """A port has a fake that keeps its contract; a mock keeps only the author's hopes."""
    named = [(m, name) for m in modules("tests") for _, name in rules.imported_names(m)]
    none_of(f"{m.path}: imports {name}" for m, name in named if name.startswith("unittest.mock"))


# --- the journal and the labels ------------------------------------------------------------------


def test_journal_entries_are_never_changed() -> None:
    """The journal is append-only: no UPDATE, no DELETE, in SQL or through SQLAlchemy."""
    none_of(each(rules.journal_rewrites, modules("collector")))
    for text in (
        "q = 'UPDATE journal SET x = 1'",
        "q = 'delete from journal_entries'",
        "sa.update(journal)",
        "schema.journal.delete()",
    ):
        assert each(rules.journal_rewrites, [bad(text)]), text
    assert not each(
        rules.journal_rewrites, [bad("q = 'CREATE TRIGGER t BEFORE UPDATE ON journal'")]
    )


def test_prometheus_keeps_its_own_label() -> None:
    """No metric of ours has a label `job`: Prometheus sets that one itself."""
    pages = [m for m in shipped() if m.path.name == "exposition.py"]
    found = [
        module.at(node, "label `job`; say `job_id`")
        for module in pages
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and node.value == "job"
    ]
    selector = re.compile(r"[{,]\s*job\s*(=|!=|=~|!~)|\b(by|on|without)\s*\([^)]*\bjob\b")
    for path, text in texts():
        if path.parts[0] == "dashboards":
            found += rules.forbidden_text(path, text, selector, "site-specific selector")
    none_of(found)


# --- text ----------------------------------------------------------------------------------------


def test_flop_is_an_amount_and_a_rate_says_per_second() -> None:
    """The ambiguous plural appears nowhere."""
    reason = "say FLOP (amount) or FLOP/s (rate)"
    found = (
        violation
        for path, text in texts()
        if str(path) not in RATE_WORD_QUOTED
        for violation in rules.forbidden_text(path, text, _RATE_WORD, reason)
    )
    none_of(found)
    assert _RATE_WORD.search("989 TFLOP" + "S")
    assert not _RATE_WORD.search("989 TFLOP/s")


def test_nothing_is_left_for_later_in_the_text() -> None:
    """Unfinished work is an issue, not a comment."""
    reason = "finish it or file an issue"
    none_of(v for p, t in texts() for v in rules.forbidden_text(p, t, _UNFINISHED, reason))
    assert _UNFINISHED.search("# " + "TO" + "DO: x")


def test_no_file_names_a_machine_or_a_registry() -> None:
    """A checkout works anywhere: no paths of one machine, no package hosts, no lock files."""
    reason = "belongs to one machine"
    none_of(v for p, t in texts() for v in rules.forbidden_text(p, t, _MACHINE, reason))
    locks = {"Pipfile.lock", "package-lock.json", "pdm.lock", "poetry.lock", "uv.lock"}
    assert not [path for path in tracked_files() if path.name in locks]
    assert _MACHINE.search("see /wo" + "rk/main/x")


def test_the_changelog_speaks_of_this_version() -> None:
    """A reader of the changelog finds the version that is in the tree."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert re.search(rf"^## \[(Unreleased|{re.escape(version[1])})\]", changelog, re.MULTILINE)


# --- source roots --------------------------------------------------------------------------------


def test_a_source_root_holds_exactly_one_package() -> None:
    """Anything else directly under a root would become importable everywhere."""
    for root in SOURCE_ROOTS:
        inside = {
            p.relative_to(ROOT / root).parts for p in tracked_files() if ROOT / root in p.parents
        }
        packages = {parts[0] for parts in inside if len(parts) > 1 and parts[-1].endswith(".py")}
        assert packages == {f"flopledger_{root}"}
        assert not [parts for parts in inside if len(parts) == 1 and parts[0].endswith(".py")]
        assert (ROOT / root / f"flopledger_{root}" / "py.typed").exists()


def test_every_package_folder_is_a_package() -> None:
    """A folder with modules has an __init__, in the packages and in the tests alike."""
    folders = {module.path.parent for module in modules(*SOURCE_ROOTS, "tests")}
    missing = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]
    none_of(f"{folder}: no __init__.py" for folder in sorted(missing))


def test_every_tool_is_told_the_same_source_roots() -> None:
    """pyproject.toml spells the roots in several sections; they agree."""
    spelled = rules.source_roots((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert spelled == dict.fromkeys(spelled, sorted(SOURCE_ROOTS))
