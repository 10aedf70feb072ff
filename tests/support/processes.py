"""Run a function on n processes that form one gloo group, or a command that starts processes of its own.

``run_ranks`` forks its processes from a server that has imported everything already (``preload``), so a group of them
costs milliseconds and every call gets fresh processes: no state of Megatron survives from one case to the next. The
group is initialised before the function runs (Megatron then keeps it); results travel in files.

Only what was started here is ended, and it always is: processes after a failure or the time limit, commands with their
whole session.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# One thread a process, no GPU, no network interface but the machine's own.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


class RankError(AssertionError):
    """A rank failed; the text holds its traceback."""


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, time_limit: float = 300.0) -> list[Any]:
    """Return what ``function(*arguments)`` returned on each of ``ranks`` processes, in rank order.

    ``function`` is a module's own (it travels by name) and returns tensors and plain values. Raises RankError with the
    traceback of the rank that failed first, or when ``time_limit`` seconds have passed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = _fork_server()
        processes = [
            context.Process(target=_rank_main, args=(function, rank, ranks, str(folder), arguments))
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, time_limit)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        import torch

        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _rank_main(function: Callable[..., Any], rank: int, ranks: int, folder: str, arguments: tuple[Any, ...]) -> None:
    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(ENVIRONMENT)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in places.items()})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        result = function(*arguments)
        torch.save(result, f"{folder}/rank{rank}.partial")
        os.replace(f"{folder}/rank{rank}.partial", f"{folder}/rank{rank}.pt")
        if dist.is_initialized():  # the entry point has ended its groups itself
            dist.barrier()  # a rank that leaves early would break the others' connections
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"rank{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # without destructors, which may wait for the other ranks


def _wait(processes: Sequence[BaseProcess], folder: Path, time_limit: float) -> None:
    deadline = time.monotonic() + time_limit
    while any(process.exitcode is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], timeout=0.2)
    codes = [process.exitcode for process in processes]
    if any(codes) or None in codes:
        # The rank that failed first: the others' connections break after it.
        errors = sorted(folder.glob("rank*.error"), key=lambda path: path.stat().st_mtime_ns)
        logs = [f"{path.name}: ...{path.read_text()[-1500:]}" for path in sorted(folder.glob("rank*.log"))]
        cause = f"{errors[0].name}:\n{errors[0].read_text()}" if errors else f"no end within {time_limit} s"
        raise RankError("\n".join([f"exit codes {codes} (None: still running); {cause}", *logs]))


@contextlib.contextmanager
def command(arguments: Sequence[str], *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running command in a session of its own, output to the file ``log``; killed with all it started on leaving."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(arguments),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_session(process)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the session that ``process`` leads, and for torchrun's workers, which lead sessions of their own."""
    if process.poll() is not None:  # torchrun has ended its workers, and the id may be another's by now
        return
    for leader in [*_workers(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
    process.wait()


def _workers(pid: int) -> list[int]:
    """Children of ``pid`` (which must be ours) that lead a process group."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    leaders = []
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(child) == child:
                leaders.append(child)
    return leaders


def torchrun(ranks: int, flags: Sequence[str]) -> list[str]:
    """The command that trains with ``flags`` on ``ranks`` processes of this machine, on a port it finds itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, str(ROOT / "pretrain_camopd.py"), *flags]


def run_command(arguments: Sequence[str], *, log: Path, time_limit: float = 120.0) -> int:
    """Run a command to its end; its exit status. Raises RankError with the end of ``log`` when it takes too long."""
    with command(arguments, log=log) as process:
        try:
            return process.wait(timeout=time_limit)
        except subprocess.TimeoutExpired as error:
            raise RankError(f"no end within {time_limit} s: ...{log.read_text()[-3000:]}") from error
