"""Statements and how figures are written."""
