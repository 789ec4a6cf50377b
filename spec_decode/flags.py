"""The flags that name a pair and how it is loaded, shared by `app.py` and the commands that race.

In: an argument parser, then its result. Out: the arguments of `loading.pair.load_pair`. Imports no torch.
"""

from __future__ import annotations

import argparse
from typing import Any

from .drafters import kinds
from .errors import UserError
from .loading import catalog

_SAME_NAME = ("device", "dtype", *catalog.Options.__annotations__)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser."""
    pairs = ", ".join([catalog.EMBEDDED, *(entry.name for entry in catalog.GEMMA4)])
    parser.add_argument("--pair", metavar="NAME", help=f"target and drafter by one name: {pairs}")
    parser.add_argument("--target", metavar="ID", help="embedded (default), a Hub id or a directory")
    parser.add_argument(
        "--drafter",
        metavar="ID",
        help=f"{kinds.usage()} (default: the pair's own)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", help="auto (default), int8 (CPU), float32, float16 or bfloat16")
    parser.add_argument(
        "--quantize", metavar="HOW", help="with bitsandbytes: int8, nf4 (the target), or target=nf4,drafter=int8"
    )
    parser.add_argument("--drafter-device", metavar="DEVICE", help="another device for the drafter, such as cpu")
    parser.add_argument("--device-map", choices=("auto",), help="auto spreads the target over all GPUs")
    parser.add_argument(
        "--attention",
        metavar="NAME",
        help="sdpa, grouped or eager (default: on CUDA the fastest, elsewhere what transformers chooses)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the target's layers with torch.compile")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="verify in passes of one fixed shape, so that bfloat16 rounds alike in both lanes; slower",
    )
    parser.add_argument("--target-revision", metavar="REV", help="branch, tag or commit of the target")
    parser.add_argument("--drafter-revision", metavar="REV", help="branch, tag or commit of the drafter")
    parser.add_argument("--thinking", action="store_true", help="let the target think first, if its template can")


def read(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `loading.pair.load_pair` except `progress`.

    Raises:
        UserError: a pair, precision or attention implementation that does not exist, or both a pair and a target.
    """
    target, drafter = arguments.target, arguments.drafter
    if arguments.pair:
        if target:
            raise UserError("Name the target by --pair or by --target, not by both.")
        target, own = catalog.pair(arguments.pair)
        drafter = drafter or own
    catalog.quantization(arguments.quantize)
    catalog.attention(arguments.attention)
    options = {name: getattr(arguments, name) for name in _SAME_NAME}
    return {"target": target or catalog.EMBEDDED, "drafter": drafter, **options}
