"""The process that makes a forecast beside a run, see `library.training.forecast_beside`: a job comes in, JSON goes out."""

import io
import json
import os
import pickle
import struct
import sys
import threading
from typing import BinaryIO

LENGTH = struct.Struct("<Q")
"""Goes before the job."""


def end_with(source: BinaryIO) -> None:
    """End this process when its standard input is closed: the run is over, however it ended."""
    while source.read(1):
        pass
    os._exit(1)


def main() -> None:
    """Read the job, make the forecast, and write it; what libraries print goes nowhere."""
    if hasattr(os, "nice"):
        os.nice(19)
    source, answer = sys.stdin.buffer, sys.stdout
    sys.stdout = io.StringIO()
    (length,) = LENGTH.unpack(source.read(LENGTH.size))
    handed = source.read(length)
    threading.Thread(target=end_with, args=(source,), daemon=True).start()
    job = pickle.loads(handed)
    from library.training.forecast_beside import facts_of

    answer.write(json.dumps(facts_of(job.done())))
    answer.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
