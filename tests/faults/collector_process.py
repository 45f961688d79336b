"""A process that tests kill: a real ledger, real senders, a printed line for each acknowledgement.

`ingest` sends every stream's minutes from the beginning, as agents do that lost their answers, and
folds meanwhile; `post` posts people's entries beside it, as a command does. A line is printed only
after the answer was given, so every line a parent has read stands for a promise.
"""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from typing import Final

from flopledger_collector.ingest import IngestRequest
from tests.collector.opened import opened, opening
from tests.collector.sealing import StreamSealer, hours

STREAMS: Final = 5
MINUTES: Final = 60
GPUS: Final = 2
POSTS: Final = 30


def history(stream: int) -> list[bytes]:
    """One stream's batches: the same bytes in every process."""
    sealer = StreamSealer(stream, node=f"node-{stream}")
    return [sealer.minute(minute, gpus=GPUS) for minute in range(MINUTES)]


def ingest(directory: Path, seed: int) -> None:
    """Send everything, in bundles of random size, from one thread a stream."""
    with opened(directory) as handle:
        handle.folder.start()

        def send(stream: int) -> None:
            chance = random.Random(seed * 1000 + stream)
            batches = history(stream)
            while batches:
                size = chance.randint(1, 4)
                bundle, batches = batches[:size], batches[size:]
                request = IngestRequest(content=b"".join(bundle), peer_is_loopback=True)
                for answer in handle.writer.submit([request])[0]:
                    _say(
                        f"{answer.outcome} {answer.stream_id} {answer.sequence} {answer.batch_hash}"
                    )

        threads = [threading.Thread(target=send, args=(n,)) for n in range(1, STREAMS + 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        if handle.folder.failure is not None:
            raise handle.folder.failure
        handle.folder.fold()


def post(directory: Path, seed: int) -> None:
    """Post entries one by one, as a command line would."""
    with opened(directory) as handle:
        for number in range(POSTS):
            posted = handle.entries.post(
                opening(title=f"title {number}"), hours(f"{seed}:{number}")
            )
            _say(f"posted {posted.stream_id} {posted.sequence} {posted.batch_hash}")
            handle.folder.fold()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")  # one write, so that threads' lines stay whole
    sys.stdout.flush()


if __name__ == "__main__":
    {"ingest": ingest, "post": post}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
