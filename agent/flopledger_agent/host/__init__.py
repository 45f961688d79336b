"""The node around the GPUs: its boot, its clock discipline."""
