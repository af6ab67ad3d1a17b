"""GroupNorm and SiLU in one pass over channels-last memory, forward and backward, as Triton kernels.

In channels-last memory, a batch (N, C, H, W) is N samples of H * W rows of C numbers. Most kernels take a tile of
`TILE_ROWS` x `TILE_CHANNELS` of one sample, so that they read and write whole lines of memory. A group is C / G
channels, and a tile may hold parts of several groups. So a tile sums by channel, and the ``_finish`` kernels join the
tiles and channels of a group. No sum uses atomic operations, so the same input gives the same bits. Everything is
computed in float32.

Only `fused_norms` imports this module, because Triton is not always installed.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: Rows and channels of a tile: 64 numbers in half precision are a line of memory, 128 bytes.
TILE_ROWS, TILE_CHANNELS = 64, 64


@triton.jit
def _locate(hw, channels, groups, rows: tl.constexpr, columns: tl.constexpr):
    """Find the tile of a program: places of its numbers and which exist, its channels and which exist, groups."""
    n = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    is_channel = channel < channels
    inside = (row < hw)[:, None] & is_channel[None, :]
    place = n * hw * channels + row[:, None] * channels + channel[None, :]
    return place, inside, channel, is_channel, n * groups + channel // (channels // groups)


@triton.jit
def _read(of, place, inside):
    """Read numbers as float32; 0 where `inside` is False."""
    return tl.load(of + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _read_normalised(x, mean, rstd, place, inside, group, is_channel):
    """Read x and normalise it; also return the 1 / standard deviations."""
    scale = _read(rstd, group, is_channel)[None, :]
    return (_read(x, place, inside) - _read(mean, group, is_channel)[None, :]) * scale, scale


@triton.jit
def _differentiate(dy, z, silu: tl.constexpr):
    """Turn the gradient of the result into that of z: d SiLU(z) / dz = s + z s (1 - s), where s = sigmoid(z)."""
    if silu:
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy


@triton.jit
def _moments_kernel(x, means, squares, hw, channels, rows: tl.constexpr, columns: tl.constexpr):
    """Compute mean and sum of squared distances from it per channel of a tile; large means do not harm precision."""
    place, inside, channel, is_channel, _ = _locate(hw, channels, channels, rows, columns)
    values = _read(x, place, inside)
    count = tl.minimum(hw - tl.program_id(0) * rows, rows).to(tl.float32)
    mean = tl.sum(values, axis=0) / count
    distance = tl.where(inside, values - mean[None, :], 0.0)
    part = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(means + part, mean, mask=is_channel)
    tl.store(squares + part, tl.sum(distance * distance, axis=0), mask=is_channel)


@triton.jit
def _finish_moments_kernel(
    means, squares, mean_out, rstd_out, hw, channels, groups, tiles, eps, rows: tl.constexpr, lanes: tl.constexpr
):
    """Join the moments of a group: its mean, then the squared distances from this mean."""
    n, group, width = tl.program_id(0).to(tl.int64), tl.program_id(1), channels // groups
    lane = tl.arange(0, lanes)
    first = n * tiles * channels + group * width + lane
    sums = tl.zeros([lanes], tl.float32)
    for tile in range(tiles):
        count = tl.minimum(hw - tile * rows, rows).to(tl.float32)
        sums += count * _read(means, first + tile * channels, lane < width)
    size = 1.0 * hw * width
    mean = tl.sum(sums, axis=0) / size
    sums = tl.zeros([lanes], tl.float32)
    for tile in range(tiles):
        count = tl.minimum(hw - tile * rows, rows).to(tl.float32)
        shift = _read(means, first + tile * channels, lane < width) - mean
        sums += _read(squares, first + tile * channels, lane < width) + count * shift * shift
    variance = tl.sum(tl.where(lane < width, sums, 0.0), axis=0) / size
    tl.store(mean_out + n * groups + group, mean)
    tl.store(rstd_out + n * groups + group, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _apply_kernel(
    x, weight, bias, mean, rstd, out, hw, channels, groups,
    silu: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """z = (x - mean) * rstd * weight + bias, and its SiLU."""
    place, inside, channel, is_channel, group = _locate(hw, channels, groups, rows, columns)
    normal, _ = _read_normalised(x, mean, rstd, place, inside, group, is_channel)
    z = normal * _read(weight, channel, is_channel)[None, :] + _read(bias, channel, is_channel)[None, :]
    if silu:
        z = z * tl.sigmoid(z)
    tl.store(out + place, z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sums_kernel(
    dy, x, weight, bias, mean, rstd, sums, hw, channels, groups,
    silu: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Sum dz, and dz times the normalised x, per channel of a tile."""
    place, inside, channel, is_channel, group = _locate(hw, channels, groups, rows, columns)
    normal, _ = _read_normalised(x, mean, rstd, place, inside, group, is_channel)
    z = normal * _read(weight, channel, is_channel)[None, :] + _read(bias, channel, is_channel)[None, :]
    dz = _differentiate(_read(dy, place, inside), z, silu)  # 0 outside, like dy
    tiles, samples = tl.num_programs(0), tl.num_programs(2).to(tl.int64)
    part = (tl.program_id(2).to(tl.int64) * tiles + tl.program_id(0)) * channels + channel
    tl.store(sums + part, tl.sum(dz, axis=0), mask=is_channel)
    tl.store(sums + samples * tiles * channels + part, tl.sum(dz * normal, axis=0), mask=is_channel)


@triton.jit
def _finish_sums_kernel(sums, weight, by_channel, by_group, hw, channels, groups, tiles, lanes: tl.constexpr):
    """Join the sums of all tiles per channel; then multiply them by the weight, and take the mean over a group."""
    n, group, width = tl.program_id(0).to(tl.int64), tl.program_id(1), channels // groups
    samples, lane = tl.num_programs(0), tl.arange(0, lanes)
    channel, exists = group * width + lane, lane < width
    weights = _read(weight, channel, exists)
    for number in range(2):  # the sums of dz, then those of dz times the normalised x
        row = number * samples + n
        total = tl.zeros([lanes], tl.float32)
        for tile in range(tiles):
            total += _read(sums, (row * tiles + tile) * channels + channel, exists)
        tl.store(by_channel + row * channels + channel, total, mask=exists)
        tl.store(by_group + row * groups + group, tl.sum(total * weights, axis=0) / (1.0 * hw * width))


@triton.jit
def _gradient_kernel(
    dy, x, weight, bias, mean, rstd, by_group, dx, hw, channels, groups,
    silu: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - n * mean(g * n)), where g = weight * dz and n is the normalised x."""
    place, inside, channel, is_channel, group = _locate(hw, channels, groups, rows, columns)
    normal, scale = _read_normalised(x, mean, rstd, place, inside, group, is_channel)
    weights = _read(weight, channel, is_channel)[None, :]
    z = normal * weights + _read(bias, channel, is_channel)[None, :]
    g = weights * _differentiate(_read(dy, place, inside), z, silu)
    mean_g = _read(by_group, group, is_channel)[None, :]
    mean_gn = _read(by_group + tl.num_programs(2) * groups, group, is_channel)[None, :]
    tl.store(dx + place, (scale * (g - mean_g - normal * mean_gn)).to(dx.dtype.element_ty), mask=inside)


# Custom operators of PyTorch, so that they work with fake tensors and with tools that look at operators.
@torch.library.custom_op("mimicbrush::group_norm", mutates_args=())
def fused_group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute GroupNorm and optionally SiLU in channels-last memory: (N, C, H, W) -> (N, C, H, W).

    It is differentiable by `x`, `weight` and `bias`.

    Args:
        x: float32, float16 or bfloat16, channels-last.
        weight, bias: (C,), of any of these types.
        groups: number of groups, which divides C.
        eps: epsilon of the norm.
        silu: whether SiLU follows.

    Returns:
        The result in the type of `x`; mean and 1 / standard deviation of each group, (N, groups) float32 each.
    """
    n, channels, hw = len(x), x.shape[1], x.shape[2] * x.shape[3]
    tiles, group_width = triton.cdiv(hw, TILE_ROWS), triton.next_power_of_2(channels // groups)
    grid = (tiles, triton.cdiv(channels, TILE_CHANNELS), n)
    means, squares = (x.new_empty((n, tiles, channels), dtype=torch.float32) for _ in range(2))
    mean, rstd = (x.new_empty((n, groups), dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _moments_kernel[grid](x, means, squares, hw, channels, TILE_ROWS, TILE_CHANNELS)
        _finish_moments_kernel[n, groups](
            means, squares, mean, rstd, hw, channels, groups, tiles, eps, TILE_ROWS, group_width
        )
        _apply_kernel[grid](x, weight, bias, mean, rstd, out, hw, channels, groups, silu, TILE_ROWS, TILE_CHANNELS)
    return out, mean, rstd


@torch.library.custom_op("mimicbrush::group_norm_backward", mutates_args=())
def _differentiate_norm(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of `x`, and those of bias and weight by sample, (2, N, C) float32."""
    n, channels, hw, groups = len(x), x.shape[1], x.shape[2] * x.shape[3], mean.shape[1]
    tiles, group_width = triton.cdiv(hw, TILE_ROWS), triton.next_power_of_2(channels // groups)
    grid = (tiles, triton.cdiv(channels, TILE_CHANNELS), n)
    sums = x.new_empty((2, n, tiles, channels), dtype=torch.float32)
    by_channel = x.new_empty((2, n, channels), dtype=torch.float32)
    by_group = x.new_empty((2, n, groups), dtype=torch.float32)
    dx = torch.empty_like(x)
    inputs, sizes = (dy, x, weight, bias, mean, rstd), (hw, channels, groups)
    with torch.cuda.device_of(x):
        _sums_kernel[grid](*inputs, sums, *sizes, silu, TILE_ROWS, TILE_CHANNELS)
        _finish_sums_kernel[n, groups](sums, weight, by_channel, by_group, *sizes, tiles, group_width)
        _gradient_kernel[grid](*inputs, by_group, dx, *sizes, silu, TILE_ROWS, TILE_CHANNELS)
    return dx, by_channel


@fused_group_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool) -> Any:
    return torch.empty_like(x), *(x.new_empty((len(x), groups), dtype=torch.float32) for _ in range(2))


@_differentiate_norm.register_fake
def _(dy: torch.Tensor, x: torch.Tensor, *others: Any) -> Any:
    return torch.empty_like(x), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _go_back(ctx: Any, dy: torch.Tensor, *of_moments: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, by_sample = _differentiate_norm(dy, x, weight, bias, mean, rstd, ctx.silu)
    of_weight = of_bias = None
    if any(ctx.needs_input_grad[1:3]):  # not if only adapters are trained
        of_bias, of_weight = by_sample.sum(dim=1).unbind()
        of_weight, of_bias = of_weight.to(weight.dtype), of_bias.to(bias.dtype)
    return dx, of_weight, of_bias, None, None, None


fused_group_norm.register_autograd(_go_back, setup_context=_keep_for_backward)
