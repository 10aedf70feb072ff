"""Megatron as rollout engine: batched decoding with the trained weights themselves and Megatron's static KV cache.

There is no copy of the weights, so nothing has to be synchronised and rollouts always come from the current student.
The engine works at any tensor- and pipeline-parallel size. It is simple and exact, but slower than vLLM on long
responses.

Megatron's static cache has one offset for the whole batch. Prompts of different lengths share a batch as follows: as
many columns as the shortest prompt has are prefilled for all rows; from there on every row is fed token by token, first
the rest of its prompt, then its own samples. So there is no padding that a row could attend to. Prompts are sorted by
length before they are batched, which keeps the part short in which prompts are fed token by token. As soon as a quarter
of the batch has ended, those rows leave the batch and the cache. The cache grows with the responses, where Megatron
would allocate it for the longest response allowed.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from megatron.core.utils import unwrap_model
from torch import Tensor
from tqdm import tqdm

from megatron_camopd.batch import RolloutBatch
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.config.settings import Settings, at_least, setting
from megatron_camopd.errors import ConfigurationError
from megatron_camopd.model.output_head import answer_request
from megatron_camopd.rollout.engine import RolloutEngine
from megatron_camopd.rollout.sampling import sample_tokens
from megatron_camopd.runtime import accelerator
from megatron_camopd.runtime.layout import Layout

_COMPACT_WHEN_ENDED = 0.25  # copying the cache moves about as many bytes as one decoding step reads
_CACHE_BLOCK = 256  # smallest number of columns by which the cache grows
_CACHE_GROWTH = 1.25


@dataclass
class _NextToken:
    """Request to the output head: sample the next token of the n rows whose prompt has ended.

    Attributes:
        positions: [n] int64, the rows' last positions in the flattened hidden states.
        indices: [n] int64, the rows' indices in the global batch.
        response_positions: [n] int64, position of the token within its response.
        engine: The engine, for its seed, temperature and vocabulary.
        step: Training step.
    """

    positions: Tensor
    indices: Tensor
    response_positions: Tensor
    engine: "MegatronEngine"
    step: int

    def compute(self, hidden: Tensor, weight: Tensor, *, tp_group: Any, reduce_hidden_grad: bool) -> dict[str, Tensor]:
        token, logprob = sample_tokens(
            hidden,
            weight,
            seed=self.engine.seed,
            step=self.step,
            indices=self.indices,
            response_positions=self.response_positions,
            temperature=self.engine.temperature,
            valid_vocab_size=self.engine.vocab_size,
            tp_group=tp_group,
        )
        return {"token": token, "logprob": logprob}


@dataclass(frozen=True, kw_only=True)
class MegatronEngineSettings(Settings):
    """CaMOPD rollouts by Megatron: used only with --rollout-engine megatron."""

    rollout_batch_size: int = setting(64, within=at_least(1))
    """megatron engine: sequences decoded at once on a data-parallel rank"""

    @classmethod
    def check_run(cls, args: Namespace) -> None:
        """Check that the layers can decode whole sequences."""
        if args.context_parallel_size > 1 and args.transformer_impl != "local":
            raise ConfigurationError(
                "--rollout-engine megatron: Transformer Engine's attention cannot decode with --context-parallel-size "
                f"{args.context_parallel_size}; use --rollout-engine vllm"
            )


def build(args: Namespace, model: Sequence[MegatronModule], end_of_sequence_ids: Sequence[int]) -> RolloutEngine:
    """Build the engine that decodes with ``model`` itself, the student (this rank's model chunks)."""
    sampling = SamplingSettings.of(args)
    return MegatronEngine(
        model[0],
        seed=args.seed,
        temperature=sampling.rollout_temperature,
        end_of_sequence_ids=end_of_sequence_ids,
        max_response_length=sampling.max_response_length,
        vocab_size=args.vocab_size,
        batch_size=MegatronEngineSettings.of(args).rollout_batch_size,
        progress=dist.get_rank() == 0,
    )


class MegatronEngine:
    """Rollout engine that decodes with the student's own weights; implements :class:`~.engine.RolloutEngine`.

    The KV cache holds running sequences x columns in use (up to 25% more) x layers x 2 x key-value heads x head_dim
    elements, divided among the pipeline stages and tensor-parallel ranks.

    Args:
        model: This rank's model chunk, DDP-wrapped or not.
        seed: The run's seed.
        temperature: Sampling temperature; 0 takes the most likely token.
        end_of_sequence_ids: Token ids that end a response.
        max_response_length: Largest number of tokens of a response.
        vocab_size: Size of the vocabulary without Megatron's padding.
        batch_size: Largest number of sequences decoded at once on one data-parallel rank.
        progress: Whether to show a progress bar, if the console is a terminal.
    """

    def __init__(
        self,
        model: MegatronModule,
        *,
        seed: int,
        temperature: float,
        end_of_sequence_ids: Sequence[int],
        max_response_length: int,
        vocab_size: int,
        batch_size: int,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.seed = seed
        self.temperature = temperature
        self.end_ids = torch.tensor(sorted(end_of_sequence_ids), device=accelerator.current().device)
        self.max_response_length = max_response_length
        self.vocab_size = vocab_size
        self.batch_size = batch_size
        self.progress = progress

    def synchronize(self, *, step: int) -> None:
        """Do nothing: the engine decodes with the trained weights themselves."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], indices: Tensor, *, step: int) -> RolloutBatch:
        """Sample one response for each prompt; see :meth:`~.engine.RolloutEngine.generate`."""
        self.model.eval()
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        batches = []
        with _whole_sequences(self.model), self._bar(len(prompts), step) as bar:
            for start in range(0, len(prompts), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                decoder = _Decoder(self, [prompts[row] for row in rows], indices[rows], step)
                batches.append(decoder.run(bar))
        return RolloutBatch.concatenate(batches).take(torch.argsort(torch.argsort(indices)))

    def _bar(self, total: int, step: int) -> tqdm:
        hidden = None if self.progress else True  # None: tqdm hides the bar where the console is no terminal
        return tqdm(total=total, desc=f"step {step} rollout", unit="seq", leave=False, disable=hidden)


class _Decoder:
    """Decoding of one batch of prompts, from the prefill to the end of the last response.

    ``rows`` are the rows that are still running. The results (tokens, log-probabilities, lengths) keep all rows of the
    batch; the KV cache keeps the running rows only.
    """

    def __init__(self, engine: MegatronEngine, prompts: Sequence[Sequence[int]], indices: Tensor, step: int) -> None:
        self.engine, self.step = engine, step
        self.model, self.layout = unwrap_model(engine.model), Layout.current()
        device = accelerator.current().device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.total = int(lengths.max()) + engine.max_response_length
        self.tokens = torch.zeros(len(prompts), self.total, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt)
        self.tokens = self.tokens.to(device)
        self.indices, self.prompt_lengths = indices.to(device), lengths.to(device)
        self.response_lengths = torch.zeros_like(self.prompt_lengths)
        self.logprobs = torch.zeros(len(prompts), engine.max_response_length, dtype=torch.float32, device=device)
        self.truncated = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.rows = torch.arange(len(prompts), device=device)
        capacity = min(self.total, int(lengths.min()) + _CACHE_BLOCK)
        self.context = StaticInferenceContext(max_batch_size=len(prompts), max_sequence_length=capacity)

    def run(self, bar: tqdm) -> RolloutBatch:
        """Decode until every response has ended; ``bar`` advances by one for each."""
        cursor = int(self.prompt_lengths.min())  # columns [0, cursor) of every row are known
        inputs = self.tokens[:, :cursor]
        running = torch.ones_like(self.truncated)
        while len(self.rows):
            sampled, logprob, sampling = self._forward(inputs, cursor)
            self._record(sampled, logprob, sampling & running, cursor)
            ended = self._ended(sampling & running, cursor)
            bar.update(int(ended.sum()))
            running &= ~ended
            if not running.any() or (~running).float().mean() >= _COMPACT_WHEN_ENDED:
                running = self._compact(running)
            inputs = self.tokens[self.rows, cursor : cursor + 1]
            cursor += 1
            if cursor > self.context.max_sequence_length:
                grown = max(cursor + _CACHE_BLOCK, int(cursor * _CACHE_GROWTH))
                self._copy_cache(slice(None), min(self.total, grown))
        return self._result()

    def _forward(self, inputs: Tensor, cursor: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model on ``inputs`` [n, s], the s columns before column ``cursor``, and sample that column.

        Only rows whose prompt has ended are sampled.

        Returns:
            Tokens [n] int64, log-probabilities [n] float32, and whether each row was sampled [n] bool. Tokens and
            log-probabilities of the other rows are 0.
        """
        count, width = inputs.shape
        sampling = self.prompt_lengths[self.rows] <= cursor
        wanted = sampling.nonzero().flatten()
        request = _NextToken(
            positions=wanted * width + width - 1,
            indices=self.indices[self.rows][wanted],
            response_positions=cursor - self.prompt_lengths[self.rows][wanted],
            engine=self.engine,
            step=self.step,
        )
        answer = self._through_stages(inputs, cursor - width, request)
        self.context.sequence_len_offset = cursor
        result = torch.zeros(2, len(wanted), dtype=torch.float64, device=inputs.device)
        if answer is not None:
            result = torch.stack([answer["token"].double(), answer["logprob"].double()])
        if self.layout.pipeline.size > 1:
            dist.broadcast(result, self.layout.stage_rank(-1), group=self.layout.pipeline.group)
        token = torch.zeros(count, dtype=torch.int64, device=inputs.device)
        logprob = torch.zeros(count, dtype=torch.float32, device=inputs.device)
        token[wanted], logprob[wanted] = result[0].long(), result[1].float()
        return token, logprob, sampling

    def _through_stages(self, inputs: Tensor, offset: int, request: _NextToken) -> dict[str, Tensor] | None:
        """Run this rank's pipeline stage; return the output head's answer on the last stage, None on the others."""
        count, width = inputs.shape
        stage = self.layout.pipeline.rank
        if not self.layout.first_stage:
            shape = (width, count, self.model.config.hidden_size)
            received = torch.empty(shape, dtype=self.model.config.params_dtype, device=inputs.device)
            dist.recv(received, self.layout.stage_rank(stage - 1))
            self.model.set_input_tensor(received)
        output = self.model(
            inputs,
            torch.arange(offset, offset + width, device=inputs.device).expand(count, width),
            None,
            inference_context=self.context,
            output_processor=answer_request,
            output_processor_context=request,
        )
        if self.layout.last_stage:
            answer: dict[str, Any] | None = output
            return answer
        dist.send(output.contiguous(), self.layout.stage_rank(stage + 1))
        return None

    def _record(self, sampled: Tensor, logprob: Tensor, writing: Tensor, cursor: int) -> None:
        rows = self.rows[writing]
        self.tokens[rows, cursor] = sampled[writing]
        column = cursor - self.prompt_lengths[rows]
        self.logprobs[rows, column] = logprob[writing]
        self.response_lengths[rows] = column + 1

    def _ended(self, writing: Tensor, cursor: int) -> Tensor:
        """Return which running rows end with column ``cursor``, by an end-of-sequence token or at the length limit."""
        stopped = writing & torch.isin(self.tokens[self.rows, cursor], self.engine.end_ids)
        full = writing & (self.response_lengths[self.rows] >= self.engine.max_response_length)
        self.truncated[self.rows[full & ~stopped]] = True
        return stopped | full

    def _compact(self, running: Tensor) -> Tensor:
        """Drop ended rows from the batch and from every layer's cache."""
        self.rows = self.rows[running]
        self._copy_cache(running, self.context.max_sequence_length)
        return running[running]

    def _copy_cache(self, kept: Tensor | slice, capacity: int) -> None:
        """Give every layer a new cache [capacity, running rows, heads, head_dim] and copy the ``kept`` rows to it."""
        used, cache = self.context.sequence_len_offset, self.context.key_value_memory_dict
        for layer, old in cache.items():
            new = tuple(part.new_empty(capacity, len(self.rows), *part.shape[2:]) for part in old)
            for part, grown in zip(old, new, strict=True):
                grown[:used] = part[:used, kept]
            cache[layer] = new
        self.context.max_sequence_length, self.context.max_batch_size = capacity, len(self.rows)

    def _result(self) -> RolloutBatch:
        lengths = (self.prompt_lengths + self.response_lengths).cpu()
        return RolloutBatch(
            indices=self.indices.cpu(),
            tokens=self.tokens[:, : int(lengths.max())].cpu(),
            prompt_lengths=self.prompt_lengths.cpu(),
            response_lengths=self.response_lengths.cpu(),
            rollout_logprobs=self.logprobs[:, : int(self.response_lengths.max())].cpu(),
            truncated=self.truncated.cpu(),
        )


@contextmanager
def _whole_sequences(model: MegatronModule) -> Iterator[None]:
    """Turn sequence and context parallelism off within the context: a single token cannot be cut into parts.

    Context-parallel ranks then decode the same prompts, each for itself.
    """
    inner = unwrap_model(model)
    sequence_parallel, context_group = inner.config.sequence_parallel, inner.rotary_pos_emb.cp_group
    if sequence_parallel:
        set_model_to_sequence_parallel(inner, False)
    inner.rotary_pos_emb.cp_group = None  # else the angles would be those of this rank's chunks
    try:
        yield
    finally:
        inner.rotary_pos_emb.cp_group = context_group
        if sequence_parallel:
            set_model_to_sequence_parallel(inner, True)
