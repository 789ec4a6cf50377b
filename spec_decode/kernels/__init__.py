"""CPU kernels: a pass over a whole decoder in one call, a draft in one call, sampling; compiled when first used.

In: 8-bit weights and float32 activations as NumPy arrays. Out: the same arrays filled. A row's result is the same bit
for bit whatever stands beside it and however many threads there are; verification relies on that.

`products` and `rows` are the arithmetic, `processor` what it is compiled for, `compiled` where the code is kept,
`sharing` the threads, `rope` the tables of cos and sin; `passes`, `drafts` and `vocabulary` what is called.
"""

from .drafts import assistant
from .passes import linear, llama
from .products import Weights, levels, steps
from .rope import rope_table
from .vocabulary import argmax, exponential, keys, softmax

__all__ = [
    "Weights",
    "argmax",
    "assistant",
    "exponential",
    "keys",
    "levels",
    "linear",
    "llama",
    "rope_table",
    "softmax",
    "steps",
]
