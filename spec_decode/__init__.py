"""Spec Decode: watch, measure and trust speculative decoding."""
