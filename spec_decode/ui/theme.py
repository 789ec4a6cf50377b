"""How the page looks: Gradio's theme brought in line with the palette of assets/app.css, light and dark.

Only fonts that a computer already has, so that nothing is fetched from elsewhere.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import gradio as gr

from .components import asset

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Quiet greys, one accent; every colour is a variable of assets/app.css."""
    both = {
        "body_background_fill": "var(--sd-page)",
        "body_text_color": "var(--sd-ink)",
        "body_text_color_subdued": "var(--sd-muted)",
        "background_fill_primary": "var(--sd-surface)",
        "background_fill_secondary": "var(--sd-page)",
        "border_color_primary": "var(--sd-line)",
        "border_color_accent": "var(--sd-accent)",
        "color_accent": "var(--sd-accent)",
        "color_accent_soft": "var(--sd-accent-soft)",
        "block_background_fill": "transparent",
        "block_border_color": "var(--sd-line)",
        "block_label_text_color": "var(--sd-muted)",
        "block_title_text_color": "var(--sd-ink)",
        "block_info_text_color": "var(--sd-muted)",
        "input_background_fill": "var(--sd-surface)",
        "input_border_color": "var(--sd-line-strong)",
        "input_border_color_focus": "var(--sd-accent)",
        "input_placeholder_color": "var(--sd-muted)",
        "button_primary_background_fill": "var(--sd-accent)",
        "button_primary_background_fill_hover": "var(--sd-accent-strong)",
        "button_primary_text_color": "var(--sd-on-accent)",
        "button_primary_border_color": "transparent",
        "button_secondary_background_fill": "var(--sd-surface)",
        "button_secondary_background_fill_hover": "var(--sd-page)",
        "button_secondary_text_color": "var(--sd-ink)",
        "button_secondary_border_color": "var(--sd-line-strong)",
        "slider_color": "var(--sd-accent)",
        "checkbox_background_color_selected": "var(--sd-accent)",
        "checkbox_border_color_selected": "var(--sd-accent)",
        "checkbox_label_background_fill": "var(--sd-surface)",
        "checkbox_label_background_fill_selected": "var(--sd-accent-soft)",
        "checkbox_label_text_color": "var(--sd-ink)",
        "checkbox_label_text_color_selected": "var(--sd-ink)",
        "link_text_color": "var(--sd-accent)",
    }
    known = inspect.signature(gr.themes.Base.set).parameters
    values: dict[str, Any] = both | {f"{k}_dark": v for k, v in both.items() if f"{k}_dark" in known}
    values |= {
        "block_shadow": "none",
        "block_label_shadow": "none",
        "input_shadow": "none",
        "block_border_width": "0px",
    }
    values |= {"block_border_width_dark": "0px", "input_shadow_focus": "0 0 0 2px var(--sd-accent-soft)"}
    values |= {"input_border_width": "1px", "input_border_width_dark": "1px", "input_radius": "8px"}
    values |= {"block_padding": "0px", "block_radius": "8px", "layout_gap": "14px", "form_gap_width": "0px"}
    base = gr.themes.Base(
        primary_hue="teal", neutral_hue="zinc", radius_size="md", font=list(SANS), font_mono=list(MONO)
    )
    return base.set(**values)


STYLES = ("app.css", "page.css", "lab.css", "tour.css", "share.css", "branch.css", "pays.css", "pins.css")


def sheet(name: str) -> str:
    """A style sheet of assets/ without comments and indentation."""
    return re.sub(r"(?m)^\s+", "", re.sub(r"(?s)/\*.*?\*/", "", asset(name)))


def style() -> str:
    """What a script puts into the page's head: the style sheet, whole and unscoped."""
    return f"<style>{''.join(map(sheet, STYLES))}</style>"
