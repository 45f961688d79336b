"""Recorded inputs and the outputs they must give."""
