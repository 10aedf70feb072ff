"""The frozen teachers: one resident model, the weights of all of them in host memory.

Teachers share the student's architecture, so one frozen Megatron model serves for all: activating one
copies that teacher's shards from (page-locked) host memory into it. The schedule is known ahead, so the next
teacher is copied on a side stream while the student trains; there is no copy when a teacher repeats.
"""

from argparse import Namespace
from collections.abc import Iterable, Sequence

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_camopd.checkpoint.directory import CheckpointLocation
from megatron_camopd.checkpoint.training_state import load_weights
from megatron_camopd.model.builder import build_model
from megatron_camopd.runtime import accelerator


class TeacherBank:
    """The teachers of a run, each by its place in ``checkpoints``.

    Args:
        args: Megatron's arguments.
        checkpoints: where each teacher lies.

    Construction is collective.
    """

    def __init__(self, args: Namespace, checkpoints: Sequence[CheckpointLocation]) -> None:
        self._chunks = build_model(args, trainable=False)
        self._parameters = [parameter for chunk in self._chunks for parameter in chunk.parameters()]
        self._host: list[list[Tensor]] = []
        self._copies = accelerator.CopyStream()
        for location in checkpoints:
            load_weights(args, self._chunks, location)
            self._host.append([accelerator.host_copy(parameter) for parameter in self._parameters])
        self._resident = len(self._host) - 1

    def activate(self, teacher: int) -> list[MegatronModule]:
        """Return the model with the weights of ``teacher``; valid until another one is asked for."""
        self.prefetch(teacher)
        self._copies.wait()
        return self._chunks

    def in_order(self, teachers: Iterable[int]) -> list[int]:
        """Return each of ``teachers`` once, the resident one first: the order that needs the fewest copies."""
        return sorted(set(teachers), key=lambda teacher: (teacher != self._resident, teacher))

    def prefetch(self, teacher: int) -> None:
        """Start copying the weights of ``teacher`` in. The resident one must not be used from here on."""
        if teacher == self._resident:
            return
        with self._copies:
            for parameter, host in zip(self._parameters, self._host[teacher], strict=True):
                parameter.data.copy_(host, non_blocking=True)
        self._resident = teacher
