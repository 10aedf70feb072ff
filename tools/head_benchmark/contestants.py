"""The contestants: output heads that are measured on the same inputs, each through its own public call.

The training loss is - sum_n c_n w_n A_n logprob_n with A and w as constants. Packages that offer only the sum of the
cross-entropy train on that: the same matrix products with fewer operations on rows, a small advantage for them. In
forward mode a contestant computes the targets' log-probabilities; ours, verl, TRL and liger-scaled compute the entropy
as well.

To add one: derive from :class:`Contestant`, name the package and the version whose interface it follows, and list it in
CONTESTANTS.
"""

import importlib.metadata
import importlib.util
import os
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_camopd.kernels import distill_head, linear_logprob
from megatron_camopd.kernels.vocab_parallel import chunk_size
from tools.head_benchmark.problem import IMPORTANCE, Case, Problem


class Contestant:
    """A way to compute the output head.

    Attributes:
        name: Name on the command line and in the tables.
        note: Description for the report.
        module: Module that must be importable, None for torch and this package.
        distribution: Package that contains the module.
        version: Version of the package whose interface the adapter follows.
        needs_cuda: Whether it runs on CUDA alone.
        tensor_parallel: Whether it supports a weight that is sharded over ranks.
        tempers: Whether it supports a temperature other than 1.
        weighted: Whether it trains on the loss above, not on the plain sum of the cross-entropy.
        accumulates: Whether it adds the weight's gradient to ``Problem.weight_gradient``, which exists beforehand as
            Megatron's ``main_grad`` does; the others leave it in ``weight.grad``.
        preallocates: Whether ``prepare`` allocates all its memory, so that peak memory and errors say nothing.
    """

    name: ClassVar[str]
    note: ClassVar[str]
    module: ClassVar[str | None] = None
    distribution: ClassVar[str | None] = None
    version: ClassVar[str | None] = None
    needs_cuda: ClassVar[bool] = False
    tensor_parallel: ClassVar[bool] = False
    tempers: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    preallocates: ClassVar[bool] = False

    def obstacle(self, case: Case, device: torch.device) -> str | None:
        """Return why this contestant cannot run ``case`` on ``device``, or None if it can."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return "not installed"
        if self.needs_cuda and device.type != "cuda":
            return "not run: needs CUDA"
        if case.tp > 1 and not self.tensor_parallel:
            return "not run: no tensor parallelism"
        if case.temperature != 1.0 and not self.tempers:
            return "not run: no temperature"
        return None

    def prepare(self, problem: Problem, mode: str) -> None:
        """Allocate the buffers that exist before the measured call."""

    def release(self) -> None:
        """Release the buffers of ``prepare``."""

    def forward(self, problem: Problem) -> Tensor | None:
        """Return the targets' log-probabilities [N], or None if the contestant computes only their sum."""
        raise NotImplementedError

    def training(self, problem: Problem) -> None:
        """Run forward and backward; leave the gradients in ``hidden.grad`` and where ``accumulates`` says."""
        raise NotImplementedError


class Ours(Contestant):
    """The kernels of this package."""

    name = "ours"
    note = "linear_logprob (with entropy) and distill_head; dW is added to a given fp32 buffer"
    tensor_parallel = True
    accumulates = True

    def forward(self, problem: Problem) -> Tensor:
        """Return the targets' log-probabilities [N]."""
        return linear_logprob(
            problem.hidden,
            problem.weight,
            problem.targets,
            temperature=problem.temperature,
            tp_group=problem.group,
        )[0]

    def training(self, problem: Problem) -> None:
        """Run forward and backward."""
        loss, _ = distill_head(
            problem.hidden,
            problem.weight,
            problem.targets,
            problem.teacher_logprobs,
            problem.rollout_logprobs,
            problem.coefficients,
            importance=IMPORTANCE,
            temperature=problem.temperature,
            tp_group=problem.group,
            weight_gradient=problem.weight_gradient,
            loss_gradient=1.0,
        )
        loss.backward()


def surrogate_loss(problem: Problem, logprob: Tensor) -> Tensor:
    """Return - sum_n c_n w_n A_n logprob_n in plain torch, a scalar; differentiable in ``logprob`` [N] fp32."""
    _, low, high = IMPORTANCE
    constant = logprob.detach()
    ratio = torch.exp(constant - problem.rollout_logprobs)
    ratio = ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    return -(problem.coefficients * ratio * (problem.teacher_logprobs - constant) * logprob).sum()


class Materialised(Contestant):
    """Plain torch, with all logits in memory."""

    name = "materialised"
    note = "log_softmax((h @ W.T).float(), -1).gather() with autograd; no entropy"

    def forward(self, problem: Problem) -> Tensor:
        """Return the targets' log-probabilities [N]."""
        logits = (problem.hidden @ problem.weight.T).float()
        if problem.temperature != 1.0:
            logits = logits / problem.temperature
        return torch.log_softmax(logits, -1).gather(1, problem.targets[:, None])[:, 0]

    def training(self, problem: Problem) -> None:
        """Run forward and backward."""
        surrogate_loss(problem, self.forward(problem)).backward()


class TorchChunked(Contestant):
    """The chunked linear cross-entropy of torch."""

    name = "torch-chunked"
    note = "torch.nn.functional.linear_cross_entropy in chunks of 256 tokens; trains on the plain sum"
    distribution, version = "torch", "2.13"
    tempers = False
    weighted = False

    def obstacle(self, case: Case, device: torch.device) -> str | None:
        """Return why this contestant cannot run ``case``, or None; it needs a torch that has the function."""
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return "not installed: needs torch 2.13"
        return super().obstacle(case, device)

    def _loss(self, problem: Problem, reduction: str) -> Tensor:
        # Its default grows with N: 128 tokens at N 8,192, but 4 at N 1,024, which is ten times slower on a CPU.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
        return torch.nn.functional.linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction=reduction, options=options
        )

    def forward(self, problem: Problem) -> Tensor:
        """Return the targets' log-probabilities [N]."""
        return -self._loss(problem, "none")

    def training(self, problem: Problem) -> None:
        """Run forward and backward."""
        self._loss(problem, "sum").backward()


class Liger(Contestant):
    """Liger's fused linear cross-entropy."""

    name = "liger"
    note = "liger_fused_linear_cross_entropy, fp32 accumulation; trains on the plain sum"
    module, distribution, version = "liger_kernel", "liger-kernel", "0.8.2"
    needs_cuda = True
    tempers = False
    weighted = False

    def _loss(self, problem: Problem, reduction: str) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction=reduction, accum_dtype=torch.float32
        )

    def forward(self, problem: Problem) -> Tensor:
        """Return the targets' log-probabilities [N]."""
        return -self._loss(problem, "none")

    def training(self, problem: Problem) -> None:
        """Run forward and backward."""
        self._loss(problem, "sum").backward()


class LigerScaled(Contestant):
    """Liger's fused linear cross-entropy with a gradient for every token's loss."""

    name = "liger-scaled"
    note = (
        "LigerFusedLinearScaledCrossEntropyFunction: CuTe kernels for bf16 on Hopper, 512-token torch chunks elsewhere"
    )
    module, distribution, version = "liger_kernel", "liger-kernel", "0.8.2"

    def _logprob(self, problem: Problem, entropy: bool) -> Tensor:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

        result = LigerFusedLinearScaledCrossEntropyFunction.apply(
            problem.hidden, problem.weight, problem.targets, problem.temperature, -100, 1, entropy
        )
        return -(result[0] if entropy else result)

    def forward(self, problem: Problem) -> Tensor:
        """Return the targets' log-probabilities [N]."""
        return self._logprob(problem, entropy=True)

    def training(self, problem: Problem) -> None:
        """Run forward and backward."""
        surrogate_loss(problem, self._logprob(problem, entropy=False)).backward()


class Trl(Contestant):
    """The chunked cross-entropy of TRL's SFTTrainer."""

    name = "trl"
    note = "SFTTrainer's chunked cross-entropy (256 tokens, checkpointed): the plain sum alone comes out; with entropy"
    module, distribution, version = "trl", "trl", "1.9.0"
    weighted = False

    def _loss(self, problem: Problem) -> Tensor:
        from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_cross_entropy_loss

        return _chunked_cross_entropy_loss(
            problem.hidden[None],
            problem.weight,
            _CHUNKED_LM_HEAD_CHUNK_SIZE,
            shift_labels=problem.targets[None],
            num_items_in_batch=1,
            logit_scale=1.0 / problem.temperature,
        )[0]

    def forward(self, problem: Problem) -> None:
        """Compute the sum of the targets' log-probabilities; no log-probability of a single token comes out."""
        self._loss(problem)

    def training(self, problem: Problem) -> None:
        """Run forward and backward."""
        self._loss(problem).backward()


class Verl(Contestant):
    """The linear cross-entropy kernel of verl."""

    name = "verl"
    note = "linear_cross_entropy (Triton, logits computed again in backward); with entropy"
    module, distribution, version = "verl", "verl", "0.7.0"
    needs_cuda = True
    tensor_parallel = True

    def forward(self, problem: Problem) -> Tensor:
        """Return the targets' log-probabilities [N]."""
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, problem.temperature, "none", problem.group
        )[0]

    def training(self, problem: Problem) -> None:
        """Run forward and backward."""
        surrogate_loss(problem, self.forward(problem)).backward()
        if problem.group is not None:  # verl leaves this reduction to its caller
            dist.all_reduce(problem.hidden.grad, group=problem.group)


class Products(Contestant):
    """The matrix products alone: a lower bound of the time.

    Their outputs are allocated beforehand: all logits if they fit into a quarter of the memory, else as many tokens at
    a time as our kernels take. With 16-bit inputs, logits and dW are fp32 on CUDA; a CPU has no such product, so there
    all outputs have the inputs' dtype. The gradient of the logits is the logits themselves or random numbers. With
    tensor parallelism each rank multiplies its shard, without communication.
    """

    name = "products"
    note = "the bare matrix products (1 forward, 3 training), outputs allocated beforehand; local ones with tp"
    tensor_parallel = True
    accumulates = True
    preallocates = True

    def prepare(self, problem: Problem, mode: str) -> None:
        """Allocate all outputs."""
        tokens, width, dtype = len(problem.hidden), len(problem.weight), problem.hidden.dtype
        self.mixed = problem.hidden.is_cuda and dtype != torch.float32
        self.logits_dtype = torch.float32 if self.mixed else dtype
        separate = self.mixed and mode == "training"
        row_bytes = width * (self.logits_dtype.itemsize + separate * dtype.itemsize)
        fits = tokens * row_bytes <= memory_bytes(problem.hidden.device) // 4
        self.chunk = tokens if fits else min(tokens, chunk_size(tokens, width, problem.hidden.device))
        # Filled, because the first write to new pages would add to the time of the first product.
        self.logits = problem.hidden.new_empty(self.chunk, width, dtype=self.logits_dtype).fill_(0.01)
        self.grad_logits = torch.empty_like(self.logits, dtype=dtype).normal_(std=0.01) if separate else self.logits
        self.grad_hidden = torch.zeros_like(problem.hidden)
        self.grad_weight = problem.weight_gradient
        if mode == "training" and not self.mixed and dtype != torch.float32:
            self.grad_weight = torch.zeros_like(problem.weight)

    def release(self) -> None:
        """Release all outputs."""
        vars(self).clear()

    def _chunks(self, problem: Problem) -> list[slice]:
        """Return the tokens of each chunk."""
        tokens = len(problem.hidden)
        return [slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]

    def _logits(self, problem: Problem, rows: slice) -> None:
        """Compute the logits of the tokens ``rows``."""
        hidden, out = problem.hidden.detach()[rows], self.logits[: rows.stop - rows.start]
        if self.mixed:
            torch.mm(hidden, problem.weight.detach().t(), out_dtype=torch.float32, out=out)
        else:
            torch.mm(hidden, problem.weight.detach().t(), out=out)

    def forward(self, problem: Problem) -> None:
        """Compute the logits."""
        for rows in self._chunks(problem):
            self._logits(problem, rows)

    def training(self, problem: Problem) -> None:
        """Compute the logits and both gradients."""
        for rows in self._chunks(problem):
            self._logits(problem, rows)
            hidden, grad_logits = problem.hidden.detach()[rows], self.grad_logits[: rows.stop - rows.start]
            torch.mm(grad_logits, problem.weight.detach(), out=self.grad_hidden[rows])
            total = self.grad_weight
            assert total is not None  # prepare() was called for training
            if self.mixed:
                torch.addmm(total, grad_logits.t(), hidden, out_dtype=torch.float32, out=total)
            else:
                total.addmm_(grad_logits.t(), hidden)


def memory_bytes(device: torch.device) -> int:
    """Return the total memory of ``device`` in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


CONTESTANTS: dict[str, Contestant] = {
    entry.name: entry
    for entry in (Ours(), Materialised(), Products(), TorchChunked(), Liger(), LigerScaled(), Trl(), Verl())
}


def installed_versions() -> dict[str, str | None]:
    """Return the versions of torch, Triton and every contestant's package, None where it is not installed."""
    packages = ["triton"] + [entry.distribution for entry in CONTESTANTS.values() if entry.distribution]
    versions: dict[str, str | None] = {"torch": torch.__version__}  # the full version, with the CUDA it was built for
    for package in dict.fromkeys(packages):
        if package in versions:
            continue
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
