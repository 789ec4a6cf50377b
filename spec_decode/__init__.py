"""Spec Decode: watch, measure and trust speculative decoding."""

import os

__version__ = "0.1.0"

# Before anything imports huggingface_hub, which would else ask the Hub for more than the models that were named.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
