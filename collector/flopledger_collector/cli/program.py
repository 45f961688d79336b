"""How the program ends: known errors as one sentence, never as a traceback; and its version."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import click

from flopledger_core import __version__
from flopledger_core.errors import FlopLedgerError, InvalidInput, shown
from flopledger_core.units import MS_PER_SECOND

EXIT_FINDING: Final = 1
EXIT_MISUSE: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells expect
TRACEBACK_VARIABLE: Final = "FLOPLEDGER_TRACEBACK"
COMPLAINT_MAX: Final = 200  # characters of an unexpected error that help a person

# Field of a record or of a function -> what a person typed for it.
OPTIONS: Final[dict[str, str]] = {
    "accelerator": "--accelerator", "author": "--author", "cluster": "--cluster",
    "currency": "--currency", "end_unix_ms": "--to", "entity": "--entity",
    "evidence": "--evidence", "flop": "--flop-bounds", "gpu_hours": "--gpu-hours",
    "limit": "the limit", "method": "--method", "model": "--model", "name": "--name",
    "parameters": "--parameters", "passes": "--passes", "policy": "--policy",
    "precision": "--precision", "run": "--run", "start_unix_ms": "--from", "time_zone":
    "--time-zone", "title": "--title", "tokens": "--tokens", "utilization": "--utilization",
    "peak_flop_per_second": "--peak-flop-per-second", "utilization_source": "--utilization-source",
}  # fmt: skip
DAYS: Final = frozenset({"start_unix_ms", "end_unix_ms"})
_RECORD_FIELD: Final = re.compile(r"^(?P<complaint>.*) - at `\$\.(?P<field>[a-z_]+)`$")
_LENGTH: Final = re.compile(r"^Expected `str` of length (?P<sign>[<>]=) (?P<length>\d+)$")


class Program(click.Group):
    """The whole program: a group whose errors are sentences."""

    def __init__(self, *args: Any, **attributes: Any) -> None:  # noqa: ANN401 (click's own)
        super().__init__(*args, **attributes)
        click.version_option(__version__, package_name="flopledger", prog_name="flopledger")(self)

    def main(  # type: ignore[override]  # one signature for both of click's overloads
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,  # noqa: ANN401 (click's own)
    ) -> NoReturn:
        """Run, and exit with the contract's status."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name or "flopledger", **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            code = EXIT_MISUSE
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx is not None else "flopledger"
            _say(f"{error.format_message().rstrip('.')}; see `{path} --help`")
            code = EXIT_MISUSE
        except click.ClickException as error:
            _say(error.format_message())
            code = EXIT_MISUSE
        except InvalidInput as error:
            _say(as_typed(error))
            code = EXIT_MISUSE
        except FlopLedgerError as error:
            _say(str(error))
            code = EXIT_MISUSE
        except BrokenPipeError:
            sys.stderr.close()  # whoever read our output has gone; nothing is left to say
            code = 0
        except OSError as error:
            _say(f"{error.filename or 'file'}: {error.strerror or error}; check it and try again")
            code = EXIT_MISUSE
        except (click.Abort, KeyboardInterrupt):
            code = EXIT_INTERRUPTED
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            _say(
                f"failed unexpectedly ({type(error).__name__}: {str(error)[:COMPLAINT_MAX]}); "
                f"this is a bug: report it with what ${TRACEBACK_VARIABLE}=1 shows"
            )
            code = EXIT_MISUSE
        sys.exit(code if isinstance(code, int) else 0)


def as_typed(error: InvalidInput) -> str:
    """The error's sentence with the option that a person typed, where there is one."""
    found = _RECORD_FIELD.match(str(error.value))
    if found is not None and found["field"] in OPTIONS:
        option = OPTIONS[found["field"]]
        length = _LENGTH.match(found["complaint"])
        if length is None:
            return f"{option} is not acceptable: {found['complaint']}; correct it"
        if length["sign"] == ">=":
            return f"{option} is empty: give a text, or leave the option out"
        return f"{option} is too long: give at most {length['length']} characters"
    if error.field not in OPTIONS:
        return str(error)
    if error.value is None:
        return f"{OPTIONS[error.field]} is missing: {error.remedy}"
    value = shown(error.value)
    if error.field in DAYS and isinstance(error.value, int):
        value = datetime.fromtimestamp(error.value // MS_PER_SECOND, tz=UTC).date().isoformat()
    return f"{OPTIONS[error.field]} is {value}: {error.remedy}"


def _say(sentence: str) -> None:
    click.echo(f"flopledger: {' '.join(sentence.split())}", err=True)


def finding(context: click.Context) -> None:
    """End with the status that says that something was found."""
    context.exit(EXIT_FINDING)
