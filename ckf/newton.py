"""Newton's method for the convex fits of few weights."""

from collections.abc import Callable

import numpy as np

_STEPS, _SHORT = 50, 1e-8


def damped_newton(
    weights: np.ndarray, slope_and_curve: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """The weights (f,) where a convex loss is least.

    Args:
        weights: where to start.
        slope_and_curve: of weights the gradient (f,) and the Hessian (f, f), positive definite.
    """
    for _ in range(_STEPS):
        slope, curve = slope_and_curve(weights)
        step = np.linalg.solve(curve, slope)
        longest = np.abs(step).max()
        weights = weights - step / max(1.0, longest)  # no leap where it is flat
        if longest < _SHORT:
            break
    return weights
