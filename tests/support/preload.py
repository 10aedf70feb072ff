"""Imports that the processes of a test need, done once: their parent imports this module, then forks them.

The imports take some ten seconds, a fork takes milliseconds. Tests run on the CPU also where there is a GPU: four
ranks cannot share one under NCCL.
"""

from megatron_camopd.runtime import accelerator

accelerator.activate()  # before Megatron is imported

import megatron_camopd.stages.distill.plan  # noqa: E402, F401
import megatron_camopd.stages.registry  # noqa: E402, F401
