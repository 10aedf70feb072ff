"""The methods by the names of ``--distill-method``: settings and construction of each."""

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

    settings: what this method alone reads, :class:`AlternatingSettings` or :class:`MixingSettings` among them: whether
    a step serves one branch or all. build: makes the method from the arguments and the run's table of
    branches.
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
