"""The exceptions of this package. Every message names the cause and says what to do."""


class SmileError(ValueError):
    """Base class of the exceptions of this package."""


class ConfigError(SmileError):
    """An option has an unknown name or an invalid value."""


class PlanError(SmileError):
    """Models cannot be upscaled together."""


class CheckpointError(SmileError):
    """A folder cannot be written, or is not a complete SMILE checkpoint."""
