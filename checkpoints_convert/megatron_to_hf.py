"""Convert a Megatron checkpoint (imported, or saved by training) into a Hugging Face folder with tokenizer.

    python checkpoints_convert/megatron_to_hf.py --load DIR --save DIR [--iteration N] [--max-shard-size 4GB] [--verify]

Exit status: 0, or 2 after one line on stderr that says what is wrong with the flags or files.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing


def main() -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.errors import ConfigurationError

    parser = argparse.ArgumentParser(description="Convert a Megatron checkpoint into a Hugging Face folder.")
    parser.add_argument("--load", required=True, help="checkpoint directory")
    parser.add_argument("--save", required=True, help="new Hugging Face folder")
    parser.add_argument("--iteration", type=int, help="iteration to convert (default: the newest)")
    parser.add_argument("--max-shard-size", default="4GB", help="largest safetensors file (default: 4GB)")
    parser.add_argument("--verify", action="store_true", help="afterwards compare the logits of both models")
    args = parser.parse_args()
    try:
        from megatron_camopd.checkpoint.export_hf import export_hf
        from megatron_camopd.config.byte_size import parse_size

        max_shard_bytes = parse_size(args.max_shard_size, flag="--max-shard-size")
        export_hf(args.load, args.save, iteration=args.iteration, max_shard_bytes=max_shard_bytes)
        if args.verify:
            from megatron_camopd.runtime import accelerator

            accelerator.activate()  # before Megatron is imported
            from megatron_camopd.model.verify import compare_logits

            print(f"verify: largest logit difference {compare_logits(args.save, args.load):.3e}")
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
