"""Checkpoints: one reversible Qwen3 table between Hugging Face names and Megatron names, and what uses it.

``qwen3``       THE table of tensors (``qwen3_config``: the architecture in config.json, Megatron's arguments for it)
``hf_folder``   reading and writing Hugging Face folders (config.json, safetensors shards, index), streamed
``torch_dist``  the on-disk layout of Megatron's torch_dist checkpoints, read without unpickling foreign objects
``import_hf``   Hugging Face folder -> Megatron checkpoint
``export_hf``   Megatron checkpoint (imported, or saved by training) -> Hugging Face folder
``assets``      config.json, tokenizer, chat template and generation config, which travel in ``<checkpoint>/hf``
``staging``     a folder that appears under its final name complete or not at all
``training_state``  what a training run saves and restores, through Megatron

All but ``training_state`` import no Megatron: the converters start fast and run on a machine without a GPU.
"""
