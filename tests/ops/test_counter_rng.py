from __future__ import annotations

import numpy as np
import pytest

from mimicbrush.ops.counter_rng import first_numbers, generator, mix, mix_many, permute_position


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 1000])
def test_permuted_is_a_bijection_for_every_key(length: int) -> None:
    for key in range(5):
        assert sorted(permute_position(i, length, key) for i in range(length)) == list(range(length))


def test_permuted_differs_between_keys_and_from_the_identity() -> None:
    orders = {tuple(permute_position(i, 100, key) for i in range(100)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(100)) not in orders


def test_permuted_refuses_positions_outside() -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.9"):
        permute_position(10, 10, 0)


def test_mix_has_no_collision_among_neighbours_and_fits_int64() -> None:
    values = [mix(a, b) for a in range(100) for b in range(100)]
    assert len(set(values)) == len(values)
    assert min(values) >= 0 and max(values) < 2**63
    # Every bit is set about half of the time.
    bits = np.array([[value >> bit & 1 for bit in range(63)] for value in values])
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 0.03)


def test_generators_of_one_key_agree_and_of_two_keys_do_not() -> None:
    assert generator(1, 2).random() == generator(1, 2).random()
    assert generator(1, 2).random() != generator(2, 1).random()


def test_many_keys_at_once_are_hashed_as_one_by_one() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), *(mix(number) for number in range(200))]
    for stream in (1, 3, 2**40):
        assert mix_many(np.array(keys), stream).tolist() == [mix(key, stream) for key in keys]


def test_first_numbers_are_those_of_numpy() -> None:
    keys = [0, 1, 2**63, 2**64 - 1, *(mix(number) for number in range(200))]
    expected = [np.random.Philox(key=key).random_raw(4) for key in keys]
    assert np.array_equal(first_numbers(np.array(keys, dtype=np.uint64)), np.stack(expected))
