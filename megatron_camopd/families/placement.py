"""Places in a checkpoint of what layers and experts have: keys, and the axes in front of a tensor's own.

A checkpoint stacks the copies of a tensor: its first axis counts layers, and experts are on the next one. The key says
nothing about them: ``decoder.layers.mlp.linear_fc1.weight``. In a model whose layers are of several kinds Megatron
gives every layer keys of its own instead, ``decoder.layers.7.mlp.linear_fc1.weight``, without the axis of layers;
experts are stacked there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from megatron_camopd.families.architecture import Architecture

Shape = tuple[int, ...]
Index = tuple[int, ...]
Layers = Callable[[Architecture], Sequence[int]]
"""Function that returns the numbers of those layers of a model that have something."""

AXES = ("layer", "expert")
"""Axes of an index, in this order."""
_LAYERS = "decoder.layers."


class Place(NamedTuple):
    """Where a checkpoint keeps one copy.

    ``key`` is the key, ``offsets`` the numbers of the copy on the axes of layers and experts that are stacked under it,
    and ``sizes`` the sizes of these axes.
    """

    key: str
    offsets: Index
    sizes: Shape


def every_layer(arch: Architecture) -> range:
    """Return the numbers of all layers of a model of ``arch``."""
    return range(arch.num_layers)


def layer_indices(layer: int, axes: tuple[str, ...], layers: Layers, arch: Architecture) -> Iterator[Index]:
    """Iterate over the indices in one ``layer`` of what ``layers`` have and ``axes`` count."""
    if layer not in layers(arch):
        return iter(())
    return product((layer,), *(range(size) for size in _sizes(axes, arch)[1:]))


def place(key: str, index: Index, axes: tuple[str, ...], arch: Architecture) -> Place:
    """Return where a checkpoint keeps the copy ``index`` of what is called ``key`` where layers are stacked."""
    if arch.layers_differ and "layer" in axes:
        key, index = key.replace(_LAYERS, f"{_LAYERS}{index[0]}.", 1), index[1:]
    return Place(key, index, stacked(axes, arch))


def stacked(axes: tuple[str, ...], arch: Architecture) -> Shape:
    """Return the sizes of those ``axes`` that a checkpoint stacks: ``()``, ``(L,)``, ``(E,)`` or ``(L, E)``.

    L is the number of layers, E that of experts.
    """
    return _sizes(tuple(axis for axis in axes if axis != "layer" or not arch.layers_differ), arch)


def _sizes(axes: tuple[str, ...], arch: Architecture) -> Shape:
    sizes = {"layer": arch.num_layers, "expert": arch.num_experts}
    return tuple(sizes[axis] for axis in axes)


@dataclass(frozen=True, kw_only=True)
class ModuleState:
    """The (empty) ``_extra_state`` that Megatron keeps beside the weights of a module.

    Attributes:
        module: Name of the module within a layer, as in a checkpoint.
        layers: Returns the layers that have the module.
        per_expert: Whether every expert has one.
    """

    module: str
    layers: Layers = every_layer
    per_expert: bool = False

    def names(self, arch: Architecture) -> Iterator[str]:
        """Iterate over the names in a checkpoint of ``arch``: ``<key>/shard_<offsets>_<sizes>``."""
        axes = AXES if self.per_expert else AXES[:1]
        for layer in self.layers(arch):
            for index in layer_indices(layer, axes, self.layers, arch):
                key, offsets, sizes = place(f"{_LAYERS}{self.module}._extra_state", index, axes, arch)
                offset, size = (".".join(map(str, numbers)) for numbers in (offsets or (0,), sizes or (1,)))
                yield f"{key}/shard_{offset}_{size}"
