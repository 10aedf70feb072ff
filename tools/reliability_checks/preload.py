"""Imports of the commands that ``inputs`` tries, done once in the server from which their processes are forked."""

import threading

from tqdm import tqdm

from megatron_camopd.runtime import accelerator

accelerator.activate()  # before Megatron is imported

import megatron_camopd.checkpoint.import_hf  # noqa: E402
import megatron_camopd.stages.start  # noqa: E402, F401

tqdm.set_lock(threading.RLock())  # its own is one of multiprocessing, which these processes would leave behind
