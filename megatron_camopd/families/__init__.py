"""Model families: all that is specific to one kind of model, behind one interface.

``family``          the interface that every family implements (:class:`~.family.Family`)
``registry``        the families by the ``model_type`` of config.json
``architecture``    the sizes of a model (:class:`~.architecture.Architecture`)
``config_fields``   strict readers of the fields of config.json
``model_arguments`` Megatron's arguments of a plain decoder, and those that would turn it into another model
``table``           tables that map tensors between Hugging Face's names and Megatron's
``placement``       the keys of tensors in a checkpoint, and the axes of layers and experts in front of theirs
``row_orders``      rows of Q, K and V interleaved by query group, padding of the vocabulary
``local_layers``    Megatron's local layers with norms that support sequence parallelism (``rms_norm``)
``qwen3``           dense Qwen3
``qwen3_moe``       Qwen3 with experts

To add a family, write a folder like ``qwen3`` whose ``FAMILY`` is a :class:`~.family.Family`, and name it in
``registry``. No module outside this package names a family. Only ``local_layers``, ``rms_norm`` and a family's
``layers`` import Megatron, and they are imported only when a model is built: the converters start fast and need no GPU.
"""
