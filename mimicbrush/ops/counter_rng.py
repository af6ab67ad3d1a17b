"""Counter-based randomness: a value is a function of its key, never of what was sampled before it.

This is what makes the loader's state one integer: sample n looks the same for any number of ranks or
workers and after any restart.
"""

from __future__ import annotations

import numpy as np

_MASK64 = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Hash integers to 63 bits (splitmix64, Steele et al. 2014), so that the result fits an int64 tensor."""
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = (state ^ (key & _MASK64)) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & _MASK64
    return state >> 1


def generator(*keys: int) -> np.random.Generator:
    """Build a NumPy generator (Philox, counter-based) for this key."""
    return np.random.Generator(np.random.Philox(key=mix(*keys)))


def permute_position(position: int, length: int, key: int) -> int:
    """Find where `position` lands in a random permutation of `length` items, without storing the permutation.

    A four-round Feistel network on the next even number of bits, walked until it falls below `length`
    (Black and Rogaway 2002, "cycle walking"): a bijection of 0..length-1 for every key.
    """
    if not 0 <= position < length:
        raise ValueError(f"position {position} is outside 0..{length - 1}")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & half_mask
        for round_number in range(4):
            left, right = right, left ^ (mix(key, round_number, right) & half_mask)
        position = left << half_bits | right
        if position < length:
            return position
