"""The frozen teachers: one Megatron model on the accelerator, and the weights of every teacher in host memory.

Teachers share the student's architecture, so one frozen model serves for all: activating a branch copies that
teacher's shards from (page-locked) host memory into it. The teacher whose weights the model has is the resident one.
The schedule is known ahead, so the next teacher is copied on a side stream while the student trains; nothing is copied
when a branch repeats.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_camopd.checkpoint.directory import CheckpointLocation
from megatron_camopd.checkpoint.training_state import load_weights
from megatron_camopd.model.builder import build_model
from megatron_camopd.runtime import accelerator
from megatron_camopd.schedule import Branch


class TeacherBank:
    """The teachers of all branches.

    Construction loads every teacher and is collective.

    Args:
        args: Checked Megatron and CaMOPD arguments.
        checkpoints: The checkpoint of each branch's teacher.
    """

    def __init__(self, args: Namespace, checkpoints: Mapping[Branch, CheckpointLocation]) -> None:
        self._chunks = build_model(args, trainable=False)
        self._parameters = [parameter for chunk in self._chunks for parameter in chunk.parameters()]
        self._host: dict[Branch, list[Tensor]] = {}
        self._copies = accelerator.CopyStream()
        self._resident: Branch | None = None
        for branch, location in checkpoints.items():
            load_weights(args, self._chunks, str(location.directory), iteration=location.iteration)
            self._host[branch] = [accelerator.host_copy(parameter) for parameter in self._parameters]
            self._resident = branch

    def activate(self, branch: Branch) -> list[MegatronModule]:
        """Return the model with the weights of ``branch``'s teacher.

        It is valid until another branch is activated or prefetched.
        """
        self.prefetch(branch)
        self._copies.wait()
        return self._chunks

    def in_order(self, branches: Iterable[Branch]) -> list[Branch]:
        """Sort ``branches`` with the resident teacher's first, so that serving them takes the fewest copies."""
        return sorted(branches, key=lambda branch: branch is not self._resident)

    def prefetch(self, branch: Branch) -> None:
        """Start copying the weights of ``branch``'s teacher into the model.

        The model must not be used again until :meth:`activate` returns it.
        """
        if branch is self._resident:
            return
        with self._copies:
            for parameter, host in zip(self._parameters, self._host[branch], strict=True):
                parameter.data.copy_(host, non_blocking=True)
        self._resident = branch
