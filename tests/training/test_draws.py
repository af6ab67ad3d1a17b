from __future__ import annotations

import torch

from mimicbrush.training.draws import Draws

SHAPE = (4, 8, 8)


def draw(keys: list[int], reference: float = 0.1, depth: float = 0.5) -> Draws:
    return Draws.for_keys(
        torch.tensor(keys), SHAPE, num_timesteps=1000, reference_drop_ratio=reference, depth_drop_ratio=depth
    )


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together, alone = draw([5, 6, 7]), draw([6])
    assert torch.equal(together.noise[1], alone.noise[0])
    assert torch.equal(together.posteriors[:, 1], alone.posteriors[:, 0])
    assert together.timestep[1] == alone.timestep[0]
    assert together.keep_depth[1] == alone.keep_depth[0]


def test_drops_happen_per_sample_at_their_rates() -> None:
    draws = draw(list(range(4000)))
    assert abs((~draws.keep_reference).float().mean() - 0.10) < 0.02
    assert abs((~draws.keep_depth).float().mean() - 0.50) < 0.035
    both = (~draws.keep_reference & ~draws.keep_depth).float().mean()
    assert abs(both - 0.05) < 0.015  # independent
    assert draws.timestep.min() < 5 and draws.timestep.max() > 994
    assert draw([1, 2], reference=0, depth=1).keep_reference.all()
    assert not draw([1, 2], reference=0, depth=1).keep_depth.any()


def test_noise_is_standard_normal_and_each_its_own() -> None:
    draws = draw(list(range(200)))
    assert abs(draws.noise.mean()) < 0.02 and abs(draws.noise.std() - 1) < 0.02
    everything = torch.cat([draws.noise[None], draws.posteriors]).flatten(2)  # (4, B, n)
    correlation = torch.corrcoef(everything.reshape(4, -1))
    assert (correlation - torch.eye(4)).abs().max() < 0.03


def test_the_released_code_drops_the_first_quarter_of_a_batch() -> None:
    drop = {"num_timesteps": 1000, "reference_drop_ratio": 0.1, "depth_drop_ratio": 0.5}
    for count, dropped in ((8, 2), (5, 1), (3, 0)):
        keys = torch.arange(count)
        released = Draws.for_keys(keys, SHAPE, **drop, reference_drop="first_quarter")
        assert released.keep_reference.tolist() == [False] * dropped + [True] * (count - dropped)
        # Nothing else is drawn differently.
        random = Draws.for_keys(keys, SHAPE, **drop)
        assert torch.equal(random.keep_depth, released.keep_depth) and torch.equal(random.noise, released.noise)
