"""`flopledger policies` and `flopledger instruments`: what counts, what binds, with sources."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from flopledger_collector.cli.ledgers import config_option, rules_of
from flopledger_collector.cli.output import format_option, print_json, print_line, print_table
from flopledger_collector.config import load_config
from flopledger_collector.policies.rulefiles import READ_STATUSES, Source
from flopledger_collector.reports import figures, json_form
from flopledger_collector.status import Rules, load_rules
from flopledger_core.units import scientific


@click.group()
def policies() -> None:
    """What counts: the counting policies."""


@policies.command("list")
@format_option("table", "json")
@config_option
def list_policies(form: str, config_file: Path | None) -> None:
    """List the policies this version knows.

    Example: flopledger policies list
    """
    rules = _rules(config_file)
    if form == "json":
        print_json({"policies": [_document(one) for one in rules.policies.values()]})
        return
    print_table(
        ("Policy", "Adopted", "Title", "Status"),
        (
            (one.id, "yes" if one.id in rules.adopted else "no", one.title, one.status)
            for one in rules.policies.values()
        ),
    )


@policies.command("show")
@click.argument("policy_id", metavar="POLICY")
@format_option("table", "json")
@config_option
def show_policy(policy_id: str, form: str, config_file: Path | None) -> None:
    """Show what POLICY makes of every activity, and where that stands.

    Example: flopledger policies show ec-cumulative
    """
    found = _rules(config_file).policy(policy_id)
    if form == "json":
        print_json(_document(found))
        return
    rows = [
        (
            activity,
            rule.verdict + (" *" if rule.inferred else ""),
            f"{found.rules[rule.rule].text} ({found.rules[rule.rule].citation})",
        )
        for activity, rule in found.activities.items()
    ]
    print_table(("Activity", "Verdict", "Rule"), rows, title=f"{found.title} ({found.version})")
    print_line("* the text does not name this work; the verdict is our reading")
    _print_source(found.source)


@click.group()
def instruments() -> None:
    """What binds: the legal thresholds."""


@instruments.command("list")
@format_option("table", "json")
@config_option
def list_instruments(form: str, config_file: Path | None) -> None:
    """List the instruments this version knows.

    Example: flopledger instruments list
    """
    rules = _rules(config_file)
    if form == "json":
        print_json({"instruments": [_document(one) for one in rules.instruments.values()]})
        return
    print_table(
        ("Instrument", "Where", "Threshold", "Scope", "Status"),
        (
            (
                one.id,
                one.jurisdiction,
                f"{one.comparator} {scientific(one.threshold)} {figures.unit(one.quantity)}",
                one.scope_policy,
                f"{one.status} from {one.valid_from.isoformat()}",
            )
            for one in rules.instruments.values()
        ),
    )


@instruments.command("show")
@click.argument("instrument_id", metavar="INSTRUMENT")
@format_option("table", "json")
@config_option
def show_instrument(instrument_id: str, form: str, config_file: Path | None) -> None:
    """Show INSTRUMENT: its threshold, the facts it asks for, what it triggers, its source.

    Example: flopledger instruments show eu-aia-51-2
    """
    found = _rules(config_file).instrument(instrument_id)
    if form == "json":
        print_json(_document(found))
        return
    rows = [
        ("Threshold", f"{found.comparator} {scientific(found.threshold)} {found.quantity}"),
        ("Subject", f"{found.subject}, {found.window}"),
        ("Scope", f"policy {found.scope_policy}"),
        ("Status", f"{found.status} from {found.valid_from.isoformat()}"),
        *(("Asks", question) for question in found.facts().values()),
        *(
            ("Triggers", f"{one.event}: {one.duty}, {one.deadline} ({one.citation})")
            for one in found.triggers
        ),
        *(() if found.note is None else (("Note", found.note),)),
    ]
    print_table(("Field", "Value"), rows, title=f"{found.title} ({found.version})")
    _print_source(found.source)


def _rules(config_file: Path | None) -> Rules:
    """The rules of a configuration; without one the packaged ones and the default adoption."""
    return load_rules() if config_file is None else rules_of(load_config(config_file))


def _document(rule: msgspec.Struct) -> json_form.Document:
    """A rule file as it was read; thresholds as decimal strings."""
    document: json_form.Document = msgspec.to_builtins(msgspec.structs.asdict(rule))
    del document["file"]
    if "threshold" in document:
        document["threshold"] = str(document["threshold"])
    return document


def _print_source(source: Source) -> None:
    print_line(f"Source: {source.citation}")
    print_line(f"  {source.url}")
    print_line(f"  {READ_STATUSES[source.read_status]}, as of {source.as_of.isoformat()}")
