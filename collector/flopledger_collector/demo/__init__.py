"""The demo: a simulated cluster driven by recorded data, metered by real agents, live.

Nothing here is part of a production ledger: every batch of a demo is signed as simulated, and
every input says whether it was recorded or invented.
"""
