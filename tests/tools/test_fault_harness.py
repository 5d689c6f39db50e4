"""Tests that the functions at which the fault harness makes faults strike still exist in the code."""

import pytest

from fault_harness.strike_at import MOMENTS, find


@pytest.mark.parametrize("moment", MOMENTS)
def test_every_moment_is_a_function_of_the_package(moment):
    owner, name = find(moment)
    assert callable(getattr(owner, name))
