"""Who may import what: gradio stays in ui/, and neither the page nor the command line needs torch to begin."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "spec_decode").rglob("*.py"))
}
HEAVY = {"torch", "transformers", "numba", "accelerate", "safetensors", "bitsandbytes"}
LIGHT = (
    "sources",
    "sources.replay",
    "request",
    "events",
    "trace_format",
    "metrics",
    "text",
    "errors",
    "__main__",
    "prove.command",
    "share.command",
    "share.saved",
    "prove.setup",
)


def imports(node: ast.AST, module: str, lazy: bool) -> Iterator[str]:
    """Full names of what a module imports when it is loaded; with `lazy` also what its functions import when called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            home = child.module or ""
            if child.level:
                parts = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
                home = ".".join([*parts[: len(parts) - child.level + 1], *([home] if home else [])])
            yield home
            yield from (f"{home}.{name.name}" for name in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(child, module, lazy)


@cache
def imported(module: str, lazy: bool = False) -> frozenset[str]:
    return frozenset(imports(ast.parse(FILES[module].read_text(encoding="utf-8")), module, lazy))


def reached(module: str) -> dict[str, str]:
    """Every package that loading `module` loads, and a module of ours that asks for it."""
    found: dict[str, str] = {}
    seen, left = {module}, [module]
    while left:
        here = left.pop()
        parents = {".".join(here.split(".")[:i]) for i in range(1, here.count(".") + 1)}
        for name in imported(here) | parents:
            if name in FILES and name not in seen:
                seen.add(name)
                left.append(name)
            found.setdefault(name.split(".")[0], here)
    return found


def room(name: str) -> list[str]:
    return [module for module in FILES if f"{module}.".startswith(f"spec_decode.{name}.")]


def test_the_walk_sees_what_there_is() -> None:
    assert "torch" in reached("spec_decode.decode") and "torch" in imported("spec_decode.sources.local")
    assert "gradio" in imported("spec_decode.ui.wiring") and "gradio" in reached("spec_decode.ui")
    assert "spec_decode.session.device" in imported("spec_decode.ui.wiring")
    late = imported("spec_decode.__main__", lazy=True) - imported("spec_decode.__main__")
    assert "spec_decode.sources.local" in late
    assert len(room("ui")) > 8 and len(room("session")) > 5


@pytest.mark.parametrize("module", [*room("session"), *(f"spec_decode.{name}" for name in LIGHT)])
def test_what_needs_neither_a_model_nor_a_page_loads_neither(module: str) -> None:
    found = reached(module)
    assert not {name: found[name] for name in (HEAVY | {"gradio"}) & found.keys()}


@pytest.mark.parametrize("module", room("ui"))
def test_the_page_loads_no_model(module: str) -> None:
    found = reached(module)
    assert not {name: found[name] for name in HEAVY & found.keys()}
    assert not HEAVY & {name.split(".")[0] for name in imported(module, lazy=True)}


@pytest.mark.parametrize("module", room("session"))
def test_a_session_touches_no_tensor_even_when_it_runs(module: str) -> None:
    assert not HEAVY & {name.split(".")[0] for name in imported(module, lazy=True)}


@pytest.mark.parametrize("module", [name for name in FILES if name not in room("ui")])
def test_gradio_stays_in_its_room(module: str) -> None:
    names = imported(module, lazy=True)
    assert not [name for name in names if name.startswith(("gradio", "spec_decode.ui"))]
