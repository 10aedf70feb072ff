"""Registry of the rollout engines: the settings and the construction of each value of ``--rollout-engine``."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.transformer.module import MegatronModule

from megatron_camopd.config.settings import Settings
from megatron_camopd.rollout import megatron_engine, vllm
from megatron_camopd.rollout.engine import RolloutEngine


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """One value of ``--rollout-engine``.

    Attributes:
        settings: The settings that only this engine reads.
        build: Builds the engine from the arguments, the student (this rank's model chunks) and the token ids that end
            a response; collective over the world.
    """

    settings: tuple[type[Settings], ...]
    build: Callable[[Namespace, Sequence[MegatronModule], Sequence[int]], RolloutEngine]


ENGINES: dict[str, EngineKind] = {
    "megatron": EngineKind(settings=(megatron_engine.MegatronEngineSettings,), build=megatron_engine.build),
    "vllm": EngineKind(settings=(vllm.VllmEngineSettings,), build=vllm.build),
}
