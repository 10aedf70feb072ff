"""Diagnostics of a training step that do not change it: gradient coherence, counteraction, gap concentration.

:mod:`gradients` measures during training. :mod:`coherence` and :mod:`concentration` hold the mathematics as pure
functions. Scripts in tools/ plot what is recorded.
"""
