"""The frozen teachers: one resident model, the weights of all of them in host memory.

Teachers share the student's architecture, so one frozen Megatron model serves for all: activating a branch
copies that teacher's shards from (page-locked) host memory into it. The schedule is known ahead, so the next
teacher is copied on a side stream while the student trains; the copy is free when a branch repeats.
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
    """``checkpoints``: where each branch's teacher lies. Construction is collective."""

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
        """The model with the weights of ``branch``'s teacher; valid until another branch is asked for."""
        self.prefetch(branch)
        self._copies.wait()
        return self._chunks

    def in_order(self, branches: Iterable[Branch]) -> list[Branch]:
        """``branches`` with the resident teacher's first: the order in which they need the fewest copies."""
        return sorted(branches, key=lambda branch: branch is not self._resident)

    def prefetch(self, branch: Branch) -> None:
        """Start copying ``branch``'s weights in. The resident teacher must not be used from here on."""
        if branch is self._resident:
            return
        with self._copies:
            for parameter, host in zip(self._parameters, self._host[branch], strict=True):
                parameter.data.copy_(host, non_blocking=True)
        self._resident = branch
