"""placeholder until the branch with the populations is merged"""

import numpy as np


def candels(rng, n):
    mag = rng.uniform(18, 26, n)
    return {
        "mag": mag,
        "r_eff": 0.06 * 10 ** (0.81 - 0.053 * (mag - 22) + 0.30 * rng.standard_normal(n)),
        "sersic_n": np.clip(10 ** (0.14 + 0.28 * rng.standard_normal(n)), 0.3, 8),
        "ellipticity": 1 - np.clip(0.55 + 0.21 * rng.standard_normal(n), 0.1, 1),
    }
