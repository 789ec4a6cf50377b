"""Tables of cos and sin for rotary positions, the same bits on every machine.

The functions of PyTorch and of C libraries differ from each other in the last bit. Here they are polynomials in
float64, made of operations that IEEE 754 defines, and the result is rounded to float32.
"""

from __future__ import annotations

import numpy as np

from .arguments import Rope

# π/2 in three parts. The first two have 33 bits, so their products with integers below 2²⁰ are exact.
# Then the coefficients of sin r and cos r for |r| ≤ π/4, with an error below 2⁻⁵⁷ (fdlibm, Sun Microsystems 1993).
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)


def rope_table(frequencies: np.ndarray, positions: int, scaling: float = 1.0) -> Rope:
    """cos and sin of position · frequency for the first `positions` (Su et al. 2021, arXiv:2104.09864).

    Args:
        frequencies: float32 `[head size / 2]`, in radians per position; the angle is rounded to float32, as in
            transformers.
        scaling: what the results are multiplied with.

    Returns:
        float32 `[positions, head size]` each. The two halves of a row are equal.
    """
    angles = (np.arange(positions, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    quarters = np.rint(angles * (2 / np.pi))
    r = angles  # modulo π/2
    for part in _HALF_PI:
        r = r - quarters * part
    z = r * r
    sin, cos = r + r * z * _polynomial(z, _SIN), 1 - 0.5 * z + z * z * _polynomial(z, _COS)
    quadrant = quarters.astype(np.int64) % 4
    swapped, below, left = quadrant % 2 == 1, quadrant >= 2, (quadrant + 1) % 4 >= 2
    sin, cos = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    tables = (np.where(left, -cos, cos), np.where(below, -sin, sin))
    cos, sin = (np.tile(table.astype(np.float32) * np.float32(scaling), 2) for table in tables)
    return Rope(cos, sin)


def _polynomial(z: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    value = np.full_like(z, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * z + coefficient
    return value
