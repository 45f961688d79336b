"""Tests of what an operator installs."""
