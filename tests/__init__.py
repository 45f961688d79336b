"""The tests: one folder per room, and what crosses rooms (contract, end to end, faults, house)."""
