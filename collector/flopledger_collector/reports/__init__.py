"""Statements: what is on one, and its renderings. Nothing here reads the ledger but by its port."""
