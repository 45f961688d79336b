"""`flopledger`: the collector's command line. A contract: scripts and auditors depend on it.

Exit status 0 is success, 1 a finding, 2 misuse or a failure. Errors are one sentence on standard
error that names the thing and the remedy; a traceback is a bug. Commands only translate: what is
true is decided in the modules they call.
"""

from __future__ import annotations

from flopledger_collector.cli.budgets import budget
from flopledger_collector.cli.declarations import declare
from flopledger_collector.cli.demonstration import demo
from flopledger_collector.cli.estimates import estimate
from flopledger_collector.cli.imports import imports
from flopledger_collector.cli.program import Program
from flopledger_collector.cli.projects import job, project
from flopledger_collector.cli.rulebook import instruments, policies
from flopledger_collector.cli.server import migrate, rebuild, serve
from flopledger_collector.cli.statements import statement
from flopledger_collector.cli.statuses import status

__all__ = ["main"]

main = Program(
    name="flopledger",
    help="Meter, prove and forecast the compute, energy and cost of AI development.\n\n"
    "Commands that read or write a ledger find it by --config, $FLOPLEDGER_CONFIG or --database.",
    commands=[
        serve, migrate, status, project, declare, budget, job, imports, estimate, statement,
        policies, instruments, rebuild, demo,
    ],
)  # fmt: skip
