"""One unit of the replication: a training run and its scores, in a process of its own.

The process is forked from a server process that has imported this module already. It does what ``pretrain_camopd.py``
does with the unit's command line on a single process. Then the megatron engine generates greedy responses to the
held-out prompts. A response is right if it equals the answer and then ends.
"""

import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_camopd.runtime import accelerator

accelerator.activate()  # before Megatron is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_camopd.checkpoint.tokenizer import load_tokenizer  # noqa: E402
from megatron_camopd.data import ChatFormatter, read_prompts  # noqa: E402
from megatron_camopd.rollout.megatron_engine import MegatronEngine  # noqa: E402
from megatron_camopd.stages.arguments import parse_arguments  # noqa: E402
from megatron_camopd.stages.distill.plan import plan_distillation  # noqa: E402
from megatron_camopd.stages.distill.runner import DistillRunner  # noqa: E402
from megatron_camopd.stages.metrics import FILE  # noqa: E402

# Metrics that the figures need.
SERIES = (
    "step", "branch", "loss", "gap_abs_mean", "grad_norm", "selected_fraction", "coherence_full", "coherence_selected",
    "gradient_coherence_gain", "branch_dot_product", "branch_cosine", "acceptance_rate", "kept_token_fraction",
    "response_length_mean",
)  # fmt: skip


def run_unit(flags: list[str], prompts: dict[str, str], result: str, log: str, commit: str, *, train: bool) -> None:
    """Train, score the student on held-out prompts, and write the result.

    Args:
        flags: Command line of the run.
        prompts: Prompt files with answers, {side: path}.
        result: JSON file to write, which appears when the unit is finished.
        log: File for the console output.
        commit: Commit of the checkout, to be written to the result.
        train: Whether to train; otherwise the initial weights are scored.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.set_num_threads(1)
    started = time.monotonic()
    args = parse_arguments(flags)
    with tempfile.TemporaryDirectory() as rendezvous:  # a file: units run at once, and ports could clash
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=0, world_size=1)
        trainer = DistillRunner(args, plan_distillation(args))
        if train:
            trainer.run()
        trained = time.monotonic()
        found = {
            "commit": commit,
            "scores": {name: score(trainer, Path(path)) for name, path in prompts.items()},
            "series": read_series(Path(args.save) / FILE) if train else {},
            "seconds_training": round(trained - started, 1),
            "seconds_scoring": round(time.monotonic() - trained, 1),
        }
        partial = Path(f"{result}.partial")
        partial.write_text(json.dumps(found))
        os.replace(partial, result)
        dist.destroy_process_group()


def score(trainer: DistillRunner, path: Path) -> dict[str, float]:
    """Return the fraction of right responses to the prompts of one file, by category."""
    args, plan = trainer.args, trainer.plan
    tokenizer = load_tokenizer(args.load)
    formatter = ChatFormatter(tokenizer, template_kwargs={}, max_prompt_length=args.max_prompt_length)
    rows = read_prompts([str(path)], flag="--prompts").prompts
    assert len(rows) == len(path.read_text(encoding="utf-8").splitlines()), path
    encoded = [formatter.encode(row) for row in rows]
    assert all(encoded), f"{path}: a prompt is longer than {args.max_prompt_length} tokens"
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    engine = MegatronEngine(
        trainer.model[0],
        seed=args.seed,
        temperature=0.0,
        end_of_sequence_ids=plan.end_of_sequence_ids,
        max_response_length=args.max_response_length,
        vocab_size=args.vocab_size,
        batch_size=args.rollout_batch_size,
    )
    rollout = engine.generate([ids for ids in encoded if ids], torch.arange(len(rows)), step=0)
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in enumerate(answers):
        start = int(rollout.prompt_lengths[row])
        ids = rollout.tokens[row, start : start + int(rollout.response_lengths[row])].tolist()
        text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)  # without the end-of-sequence token
        right[rows[row].category or ""].append(not bool(rollout.truncated[row]) and text == answer)
    return {category: sum(marks) / len(marks) for category, marks in right.items()}


def read_series(path: Path) -> dict[str, list[Any]]:
    """Read the metrics of :data:`SERIES`, one list per name; None where a step did not measure it."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: [record.get(name) for record in records] for name in SERIES if any(name in r for r in records)}
