"""Corrections against their definitions."""

import numpy as np
import pytest

from halfstep.statistics import holm


def test_holm() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([])).size == 0
