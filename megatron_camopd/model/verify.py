"""``--verify`` of the converters: the Hugging Face folder and the Megatron checkpoint must compute the same logits.

Both models run on the same random tokens, in one process, in true float32: with Megatron's local layers even where
Transformer Engine is installed, and without TF32, whose 10-bit mantissa could hide a wrong weight. The host memory must
hold both models at once.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from megatron.core.utils import unwrap_model

from megatron_camopd.checkpoint.arguments import model_arguments
from megatron_camopd.checkpoint.assets import assets_dir, read_model
from megatron_camopd.checkpoint.directory import require_checkpoint
from megatron_camopd.checkpoint.training_state import load_weights
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.model.builder import build_model
from megatron_camopd.model.output_head import HeadSettings
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.startup import initialize_megatron, quiet_megatron, single_process_environment

TOKENS = (2, 64)  # batch and length of the comparison
TOLERANCE = 1e-3  # relative to the largest logit; float32 rounding through tens of layers stays well below


@torch.no_grad()
def compare_logits(hf_path: str | Path, checkpoint: str | Path) -> float:
    """Return the largest absolute logit difference over :data:`TOKENS` random tokens.

    May be called once per process, because it initialises Megatron.

    Raises:
        ConfigurationError: The difference exceeds :data:`TOLERANCE` times the largest logit.
    """
    os.environ.update(single_process_environment())
    args = model_arguments(str(checkpoint), [HeadSettings])
    vars(args).update(accelerator.plain_arguments())
    initialize_megatron(args)
    device = accelerator.current().device
    tokens = torch.randint(args.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0)).to(device)
    with quiet_megatron(args):
        chunks = build_model(args, trainable=False)
    load_weights(args, chunks, require_checkpoint("--load", checkpoint))
    positions = torch.arange(TOKENS[1], device=device).expand(TOKENS)
    with _without_tf32():
        ours = unwrap_model(chunks)[0](tokens, positions, None)[..., : args.vocab_size].float().cpu()
    del chunks
    family, _ = read_model(assets_dir(checkpoint))
    reference_class = getattr(transformers, family.hf_class)
    reference = reference_class.from_pretrained(hf_path, dtype=torch.float32, local_files_only=True)
    theirs = reference(tokens.cpu()).logits
    difference = float((ours - theirs).abs().max())
    limit = TOLERANCE * max(1.0, float(theirs.abs().max()))
    if not difference <= limit:
        raise ConfigurationError(
            f"{checkpoint}: its logits differ from those of {hf_path} by {difference:.3e}; at most {limit:.1e} is "
            "rounding; convert again"
        )
    return difference


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute float32 matrix products in true float32 inside the context, also on a GPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
