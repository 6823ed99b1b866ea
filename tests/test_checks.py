import math

import numpy as np
import pytest

from medrobust_lib.checks import check_choice, check_positive, check_whole


def test_a_choice_is_one_of_them_and_the_closest_is_named():
    check_choice("sampling", "fixed", ("fixed", "sequential"))
    with pytest.raises(ValueError, match=r"unknown sampling 'fixd'; choose one of fixed, seq; did you mean 'fixed'\?"):
        check_choice("sampling", "fixd", ("fixed", "seq"))
    with pytest.raises(ValueError, match=r"unknown sampling 3; choose one of fixed, seq$"):
        check_choice("sampling", 3, ("fixed", "seq"))


@pytest.mark.parametrize("value", [1, np.int64(7), 10])
def test_whole_numbers_come_back_as_ints(value):
    found = check_whole("n", value, most=10)
    assert found == value and type(found) is int


@pytest.mark.parametrize("value", [0, 11, True, 1.0, "1", None, np.float64(2), math.nan])
def test_what_is_no_whole_number_within_bounds_is_refused_with_them(value):
    with pytest.raises(ValueError, match=r"n=.* is no whole number from 1 to 10; ask for fewer$"):
        check_whole("n", value, most=10, hint="; ask for fewer")
    with pytest.raises(ValueError, match=r"n=-1 is no whole number of 0 or more$"):
        check_whole("n", -1, least=0)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True, "1", None, 11])
def test_what_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match=r"sigma=.* is no number above 0 and up to 10$"):
        check_positive("sigma", value, most=10)
    check_positive("sigma", np.float32(0.25), most=10)
