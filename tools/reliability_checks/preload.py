"""Imports of the commands that ``inputs`` tries, done once in the server from which their processes are forked."""

from megatron_camopd.runtime import accelerator

accelerator.activate()  # before Megatron is imported

import megatron_camopd.checkpoint.import_hf  # noqa: E402
import megatron_camopd.stages.start  # noqa: E402, F401
