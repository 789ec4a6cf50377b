"""CPU kernels: a pass over a whole decoder in one call, a draft in one call, sampling; compiled when first used.

In: 8-bit weights and float32 activations as NumPy arrays. Out: arrays, or the given ones filled. A row's result is the
same bits whatever rows stand beside it and however many threads there are; verification relies on that.

`floats`, `noise`, `rows` and `products` are the arithmetic, `processor` what it is compiled for, `compiled` where the
code is kept on disk, `sharing` the threads, `arguments` the kernels' arguments, `rope` the RoPE tables; `passes`,
`drafts` and `vocabulary` are what is called.
"""

from .drafts import TOP, assistant
from .passes import linear, llama
from .products import Weights, levels, quantized, steps
from .rope import rope_table
from .vocabulary import argmax, exponential, keys, softmax, top

__all__ = [
    "TOP",
    "Weights",
    "argmax",
    "assistant",
    "exponential",
    "keys",
    "levels",
    "linear",
    "llama",
    "quantized",
    "rope_table",
    "softmax",
    "steps",
    "top",
]
