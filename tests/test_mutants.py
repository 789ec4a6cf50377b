"""The table of deliberate bugs fits the code and the tests, so that it cannot become outdated unnoticed."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache

from mutants import MUTANTS, ROOT, mutate


@cache
def source(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def functions_of(path: str) -> set[str]:
    return {node.name for node in ast.parse(source(path)).body if isinstance(node, ast.FunctionDef)}


def test_every_bug_can_be_put_in_place() -> None:
    """Its text occurs once, and what comes of it is Python: a syntax error is killed by any test."""
    for mutant in MUTANTS:
        assert mutant.old != mutant.new, mutant.name
        ast.parse(mutate(source(f"spec_decode/{mutant.file}"), mutant), mutant.name)


def test_every_bug_has_a_name_of_its_own_and_tests_that_exist() -> None:
    names = Counter(mutant.name for mutant in MUTANTS)
    assert not (twice := [name for name, count in names.items() if count > 1]), f"names used twice: {twice}"
    for mutant in MUTANTS:
        assert mutant.nodes, mutant.name
        for node in mutant.nodes:
            file, _, test = node.partition("::")
            assert test.partition("[")[0] in functions_of(file), f"{mutant.name}: there is no test {node}"
