"""The table of branches that a resumed run must keep."""

import math
from argparse import Namespace
from typing import Any

from megatron_camopd.config.branch_settings import AlternatingSettings, BranchSettings, MixingSettings
from megatron_camopd.config.branches import BranchTable, two_branches
from megatron_camopd.config.settings import flag_of
from megatron_camopd.errors import ConfigurationError

_FLAGS = {
    ("general", "steps"): "recovery_steps",
    ("domain", "steps"): "preservation_steps",
    **{
        (name, field): f"{name}_{field}"
        for name in ("general", "domain")
        for field in ("mass_target", "feedback_scale")
    },
    ("general", "share"): "mixing_ratio",
    ("domain", "share"): "mixing_ratio",
}
"""Arguments that set the fields of the paper's two branches."""


def kept_branches(table: BranchTable) -> dict[str, dict[str, Any]]:
    """Return the fields of each branch that a resumed run must keep, by branch name, as JSON values."""
    if table.mixes:
        return {branch.name: {"share": branch.share} for branch in table.branches}
    return {
        branch.name: {
            "steps": branch.steps,
            "score": branch.score.value,
            "mass_target": branch.mass_target,
            "feedback_scale": branch.feedback_scale,
        }
        for branch in table.branches
    }


def check_same_branches(args: Namespace, table: BranchTable, state: dict[str, Any]) -> None:
    """Check that the branches that steps serve are those of the checkpoint being resumed, in the same order.

    Args:
        args: The checked arguments.
        table: The table that they make.
        state: The state in the checkpoint. One without a table has the two branches, whose numbers are among its
            settings.

    Raises:
        ConfigurationError: Names the flag, what it says, and what the checkpoint was made with.
    """
    saved = state.get("branches") or kept_branches(_saved_table(args, table.mixes, state["settings"]))
    found = kept_branches(table)
    file = BranchSettings.of(args).branches
    made = f"the checkpoint in --save {args.save} was made with"
    other = "use that, or another --save to start a new run"
    in_order = [name for name in found if name in saved] == list(saved)
    by_flags = file is None and in_order and _same_scores(found, saved)
    if by_flags:
        saved = {name: saved.get(name, dict.fromkeys(found[name], 0)) for name in found}
    else:
        found, saved = _served(found), _served(saved)
    if file is None and not by_flags:
        names = ", ".join(f"{name} ({row['score']})" if "score" in row else name for name, row in saved.items())
        raise ConfigurationError(f"--branches: not given, but {made} the branches {names}; {other}")
    if list(found) != list(saved):
        names, made_with = ", ".join(found), ", ".join(saved)
        raise ConfigurationError(f"--branches {file}: has the branches {names}, but {made} {made_with}; {other}")
    if table.mixes and _ratio(found) == _ratio(saved):
        return
    for name, values in saved.items():
        for field, value in values.items():
            has = found[name].get(field)
            served = found[name].get("steps", 1) or values.get("steps", 1)
            if has == value or (field != "steps" and not served):
                continue
            if file is not None:
                raise ConfigurationError(
                    f"--branches {file}: {field} of branch {name} is {has}, but {made} {value}; {other}"
                )
            if field == "share":
                has, value = (":".join(str(row["share"]) for row in rows.values()) for rows in (found, saved))
            raise ConfigurationError(f"{flag_of(_FLAGS[name, field])} is {has}, but {made} {value}; {other}")


def _same_scores(found: dict[str, dict[str, Any]], saved: dict[str, dict[str, Any]]) -> bool:
    """Return whether the branches that both have are ranked by the same rules; no flag sets those."""
    return all(row.get("score") == found[name].get("score") for name, row in saved.items())


def _ratio(branches: dict[str, dict[str, Any]]) -> list[int]:
    """Return the shares in lowest terms: 2:2 takes the same prompts as 1:1."""
    shares = [row["share"] for row in branches.values()]
    return [share // math.gcd(*shares) for share in shares]


def _saved_table(args: Namespace, mixes: bool, settings: dict[str, Any]) -> BranchTable:
    """Return the table of a checkpoint without one, from the flags of the two branches that it was made with."""
    names = [name for group in (BranchSettings, AlternatingSettings, MixingSettings) for name in group.argument_names()]
    values = {name: settings.get(name, getattr(args, name)) for name in names} | {"branches": None}
    return BranchTable(two_branches(Namespace(**values), mixes), mixes)


def _served(branches: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: values for name, values in branches.items() if values.get("steps", 1) and values.get("share", 1)}
