"""How the demo's extracts were cut."""
