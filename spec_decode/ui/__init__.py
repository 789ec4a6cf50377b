"""The browser app: `build(engine)` makes the page, `Engine` owns its device, `TokenView` is for other pages.

Imports no torch.
"""

from ..session.device import Engine, Limits
from .layout import build, launch_options
from .view import TokenView

__all__ = ["Engine", "Limits", "TokenView", "build", "launch_options"]
