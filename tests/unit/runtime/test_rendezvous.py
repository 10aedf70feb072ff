"""Values exchanged before the process group, where rank 0 holds the store because no launcher does."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_camopd.runtime.startup import single_process_environment

ROOT = Path(__file__).parents[3]
EXCHANGE = """
import os, sys, time
from megatron_camopd.runtime import rendezvous
rank = rendezvous.process_number()
if rank:  # this process reads the values late
    wait_for = rendezvous._wait_for
    rendezvous._wait_for = lambda store, number: (time.sleep(0.5), wait_for(store, number))[1]
for number in range(2):
    values = rendezvous.exchange("x", [rank, number])
    assert values == [[0, number], [1, number]], values
os._exit(0)
"""


def test_the_holder_of_the_store_ends_after_all_have_read() -> None:
    port = single_process_environment()["MASTER_PORT"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGE], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
