"""The commands: a contract that scripts and auditors depend on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from flopledger_collector.cli import main
from flopledger_collector.config import parse_config
from flopledger_collector.handle import open_ledger
from tests.collector.cli.commands import Shell, run, shell
from tests.collector.ledgers import rich_ledger

DECLARED = (
    "declare", "usage", "atlas", "--activity", "pretrain", "--from", "2025-01-01",
    "--to", "2025-07-01", "--method", "opening balance",
)  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Shell:
    """A ledger that a person has just begun."""
    found = shell(tmp_path)
    found.run("migrate")
    return found


def every_command(
    path: str = "flopledger", group: click.Command = main
) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by what one types."""
    if isinstance(group, click.Group):
        for name, inner in group.commands.items():
            yield from every_command(f"{path} {name}", inner)
    else:
        yield path, group


def test_every_command_teaches_by_an_example() -> None:
    """`--help` of each command shows one that works."""
    for path, command in every_command():
        assert f"Example: {path}" in (command.help or ""), path


def test_a_project_is_opened_budgeted_and_declared(ledger: Shell) -> None:
    """The way of a person from an empty ledger to a statement."""
    ledger.run("project", "create", "atlas", "--title", "Atlas 2", "--entity", "lab")
    ledger.run("budget", "set", "atlas", "--flop", "1e20")
    ledger.run(*DECLARED, "--flop-bounds", "9e24", "9.5e24", "9.9e24", "--evidence", "book 3")
    status = ledger.json("status", "atlas")
    assert status["flop"] == {"low": "9" + "0" * 24, "central": "95" + "0" * 23,
                              "high": "99" + "0" * 23}  # fmt: skip
    assert status["budgets"][0]["verdict"] == "exceeds"
    assert status["exceeded"] == ["compute"]
    shown = ledger.json("project", "show", "atlas")
    assert shown["project"]["title"] == "Atlas 2"
    assert shown["declarations"][0]["evidence"] == "book 3"
    assert ledger.run("statement", "atlas").stdout.startswith("# Statement: atlas\n")
    assert ledger.json("statement", "atlas")["items"][0]["tier"] == "declared"


def test_a_project_is_opened_once(ledger: Shell) -> None:
    """Saying the same again posts nothing; a new title is a new entry."""
    ledger.run("project", "create", "atlas", "--title", "one")
    ledger.run("project", "create", "atlas", "--title", "one")
    assert ledger.json("status")["position"]["entries"] == 1
    ledger.run("project", "create", "atlas", "--title", "two")
    assert ledger.json("project", "list")["projects"][0]["title"] == "two"


def test_check_finds_what_is_exceeded(ledger: Shell) -> None:
    """Exit status 1 is a finding, and only with --check."""
    ledger.run("project", "create", "atlas")
    ledger.run("status", "--check")
    ledger.run(*DECLARED, "--flop", "2e25")
    ledger.run("status")
    ledger.run("status", "--check", status=1)
    ledger.run("status", "atlas", "--check", "--format", "json", status=1)


def test_each_budget_quantity_has_its_option(ledger: Shell) -> None:
    """FLOP, energy, GPU-hours and cost; a later one of the same name replaces."""
    ledger.run("budget", "set", "atlas", "--flop", "1e20")
    ledger.run("budget", "set", "atlas", "--energy", "12.5")
    ledger.run("budget", "set", "atlas", "--gpu-hours", "100")
    ledger.run("budget", "set", "atlas", "--cost", "5000", "--currency", "EUR")
    ledger.run("budget", "set", "atlas", "--flop", "2e20")
    found = {one["quantity"]: one["limit"] for one in ledger.json("budget", "list")["budgets"]}
    assert found == {
        "flop": "2" + "0" * 20, "energy_mj": "45000000000", "gpu_time_ms": "360000000",
        "cost_cents": "500000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("project", "create", "a b"), "project is 'a b'"),
        (("project", "create", "idle"), "account of the ledger"),
        (("budget", "set", "atlas"), "--flop, --energy, --gpu-hours or --cost"),
        (("budget", "set", "atlas", "--flop", "1", "--energy", "1"), "one quantity"),
        (("budget", "set", "atlas", "--cost", "1"), "--currency"),
        (("budget", "set", "atlas", "--flop", "nan"), "'nan' is not a plain decimal"),
        (("budget", "set", "atlas", "--flop", "1.5"), "not a whole number of FLOP"),
        ((*DECLARED,), "nothing is declared"),
        ((*DECLARED, "--flop", "1", "--flop-bounds", "1", "2", "3"), "not both"),
        ((*DECLARED, "--flop-bounds", "3", "2", "1"), "LOW CENTRAL HIGH"),
        ((*DECLARED, "--cost", "1"), "currency"),
        ((*DECLARED, "--flop", "1", "--currency", "USD"), "--cost and --currency go together"),
        ((*DECLARED, "--flop", "1e30"), "too large: give at most 1e29 FLOP"),
        ((*DECLARED, "--flop", "1", "--method", ""), "--method is empty"),
        ((*DECLARED, "--flop", "1", "--evidence", "x" * 1025), "--evidence is too long"),
        ((*DECLARED, "--flop", "1", "--to", "2024-01-01"), "--to is 2024-01-01"),
        (("statement", "atlas", "--policy", "nope"), "--policy is 'nope'"),
        ((*DECLARED, "--flop", "1", "--activity", "fun"), "--activity is 'fun'"),
        ((*DECLARED, "--model-flop", "--gpu-hours", "1"), "--model-flop"),
        (("status", "nope"), "flopledger project create"),
        (("statement", "nope"), "flopledger project create"),
        (("job", "list", "nope"), "flopledger project create"),
        (("policies", "show", "nope"), "ec-cumulative"),
        (("instruments", "show", "nope"), "eu-aia-51-2"),
        (("estimate", "hardware", "--accelerator", "X", "--gpu-hours", "1", "--precision", "bf16",
          "--utilization", "1"), "H100 SXM"),
        (("import", "sacct", "nowhere.psv"), "nowhere.psv"),
        (("status", "--config", "nowhere.toml"), "nowhere.toml"),
        (("status", "--database", "nowhere.sqlite3"), "no ledger is there"),
        (("status", "--database", "postgresql://x"), "sqlite:///"),
        (("serve", "--listen", "nonsense"), "web.listen_address"),
        (("nope",), "No such command 'nope'"),
        (("status", "--nope"), "--nope"),
    ],
)  # fmt: skip
def test_misuse_is_one_sentence_with_a_remedy(
    ledger: Shell, words: tuple[str, ...], names: str
) -> None:
    """Status 2, nothing on standard output, and the thing is named."""
    ledger.run("project", "create", "atlas")
    result = ledger.run(*words, status=2)
    assert names in result.stderr
    assert result.stdout == ""


def test_a_ledger_must_be_named() -> None:
    """Without a configuration, commands say how to give one; they never make one up."""
    for words in (("status",), ("project", "create", "atlas"), ("serve",)):
        assert "--config" in run(*words, status=2).stderr


def test_reading_never_begins_a_ledger(tmp_path: Path) -> None:
    """A mistyped state directory is an error and stays absent."""
    found = shell(tmp_path)
    assert "flopledger migrate" in found.run("status", status=2).stderr
    assert not (tmp_path / "state").exists()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    """Another file than a ledger is named, without a traceback."""
    (tmp_path / "other.sqlite3").write_bytes(b"no database at all" * 100)
    result = run("status", "--database", str(tmp_path / "other.sqlite3"), status=2)
    assert "holds no ledger" in result.stderr
    (tmp_path / "blank.sqlite3").touch()
    result = run("status", "--database", str(tmp_path / "blank.sqlite3"), status=2)
    assert "holds no ledger" in result.stderr


def test_reading_changes_no_key(tmp_path: Path) -> None:
    """Looking at a ledger with another configuration revokes nobody's key."""
    key = "A" * 43 + "="
    with open_ledger(
        parse_config(
            f'[state]\ndirectory = "{tmp_path}"\n[trust]\nkeys = [{{ public_key = "{key}" }}]\n'
        )
    ) as handle:
        run("status", "--database", str(tmp_path / "ledger.sqlite3"))
        with handle.database.writing() as writing:
            states = {entry.public_key: entry.state for entry in writing.journal.all_keys()}
    assert states[key] == "trusted"


def test_tables_fit_eighty_columns_and_carry_no_control_characters(tmp_path: Path) -> None:
    """A rich ledger, hostile titles included, prints as plain text."""
    found = shell(tmp_path)
    rich_ledger(tmp_path / "state").close()
    for words in (
        ("status",), ("status", "atlas"), ("project", "list"), ("project", "show", "birch"),
        ("job", "list", "atlas"), ("budget", "list"), ("policies", "list"),
        ("policies", "show", "casper-2025"), ("instruments", "list"),
    ):  # fmt: skip
        output = found.run(*words).stdout
        tables = [line for line in output.splitlines() if line.startswith(" ")]
        assert max(map(len, tables)) <= 80, words
        assert "\x1b" not in output
        assert "\u202e" not in output
    shown = "".join(found.run("project", "show", "birch").stdout.split())
    assert "<script>alert(1)</script>" in shown  # whole, as text


def test_jobs_are_listed_apart(tmp_path: Path) -> None:
    """What each job used, with its bounds."""
    found = shell(tmp_path)
    rich_ledger(tmp_path / "state").close()
    jobs = found.json("job", "list", "atlas")["jobs"]
    assert {one["job"] for one in jobs} == {None, "7", "8", "job-1"}
    (node,) = [one for one in jobs if one["job"] == "8"]
    assert (node["tier"], node["flop"], node["gpu_time_ms"]) == ("host", None, None)
    assert node["absent"]["flop"] == "cpu_flop_not_counted"
    assert node["cpu_time_ms"]["central"] == "120000"


def test_a_rebuild_changes_nothing(tmp_path: Path) -> None:
    """Every projection folded again from the journal gives the same statement."""
    found = shell(tmp_path)
    rich_ledger(tmp_path / "state").close()
    before = found.json("statement", "atlas")["items"]
    assert "folded 15 journal entries" in found.run("rebuild").stdout
    assert found.json("statement", "atlas")["items"] == before


def test_a_statement_can_go_to_a_file(tmp_path: Path) -> None:
    """--output writes exactly what would be printed."""
    found = shell(tmp_path)
    rich_ledger(tmp_path / "state").close()
    assert found.run("statement", "birch", "--output", str(tmp_path / "s.md")).stdout == ""
    printed = found.run("statement", "birch").stdout.splitlines()
    written = (tmp_path / "s.md").read_text().splitlines()
    assert [one for one in printed if "Generated" not in one] == [
        one for one in written if "Generated" not in one
    ]


def test_rules_are_shown_with_their_sources() -> None:
    """What counts and what binds can be read without a ledger."""
    assert "verdict is our reading" in run("policies", "show", "ec-cumulative").stdout
    assert "Source:" in run("instruments", "show", "us-ca-sb53").stdout
    assert '"threshold": "1' in run("instruments", "show", "us-ca-sb53", "--format", "json").stdout
    assert '"casper-2025"' in run("policies", "list", "--format", "json").stdout


def test_the_hardware_estimate_is_the_commissions_example() -> None:
    """370,000 H100-hours at half of the peak: example H of the guidelines."""
    document = Shell(directory=Path()).json(
        "estimate", "hardware", "--accelerator", "H100 SXM", "--gpu-hours", "370000",
        "--precision", "bf16", "--utilization", "0.5",
    )  # fmt: skip
    assert set(document["flop"]) == {"low", "central", "high"}
    assert 6.5e23 < int(document["flop"]["central"]) < 6.7e23
    table = run("estimate", "architecture", "--parameters", "405e9", "--tokens", "15.6e12")
    assert "3.79e25" in table.stdout


def test_the_version_is_told() -> None:
    """`--version` names program and version."""
    assert run("--version").stdout.startswith("flopledger, version 0.")


def test_an_unexpected_failure_is_a_sentence(
    ledger: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug shows one line and no traceback, and says how to see more."""

    def fail(*_arguments: object) -> None:
        raise OverflowError("too large")

    monkeypatch.setattr("flopledger_collector.cli.statuses.evaluate_ledger", fail)
    assert "OverflowError: too large" in ledger.run("status", status=2).stderr


def test_adopted_and_own_rules_are_the_configurations(tmp_path: Path) -> None:
    """`policies list --config` shows what this ledger adopts; a directory must exist."""
    found = shell(tmp_path, '[policies]\nadopted = ["ec-training"]')
    rows = found.run("policies", "list").stdout.splitlines()
    assert [row.split()[1] for row in rows if " ec-training " in f" {row} "] == ["yes"]
    assert [row.split()[1] for row in rows if " casper-2025 " in f" {row} "] == ["no"]
    for table in ("policies", "instruments"):
        wrong = shell(tmp_path, f'[{table}]\ndirectory = "{tmp_path}/none"')
        assert "name an existing directory" in wrong.run(table, "list", status=2).stderr


def test_work_that_crosses_the_period_is_named(ledger: Shell) -> None:
    """A declaration that begins before the period is listed, not silently left out."""
    ledger.run("project", "create", "atlas")
    ledger.run(*DECLARED, "--flop", "1")
    printed = ledger.run("statement", "atlas", "--from", "2025-03-01").stdout
    assert "begins before the period; counted on its first day" in printed
    printed = ledger.run("statement", "atlas", "--to", "2025-03-01").stdout
    assert "ends after the period; counted whole on its first day" in printed


def test_an_import_without_accelerator_warns(ledger: Shell, tmp_path: Path) -> None:
    """FLOP of such hours is open, which a person should hear before posting."""
    file = tmp_path / "jobs.txt"
    file.write_text(
        "JobID|Account|State|Submit|Start|End|ElapsedRaw|AllocTRES\n"
        "1|atlas|COMPLETED|2026-01-01T00:00:00|2026-01-01T00:00:00|2026-01-01T01:00:00|3600|"
        "gres/gpu=8\n"
    )
    printed = ledger.run("import", "sacct", str(file), "--format", "json")
    assert "no --accelerator is given: the FLOP of these hours stays open" in printed.stderr
    assert '"differing": []' in printed.stdout
