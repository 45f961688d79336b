"""GPUs as the agent sees them: a port, the real driver behind pynvml, and a simulated one."""
