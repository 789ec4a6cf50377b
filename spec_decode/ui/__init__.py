"""The browser app: `build(engine)` makes the page, `Engine` owns its device. Imports no torch."""

from ..session.device import Engine, Limits
from .layout import build, launch_options

__all__ = ["Engine", "Limits", "build", "launch_options"]
