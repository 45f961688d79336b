"""`python -m flopledger_agent` is `flopledger-agent`."""

from flopledger_agent.cli import main

if __name__ == "__main__":
    main()
