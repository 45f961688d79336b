"""Tests of the demo's inputs."""
