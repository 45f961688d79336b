"""Running the command line in this process, as a person or a script would."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from flopledger_collector.cli import main


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """A directory with a configuration."""

    directory: Path

    @property
    def config_file(self) -> Path:
        """The collector's configuration."""
        return self.directory / "collector.toml"

    def run(self, *words: str, status: int = 0) -> Result:
        """One command on this ledger; its exit status is checked."""
        return run(*words, config=self.config_file, status=status)

    def json(self, *words: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.run(*words, "--format", "json").stdout)


def shell(directory: Path, more: str = "") -> Shell:
    """A configuration that keeps everything in one directory."""
    found = Shell(directory=directory)
    found.config_file.write_text(f'{more}\n[state]\ndirectory = "{directory}/state"\n')
    return found


def run(*words: str, config: Path | None = None, status: int = 0) -> Result:
    """One command; errors are one sentence on standard error, and never a traceback."""
    environment = {} if config is None else {"FLOPLEDGER_CONFIG": str(config)}
    result = CliRunner().invoke(main, list(words), env=environment)
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if status == 2 and words:
        assert result.stderr.startswith("flopledger: ")
        assert result.stderr.count("\n") == 1
    return result
