"""The house rules as pure functions: source text in, violations out.

Each function takes parsed modules (or lines of text) and yields one sentence per violation, so that
a rule can be tried on a small bad snippet and be seen to fail. No rule reads a clock, a network or
anything but what it is given. tests/test_house.py applies them.
"""

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

FUNCTION_LINES_MAX: Final = 70  # a screen
MODULE_LINES_MAX: Final = 500
PORT_METHODS_MAX: Final = 5

BANNED_NAMES: Final = frozenset(
    {"base", "common", "helper", "helpers", "misc", "shared", "stuff", "util", "utils"}
)

# One of these words in a numeric field's name says what its number counts.
UNIT_WORDS: Final = frozenset(
    "ns us ms s seconds minutes hours days hz khz mhz joules mj uj watts mw celsius bytes kib mib"
    " gib cycles flop operations ratio share shares percent mille milli per ppm cents price weight"
    " speed count index number id pid uid gid fd port version sequence position generation instance"
    " code seed size depth digits attempts entries records batches samples sharers weights gpus"
    " sms minor nodes streams slices workers row rows line lines architecture".split()
)

_NETWORK_CALLS: Final = frozenset(
    {
        "http.client.HTTPConnection",
        "http.client.HTTPSConnection",
        "httpx.AsyncClient",
        "httpx.Client",
        "httpx.delete",
        "httpx.get",
        "httpx.head",
        "httpx.post",
        "httpx.put",
        "httpx.request",
        "httpx.stream",
        "requests.get",
        "requests.post",
        "socket.create_connection",
        "sqlite3.connect",
        "subprocess.call",
        "subprocess.check_call",
        "subprocess.check_output",
        "subprocess.run",
        "urllib.request.urlopen",
    }
)
# Methods that wait for ever when called bare: threads, processes, events.
_WAITING_METHODS: Final = frozenset({"communicate", "join", "wait"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One Python file: its path below the repository root, its text, its syntax tree."""

    path: PurePosixPath
    text: str
    tree: ast.Module

    def at(self, node: ast.AST, message: str) -> str:
        """One violation, in the form editors and terminals make clickable."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"

    @property
    def line_count(self) -> int:
        """How long the file is."""
        return self.text.count("\n") + (not self.text.endswith("\n"))


def parse(path: str, text: str) -> Module:
    """A module from its text."""
    return Module(path=PurePosixPath(path), text=text, tree=ast.parse(text, filename=path))


def read(root: Path, path: Path) -> Module:
    """A module from disk."""
    return parse(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))


# --- shape ---------------------------------------------------------------------------------------


def banned_names(paths: Iterable[PurePosixPath]) -> Iterator[str]:
    """Names that say nothing, on modules and folders alike."""
    for path in paths:
        for part in path.with_suffix("").parts:
            if part in BANNED_NAMES:
                yield f"{path}: `{part}` says nothing; name the noun it holds"


def long_modules(modules: Iterable[Module], allowed: dict[str, str]) -> Iterator[str]:
    """Modules over the limit, and exceptions that are no longer needed."""
    long = {str(m.path): m.line_count for m in modules if m.line_count > MODULE_LINES_MAX}
    for path, count in sorted(long.items()):
        if path not in allowed:
            yield f"{path}: {count} lines, at most {MODULE_LINES_MAX}; split it by noun"
    for path in sorted(allowed.keys() - long.keys()):
        yield f"{path}: is no longer too long; remove it from the exception list"


def functions(module: Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Every function with its length in lines, decorators left out."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def long_functions(module: Module) -> Iterator[str]:
    """Functions that do not fit a screen."""
    for node, count in functions(module):
        if count > FUNCTION_LINES_MAX:
            yield module.at(node, f"{node.name} has {count} lines, at most {FUNCTION_LINES_MAX}")


def missing_room_sign(module: Module) -> Iterator[str]:
    """A module without a docstring that says why it exists; empty markers of test folders pass."""
    if module.path.parts[0] == "tests" and not module.tree.body:
        return
    if not (ast.get_docstring(module.tree) or "").strip():
        yield module.at(module.tree, "no docstring: say why the module exists")


def undocumented_errors(module: Module) -> Iterator[str]:
    """Error classes without a docstring: it is their default message and their meaning."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            bases = {_tail(base) for base in node.bases}
            is_error = any(b.endswith(("Error", "Exception")) for b in bases)
            in_tree = module.path.name == "errors.py" and bases
            if (is_error or in_tree) and not ast.get_docstring(node):
                yield module.at(node, f"{node.name} has no docstring: say what happened")


# --- imports -------------------------------------------------------------------------------------


def imported_names(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every absolute dotted name a module imports, also inside functions."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            prefix = _absolute(module, node)
            for alias in node.names:
                yield node, f"{prefix}.{alias.name}"


def foreign_importers(module: Module, allowed: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Imports of a library (or an inner module) outside the files that may have it."""
    seen: set[tuple[int, str]] = set()
    for node, name in imported_names(module):
        for library, globs in allowed.items():
            key = (getattr(node, "lineno", 0), library)
            if name != library and not name.startswith(f"{library}."):
                continue
            if key not in seen and not any(_glob(module.path, pattern) for pattern in globs):
                seen.add(key)
                where = ", ".join(globs) or "no module"
                yield module.at(node, f"imports {library}, which belongs to {where}")


def other_imports(module: Module, allowed: frozenset[str], own: frozenset[str]) -> Iterator[str]:
    """Imports of our own packages other than the allowed ones."""
    for node, name in imported_names(module):
        package = name.split(".")[0]
        if package in own and package not in allowed and name != str(module.path):
            yield module.at(node, f"imports {name}; only {', '.join(sorted(allowed))} is allowed")


# --- value types ---------------------------------------------------------------------------------


def thawed_value_types(modules: Iterable[Module], allowed: dict[str, str]) -> Iterator[str]:
    """Dataclasses and Structs that are not frozen, slotted and keyword-only, minus named ones."""
    modules = list(modules)
    structs = _struct_names(modules)
    found: set[str] = set()
    for module in modules:
        for node in _classes(module):
            missing = _missing_options(node, structs)
            if missing and f"{module.path}::{node.name}" not in allowed:
                yield module.at(node, f"{node.name} is not {', '.join(missing)}")
            elif missing:
                found.add(f"{module.path}::{node.name}")
    for name in sorted(allowed.keys() - found):
        yield f"{name}: needs no exception any more; remove it from the list"


def float_fields(module: Module) -> Iterator[str]:
    """Floats where sums must be exact: annotated fields, and float columns."""
    for node in _classes(module):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and "float" in _names(field.annotation):
                yield module.at(
                    field, f"{node.name}.{_tail(field.target)} is a float; the ledger has none"
                )
    for inner in ast.walk(module.tree):
        if isinstance(inner, ast.Call) and _tail(inner.func) in {"Float", "REAL", "Double"}:
            yield module.at(inner, f"{_tail(inner.func)} column; the ledger has none")


def unitless_fields(
    modules: Iterable[Module], allowed_fields: dict[str, str], allowed_classes: dict[str, str]
) -> Iterator[str]:
    """Numeric fields of value types whose name does not say what is counted."""
    modules = list(modules)
    numeric = _numeric_aliases(modules)
    structs = _struct_names(modules)
    for module in modules:
        for node in _classes(module):
            if not _is_value_type(node, structs) or node.name in allowed_classes:
                continue
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    name = field.target.id
                    words = set(name.lower().strip("_").split("_"))
                    if name in allowed_fields or words & UNIT_WORDS:
                        continue
                    if _is_number(field.annotation, numeric):
                        yield module.at(field, f"{node.name}.{name} has no unit in its name")


def large_ports(module: Module) -> Iterator[str]:
    """Ports in interface.py with more methods than anyone wants to implement."""
    for node in _classes(module):
        if "Protocol" in {_tail(base) for base in node.bases}:
            methods = [
                n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            if len(methods) > PORT_METHODS_MAX:
                yield module.at(node, f"{node.name} asks for {len(methods)} methods, at most five")


# --- waiting -------------------------------------------------------------------------------------


def unbounded_waits(module: Module) -> Iterator[str]:
    """Network, database and process calls, joins and waits without an explicit time limit."""
    aliases = _aliases(module)
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        if "timeout" in keywords or None in keywords:
            continue
        name = _dotted(node.func, aliases)
        bare = not node.args and not node.keywords
        if name in _NETWORK_CALLS:
            yield module.at(node, f"{name} without an explicit timeout")
        elif bare and isinstance(node.func, ast.Attribute) and node.func.attr in _WAITING_METHODS:
            yield module.at(node, f".{node.func.attr}() waits for ever; give it a timeout")


def blind_sleeps(module: Module) -> Iterator[str]:
    """Sleeps outside a polling loop: they make tests slow and still flaky."""
    aliases = _aliases(module)

    def visit(node: ast.AST, *, looping: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if (
                isinstance(child, ast.Call)
                and _dotted(child.func, aliases) in {"time.sleep", "asyncio.sleep"}
                and not looping
            ):
                yield module.at(child, "a sleep; poll with a deadline, or inject a clock")
            yield from visit(child, looping=looping or isinstance(child, ast.While | ast.For))

    yield from visit(module.tree, looping=False)


# --- text ----------------------------------------------------------------------------------------


def forbidden_text(
    path: PurePosixPath, text: str, pattern: re.Pattern[str], reason: str
) -> Iterator[str]:
    """Lines of any text file that match a pattern nothing should match."""
    for number, line in enumerate(text.splitlines(), start=1):
        found = pattern.search(line)
        if found:
            yield f"{path}:{number}: `{found.group()}`: {reason}"


def journal_rewrites(module: Module) -> Iterator[str]:
    """UPDATE or DELETE on journal tables, in SQL text or through SQLAlchemy."""
    sql = re.compile(r"\b(update|delete\s+from)\s+[\"'`]?(journal\w*|\w*entries)\b", re.IGNORECASE)
    yield from forbidden_text(module.path, module.text, sql, "journal entries never change")
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        function, target = node.func, ""
        if _tail(function) in {"update", "delete"}:
            if isinstance(function, ast.Attribute):
                target = _tail(function.value)
            if node.args and not target.startswith(("journal", "entries")):
                target = _tail(node.args[0])
            if re.match(r"(?i)_?(journal|entries)", target):
                yield module.at(
                    node, f"{_tail(function)} on {target}: journal entries never change"
                )


# --- the project file ----------------------------------------------------------------------------


def source_roots(pyproject: str) -> dict[str, list[str]]:
    """Each place of pyproject.toml that spells the source roots, with what it spells."""
    tool: dict[str, Any] = tomllib.loads(pyproject)["tool"]
    mypy_path = tool["mypy"]["mypy_path"].replace("$MYPY_CONFIG_FILE_DIR/", "").split(":")
    packages = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    linter = tool["importlinter"]["root_packages"]
    return {
        "hatch wheel packages": sorted(PurePosixPath(p).parts[0] for p in packages),
        "hatch dev-mode-dirs": sorted(tool["hatch"]["build"]["dev-mode-dirs"]),
        "pytest pythonpath": sorted(set(tool["pytest"]["ini_options"]["pythonpath"]) - {"."}),
        "mypy mypy_path": sorted(mypy_path),
        "pyright extraPaths": sorted(tool["pyright"]["extraPaths"]),
        "ruff src": sorted(set(tool["ruff"]["src"]) - {"."}),
        "importlinter root_packages": sorted(name.removeprefix("flopledger_") for name in linter),
    }


# --- reading syntax trees ------------------------------------------------------------------------


def _tail(node: ast.AST) -> str:
    """The last name of `a.b.c`, `a.b(...)` or `a[b]`; empty for anything else."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return _tail(inner)
        case _:
            return ""


def _classes(module: Module) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))


def _struct_names(modules: list[Module]) -> frozenset[str]:
    """Names of all classes that derive from msgspec.Struct, however far up."""
    known, grown = {"Struct"}, True
    while grown:
        grown = False
        for module in modules:
            for node in _classes(module):
                if node.name not in known and known & {_tail(base) for base in node.bases}:
                    known.add(node.name)
                    grown = True
    return frozenset(known)


def _dataclass_decorator(node: ast.ClassDef) -> ast.expr | None:
    return next((d for d in node.decorator_list if _tail(d) == "dataclass"), None)


def _is_value_type(node: ast.ClassDef, structs: frozenset[str]) -> bool:
    return _dataclass_decorator(node) is not None or bool(
        structs & {_tail(base) for base in node.bases}
    )


def _true_options(keywords: list[ast.keyword]) -> set[str]:
    return {k.arg for k in keywords if k.arg and getattr(k.value, "value", None) is True}


def _missing_options(node: ast.ClassDef, structs: frozenset[str]) -> list[str]:
    bases = {_tail(base) for base in node.bases}
    decorator = _dataclass_decorator(node)
    if decorator is not None:
        keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
        return [o for o in ("frozen", "slots", "kw_only") if o not in _true_options(keywords)]
    has_fields = any(isinstance(item, ast.AnnAssign) for item in node.body)
    if "Struct" in bases:
        wanted = ["frozen", "kw_only"]
    elif structs & bases and has_fields:
        wanted = ["kw_only"]  # frozen is inherited
    else:
        return []
    return [option for option in wanted if option not in _true_options(node.keywords)]


def _names(annotation: ast.AST) -> set[str]:
    """Every identifier in an annotation, string annotations and `Annotated` included."""
    names: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name | ast.Attribute):
            names.add(_tail(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(re.findall(r"\w+", node.value))
    return names


def _numeric_aliases(modules: list[Module]) -> frozenset[str]:
    """`int` and its kin, and module-level aliases of them (`Count = Annotated[int, ...]`)."""
    numeric = {"int", "float", "Fraction", "Decimal"}
    for module in modules:
        for node in module.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() as value):
                    if _is_number(value, frozenset(numeric)):
                        numeric.add(name)
                case _:
                    pass
    return frozenset(numeric)


def _is_number(annotation: ast.AST, numeric: frozenset[str]) -> bool:
    """Whether an annotation is a number, possibly absent; containers of numbers are not."""
    match annotation:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in numeric
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _is_number(left, numeric) or _is_number(right, numeric)
        case ast.Subscript(value=head, slice=inner) if _tail(head) in {
            "Annotated",
            "Final",
            "Optional",
        }:
            return _is_number(inner.elts[0] if isinstance(inner, ast.Tuple) else inner, numeric)
        case ast.Constant(value=str() as text):
            return _is_number(ast.parse(text, mode="eval").body, numeric)
        case _:
            return False


def _aliases(module: Module) -> dict[str, str]:
    """Local name -> imported dotted name."""
    aliases: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return aliases


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """The full dotted name of `a.b.c` under a module's imports; empty where it is not one."""
    match node:
        case ast.Name(id=name):
            return aliases.get(name, name)
        case ast.Attribute(value=inner, attr=attr):
            head = _dotted(inner, aliases)
            return f"{head}.{attr}" if head else ""
        case _:
            return ""


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of an import's module; relative ones counted from the source root."""
    if not node.level:
        return node.module or ""
    parts = list(module.path.with_suffix("").parts)[1:]
    parent = parts[: len(parts) - node.level]
    return ".".join([*parent, *([node.module] if node.module else [])])


def _glob(path: PurePosixPath, pattern: str) -> bool:
    """Whether a path is a file, or lies in a folder when the pattern ends with a slash."""
    text = str(path)
    return text.startswith(pattern) if pattern.endswith("/") else text == pattern
