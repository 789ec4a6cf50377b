"""`python -m spec_decode check NAME`: measurements and proofs that the documentation quotes.

Each check is a module of this package with `add_arguments(parser)` and `run(arguments)`; it prints its result. A module
is imported when its check is asked for, so the help of the command line needs no torch.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from ..errors import UserError

CHECKS = {  # name: what it tells; the module has the name with "_" for "-"
    "gpu": "random pairs in the shapes of Gemma 4, raced on an accelerator in every precision",
    "operators": "operators, bytes and predicted milliseconds of a step and a round of Gemma 4, on CUDA without a GPU",
    "lossless": "plain sampling, transformers' assisted generation and this engine against an exact distribution",
    "fidelity": "how far the embedded target's int8 weights are from float32: KL divergence and the same argmax",
    "kernels": "milliseconds of the linear layers of SmolLM2-135M, in PyTorch's kernels and in ours",
    "draft-step": "cost of a draft step of the embedded drafter, and what its shortcuts cost in acceptance",
    "predicted-speedup": "how often the measured speedup lies in the predicted band",
    "openvino-weights": "how OpenVINO GenAI holds the weights of the embedded target's GGUF file",
}


def add_commands(commands: Any) -> None:
    """Adds the command `check`, with a command of its own for each check, to the subparsers of the command line."""
    check = commands.add_parser("check", help="measurements and proofs that the documentation quotes")
    checks = check.add_subparsers(required=True, metavar="CHECK", parser_class=_Parser)
    for name, told in CHECKS.items():
        checks.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.", module=name.replace("-", "_"))


class _Parser(argparse.ArgumentParser):
    """The parser of one check, which asks the check's module for its arguments when it is used."""

    def __init__(self, module: str, **options: Any) -> None:
        super().__init__(**options)
        self.module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("run") is None:
            module = import_module(f".{self.module}", __package__)
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        return super().parse_known_args(args, namespace)


def package(name: str, check: str) -> Any:
    """The module `name` of a package that only one check needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"check {check} needs the package {name.partition('.')[0]}: {error}.") from error
