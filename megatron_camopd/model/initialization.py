"""Bring Megatron up in this process: global variables, process groups, seeds."""

import socket
from argparse import Namespace

import torch.distributed as dist
from megatron.training import initialize
from megatron.training.global_vars import set_global_variables

from megatron_camopd import accelerator
from megatron_camopd.arguments import quiet_megatron


def initialize_megatron(args: Namespace) -> None:
    """Megatron's own initialisation from validated ``args``; rank 0 says which accelerator it runs on. Collective."""
    # The wheel ships the dataset helper compiled but not its Makefile; the call would end rank 0.
    initialize._compile_dependencies = lambda: None
    with quiet_megatron(args):
        set_global_variables(args, build_tokenizer=False)
        initialize.initialize_megatron(allow_no_cuda=True)
    if dist.get_rank() == 0:
        print(accelerator.current().describe(), flush=True)


def single_process_environment() -> dict[str, str]:
    """What torchrun would set for a world of one process, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
