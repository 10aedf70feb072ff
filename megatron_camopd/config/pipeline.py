"""Division of a model's layers among the pipeline stages.

All stages get equally many, unless Megatron's ``--decoder-first-pipeline-num-layers`` or
``--decoder-last-pipeline-num-layers`` sets the number of one end; the others then share what is left equally. Megatron
checks this only when it builds the model, after the processes have met.
"""

from argparse import Namespace

from megatron_camopd.config.settings import flag_of
from megatron_camopd.errors import ConfigurationError

_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_ACCOUNTING = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def layers_of_stages(args: Namespace) -> list[int]:
    """Return the number of layers of each pipeline stage, first to last.

    Raises:
        ConfigurationError: The layers cannot be divided as the flags say; names the flags and what would be right.
    """
    layers, stages = args.num_layers, args.pipeline_model_parallel_size
    fixed = {name: getattr(args, name) for name in _ENDS if getattr(args, name) is not None}
    if not fixed:
        if layers % stages:
            raise ConfigurationError(
                f"--pipeline-model-parallel-size {stages}: must divide the {layers} layers{_uneven(layers, stages)}"
            )
        return [layers // stages] * stages
    _check_ends(args, fixed)
    others = stages - len(fixed)
    share = (layers - sum(fixed.values())) // max(others, 1)
    first, last = (fixed.get(name) for name in _ENDS)
    return [*([] if first is None else [first]), *[share] * others, *([] if last is None else [last])]


def _check_ends(args: Namespace, fixed: dict[str, int]) -> None:
    """Check that the stages at the ends, with their ``fixed`` numbers by argument name, leave the others equal shares.

    Raises:
        ConfigurationError: Names the flags and what would be right.
    """
    layers, stages = args.num_layers, args.pipeline_model_parallel_size
    given = " and ".join(f"{flag_of(name)} {value}" for name, value in fixed.items())
    if stages == 1:
        raise ConfigurationError(
            f"{given}: without effect at --pipeline-model-parallel-size 1; give a larger one or leave it out"
        )
    for name in _ACCOUNTING:
        if getattr(args, name):
            raise ConfigurationError(f"{flag_of(name)}: cannot be combined with {given}; drop one of the two")
    left, others = layers - sum(fixed.values()), stages - len(fixed)
    if _divides(left, others):
        return
    *_, (name, value) = fixed.items()
    rights = [number for number in range(1, layers) if _divides(left + value - number, others)]
    right = f", as with {flag_of(name)} {min(rights, key=lambda n: abs(n - value))}" if rights else ""
    if not others:
        raise ConfigurationError(
            f"{given}: must add up to the {layers} layers with --pipeline-model-parallel-size {stages}{right}"
        )
    who, wanted = "the other stage", "at least 1"
    if others > 1:
        who, wanted = f"the other {others} stages", f"a multiple of {others}, at least {others}"
    raise ConfigurationError(
        f"{given}: {max(left, 0)} of the {layers} layers are left for {who} of "
        f"--pipeline-model-parallel-size {stages}; must be {wanted}{right}"
    )


def _divides(layers: int, stages: int) -> bool:
    """Return whether ``stages`` stages can share ``layers`` layers equally, at least one each; no stage, no layer."""
    return layers % stages == 0 and layers >= stages if stages else layers == 0


def _uneven(layers: int, stages: int) -> str:
    """Return advice about the last stage's number that lets the others share equally, if there is one."""
    for share in (layers // stages + 1, layers // stages):  # a smaller last stage first: it also holds the output head
        last = layers - share * (stages - 1)
        if share and last >= 1:
            return f"; {flag_of(_ENDS[1])} {last} would leave {share} for each other stage"
    return ""
