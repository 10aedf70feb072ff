"""Small complete inputs of a training run, made from nothing: tokenizer, Qwen3 with random weights, prompts, flags.

A :class:`World` is a student and a general teacher as converted Megatron checkpoints, with two prompt files; its
``flags`` are a command line that ``pretrain_camopd.py`` accepts. Nothing is downloaded, and everything is the same
every time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_camopd.errors import ConfigurationError

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_camopd.stages.distill.plan import DistillPlan

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{%- if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}"
    "{%- if 'refuse this' in message.content %}{{ raise_exception('a row\nthat fails') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if thinking is defined and not thinking %}<think></think>{% endif %}{% endif %}"
)
VOCABULARY = {
    token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
}
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
"""Fields that make a model of :data:`SIZES` one with experts."""


def make_tokenizer(
    *, chat_template: str | None = CHATML, vocabulary: Mapping[str, int] = VOCABULARY
) -> PreTrainedTokenizerFast:
    """One id a byte and three special tokens; ``chat_template`` None: a base model's tokenizer."""
    backend = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_hf_model(folder: Path, *, seed: int = 0, vocabulary: Mapping[str, int] = VOCABULARY, **sizes: Any) -> Path:
    """A Hugging Face folder: Qwen3 of :data:`SIZES` (``sizes`` win) with random float32 weights, and a tokenizer.

    It has experts if ``sizes`` contain those of :data:`EXPERTS`.
    """
    # Imported here, like Megatron below: the tests that only want a tokenizer need not wait for it.
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    made: Any = (Qwen3MoeForCausalLM, Qwen3MoeConfig) if "num_experts" in sizes else (Qwen3ForCausalLM, Qwen3Config)
    made[0](made[1](**(SIZES | sizes))).save_pretrained(folder)
    make_tokenizer(vocabulary=vocabulary).save_pretrained(folder)
    return folder


def make_checkpoint(folder: Path, **options: Any) -> Path:
    """The Megatron checkpoint directory ``folder`` of a :func:`make_hf_model` with ``options``."""
    from megatron_camopd.checkpoint.import_hf import import_hf

    return import_hf(make_hf_model(folder.with_name(folder.name + "-hf"), **options), folder)


def write_prompts(path: Path, name: str, *, count: int = 20) -> Path:
    """A JSONL file of ``count`` different short prompts."""
    path.write_text("".join(json.dumps({"prompt": f"{name} {row}"}) + "\n" for row in range(count)))
    return path


@dataclass(frozen=True)
class World:
    """The paths of one run's inputs, all below ``root``."""

    root: Path

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def general(self) -> Path:
        return self.root / "general.jsonl"

    @property
    def domain(self) -> Path:
        return self.root / "domain.jsonl"

    def flags(self, **changes: Any) -> list[str]:
        """A command line that trains 2 steps of 4 prompts into ``root/run``.

        ``changes`` by argument name win: None drops the flag, True gives it without a value, a list many values.
        """
        values: dict[str, Any] = {
            "load": self.student,
            "save": self.root / "run",
            "general_teacher_load": self.teacher,
            "general_prompts": self.general,
            "domain_prompts": self.domain,
            "max_prompt_length": 40,
            "max_response_length": 24,
            "global_batch_size": 4,
            "train_iters": 2,
        } | changes
        line = []
        for name, value in values.items():
            if value is None:
                continue
            items = value if isinstance(value, list) else [] if value is True else [value]
            line += [f"--{name.replace('_', '-')}", *map(str, items)]
        return line


def make_world(root: Path) -> World:
    """Make a :class:`World`'s files; about a second."""
    world = World(root)
    make_checkpoint(world.student, seed=1)
    make_checkpoint(world.teacher, seed=2)
    write_prompts(world.general, "general")
    write_prompts(world.domain, "domain")
    return world


def prepare(flags: list[str]) -> tuple["Namespace", "DistillPlan"]:
    """Do what ``pretrain_camopd.py`` does before its processes meet: parse, check, plan."""
    from megatron_camopd.runtime import accelerator

    accelerator.activate()  # before Megatron is imported
    from megatron_camopd.stages.arguments import parse_arguments
    from megatron_camopd.stages.registry import plan_stage

    args = parse_arguments(flags)
    return args, plan_stage(args)


def refusal(flags: list[str]) -> str:
    """The one line with which these flags are refused."""
    with pytest.raises(ConfigurationError) as caught:
        prepare(flags)
    line = str(caught.value)
    assert line and "\n" not in line, line
    return line
