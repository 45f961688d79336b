"""Readers of what others recorded: pure parsers that turn foreign text into values.

An importer never posts anything. What it cannot read it names, with the line and the reason; what
it reads it neither rounds nor completes.
"""
