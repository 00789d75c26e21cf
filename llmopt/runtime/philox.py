"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC'11), the generator devices use too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counter: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Ten rounds on counters (4, n) uint32 with keys (2, n) uint32; four random words (4, n) uint32."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key.astype(np.uint64)
    for _ in range(10):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> _WORD) ^ c1 ^ k0, right & _LOW, (left >> _WORD) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3)).astype(np.uint32)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row: key = 64-bit seed, counter = (position, 0, 0, 0), 53 bits of words 0 and 1.

    A row's number depends on nothing but its own seed and position, so draws do not depend on the batch.
    """
    seed = np.array(seeds, dtype=np.uint64)
    counter = np.zeros((4, len(seed)), dtype=np.uint32)
    counter[0] = positions
    words = philox4x32(counter, np.stack((seed & _LOW, seed >> _WORD)).astype(np.uint32)).astype(np.uint64)
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    return np.asarray(bits.astype(np.float64) * 2.0**-53, np.float64)
