"""The errors of the agent.

FlopLedgerError (core)
└── AgentError
    ├── ConfigError           the configuration file cannot be used
    ├── StateError            the state directory cannot be used
    │   └── SpoolFull         there is no room for one more sealed batch
    └── CollectorUnreachable  no durable answer came from the collector
"""

from __future__ import annotations

from flopledger_core.errors import FlopLedgerError


class AgentError(FlopLedgerError):
    """Something the agent can name went wrong."""


class ConfigError(AgentError):
    """The configuration file cannot be used."""


class StateError(AgentError):
    """The state directory cannot be used."""


class SpoolFull(StateError):
    """There is no room for one more sealed batch."""


class CollectorUnreachable(AgentError):
    """No durable answer came from the collector."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason  # a stable word for the metric's label
        super().__init__(message)
