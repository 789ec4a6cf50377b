"""One device, its queue, and what a page is to show of a race. Imports neither gradio nor torch."""
