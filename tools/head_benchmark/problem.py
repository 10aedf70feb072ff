"""The inputs of one measurement, and the exact results in float64.

Letters: N tokens, H hidden size, V vocabulary size; a rank of the tensor-parallel group holds V / tp weight rows.
The standard deviation of the logits is about 2.5 nats, as in a language model. In every fourth row the target, and in
another fourth another token, gets a logit 20 nats above its random one: with such peaks 16-bit logits are inaccurate.
No token is masked, so that all contestants multiply the same matrices.

The reference works through blocks of vocabulary rows, so that a float64 matrix [N, V] never exists.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

IMPORTANCE = ("mask", 0.5, 5.0)  # mode, lower and upper bound of the importance weights: CaMOPD's default
LOGIT_SPREAD = 2.5  # nats
PEAK = 20.0  # nats
REFERENCE_BLOCK = 2**24  # elements of a float64 block: 128 MiB


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the grid.

    Attributes:
        tokens: N.
        hidden: H.
        vocab: V, over all ranks.
        dtype: Torch's name of the dtype of hidden states and weight.
        temperature: Divides the logits.
        tp: Size of the tensor-parallel group.
    """

    tokens: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    temperature: float = 1.0
    tp: int = 1


@dataclasses.dataclass
class Problem:
    """Inputs of every contestant.

    Attributes:
        hidden: [N, H] hidden states.
        weight: [V / tp, H] this rank's shard of the output weight, of the same dtype.
        targets: [N] int64 target ids.
        teacher_logprobs: [N] fp32, nats.
        rollout_logprobs: [N] fp32, nats.
        coefficients: [N] fp32.
        exact_logprobs: [N] float64 log-probabilities of the targets at the temperature, nats.
        temperature: Divides the logits.
        group: Tensor-parallel group, None for a single process.
        weight_gradient: [V / tp, H] fp32 buffer that works as Megatron's ``main_grad``, or None.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    teacher_logprobs: Tensor
    rollout_logprobs: Tensor
    coefficients: Tensor
    exact_logprobs: Tensor
    temperature: float
    group: dist.ProcessGroup | None
    weight_gradient: Tensor | None = None

    def wants_gradients(self, hidden: bool, weight: bool) -> None:
        """Drop the gradients, and set which inputs get one in the next call."""
        self.hidden.grad = self.weight.grad = None
        self.hidden.requires_grad_(hidden)
        self.weight.requires_grad_(weight)

    @property
    def first_row(self) -> int:
        """Vocabulary id of this rank's first weight row."""
        return 0 if self.group is None else dist.get_rank(self.group) * self.weight.shape[0]


def make_problem(
    case: Case, device: torch.device, group: dist.ProcessGroup | None, exact_logprobs: Tensor | None = None
) -> Problem:
    """Make the inputs of ``case``, the same in every call.

    Teacher and rollout log-probabilities are close to the student's: gaps of about 0.5 nats, importance weights near 1.

    Args:
        case: Sizes and dtype.
        device: Device of the inputs.
        group: Tensor-parallel group, None for a single process.
        exact_logprobs: [N] float64 result of an earlier call, which saves computing it again.
    """
    dtype = getattr(torch, case.dtype)
    common = torch.Generator(device).manual_seed(0)
    own = torch.Generator(device).manual_seed(1 + (0 if group is None else dist.get_rank(group)))
    weight = torch.empty(case.vocab // case.tp, case.hidden, dtype=dtype, device=device)
    weight.normal_(std=LOGIT_SPREAD / case.hidden**0.5, generator=own)
    targets, others = torch.randint(case.vocab, (2, case.tokens), generator=common, device=device).unbind()

    hidden = torch.randn(case.tokens, case.hidden, generator=common, device=device)
    row = torch.arange(case.tokens, device=device)
    direction = weight_rows(weight, torch.where(row % 4 == 1, targets, others), group)
    lift = direction * (PEAK * case.temperature / direction.square().sum(dim=1, keepdim=True))
    hidden = torch.where((row % 2 == 1)[:, None], hidden + lift, hidden).to(dtype)

    if exact_logprobs is None:
        exact_logprobs = reference_logprobs(hidden, weight, targets, case.temperature, group)
    noise = torch.randn(2, case.tokens, generator=common, device=device)
    centre = exact_logprobs.to(device)
    return Problem(
        hidden,
        weight,
        targets,
        teacher_logprobs=(centre + 0.5 * noise[0]).float(),
        rollout_logprobs=(centre + 0.05 * noise[1]).float(),
        coefficients=0.5 + torch.rand(case.tokens, generator=common, device=device),
        exact_logprobs=centre,
        temperature=case.temperature,
        group=group,
    )


def weight_rows(weight: Tensor, ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the weight rows [K, H] fp32 of the vocabulary ids [K], from all ranks."""
    local = ids - (0 if group is None else dist.get_rank(group) * weight.shape[0])
    owned = (local >= 0) & (local < weight.shape[0])
    rows = weight[local.where(owned, 0)].float().masked_fill_(~owned[:, None], 0.0)
    return _summed(rows, group)


def reference_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Compute log softmax(hidden weight^T / temperature) at the targets, [N] float64."""
    wide = hidden.double()
    log_mass = wide.new_full(targets.shape, -torch.inf)
    for _, block in _double_blocks(weight, len(hidden)):
        log_mass = torch.logaddexp(log_mass, (wide @ block.t()).div_(temperature).logsumexp(dim=1))
    if group is not None:
        parts = [torch.empty_like(log_mass) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, log_mass, group=group)
        log_mass = torch.stack(parts).logsumexp(dim=0)
    return _target_logits(wide, weight, targets, temperature, group) - log_mass


def reference_strength(problem: Problem) -> Tensor:
    """Compute c w A of every token, [N] float64: minus the derivative of the loss by its log-probability."""
    _, low, high = IMPORTANCE
    logprob = problem.exact_logprobs
    ratio = torch.exp(logprob - problem.rollout_logprobs.double())
    kept = (ratio >= low) & (ratio <= high)
    return problem.coefficients * torch.where(kept, ratio, 0.0) * (problem.teacher_logprobs - logprob)


def reference_gradients(
    problem: Problem, strength: Tensor, tokens: Tensor, vocabulary: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute rows of the gradients of - sum_n strength_n logprob_n in float64.

    Returns:
        The gradient of hidden at its rows ``tokens`` [K], [K, H], and that of this rank's weight at its rows
        ``vocabulary`` [M], [M, H].
    """
    scale = strength / problem.temperature
    wide = problem.hidden.detach().double()
    weight = problem.weight.detach()
    target_logits = _target_logits(wide, weight, problem.targets, problem.temperature, problem.group)
    log_mass = target_logits - problem.exact_logprobs
    local_targets = problem.targets - problem.first_row

    sampled = wide[tokens]
    to_hidden = torch.zeros_like(sampled)
    for rows, block in _double_blocks(weight, len(tokens)):
        probabilities = torch.exp((sampled @ block.t()).div_(problem.temperature) - log_mass[tokens, None])
        inside = (local_targets[tokens] >= rows.start) & (local_targets[tokens] < rows.stop)
        probabilities[inside, local_targets[tokens][inside] - rows.start] -= 1.0
        to_hidden += scale[tokens, None] * (probabilities @ block)

    logits = (wide @ weight[vocabulary].double().t()).div_(problem.temperature)
    hits = local_targets[:, None] == vocabulary[None, :]
    to_weight = (scale[:, None] * (torch.exp(logits - log_mass[:, None]) - hits.double())).t() @ wide
    return _summed(to_hidden, problem.group), to_weight


def _target_logits(
    wide: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Compute the targets' logits / temperature, [N] float64."""
    return (wide * weight_rows(weight, targets, group).double()).sum(dim=1) / temperature


def _double_blocks(weight: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of weight rows in float64; neither a block nor its logits exceed REFERENCE_BLOCK elements."""
    step = max(1, REFERENCE_BLOCK // max(tokens, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, weight[rows].double()


def _summed(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``part`` over the group, in place."""
    if group is not None:
        dist.all_reduce(part, group=group)
    return part
