"""Policies: which activities an accounting standard counts, as versioned data with citations."""
