from __future__ import annotations

import numpy as np
import pytest
import torch
from measurements import harness, training
from scipy import stats

from mimicbrush.ops.counter_rng import generator, mix
from mimicbrush.training.noise import NoiseSample, sample_counter_normals

SHAPE = (4, 8, 8)


def sample_noise(keys: list[int], reference: float = 0.1, depth: float = 0.5) -> NoiseSample:
    return NoiseSample.for_keys(
        torch.tensor(keys), SHAPE, num_timesteps=1000, reference_drop_ratio=reference, depth_drop_ratio=depth
    )


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together, alone = sample_noise([5, 6, 7]), sample_noise([6])
    assert torch.equal(together.noise[1], alone.noise[0])
    assert torch.equal(together.posteriors[:, 1], alone.posteriors[:, 0])
    assert together.timestep[1] == alone.timestep[0]
    assert together.keep_depth[1] == alone.keep_depth[0]


def test_drops_happen_per_sample_at_their_rates() -> None:
    noise_sample = sample_noise(list(range(4000)))
    assert abs((~noise_sample.keep_reference).float().mean() - 0.10) < 0.02
    assert abs((~noise_sample.keep_depth).float().mean() - 0.50) < 0.035
    both = (~noise_sample.keep_reference & ~noise_sample.keep_depth).float().mean()
    assert abs(both - 0.05) < 0.015  # independent
    assert noise_sample.timestep.min() < 5 and noise_sample.timestep.max() > 994
    assert sample_noise([1, 2], reference=0, depth=1).keep_reference.all()
    assert not sample_noise([1, 2], reference=0, depth=1).keep_depth.any()


def test_noise_is_standard_normal_and_each_its_own() -> None:
    noise_sample = sample_noise(list(range(200)))
    assert abs(noise_sample.noise.mean()) < 0.02 and abs(noise_sample.noise.std() - 1) < 0.02
    everything = torch.cat([noise_sample.noise[None], noise_sample.posteriors]).flatten(2)  # (4, B, n)
    correlation = torch.corrcoef(everything.reshape(4, -1))
    assert (correlation - torch.eye(4)).abs().max() < 0.03


def test_the_released_code_drops_the_first_quarter_of_a_batch() -> None:
    drop = {"num_timesteps": 1000, "reference_drop_ratio": 0.1, "depth_drop_ratio": 0.5}
    for count, dropped in ((8, 2), (5, 1), (3, 0)):
        keys = torch.arange(count)
        released = NoiseSample.for_keys(keys, SHAPE, **drop, reference_drop="first_quarter")
        assert released.keep_reference.tolist() == [False] * dropped + [True] * (count - dropped)
        # Nothing else is drawn differently.
        random = NoiseSample.for_keys(keys, SHAPE, **drop)
        assert torch.equal(random.keep_depth, released.keep_depth) and torch.equal(random.noise, released.noise)


def test_noise_of_a_whole_batch_is_normal_independent_and_each_samples_own() -> None:
    seeds = torch.tensor([[mix(number, 2) for number in range(400)]])
    (numbers,) = sample_counter_normals(seeds, (501,))
    assert numbers.shape == (400, 501) and numbers.dtype == torch.float32
    assert stats.kstest(numbers.double().flatten().numpy(), "norm").pvalue > 0.01
    # Neither neighbours in a sample nor samples side by side hang together, nor do their squares.
    for one, other in (
        (numbers[:, :-1], numbers[:, 1:]),
        (numbers[:-1], numbers[1:]),
        (numbers[:, ::2][:, :250], numbers[:, 1::2]),
    ):
        for power in (1, 2):
            assert abs(np.corrcoef(one.flatten() ** power, other.flatten() ** power)[0, 1]) < 0.01
    assert abs(numbers.mean()) < 0.01 and abs(numbers.var() - 1) < 0.02
    assert torch.equal(sample_counter_normals(seeds[:, 7:9], (501,))[0], numbers[7:9])
    # Several streams in one call, each with numbers of its own.
    fewer, others = sample_counter_normals(torch.cat([seeds, seeds + 1]), (100, 37))
    assert torch.equal(fewer, numbers[:, :100])
    assert torch.equal(others, sample_counter_normals(seeds + 1, (37,))[0])


def test_where_noise_is_drawn_changes_nothing_else() -> None:
    keys, drop = torch.arange(20), {"num_timesteps": 1000, "reference_drop_ratio": 0.1, "depth_drop_ratio": 0.5}
    plain = NoiseSample.for_keys(keys, SHAPE, **drop)
    batched = NoiseSample.for_keys(keys, SHAPE, **drop, noise_device=torch.device("cpu"))
    assert batched.noise.shape == plain.noise.shape and batched.posteriors.shape == plain.posteriors.shape
    assert not torch.equal(batched.noise, plain.noise)
    for name in ("timestep", "keep_reference", "keep_depth", "reference_rows", "depth_rows"):
        assert torch.equal(getattr(plain, name), getattr(batched, name))
    alone = NoiseSample.for_keys(keys[5:6], SHAPE, **drop, noise_device=torch.device("cpu"))
    assert torch.equal(alone.noise[0], batched.noise[5]) and torch.equal(
        alone.posteriors[:, 0], batched.posteriors[:, 5]
    )


@pytest.mark.parametrize("num_timesteps", [1000, 2**31 + 1])  # of the second, NumPy samples every other one anew
def test_timesteps_and_drops_are_those_of_a_numpy_generator_for_each_key(num_timesteps: int) -> None:
    keys = [mix(number, 5) for number in range(300)]
    made = NoiseSample.for_keys(
        torch.tensor(keys), (1, 1, 1), num_timesteps=num_timesteps, reference_drop_ratio=0.1, depth_drop_ratio=0.5
    )
    for row, key in enumerate(keys):
        decisions = generator(key, 1)
        assert int(made.timestep[row]) == decisions.integers(num_timesteps)
        assert bool(made.keep_reference[row]) == (decisions.random() >= 0.1)
        assert bool(made.keep_depth[row]) == (decisions.random() >= 0.5)
        assert abs(float(made.chance[row]) - decisions.random()) < 1e-7


def test_the_measurement_compares_equal_numbers() -> None:
    cases = list(training.noise(batch=5))
    assert len(cases) == 5
    for case in cases:
        ours = case.ours()
        assert [len(tensor) for tensor in ours] == [5, 5, 5, 5, 3]
        assert harness.largest_difference(ours, case.peer()) == 0
