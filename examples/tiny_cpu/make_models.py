"""Make the demo's general model as an HF Qwen3 folder; the specialist is made from it by make_specialist.sh.

    python examples/tiny_cpu/make_models.py --output examples/tiny_cpu/models

writes DIR/general (config.json, model.safetensors, tokenizer, chat template, generation_config.json). The committed
folder examples/tiny_cpu/models/general came from this command; the demo uses it as it is, and nobody has to run it.

Model: Qwen3, 2 layers, hidden 96, 4 heads of 32 in 2 key-value groups, MLP 288, tied embeddings, fp32.
Tokenizer: one token per printable ASCII character and newline, and four special tokens; a turn is
``<|im_start|>text<|im_end|>`` (without the role, because every conversation has one user turn). Generation stops at
``<|im_end|>`` or ``<|endoftext|>``, so that code for several end-of-sequence ids is exercised.

Training: cross-entropy on the tokens of the answer and the closing ``<|im_end|>`` alone, on the six general tasks
(addition and maximum twice as often, because they are learned last) and on plain answers to the domain's requests.
Everything is seeded; on one CPU thread the same version of torch gives the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import string
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import world
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT, TURN_START, TURN_END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
CHARACTERS = "\n" + "".join(sorted(string.ascii_letters + string.digits + string.punctuation + " "))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a character-level tokenizer in HF format: 96 characters, then 4 special tokens."""
    vocabulary = [*CHARACTERS, END_OF_TEXT, TURN_START, TURN_END, UNKNOWN]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """Build a freshly initialised Qwen3 whose vocabulary is padded to a multiple of eight."""
    torch.manual_seed(seed)
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    config = Qwen3Config(
        vocab_size=8 * math.ceil(len(tokenizer) / 8),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    return model


def encode_batch(tokenizer: PreTrainedTokenizerFast, examples: list[world.Example]) -> dict[str, torch.Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, [B, S] int64, padded on the right.

    The labels of prompts and padding are -100.
    """
    rows, labels = [], []
    for example in examples:
        prompt = tokenizer.encode(f"{TURN_START}{example.prompt}{TURN_END}{TURN_START}", add_special_tokens=False)
        answer = tokenizer.encode(f"{example.answer}{TURN_END}", add_special_tokens=False)
        rows.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    lengths = torch.tensor([len(row) for row in rows])
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(rows, batch_first=True, padding_value=tokenizer.convert_tokens_to_ids(END_OF_TEXT))
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).long(),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[world.Example],
    *,
    steps: int,
    batch_size: int,
    peak_lr: float,
    name: str,
) -> None:
    """Train ``model`` in place on the examples' answers.

    AdamW (0.9, 0.98) without weight decay, 5% warm-up, cosine decay to zero, gradients clipped to norm 1.0.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    model.train()
    started = time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = peak_lr * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = encode_batch(tokenizer, list(itertools.islice(examples, batch_size)))
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            elapsed = time.monotonic() - started
            print(f"{name} step {step} loss {loss.item():.4f} lr {rate:.2e} {elapsed:.0f} s", flush=True)
    model.eval()


def save_folder(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an HF folder under a temporary name, then rename it; an older folder is replaced."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the demo's general model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for general/")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--steps", type=int, default=2200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depends on the number of threads
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=arguments.seed)
    kinds = (*world.GENERAL_KINDS, "add", "max", *world.PLAIN_KINDS)
    examples = world.stream(kinds, held_out=False, seed=f"general model {arguments.seed}")
    train(model, tokenizer, examples, steps=arguments.steps, batch_size=128, peak_lr=4e-3, name="general")
    save_folder(model, tokenizer, arguments.output / "general")


if __name__ == "__main__":
    main()
