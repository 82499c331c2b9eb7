"""The one error that data problems raise."""


class DataError(ValueError):
    """Something is wrong with the data or its settings: what was met and expected, the fix."""
