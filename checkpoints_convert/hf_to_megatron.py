"""Convert a Hugging Face folder into a Megatron checkpoint that loads at any parallel size.

    python checkpoints_convert/hf_to_megatron.py --hf-path DIR --save DIR [--dtype bf16|fp32] [--verify]

Exit status: 0, or 2 after one line on stderr that says what is wrong with the flags or files.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing


def main() -> int:
    """Run the command and return its exit status."""
    from megatron_camopd.errors import ConfigurationError

    parser = argparse.ArgumentParser(description="Convert a Hugging Face folder into a Megatron checkpoint.")
    parser.add_argument("--hf-path", required=True, help="folder with config.json and safetensors")
    parser.add_argument("--save", required=True, help="new checkpoint directory")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype to store (default: as in the files)")
    parser.add_argument("--verify", action="store_true", help="afterwards compare the logits of both models")
    args = parser.parse_args()
    try:
        import torch

        from megatron_camopd.checkpoint.import_hf import import_hf

        dtype = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        import_hf(args.hf_path, args.save, dtype=dtype)
        if args.verify:
            from megatron_camopd.runtime import accelerator

            accelerator.activate()  # before Megatron is imported
            from megatron_camopd.model.verify import compare_logits

            print(f"verify: largest logit difference {compare_logits(args.hf_path, args.save):.3e}")
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
