"""Whole paths: driver, agent, wire, collector, pages."""
