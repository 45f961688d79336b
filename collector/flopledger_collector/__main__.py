"""`python -m flopledger_collector`: the same program as `flopledger`."""

from flopledger_collector.cli import main

if __name__ == "__main__":
    main()
