"""The inputs of one measurement, and what float64 says about them.

Letters: N tokens, H hidden size, V vocabulary size; a rank of the tensor-parallel group holds V / tp weight rows.
Logits spread by about 2.5 nats, as a language model's do. Every fourth row has its target as a peak and every fourth
another token (20 nats above its random logit): that is where 16-bit logits go wrong. No token is masked, so that all
contestants multiply the same matrices.

The reference streams over blocks of vocabulary rows: [N, V] never exists, neither in float64 nor otherwise.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

IMPORTANCE = ("mask", 0.5, 5.0)  # mode, lower and upper limit of the importance weight, as CaMOPD's default
LOGIT_SPREAD = 2.5  # nats
PEAK = 20.0  # nats
REFERENCE_BLOCK = 2**24  # elements of a float64 block: 128 MiB


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the grid. ``vocab`` counts the whole vocabulary; ``dtype`` is torch's name of hidden and weight."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    temperature: float = 1.0
    tp: int = 1


@dataclasses.dataclass
class Problem:
    """What every contestant is given.

    hidden [N, H] and weight [V / tp, H] of one dtype; targets [N] int64; teacher_logprobs, rollout_logprobs and
    coefficients [N] fp32; exact_logprobs [N] float64, the tempered log-probabilities of the targets; weight_gradient
    [V / tp, H] fp32, a buffer as Megatron's main_grad, None unless the weight's gradient is wanted in it.
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
        """Drop the gradients and set which inputs of the next call get one."""
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
    """The inputs of ``case``, the same ones every time; ``exact_logprobs`` [N] where an earlier call found them.

    Teacher and rollout lie around the student's log-probabilities: gaps of about 0.5, importance weights near 1.
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
    """The weight rows [K, H] fp32 of the vocabulary ids [K], whichever rank holds them."""
    local = ids - (0 if group is None else dist.get_rank(group) * weight.shape[0])
    owned = (local >= 0) & (local < weight.shape[0])
    rows = weight[local.where(owned, 0)].float().masked_fill_(~owned[:, None], 0.0)
    return _summed(rows, group)


def reference_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: dist.ProcessGroup | None
) -> Tensor:
    """log softmax(hidden weight^T / temperature) at the targets, [N] float64."""
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
    """c w A of every token, [N] float64: its log-probability's share of the loss, negated."""
    _, low, high = IMPORTANCE
    logprob = problem.exact_logprobs
    ratio = torch.exp(logprob - problem.rollout_logprobs.double())
    kept = (ratio >= low) & (ratio <= high)
    return problem.coefficients * torch.where(kept, ratio, 0.0) * (problem.teacher_logprobs - logprob)


def reference_gradients(
    problem: Problem, strength: Tensor, tokens: Tensor, vocabulary: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of - sum_n strength_n logprob_n in float64.

    Of hidden at the rows ``tokens`` [K]: [K, H]. Of weight at this rank's rows ``vocabulary`` [M]: [M, H].
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
    return (wide * weight_rows(weight, targets, group).double()).sum(dim=1) / temperature


def _double_blocks(weight: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of weight rows in float64, small enough that neither they nor their logits exceed REFERENCE_BLOCK."""
    step = max(1, REFERENCE_BLOCK // max(tokens, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, weight[rows].double()


def _summed(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(part, group=group)
    return part
