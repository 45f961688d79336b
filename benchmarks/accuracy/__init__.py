"""How far metered FLOP and energy lie from the truth: on the simulated driver everywhere, and on a
real GPU where there is one.
"""
