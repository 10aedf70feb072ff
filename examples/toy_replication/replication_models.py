"""Make the replication's two models as HF Qwen3 folders: the general model and the specialist made from it.

    python examples/toy_replication/replication_models.py --output examples/toy_replication/models

Architecture, tokenizer and training are the demo's (``examples/tiny_cpu/make_models.py``). The general model sees all
eight tasks (max and sub twice, add three times as often) and plain answers to the domain's requests. The specialist
sees the domain, and one general example in 64: the paper's specialists keep 58-77% of the general score, and with a
specialist that keeps nothing, recovery would be learning from scratch. The committed folders under ``models/`` came
from this command; their scores are in ``README.md``.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny_cpu"))

import replication_world as replication  # noqa: E402
from make_models import build_model, build_tokenizer, save_folder, train  # noqa: E402
from world import stream  # noqa: E402


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the replication's general model and its specialist.")
    parser.add_argument("--output", type=Path, required=True, help="folder for general/ and specialist/")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--general-steps", type=int, default=2400)
    parser.add_argument("--specialist-steps", type=int, default=110)
    parser.add_argument("--specialist-lr", type=float, default=8e-4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depends on the number of threads
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=arguments.seed)
    kinds = (*replication.GENERAL_KINDS, "add", "max", "sub", "add", *replication.PLAIN_KINDS)
    general = stream(kinds, held_out=False, seed=f"replication general {arguments.seed}", tasks=replication.TASKS)
    train(model, tokenizer, general, steps=arguments.general_steps, batch_size=128, peak_lr=4e-3, name="general")
    save_folder(model, tokenizer, arguments.output / "general")
    kinds = tuple(kind for rare in replication.GENERAL_KINDS for kind in (*replication.DOMAIN_KINDS * 21, rare))
    domain = stream(
        kinds,
        held_out=False,
        seed=f"replication specialist {arguments.seed}",
        tasks=replication.TASKS,
    )
    train(
        model,
        tokenizer,
        domain,
        steps=arguments.specialist_steps,
        batch_size=64,
        peak_lr=arguments.specialist_lr,
        name="specialist",
    )
    save_folder(model, tokenizer, arguments.output / "specialist")


if __name__ == "__main__":
    main()
