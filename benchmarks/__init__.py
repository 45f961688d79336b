"""Measurements behind every claim about speed and memory; none of them is a test."""
