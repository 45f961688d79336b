"""What both daemons must agree on: value types, the wire, the hardware table, FLOP and energy.

Nothing here does I/O, reads a clock or logs. The agent and the collector compute the same
numbers because they call the same functions.
"""

__version__ = "0.1.0"
