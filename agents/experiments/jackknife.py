"""The standard error of an estimate that is no mean, from what it is without each of its observations."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def jackknife_error(left_out: ArrayLike) -> float:
    """The standard error by the jackknife (Tukey, 1958).

    On average it is never too small (Efron and Stein, 1981).

    Args:
        left_out: (n,) the estimate without each of the n observations, n at least 2. Where observations come in
            clusters, such as the images of a prompt, the estimate without each cluster.

    Returns:
        The error, in the estimate's units; NaN for fewer than two.
    """
    values = np.asarray(left_out, np.float64)  # (n,)
    n = len(values)
    if n < 2:
        return float("nan")
    return float(np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()))
