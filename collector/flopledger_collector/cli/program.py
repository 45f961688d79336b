"""How the program ends: known errors as one sentence, never as a traceback; and its version."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import click

from flopledger_core import __version__
from flopledger_core.errors import FlopLedgerError

EXIT_FINDING: Final = 1
EXIT_MISUSE: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells expect


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
        sys.exit(code if isinstance(code, int) else 0)


def _say(sentence: str) -> None:
    click.echo(f"flopledger: {' '.join(sentence.split())}", err=True)


def finding(context: click.Context) -> None:
    """End with the status that says that something was found."""
    context.exit(EXIT_FINDING)
