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


def mix_many(keys: np.ndarray, stream: int) -> np.ndarray:
    """Hash many keys at once: (B,) int64 -> (B,) uint64, each ``mix(key, stream)``."""
    state = np.full(len(keys), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for key in (keys.astype(np.uint64), np.uint64(stream)):
        state = (state ^ key) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = (state ^ (state >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
    return state >> np.uint64(1)


#: Multipliers and steps of the keys in Philox4x64 (Salmon et al. 2011).
_MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def first_numbers(keys: np.ndarray) -> np.ndarray:
    """Sample the first four numbers of ``np.random.Philox(key=key)`` for many keys: (B,) uint64 -> (B, 4) uint64."""
    first, second, third, fourth = np.ones_like(keys), *(np.zeros_like(keys) for _ in range(3))  # the counter
    left, right = keys, np.zeros_like(keys)
    for _ in range(10):
        (high_0, low_0), (high_1, low_1) = _multiply(first, _MULTIPLIERS[0]), _multiply(third, _MULTIPLIERS[1])
        first, second, third, fourth = high_1 ^ second ^ left, low_1, high_0 ^ fourth ^ right, low_0
        left, right = left + _KEY_STEPS[0], right + _KEY_STEPS[1]
    return np.stack([first, second, third, fourth], axis=1)


def _multiply(numbers: np.ndarray, factor: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Multiply to 128 bits: (B,) uint64 -> the upper and the lower 64 bits. NumPy has no wider number."""
    factor_high, factor_low = factor >> _HALF, factor & _LOW
    high, low = numbers >> _HALF, numbers & _LOW
    middle = high * factor_low + (low * factor_low >> _HALF)
    carry = (low * factor_high + (middle & _LOW)) >> _HALF
    return high * factor_high + (middle >> _HALF) + carry, numbers * factor


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
