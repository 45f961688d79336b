"""Statuses, the Prometheus page, the pages and the HTTP API."""
