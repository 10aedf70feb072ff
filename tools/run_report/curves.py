"""The metrics that are drawn over the steps, section by section: titles, units, captions."""

from collections.abc import Callable
from functools import partial

from tools.run_report.drawing import Curve
from tools.run_report.reading import Run
from tools.run_report.series import Series, branch_norms, by_branch, by_pair, whole


def branches(metric: str) -> Callable[[Run], list[Series]]:
    """Return a function that makes a run's series of ``metric``, one for each branch."""
    return partial(by_branch, name=metric)


def branch_pairs(metric: str) -> Callable[[Run], list[Series]]:
    """Return a function that makes a run's series of ``metric``, one for each pair of branches."""
    return partial(by_pair, name=metric)


def all_steps(metric: str) -> Callable[[Run], list[Series]]:
    """Return a function that makes a run's one series of ``metric`` over all steps."""
    return partial(whole, name=metric)


OUTCOME = (
    Curve(
        "gap",
        "Gap between teacher and student",
        "|gap| (nats)",
        "Mean |log p(teacher) - log p(student)| over response tokens, in nats; each branch has its own teacher.",
        branches("gap_abs_mean"),
        wide=True,
    ),
    Curve(
        "reverse-kl",
        "Reverse KL",
        "Reverse KL (nats)",
        "Reverse KL divergence of the student from the step's teacher,"
        " in nats a token, estimated on the student's own responses.",
        branches("reverse_kl"),
        level=0.0,
    ),
    Curve(
        "loss",
        "Loss",
        "Loss",
        "Training loss of each step, advantage times log-probability (nats squared); it moves with the gap, so a small"
        " value means little feedback rather than a good model.",
        branches("loss"),
        level=0.0,
        skipped=True,
    ),
    Curve(
        "entropy",
        "Entropy of the student",
        "Entropy (nats)",
        "Mean entropy of the student's next-token distribution over response tokens, in nats.",
        branches("entropy_mean"),
    ),
)
SELECTION = (
    Curve(
        "selected-fraction",
        "Selected samples",
        "Selected (%)",
        "Percentage of the samples of a step that selection kept for training.",
        branches("selected_fraction"),
        percent=True,
    ),
    Curve(
        "kept-tokens",
        "Kept tokens",
        "Kept (%)",
        "Percentage of response tokens that Relaxed OPD kept for training.",
        branches("kept_token_fraction"),
        percent=True,
    ),
    Curve(
        "acceptance",
        "Accepted tokens",
        "Accepted (%)",
        "Percentage of response tokens that SelecTKD's teacher accepted.",
        branches("acceptance_rate"),
        percent=True,
    ),
)
GRADIENTS = (
    Curve(
        "coherence-gain",
        "Gradient coherence gain",
        "GCG (%)",
        "Gradient coherence of the selected samples relative to"
        " that of all samples, in percent; above zero, the selected gradients agree better.",
        branches("gradient_coherence_gain"),
        level=0.0,
    ),
    Curve(
        "coherence-full",
        "Coherence of all samples",
        "Coherence (0 to 1)",
        "Norm of the sum of the samples' gradients"
        " over the sum of their norms, without unit: 1 if all point one way, 0 if they cancel.",
        branches("coherence_full"),
    ),
    Curve(
        "coherence-selected",
        "Coherence of selected samples",
        "Coherence (0 to 1)",
        "The same ratio, without unit, for the selected samples alone.",
        branches("coherence_selected"),
    ),
    Curve(
        "branch-dot-product",
        "Dot product of the branches' gradients",
        "Dot product",
        "Inner product of the mean gradients of two branches at the same parameters (squared gradient units); below"
        " zero they counteract.",
        branch_pairs("branch_dot_product"),
        level=0.0,
    ),
    Curve(
        "branch-cosine",
        "Cosine of the branches' gradients",
        "Cosine (-1 to 1)",
        "Cosine of the angle between the same two gradients, without unit; below zero they counteract.",
        branch_pairs("branch_cosine"),
        level=0.0,
    ),
    Curve(
        "branch-norms",
        "Norms of the branches' gradients",
        "Norm",
        "Norm of each branch's mean gradient at the same parameters (gradient units).",
        branch_norms,
        wide=True,
    ),
)
GINI = Curve(
    "gini",
    "Concentration of the gap",
    "Gini coefficient",
    "Gini coefficient of the samples' gap scores, without"
    " unit: 0 if all samples carry the same, towards 1 if few carry everything.",
    branches("gap_gini"),
)
ROLLOUTS = (
    Curve(
        "importance-mean",
        "Importance weight",
        "Mean weight",
        "Mean importance weight, student over rollout engine, as applied in training (a ratio); 1 where both agree.",
        branches("importance_mean"),
        level=1.0,
    ),
    Curve(
        "importance-outside",
        "Ratios outside the limits",
        "Outside (%)",
        "Percentage of response tokens whose ratio the correction masks or clips.",
        branches("importance_outside_fraction"),
        percent=True,
    ),
    Curve(
        "importance-effective",
        "Effective sample size",
        "Effective (%)",
        "Effective sample size of the bare importance ratios, in percent of the tokens.",
        branches("importance_effective_fraction"),
        percent=True,
    ),
    Curve(
        "mismatch",
        "Mismatch of rollout and trainer",
        "Mean difference (nats)",
        "Mean |log p(engine) - log p(trainer)| of the sampled tokens at the same weights, in nats.",
        branches("rollout_train_logprob_abs_diff"),
        wide=True,
    ),
    Curve(
        "response-length",
        "Response length",
        "Tokens",
        "Mean length of the responses, in tokens.",
        branches("response_length_mean"),
    ),
    Curve(
        "truncated",
        "Truncated responses",
        "Truncated (%)",
        "Percentage of responses that reached the length limit before they ended.",
        branches("truncated_fraction"),
        percent=True,
    ),
)
OPTIMIZER = (
    Curve(
        "grad-norm",
        "Gradient norm",
        "Norm",
        "Norm of the step's gradient before clipping (gradient units).",
        branches("grad_norm"),
        wide=True,
        skipped=True,
    ),
    Curve(
        "learning-rate",
        "Learning rate",
        "Learning rate",
        "Learning rate of each step (a factor, no unit).",
        all_steps("learning_rate"),
    ),
)
COST = (
    Curve(
        "tokens",
        "Tokens per step",
        "Tokens",
        "Prompt and response tokens of each step's global batch.",
        branches("tokens"),
    ),
    Curve(
        "throughput",
        "Throughput",
        "Tokens per second",
        "Prompt and response tokens of a step over the time of all its"
        " phases, in tokens per second, all ranks together.",
        branches("tokens_per_second"),
    ),
    Curve("memory", "Peak memory", "GiB", "Peak memory of rank 0 so far, in GiB.", all_steps("peak_memory_gib")),
)
