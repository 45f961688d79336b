"""Dashboards: what operations staff import into Grafana and Prometheus.

Topic modules describe panels, build.py writes the committed JSON. This folder is build-time only:
it is not in the wheel, and no daemon imports it. Metric names come from the daemons' pages and
nowhere else; tests/dashboards proves that each one exists.
"""
