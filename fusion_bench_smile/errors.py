"""What this package raises for input it can't use. Every message names the thing and says what to do."""

from __future__ import annotations


class SmileError(ValueError):
    """Base of all errors raised on purpose by this package."""


class ConfigError(SmileError):
    """An option has a name or a value that can't work."""


class PlanError(SmileError):
    """The models can't be upscaled together."""


class CheckpointError(SmileError):
    """A folder can't be written, or is not a complete SMILE checkpoint."""
