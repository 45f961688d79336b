"""The agent: reads one node's GPU counters, attributes them, and ships signed batches."""
