"""Convert a Hugging Face folder into a Megatron checkpoint that loads at any parallel size.

    python checkpoints_convert/hf_to_megatron.py --hf-path DIR --save DIR [--dtype bf16|fp32] [--verify]

Exit status: 0; 2 after one line on stderr that says what is wrong with the flags or files; 128 + the number of the
signal that ended it, as in 130 after Ctrl-C. The checkpoint appears whole or not at all.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing


def convert(flags: Sequence[str]) -> None:
    """Parse ``flags`` and convert.

    Raises:
        ConfigurationError: A flag, the Hugging Face folder or the target is wrong.
    """
    from megatron_camopd.config.program import Parser, path_argument

    parser = Parser(description="Convert a Hugging Face folder into a Megatron checkpoint.")
    parser.add_argument("--hf-path", required=True, type=path_argument, help="folder with config.json and safetensors")
    parser.add_argument("--save", required=True, type=path_argument, help="new checkpoint directory")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype to store (default: as in the files)")
    parser.add_argument("--verify", action="store_true", help="afterwards compare the logits of both models")
    args = parser.parse_args(flags)
    import torch

    from megatron_camopd.checkpoint.assets import has_tokenizer
    from megatron_camopd.checkpoint.import_hf import import_hf

    dtype = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    import_hf(args.hf_path, args.save, dtype=dtype)
    if not has_tokenizer(args.hf_path):
        print(f"{args.hf_path}: has no tokenizer; the checkpoint can be exported, but no run can start from it until "
              f"{args.save}/hf has one", file=sys.stderr)  # fmt: skip
    if args.verify:
        from megatron_camopd.runtime import accelerator

        accelerator.activate()  # before Megatron is imported
        from megatron_camopd.model.verify import compare_logits

        print(f"verify: largest logit difference {compare_logits(args.hf_path, args.save):.3e}")


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("hf_to_megatron.py", lambda: convert(flags))


if __name__ == "__main__":
    from megatron_camopd.config.program import stop_on_signals

    stop_on_signals("hf_to_megatron.py")
    sys.exit(main(sys.argv[1:]))
