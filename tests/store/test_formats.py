import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import InputError, NumericsError
from halfstep.store.formats import to_float32, to_storage

finite = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-6e4, max_value=6e4), min_size=1)


@given(finite)
def test_bf16_rounds_as_torch_does(values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = torch.tensor(array).to(torch.bfloat16)
    stored = to_storage(array, "bf16")
    assert np.array_equal(stored, expected.view(torch.uint16).numpy())
    assert np.array_equal(to_float32(stored, "BF16"), expected.float().numpy())


@given(finite)
def test_fp16_rounds_as_torch_does(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert np.array_equal(to_storage(array, "fp16"), torch.tensor(array).half().numpy())


def test_every_finite_fp16_value_widens_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    widened = to_float32(every, "F16")
    assert np.array_equal(widened.view(np.uint32), every.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(storage: str, bad: float) -> None:
    with pytest.raises(NumericsError, match=storage):
        to_storage(np.array([0, bad], np.float32), storage)


def test_what_overflows_is_refused_also_when_already_stored() -> None:
    with pytest.raises(NumericsError):
        to_storage(np.array([65520.0], np.float32), "fp16")
    with pytest.raises(NumericsError):
        to_storage(np.array([np.inf], np.float16), "fp16")
    with pytest.raises(NumericsError):
        to_storage(np.array([0x7F80], np.uint16), "bf16")


def test_no_nan_rounds_to_a_number() -> None:
    every_nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], np.uint32).view(np.float32)
    for nan in every_nan:
        with pytest.raises(NumericsError):
            to_storage(np.array([nan]), "bf16")


def test_other_types_are_named() -> None:
    with pytest.raises(InputError, match="got 'fp8'; expected one of fp32, fp16, bf16"):
        to_storage(np.zeros(1, np.float32), "fp8")
    with pytest.raises(InputError, match="got int64"):
        to_storage(np.zeros(1, np.int64), "fp16")
