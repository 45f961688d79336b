"""Tests of the collector's ledger."""
