"""Checkpoints: their conversion between Hugging Face and Megatron, and what a run saves and restores.

The tensors of both sides, and the architecture in config.json, come from the model's family (``families``).

``hf_folder``   reading and writing Hugging Face folders (config.json, safetensors shards, index), streamed
``torch_dist``  the on-disk layout of Megatron's torch_dist checkpoints, read without unpickling foreign objects
``finite``      weights checked for NaN and infinity as they are copied
``import_hf``   Hugging Face folder -> Megatron checkpoint
``export_hf``   Megatron checkpoint (imported, or saved by training) -> Hugging Face folder
``assets``      config.json, tokenizer, chat template and generation config, which travel in ``<checkpoint>/hf``
``directory``   the newest complete checkpoint of a directory
``tokenizer``   the tokenizer and the end-of-sequence ids of a checkpoint
``staging``     a folder that appears under its final name complete or not at all
``training_state``  what a training run saves and restores, through Megatron

All but ``training_state`` import no Megatron: the converters start fast and run on a machine without a GPU.
"""
