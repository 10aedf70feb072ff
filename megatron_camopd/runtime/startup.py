"""Start-up of Megatron in this process: global variables, process groups and seeds, without its console output."""

import contextlib
import io
import logging
import socket
from argparse import Namespace
from collections.abc import Iterator

import torch.distributed as dist

from megatron_camopd.runtime import accelerator


def initialize_megatron(args: Namespace) -> None:
    """Initialise Megatron from validated ``args``; rank 0 prints its accelerator. Collective."""
    from megatron.training import initialize  # imported here: accelerator.activate() comes first
    from megatron.training.global_vars import set_global_variables

    # Megatron's wheel contains the dataset helper already compiled, without its Makefile; the original function would
    # end the process of rank 0.
    initialize._compile_dependencies = lambda: None
    with quiet_megatron(args):
        set_global_variables(args, build_tokenizer=False)
        initialize.initialize_megatron(allow_no_cuda=True)
    if dist.get_rank() == 0:
        print(accelerator.current().describe(), flush=True)


@contextlib.contextmanager
def quiet_megatron(args: Namespace) -> Iterator[None]:
    """Suppress Megatron's hundreds of lines of start-up output, unless ``--logging-level`` is INFO or lower."""
    if args.logging_level is not None and args.logging_level <= logging.INFO:
        yield
        return
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)


def single_process_environment() -> dict[str, str]:
    """Return the environment variables that torchrun would set for a world of one process, with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
