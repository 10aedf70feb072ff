"""Generation of one model's responses to a file of prompts, written as conversations for off-policy distillation.

The rollout engine decodes rounds of ``--global-batch-size`` prompts. After an interruption the same command continues
behind the last round that was written. The response to a prompt does not depend on the parallel layout.
"""

import json
import os
import signal
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_camopd.checkpoint.directory import require_checkpoint
from megatron_camopd.checkpoint.training_state import load_weights
from megatron_camopd.config.sampling import SamplingSettings
from megatron_camopd.data import EncodedConversation, Prompt
from megatron_camopd.data.conversations import answered
from megatron_camopd.errors import ConfigurationError, InterruptedRunError, SaveError
from megatron_camopd.model.builder import build_model
from megatron_camopd.rollout.registry import ENGINES
from megatron_camopd.rollout.settings import RolloutSettings
from megatron_camopd.runtime.collectives import first_problem, require_agreement
from megatron_camopd.runtime.layout import Layout
from megatron_camopd.runtime.lock import lost_lock
from megatron_camopd.runtime.signals import stop_requests
from megatron_camopd.runtime.startup import initialize_megatron, quiet_megatron
from megatron_camopd.runtime.writing import written_by_all
from megatron_camopd.stages.generate.plan import GeneratePlan, notes
from megatron_camopd.stages.generate.settings import GenerationSettings

COUNTS = (
    "rounds", "prompts", "written", "skipped_prompts", "truncated", "empty", "refused", "encoded_differently", "tokens",
    "bytes",
)  # fmt: skip
Response = tuple[list[int], bool]  # token ids, whether the length limit ended the response


class GenerateRunner:
    """One generation run on this rank; its construction is collective.

    Args:
        args: The arguments from ``parse_arguments``.
        plan: The plan from ``plan_responses``.
    """

    def __init__(self, args: Namespace, plan: GeneratePlan) -> None:
        self.args, self.plan = args, plan
        self.drops_truncated = GenerationSettings.of(args).truncated_responses == "drop"
        self.max_response_length = SamplingSettings.of(args).max_response_length
        initialize_megatron(args)
        require_agreement("checkpoint, prompts or output", plan.fingerprint())
        self.counts = dict.fromkeys(COUNTS, 0) | plan.done
        if plan.complete:
            return
        for line in notes(plan):
            print(line, flush=True)
        with quiet_megatron(args):
            self.model = build_model(args, trainable=False)
        load_weights(args, self.model, require_checkpoint("--load", args.load))
        engine = ENGINES[RolloutSettings.of(args).rollout_engine]
        self.engine = engine.build(args, self.model, plan.end_of_sequence_ids)

    def run(self) -> None:
        """Generate and write the responses that are not written yet; collective."""
        leads = dist.get_rank() == 0
        if not self.plan.complete:
            self.engine.synchronize(step=0)
            self._generate_rounds(leads)
        else:
            with written_by_all(self.plan.output):
                if leads:
                    self.plan.finish(self.counts)  # the run that completed it may have left its partial manifest
        if leads:
            print(self.summary(), flush=True)

    def _generate_rounds(self, leads: bool) -> None:
        prompts, size = self.plan.prompts.prompts, self.args.global_batch_size
        rounds = -(-len(prompts) // size)
        if leads:
            _truncate(self.plan.partial, self.counts["bytes"])
        with (
            stop_requests(signal.SIGTERM, self.args.exit_signal) as request,
            tqdm(total=len(prompts), initial=self.counts["prompts"], unit=" prompts", disable=not leads) as bar,
        ):
            for number in range(self.counts["rounds"], rounds):
                request.begin("round")
                chosen = prompts[number * size : (number + 1) * size]
                self._round(number, chosen, leads)
                bar.update(len(chosen))
                bar.set_postfix(tokens=self.counts["tokens"], refresh=False)
                stopped_by = first_problem(request.name)
                if stopped_by is not None and number + 1 < rounds:
                    raise InterruptedRunError(
                        f"{stopped_by}: wrote {number + 1} of {rounds} rounds to {self.plan.partial}; run the same "
                        "command again to go on"
                    )
        nothing = self._nothing_written() if leads and not self.counts["written"] else None
        if (problem := first_problem(nothing)) is not None:
            raise ConfigurationError(problem)
        with written_by_all(self.plan.output):
            if leads:
                self.plan.finish(self.counts)

    def _nothing_written(self) -> str:
        return (
            f"--responses {self.plan.output}: nothing to write: of {len(self.plan.prompts.prompts)} prompts "
            f"{self.counts['skipped_prompts']} were too long, {self.counts['truncated']} responses reached "
            f"--max-response-length {self.max_response_length}, {self.counts['empty']} were empty, "
            f"{self.counts['refused']} would be refused by --stage sft"
        )

    def _round(self, number: int, chosen: list[Prompt], leads: bool) -> None:
        """Generate the responses to the prompts of one round, and write them on rank 0."""
        encoded = [(prompt, self.plan.prompt_formatter.encode(prompt)) for prompt in chosen]
        asked = [(prompt, token_ids) for prompt, token_ids in encoded if token_ids is not None]
        responses = self._respond([token_ids for _, token_ids in asked], number)
        self.counts["rounds"] += 1
        self.counts["prompts"] += len(chosen)
        self.counts["skipped_prompts"] += len(chosen) - len(asked)
        if (problem := first_problem(lost_lock())) is not None:
            raise SaveError(problem)
        with written_by_all(self.plan.partial):
            if leads:
                found = (self._row(prompt, *response) for (prompt, _), response in zip(asked, responses, strict=True))
                self._write([row for row in found if row is not None])

    def _respond(self, prompts: list[list[int]], number: int) -> list[Response]:
        """Return a response to each of ``prompts``, those of round ``number``, on every rank."""
        if not prompts:
            return []
        data = Layout.current().data
        padded = len(prompts) + -len(prompts) % data.size  # all ranks get equally many, because engines may span ranks
        share = torch.arange(data.rank, padded, data.size)
        rollout = self.engine.generate([prompts[min(int(i), len(prompts) - 1)] for i in share], share, step=number)
        own: list[Response] = []
        for row, (start, length) in enumerate(zip(rollout.prompt_lengths, rollout.response_lengths, strict=True)):
            own.append((rollout.tokens[row, start : start + length].tolist(), bool(rollout.truncated[row])))
        shares: list[Any] = [None] * data.size
        dist.all_gather_object(shares, own, group=data.group)
        return [shares[place % data.size][place // data.size] for place in range(len(prompts))]

    def _row(self, prompt: Prompt, token_ids: list[int], truncated: bool) -> dict[str, Any] | None:
        """Return the conversation to write, or None if the response is to be dropped, and update the counts."""
        self.counts["tokens"] += len(token_ids)
        self.counts["truncated"] += truncated
        if truncated and self.drops_truncated:
            return None
        answer = token_ids if truncated else token_ids[:-1]
        text = self.plan.tokenizer.decode(answer, skip_special_tokens=False)
        if not text.strip():
            self.counts["empty"] += 1
            return None
        conversation = answered(prompt, text)
        try:
            read_back = self.plan.conversation_formatter.encode(conversation)
        except ConfigurationError as error:  # of the response: the plan has checked the prompts
            if not self.counts["refused"]:
                tqdm.write(f"a response is dropped, --stage sft would refuse it: {error}")
            self.counts["refused"] += 1
            return None
        if not truncated and not (read_back and _last_turn(read_back[-1]) == token_ids):
            self.counts["encoded_differently"] += 1
        self.counts["written"] += 1
        row: dict[str, Any] = {"id": prompt.id, "messages": conversation.messages}
        return row | {name: value for name in ("category", "tools") if (value := getattr(prompt, name)) is not None}

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with self.plan.partial.open("ab") as file:
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
            self.counts["bytes"] = file.tell()
        self.plan.note(self.counts)

    def summary(self) -> str:
        """Return one line about what was written."""
        counts = self.counts
        dropped = "dropped" if self.drops_truncated else "kept"
        return (
            f"{self.plan.output}: {counts['written']} conversations from {counts['prompts']} prompts, "
            f"{counts['tokens']} tokens; {counts['truncated']} truncated responses {dropped}; dropped: "
            f"{counts['empty']} empty ones, {counts['refused']} that --stage sft would refuse; "
            f"{counts['skipped_prompts']} prompts too long; {counts['encoded_differently']} responses whose text the "
            "tokenizer encodes differently"
        )


def _last_turn(sequence: EncodedConversation) -> list[int]:
    """Return the token ids of the last uninterrupted run of trained tokens."""
    token_ids, trained = sequence.token_ids, sequence.trained
    end = len(trained) - trained[::-1].index(True)
    start = end
    while start and trained[start - 1]:
        start -= 1
    return token_ids[start:end]


def _truncate(path: Any, size: int) -> None:
    """Cut the file to ``size`` bytes, which drops what an interrupted round wrote."""
    with path.open("ab") as file:
        file.truncate(size)
