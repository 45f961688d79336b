"""Dashboards, alert rules and scrape configuration, proved against pages and a real Prometheus."""
