"""The browser app: `build(engine)` makes the page, `Engine` owns the device behind it. Imports no torch."""

from .engine import Engine, Limits
from .layout import build, launch_options

__all__ = ["Engine", "Limits", "build", "launch_options"]
