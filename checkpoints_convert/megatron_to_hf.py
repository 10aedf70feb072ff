"""Convert a Megatron checkpoint (imported, or saved by training) into a Hugging Face folder with tokenizer.

    python checkpoints_convert/megatron_to_hf.py --load DIR --save DIR [--iteration N] [--max-shard-size 4GB] [--verify]

Exit status: 0; 2 after one line on stderr that says what is wrong with the flags or files; 128 + the number of the
signal that ended it, as in 130 after Ctrl-C. The folder appears whole or not at all.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing


def convert(flags: Sequence[str]) -> None:
    """Parse ``flags`` and convert.

    Raises:
        ConfigurationError: A flag, the checkpoint or the target is wrong.
    """
    from megatron_camopd.config.byte_size import parse_size
    from megatron_camopd.config.program import Parser, path_argument
    from megatron_camopd.errors import ConfigurationError

    parser = Parser(description="Convert a Megatron checkpoint into a Hugging Face folder.")
    parser.add_argument("--load", required=True, type=path_argument, help="checkpoint directory")
    parser.add_argument("--save", required=True, type=path_argument, help="new Hugging Face folder")
    parser.add_argument("--iteration", type=int, help="iteration to convert (default: the newest)")
    parser.add_argument("--max-shard-size", default="4GB", help="largest safetensors file (default: 4GB)")
    parser.add_argument("--verify", action="store_true", help="afterwards compare the logits of both models")
    args = parser.parse_args(flags)
    if args.iteration is not None and not 0 <= args.iteration < 10**12:
        raise ConfigurationError(f"--iteration {args.iteration}: must be the number of a saved iteration")
    max_shard_bytes = parse_size(args.max_shard_size, flag="--max-shard-size")
    from megatron_camopd.checkpoint.export_hf import export_hf

    export_hf(args.load, args.save, iteration=args.iteration, max_shard_bytes=max_shard_bytes)
    if args.verify:
        from megatron_camopd.runtime import accelerator

        accelerator.activate()  # before Megatron is imported
        from megatron_camopd.model.verify import compare_logits

        print(f"verify: largest logit difference {compare_logits(args.save, args.load):.3e}")


def main(flags: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.config.program import run_program

    return run_program("megatron_to_hf.py", lambda: convert(flags))


if __name__ == "__main__":
    from megatron_camopd.config.program import stop_on_signals

    stop_on_signals("megatron_to_hf.py")
    sys.exit(main(sys.argv[1:]))
