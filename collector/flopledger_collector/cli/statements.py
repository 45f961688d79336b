"""`flopledger statement`: an itemised statement that an auditor can add up again."""

from __future__ import annotations

from pathlib import Path

import click

from flopledger_collector.cli.amounts import DAY
from flopledger_collector.cli.ledgers import Source, reading, reads_ledger
from flopledger_collector.cli.output import format_option
from flopledger_collector.reports import json_form
from flopledger_collector.reports.markdown import statement_markdown
from flopledger_collector.reports.statement import Period, build_statement


@click.command()
@click.argument("project_id", metavar="PROJECT")
@click.option(
    "--policy", "policies", multiple=True, metavar="ID", help="Under this policy; again for more."
)
@click.option("--from", "start", type=DAY, help="First UTC day of the period.")
@click.option("--to", "end", type=DAY, help="First UTC day after the period.")
@format_option("markdown", "json")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to this file instead of standard output.",
)
@reads_ledger
def statement(
    *,
    project_id: str,
    policies: tuple[str, ...],
    start: int | None,
    end: int | None,
    form: str,
    output: Path | None,
    source: Source,
) -> None:
    """Print the statement of PROJECT.

    Example: flopledger statement atlas --policy ec-cumulative --format json
    """
    with reading(source) as opened:
        found = build_statement(
            opened.ledger,
            opened.rules,
            project_id,
            generated_unix_ms=opened.now_unix_ms(),
            policies=policies,
            period=Period(start_unix_ms=start, end_unix_ms=end),
            provenance=opened.provenance,
        )
    if form == "json":
        content = json_form.encode(json_form.statement_document(found))
    else:
        content = statement_markdown(found).encode()
    if output is None:
        click.echo(content, nl=False)
    else:
        output.write_bytes(content)
