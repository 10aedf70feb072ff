"""Uneven pipelines: how many layers each stage gets, against Megatron's own count, and what is refused."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_camopd.config.pipeline import layers_of_stages
from megatron_camopd.errors import ConfigurationError
from tests.support.worlds import World, prepare, refusal

FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
STAGES = "--pipeline-model-parallel-size"


def arguments(layers: int, stages: int, first: int | None, last: int | None, accounting: bool = False) -> Namespace:
    return Namespace(
        num_layers=layers,
        pipeline_model_parallel_size=stages,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=accounting,
    )


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "expected"),
    [
        (94, 4, None, 22, [24, 24, 24, 22]),
        (94, 4, 25, None, [25, 23, 23, 23]),
        (94, 4, 23, 23, [23, 24, 24, 23]),
        (4, 2, 1, None, [1, 3]),
        (4, 2, None, 1, [3, 1]),
        (5, 2, 2, 3, [2, 3]),
        (4, 2, None, None, [2, 2]),
        (3, 1, None, None, [3]),
    ],
)
def test_layers_are_those_that_megatron_builds(
    layers: int, stages: int, first: int | None, last: int | None, expected: list[int]
) -> None:
    from megatron_camopd.runtime import accelerator

    accelerator.activate()
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    assert layers_of_stages(arguments(layers, stages, first, last)) == expected
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    assert [get_num_layers_to_build(config, pp_rank=rank) for rank in range(stages)] == expected
    offsets = [get_transformer_layer_offset(config, pp_rank=rank) for rank in range(stages)]
    assert offsets == [sum(expected[:rank]) for rank in range(stages)]


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "line"),
    [
        (94, 4, None, None, f"{STAGES} 4: must divide the 94 layers; {LAST} 22 would leave 24 for each other stage"),
        (5, 4, None, None, f"{STAGES} 4: must divide the 5 layers; {LAST} 2 would leave 1 for each other stage"),
        (3, 4, None, None, f"{STAGES} 4: must divide the 3 layers"),
        (4, 1, 4, None, f"{FIRST} 4: without effect at {STAGES} 1; give a larger one or leave it out"),
        (4, 1, 1, 3, f"{FIRST} 1 and {LAST} 3: without effect at {STAGES} 1; give a larger one or leave it out"),
        (94, 4, None, 21, f"{LAST} 21: 73 of the 94 layers are left for the other 3 stages of {STAGES} 4; must be a "
                          f"multiple of 3, at least 3, as with {LAST} 22"),
        (94, 4, 24, 21, f"{FIRST} 24 and {LAST} 21: 49 of the 94 layers are left for the other 2 stages of {STAGES} 4; "
                        f"must be a multiple of 2, at least 2, as with {LAST} 20"),
        (94, 4, 50, 44, f"{FIRST} 50 and {LAST} 44: 0 of the 94 layers are left for the other 2 stages of {STAGES} 4; "
                        f"must be a multiple of 2, at least 2, as with {LAST} 42"),
        (94, 4, 94, 1, f"{FIRST} 94 and {LAST} 1: 0 of the 94 layers are left for the other 2 stages of {STAGES} 4; "
                       "must be a multiple of 2, at least 2"),
        (4, 2, 4, None, f"{FIRST} 4: 0 of the 4 layers are left for the other stage of {STAGES} 2; must be at least 1, "
                        f"as with {FIRST} 3"),
        (4, 2, 1, 2, f"{FIRST} 1 and {LAST} 2: must add up to the 4 layers with {STAGES} 2, as with {LAST} 3"),
        (4, 2, 5, 1, f"{FIRST} 5 and {LAST} 1: must add up to the 4 layers with {STAGES} 2"),
    ],
)  # fmt: skip
def test_layers_that_do_not_divide(layers: int, stages: int, first: int | None, last: int | None, line: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        layers_of_stages(arguments(layers, stages, first, last))
    assert str(caught.value) == line


def test_megatrons_other_uneven_splits_are_apart() -> None:
    with pytest.raises(ConfigurationError) as caught:
        layers_of_stages(arguments(5, 2, 2, None, accounting=True))
    assert str(caught.value) == (
        f"--account-for-loss-in-pipeline-split: cannot be combined with {FIRST} 2; drop one of the two"
    )


def test_the_command_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The world's model has 2 layers: one more than a stage needs, none to divide unevenly."""
    line = refusal(world.flags(save=tmp_path / "run", decoder_first_pipeline_num_layers=1))
    assert line == f"{FIRST} 1: without effect at {STAGES} 1; give a larger one or leave it out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    pipeline = {"save": tmp_path / "run", "pipeline_model_parallel_size": 2}
    line = refusal(world.flags(**pipeline, decoder_last_pipeline_num_layers=2))
    assert line.startswith(f"{LAST} 2: 0 of the 2 layers are left for the other stage") and line.endswith(f"{LAST} 1")
    args, _ = prepare(world.flags(**pipeline, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=1))
    assert layers_of_stages(args) == [1, 1]
