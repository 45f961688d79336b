"""The agent's command line: run it, ask what it can see, tag a job, pause, look into the spool.

Reading commands take `--format table|json`. Exit status: 0 success, 1 a finding, 2 misuse or
something that cannot be done; errors are one sentence on standard error.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from flopledger_agent.config import AgentConfig, load_config, parse_config
from flopledger_agent.errors import ConfigError
from flopledger_core import __version__
from flopledger_core.errors import FlopLedgerError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from flopledger_agent.attribution.tag_values import Tags

CONFIG_VARIABLE: Final = "FLOPLEDGER_AGENT_CONFIG"
FORMATS: Final = click.Choice(["table", "json"])


class _Program(click.Group):
    """A group whose known errors become one sentence and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's own signature)
        """Run the command; a FlopLedgerError needs no traceback."""
        try:
            return super().invoke(ctx)
        except FlopLedgerError as error:
            click.echo(f"flopledger-agent: {error}", err=True)
            ctx.exit(2)


def _config_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--config",
        type=click.Path(path_type=Path),  # whether it can be read is ours to say: `tag` goes on
        envvar=CONFIG_VARIABLE,
        show_envvar=True,
        help="The agent's TOML file. Without it every default applies.",
    )(function)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flopledger-agent")
def main() -> None:
    """Meter the FLOP and energy of this node's GPUs, job by job.

    \b
    Start here:
      flopledger-agent check                        what can I see on this node?
      flopledger-agent run --config agent.toml      meter and ship
      flopledger-agent tag --project atlas -- python train.py
    """  # noqa: D301 (click takes the escape itself as a mark)


@main.command()
@_config_option
@click.option("--check-config", is_flag=True, help="Only check the configuration, then exit.")
def run(config: Path | None, *, check_config: bool) -> None:
    """Run the daemon until SIGTERM or Ctrl-C.

    Every open measurement window is sealed before it ends; exits 1 when that was not possible and
    they wait for the next start. Example:

    \b
      flopledger-agent run --config /etc/flopledger/agent.toml
    """  # noqa: D301 (click takes the escape itself as a mark)
    stop = _stop_on_signals()  # first: a signal while the driver loads is a clean end, too
    settings = _settings(config)
    if check_config:
        click.echo("the configuration is good")
        return
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    from flopledger_agent import daemon  # noqa: PLC0415 (the driver is needed only here)

    sys.exit(daemon.run(settings, lambda text: click.echo(text, err=True), stop))


@main.command()
@_config_option
@click.option("--format", "form", type=FORMATS, default="table", show_default=True)
def check(config: Path | None, form: str) -> None:
    """Say what this node's agent can see: GPUs, counters and tier, owners, collector.

    For everything that is not visible it names the remedy. Exits 1 when something is missing
    without which nothing can be metered.
    """
    from flopledger_agent import inspection  # noqa: PLC0415 (loads the driver)

    report = inspection.inspect(_settings(config))
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
    else:
        for line in inspection.as_lines(report):
            click.echo(line)
    sys.exit(0 if report.can_meter else 1)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_config_option
@click.option("--project", required=True, help="The project that is accounted.")
@click.option("--model", help="The model that is being developed.")
@click.option("--run", "run_id", help="The run, where a project has several.")
@click.option("--activity", help="What kind of work: pretrain, sft, eval_capability, ...")
@click.option("--precision", help="The precision of the matrix products: bf16, fp16, tf32, fp8 ...")
@click.option("--socket", type=click.Path(path_type=Path), help="The agent's tag socket.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def tag(
    config: Path | None,
    *,
    project: str,
    model: str | None,
    run_id: str | None,
    activity: str | None,
    precision: str | None,
    socket: Path | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND as work of a project; its exit status is COMMAND's.

    Needs no privilege: the command registers itself with the agent on this node through a local
    socket, and carries the same tags in its environment. Tags that are in the environment already
    stay unless an option says otherwise. If no agent answers, or the configuration cannot be read,
    COMMAND runs all the same. Example:

    \b
      flopledger-agent tag --project atlas --activity pretrain --precision bf16 -- python train.py
    """  # noqa: D301 (click takes the escape itself as a mark)
    from flopledger_agent.attribution.tag_client import (  # noqa: PLC0415 (starts fast without it)
        CommandNotStarted,
        run_tagged,
    )
    from flopledger_agent.attribution.tag_values import VARIABLES  # noqa: PLC0415

    given = {
        "project": project,
        "model": model,
        "run": run_id,
        "activity": activity,
        "precision": precision,
    }
    tags = _merged_tags({field: value for field, value in given.items() if value is not None})
    ours = frozenset(VARIABLES.values())
    try:
        run_tagged(
            socket or _tag_socket(config),
            tags,
            command,
            environ={name: value for name, value in os.environ.items() if name not in ours},
            warn=_warn,
        )
    except CommandNotStarted as error:
        click.echo(f"flopledger-agent: {error}", err=True)
        sys.exit(error.status)


@main.command()
@_config_option
@click.option("--socket", type=click.Path(path_type=Path), help="The agent's local socket.")
@click.argument("duration")
def pause(config: Path | None, *, socket: Path | None, duration: str) -> None:
    """Stop metering for DURATION (30s, 10m, 2h; at most 8h), so that a profiler has the counters.

    Only root and the agent's own user may. The time becomes gaps with the reason `paused` in the
    ledger, bounded by what the GPUs could have done. A pause survives a restart of the agent;
    another one replaces it. Exits 1 when the agent has not let go of the driver yet. Example:

    \b
      flopledger-agent pause 10m
    """  # noqa: D301 (click takes the escape itself as a mark)
    from flopledger_agent import control  # noqa: PLC0415
    from flopledger_agent.pauses import parse_duration  # noqa: PLC0415

    request = control.ControlRequest(command="pause", duration_ms=parse_duration(duration))
    answer = control.tell(socket or _tag_socket(config), request)
    click.echo(control.sentence(answer))
    if not answer.in_effect:
        _warn("the agent has not let go of the driver yet; look with flopledger-agent check")
        sys.exit(1)


@main.command()
@_config_option
@click.option("--socket", type=click.Path(path_type=Path), help="The agent's local socket.")
def resume(config: Path | None, *, socket: Path | None) -> None:
    """End a pause before its time; metering begins again at the next tick.

    Only root and the agent's own user may.
    """
    from flopledger_agent import control  # noqa: PLC0415

    request = control.ControlRequest(command="resume")
    click.echo(control.sentence(control.tell(socket or _tag_socket(config), request)))


@main.command()
@_config_option
@click.option("--format", "form", type=FORMATS, default="table", show_default=True)
def spool(config: Path | None, form: str) -> None:
    """Show what waits for the collector: batches by stream, bytes, age, quarantined files.

    Exits 1 when files were quarantined. Works beside a running agent.
    """
    from flopledger_agent import inspection  # noqa: PLC0415

    report = inspection.inspect_spool(_settings(config))
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
    else:
        for line in inspection.spool_lines(report):
            click.echo(line)
    sys.exit(1 if report.quarantined else 0)


def _merged_tags(given: dict[str, str]) -> Tags:
    """The tags of the options and, where an option is absent, of the environment.

    What is wrong in an option is the caller's mistake; what is wrong in an inherited variable is
    not, so it is left out with a warning. The same tags go to the agent and to the environment.
    """
    from flopledger_agent.attribution.tag_values import (  # noqa: PLC0415
        VARIABLES,
        Tags,
        require_tags,
    )

    tags = require_tags(Tags(**given))
    for field, variable in VARIABLES.items():
        value = os.environ.get(variable)
        if field in given or not value:
            continue
        merged = msgspec.structs.replace(tags, **{field: value})
        try:
            tags = require_tags(merged)
        except InvalidInput as error:
            _warn(f"{variable} of the environment is left out: {error}")
    return tags


def _tag_socket(config: Path | None) -> Path:
    """Where the agent listens; a job does not fail because of the agent's configuration."""
    try:
        return Path(_settings(config).tags.socket)
    except ConfigError as error:
        _warn(f"{error}; using the default socket")
        return Path(AgentConfig().tags.socket)


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set, from now on."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def _warn(text: str) -> None:
    click.echo(f"flopledger-agent: {text}", err=True)


def _settings(config: Path | None) -> AgentConfig:
    if config is not None:
        return load_config(config)
    return parse_config("", "the defaults")
