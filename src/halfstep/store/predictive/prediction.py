"""A state predicted as a weighted sum of others, in float32: the same operations, in the same order, for encoding and
decoding.

Axes: C channels, N values of a channel. Channels next to each other may share a set of weights. What overflows on the
way is looked for at the end; whoever calls these has turned numpy's warnings off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float16]
Block = tuple[slice, slice]

_BLOCK = 1 << 15  # values of a state that are worked on at once: with all taps they stay in the cache
_FITTED_VALUES = 512  # of a channel are enough to fit a handful of weights
_MANY = 32  # channels, among which neighbors may be parts of one: packed latents
_LARGEST = 60000  # weight
_RIDGE = 1e-9  # of a direction's own square: states that repeat each other leave no direction open
_ROUNDING = 1e-14  # of a sum in float64, with room

NO_WEIGHTS: Weights = np.empty((0, 0), np.float16)


def blocks(shape: tuple[int, ...], rows: Iterable[int] | None = None) -> Iterator[Block]:
    """A state [C, N], or these rows of it, in parts that stay in the cache."""
    channels, values = shape
    height = max(1, _BLOCK // values) if rows is None else 1
    for row in range(0, channels, height) if rows is None else rows:
        for column in range(0, values, _BLOCK):
            yield slice(row, row + height), slice(column, column + _BLOCK)


def best_weights(state: Float32, history: Sequence[Float32], basis: Float64, widths: Float64) -> Weights:
    """Least-squares weights [sets, taps + 1] of the rows of `basis`, the first one less 1, and of an offset, as they
    are stored: one set a channel, one for four channels where there are many, one for all, or none. Those with which
    they and the bins of these `widths` [C] take the fewest bits. Values of `state` that are not finite count as zero.
    """
    if not history:
        return NO_WEIGHTS
    channels, unknowns = len(state), len(history) + 1
    rows, change = _sample(state, history, basis)
    products = _products(rows, change)
    sizes = list(dict.fromkeys([channels, channels // 4 if channels >= _MANY and channels % 4 == 0 else 1, 1]))
    try:
        weights = _solve(products, sizes)
    except np.linalg.LinAlgError:  # then the state is coded as it is, which takes more bytes and is as right
        return NO_WEIGHTS
    # What is left of the state, as sums of directions and target. The target is how it differs from the nearest tap.
    sides = np.zeros((channels, 1 + len(sizes), unknowns + 1))
    sides[:, :, -1] = sides[:, 0, -2] = 1.0
    candidates = [NO_WEIGHTS, *np.split(weights, np.cumsum(sizes)[:-1])]
    for number, (sets, some) in enumerate(zip(sizes, candidates[1:], strict=True), start=1):
        sides[:, number, :-1] = -np.repeat(some, channels // sets, axis=0)
    squares = np.einsum("csi,csi->cs", sides @ products, sides) / rows.shape[2]
    steps = np.where(widths > 0, widths, widths.max())[:, None]
    bits = 0.5 * np.log2(1 + np.maximum(squares, 0.0) / np.square(steps)).mean(axis=0) * state.size
    costs = bits + np.array([16.0 * some.size for some in candidates])
    return candidates[int(np.argmin(costs))][:, ::-1].copy()


def tap_weights(weights: Weights, basis: Float64, channels: int) -> Float32:
    """What each tap and the offset count for, [C, taps + 1], of the stored weights of `basis`."""
    wide = weights.astype(np.float64)
    result = np.zeros((len(weights), len(basis) + 1))
    result[:, 0], result[:, -1] = 1.0, wide[:, -1]
    for row, combination in enumerate(basis):  # one after the other, so that sums are rounded alike everywhere
        result[:, :-1] += wide[:, row, None] * combination
    return np.repeat(result.astype(np.float32), channels // len(weights), axis=0)


def predict(history: Sequence[Float32], weights: Float32, block: Block) -> Float32:
    """The prediction of one block from tap weights [C, taps + 1]; zero where it is not finite."""
    rows = block[0]
    prediction = history[0][block] * weights[rows, 0, None]
    product = np.empty_like(prediction)
    for column, past in enumerate(history[1:], start=1):
        np.multiply(past[block], weights[rows, column, None], out=product)
        prediction += product
    prediction += weights[rows, -1, None]
    return finite(prediction)


def finite(values: Float32) -> Float32:
    """Without what is not finite: predictions go on from zero there, the values themselves are kept elsewhere."""
    if np.isfinite(values.sum()):
        return values
    return np.where(np.isfinite(values), values, np.float32(0))


def _sample(state: Float32, history: Sequence[Float32], basis: Float64) -> tuple[Float64, Float64]:
    """Some values of a state and its taps, [C, n + 1, values], and how the n directions and the target [n + 1, n + 1]
    are made of these rows: an offset, the rows of `basis` from the last to the second, the nearest tap; and how the
    state differs from that."""
    some = (slice(None), slice(None, None, max(1, state.shape[1] // _FITTED_VALUES)))
    nearest, target, count = history[0][some].astype(np.float64), finite(state[some]), len(history)
    rows = np.ones((len(state), count + 2, target.shape[1]))
    for row, values in enumerate([*(past[some] for past in history[1:]), target], start=1):
        np.subtract(values, nearest, out=rows[:, row + (row == count)])
    rows[:, count] = nearest
    change = np.eye(count + 2)
    change[1:count, 1:count] = basis[:0:-1, 1:]
    return rows, change


def _products(rows: Float64, change: Float64) -> Float64:
    """Products [C, n + 1, n + 1] of directions and target."""
    products = rows @ rows.transpose(0, 2, 1)
    # Higher differences are small sums of large numbers; below this they are rounding.
    between = slice(1, len(change) - 2)
    largest = np.einsum("cii->ci", products)[:, between].max(axis=1, initial=0.0)
    floor = _ROUNDING * np.abs(change[:, between]).sum(axis=1) ** 2
    products = change @ products @ change.T
    products[:, range(len(change)), range(len(change))] += floor * largest[:, None]
    return products


def _solve(products: Float64, sizes: Sequence[int]) -> Weights:
    """Least squares for as many sets of channels as each of the `sizes`, together; weights in the order of directions.
    Babai's nearest plane: each unknown is rounded before the others are solved for, the nearest tap's first, so that
    they make up for its error."""
    together = [products.reshape(sets, -1, *products.shape[1:]).sum(axis=1) for sets in sizes]
    products = np.concatenate(together)
    count = products.shape[1] - 1
    gram, moment = products[:, :count, :count].copy(), products[:, :count, count]
    gram[:, range(count), range(count)] *= 1 + _RIDGE
    gram[:, range(count), range(count)] += 1e-30
    factor = np.linalg.cholesky(gram)
    unknown = np.linalg.solve(factor, moment[:, :, None])[:, :, 0]
    # Unknowns first, so that each of them is one row, next to each other in memory.
    columns, rows = np.ascontiguousarray(unknown.T), np.ascontiguousarray(factor.transpose(1, 2, 0))
    for k in reversed(range(count)):
        value = columns[k] / rows[k, k]
        columns[k] = np.maximum(np.minimum(value, _LARGEST), -_LARGEST).astype(np.float16)
        columns[:k] -= rows[k, :k] * columns[k]
    return columns.T.astype(np.float16)
