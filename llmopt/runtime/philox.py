"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC'11), the generator devices use too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, None, None]
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counter: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Ten rounds on counters (4, n) uint32 with keys (2, n) uint32; four random words (4, n) uint32."""
    even, odd = counter[::2].astype(np.uint64), counter[1::2].astype(np.uint64)
    for round_key in (key.astype(np.uint64) + _ROUNDS * _WEYL) & _LOW:
        product = (even * _MULTIPLIERS)[::-1]
        even, odd = (product >> _WORD) ^ odd ^ round_key, product & _LOW
    return np.stack((even, odd), axis=1).reshape(4, -1).astype(np.uint32)


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
