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
Block = tuple[slice, slice]

_BLOCK = 1 << 15  # values of a state that are worked on at once: with all taps they stay in the cache
_FITTED_VALUES = 512  # of a channel are enough to fit a handful of weights
_MANY = 32  # channels, among which neighbors may be parts of one: packed latents
_LARGEST = 60000  # weight
_RIDGE = 1e-9  # of a direction's own square: states that repeat each other leave no direction open
_ROUNDING = 1e-14  # of a sum in float64, with room


def blocks(shape: tuple[int, ...], rows: Iterable[int] | None = None) -> Iterator[Block]:
    """A state [C, N], or these rows of it, in parts that stay in the cache."""
    channels, values = shape
    height = max(1, _BLOCK // values) if rows is None else 1
    for row in range(0, channels, height) if rows is None else rows:
        for column in range(0, values, _BLOCK):
            yield slice(row, row + height), slice(column, column + _BLOCK)


def fit(state: Float32, history: Sequence[Float32], basis: Float64) -> list[npt.NDArray[np.float16]]:
    """Least-squares weights [sets, taps + 1] as they are stored, of the rows of `basis`, the first one less 1, and of
    an offset: one set a channel, one for four channels where there are many, and one for all. Values of `state` that
    are not finite count as zero."""
    channels, some = len(state), (slice(None), slice(None, None, max(1, state.shape[1] // _FITTED_VALUES)))
    nearest, target, count = history[0][some].astype(np.float64), finite(state[some]), len(history)
    # Rows: an offset, how the other taps differ from the nearest one, that one, and how the target differs from it.
    rows = np.ones((channels, count + 2, target.shape[1]))
    for row, values in enumerate([*(past[some] for past in history[1:]), target], start=1):
        np.subtract(values, nearest, out=rows[:, row + (row == count)])
    rows[:, count] = nearest
    change = np.eye(count + 2)
    change[1:count, 1:count] = basis[:0:-1, 1:]  # the last of the unknowns is rounded first: the nearest
    products = rows @ rows.transpose(0, 2, 1)
    # Higher differences are small sums of large numbers; below this they are rounding.
    largest = np.einsum("cii->ci", products)[:, 1:count].max(axis=1, initial=0.0)
    floor = _ROUNDING * np.abs(change[:, 1:count]).sum(axis=1) ** 2
    products = change @ products @ change.T
    products[:, range(count + 2), range(count + 2)] += floor * largest[:, None]
    sizes = list(dict.fromkeys([channels, channels // 4 if channels >= _MANY and channels % 4 == 0 else 1, 1]))
    together = [products.reshape(sets, -1, count + 2, count + 2).sum(axis=1) for sets in sizes]
    try:
        weights = _solve(np.concatenate(together))
    except np.linalg.LinAlgError:  # then the state is coded as it is, which takes more bytes and is as right
        return []
    ends = np.cumsum(sizes)
    return [weights[end - sets : end] for sets, end in zip(sizes, ends, strict=True)]


def tap_weights(weights: npt.NDArray[np.float16], basis: Float64, channels: int) -> Float32:
    """What each tap and the offset count for, [C, taps + 1], of the stored weights of `basis`."""
    wide = weights.astype(np.float64)
    result = np.zeros((len(weights), len(basis) + 1))
    result[:, 0] = 1.0
    for column in range(len(basis)):
        for row in range(column, len(basis)):
            result[:, column] += wide[:, row] * basis[row, column]
    result[:, -1] = wide[:, -1]
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


def _solve(products: Float64) -> npt.NDArray[np.float16]:
    """Least squares from the products [sets, n + 1, n + 1] of n directions and, last, the target. Babai's nearest
    plane: each unknown is rounded before the others are solved for, so that they make up for its error."""
    count = products.shape[1] - 1
    gram, moment = products[:, :count, :count], products[:, :count, count]
    lengths = np.einsum("sii->si", gram)
    gram[:, range(count), range(count)] = lengths * (1 + _RIDGE) + 1e-30
    factor = np.linalg.cholesky(gram)
    unknown = np.linalg.solve(factor, moment[:, :, None])[:, :, 0]
    weights = np.zeros((len(gram), count), np.float16)
    for k in reversed(range(count)):
        unknown[:, k] = weights[:, k] = np.clip(unknown[:, k] / factor[:, k, k], -_LARGEST, _LARGEST)
        unknown[:, :k] -= factor[:, k, :k] * weights[:, k, None]
    return weights[:, ::-1].copy()
