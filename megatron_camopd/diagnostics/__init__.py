"""What can be learned about the gradients of a step without changing them: coherence, counteraction, concentration.

:mod:`gradients` measures during training, :mod:`coherence` and :mod:`concentration` are the mathematics, pure
functions. Plots of what they record are made by tools/.
"""
