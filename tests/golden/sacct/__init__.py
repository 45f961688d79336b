"""Real sacct text."""
