"""The registry of methods: the settings and the constructor behind each value of ``--distill-method``."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_camopd.config.branch_settings import AlternatingSettings, MixingSettings
from megatron_camopd.config.settings import Settings
from megatron_camopd.objective import camopd, mopd, relaxed_opd, selectkd
from megatron_camopd.objective.method import Method
from megatron_camopd.schedule import BranchSpec


@dataclass(frozen=True, kw_only=True)
class MethodKind:
    """One value of ``--distill-method``.

    Attributes:
        settings: The settings classes that the method reads. :class:`AlternatingSettings` among them says that a step
            serves one branch, :class:`MixingSettings` that it serves all.
        build: Function that makes the method from the checked arguments and the table of branches.
    """

    settings: tuple[type[Settings], ...]
    build: Callable[[Namespace, Sequence[BranchSpec]], Method]

    @property
    def mixes_branches(self) -> bool:
        """Whether a step serves all branches instead of one."""
        return MixingSettings in self.settings


METHODS: dict[str, MethodKind] = {
    "camopd": MethodKind(settings=(AlternatingSettings, camopd.CaMOPDSettings), build=camopd.build),
    "mopd": MethodKind(settings=(MixingSettings,), build=mopd.build),
    "relaxed-opd": MethodKind(settings=(MixingSettings, relaxed_opd.RelaxedOPDSettings), build=relaxed_opd.build),
    "selectkd": MethodKind(settings=(MixingSettings, selectkd.SelecTKDSettings), build=selectkd.build),
}
