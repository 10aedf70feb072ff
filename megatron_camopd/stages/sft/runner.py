"""The training step of supervised fine-tuning: cross entropy on packed conversations.

It trains the specialists that distillation starts from, and the off-policy baseline on responses of a teacher.
"""

from argparse import Namespace
from typing import Any

import torch.distributed as dist

from megatron_camopd.data import PackedBatch, PackedSet
from megatron_camopd.model.supervised import accumulate_cross_entropy, cross_entropy
from megatron_camopd.runtime import accelerator
from megatron_camopd.stages.metrics import Timer, seconds_of_phases
from megatron_camopd.stages.sft.plan import SftPlan, notes
from megatron_camopd.stages.training_loop import TrainingLoop


class SftRunner(TrainingLoop):
    """One supervised fine-tuning run on this rank; its construction is collective.

    Args:
        args: The arguments from ``parse_arguments``.
        plan: The plan from ``plan_sft``.
    """

    plan: SftPlan

    def __init__(self, args: Namespace, plan: SftPlan) -> None:
        super().__init__(args, plan)
        self.restore()
        if plan.validation is not None and dist.get_rank() == 0:
            print(plan.validation.summary("validation"), flush=True)
        for line in notes(plan):
            print(line, flush=True)

    def train_step(self) -> dict[str, Any]:
        """Do one optimizer step on a packed batch and return its record."""
        timer = Timer()
        with timer("data"):
            batch = self.plan.stream.next_batch(self.args.global_batch_size)
        with timer("train"):
            update = self.update(batch)
        record = {
            "step": self.step,
            "stage": "sft",
            **update,
            "trained_tokens": batch.trained_tokens,
            "tokens": batch.tokens,
            "conversations": batch.conversations,
            "packed_fraction": batch.tokens / (len(batch.rows) * self.args.seq_length),
            "microbatch_shapes": len(self.passes.shapes),
            "epoch": self.plan.stream.epochs,
            "conversations_truncated": self.plan.stream.truncated,
            "conversations_skipped": self.plan.stream.skipped,
            "conversations_split": self.plan.stream.split,
            "turns_dropped": self.plan.stream.turns_dropped,
        }
        done = self.step + 1
        validation = self.plan.validation
        if validation is not None and (done % self.args.eval_interval == 0 or done == self.args.train_iters):
            with timer("validation"):
                record["validation_loss"] = self.validation_loss(validation)
        return {**record, **timer.seconds, "peak_memory_gib": accelerator.peak_memory_bytes() / 2**30}

    def update(self, batch: PackedBatch) -> dict[str, Any]:
        """Do forward, backward and optimizer step; a step with non-finite loss or gradients changes nothing."""
        self.clear_gradients()
        conversations = [conversation for row in batch.rows for conversation in row]
        done = accumulate_cross_entropy(self.passes, self.model, conversations, batch.trained_tokens)
        return {**self.apply_gradients(done.loss), "train_balance": done.balance}

    def validation_loss(self, validation: PackedSet) -> float:
        """Return the mean of -log pi over the assistant tokens of all validation conversations, in nats."""
        conversations = [conversation for row in validation.batch.rows for conversation in row]
        with self.passes.uncounted():  # the last step validates, but a run may go on after it
            return float(cross_entropy(self.passes, self.model, conversations)) / validation.batch.trained_tokens

    @staticmethod
    def console_line(record: dict[str, Any]) -> str:
        """Return the record as one line for the console: loss, conversations, tokens, and seconds of the phases."""
        validation = f"  validation {record['validation_loss']:.4f}" if "validation_loss" in record else ""
        left_out = f"  ({record['conversations_skipped']} too long)" if record["conversations_skipped"] else ""
        left_out += f"  ({record['turns_dropped']} turns cut off)" if record["turns_dropped"] else ""
        skipped = "  SKIPPED: loss or gradient not finite" if record["skipped"] else ""
        return (
            f"step {record['step']:>4} loss {record['loss']:.4f}{validation}  grad {record['grad_norm']:.3f}  "
            f"conversations {record['conversations']}{left_out}  tokens {record['tokens']} "
            f"({record['trained_tokens'] / record['tokens']:.0%} trained)  packed {record['packed_fraction']:.0%}  "
            f"epoch {record['epoch']:.2f}  lr {record['learning_rate']:.1e}  "
            f"{seconds_of_phases(record, ('data', 'train', 'validation'))}{skipped}"
        )
