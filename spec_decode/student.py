"""Quantiles of Student's t, for every interval that is shown or decided on.

In: a probability and degrees of freedom, whole or not. Out: the quantile. Imports no torch, and no SciPy, which only
the tests have (tests/test_model.py compares with it).
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

_NORMAL_FROM = 1e5  # degrees of freedom, from which the normal quantile is right to five digits
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@lru_cache(4096)
def quantile(probability: float, freedom: float) -> float:
    """Of Student's t, for a probability above 1/2; infinite below one degree of freedom.

    By Newton's method from the normal quantile. The distribution is concave above 0 and the normal quantile lies below
    the root, so that the steps approach it from below and never pass it.
    """
    t = NormalDist().inv_cdf(probability)
    if freedom < 1:
        return math.inf
    if freedom >= _NORMAL_FROM:
        return t
    for _ in range(100):
        step = (probability - _distribution(t, freedom)) / _density(t, freedom)
        t += step
        if step < 1e-12 * t:
            break
    return t


def _scale(freedom: float) -> float:
    return math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)


def _density(t: float, freedom: float) -> float:
    return _scale(freedom) / math.sqrt(freedom) * (1 + t * t / freedom) ** (-(freedom + 1) / 2)


def _distribution(t: float, freedom: float) -> float:
    """P(T ≤ t), t ≥ 0: with t = √f · tan θ the density is a multiple of cos θ to the power f − 1, which Gauss–Legendre
    quadrature integrates from 0."""
    half = math.atan(t / math.sqrt(freedom)) / 2
    return 0.5 + _scale(freedom) * half * float(_WEIGHTS @ np.cos(half * (_POINTS + 1)) ** (freedom - 1))
