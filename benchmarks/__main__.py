"""`make bench`: run the benchmarks and print one table each. Name some to run only those."""

from __future__ import annotations

import importlib
import sys
from typing import Final

BENCHMARKS: Final = ("overhead", "ingest")


def main() -> int:
    """Run the named benchmarks, or all; 2 for a name that is none."""
    wanted = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        print(f"benchmarks: {unknown[0]} is none of: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in wanted:
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
