import math

import numpy as np
import pytest

import medrobust_lib as mr
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


def keyword_calls():
    """Functions that pass keywords on, each with a misspelled one and the one that was meant."""
    from medrobust_lib.adaptation.adapting import adapt_lora, fine_tune
    from medrobust_lib.corruptions.writing import write_benchmark
    from medrobust_lib.data.splits import fraction_splits, learning_splits
    from medrobust_lib.generative.certify import certify_questions
    from medrobust_lib.generative.judges import chat_endpoint
    from medrobust_lib.smoothing.prompts import learn_prompts

    nothing = object()
    return [
        (lambda: mr.certify(nothing, nothing, sigma=0.1, alhpa=0.1), "certify", "alpha"),
        (lambda: mr.predict(nothing, nothing, sigma=0.1, sead=1), "predict", "seed"),
        (lambda: mr.certify_dataset(nothing, nothing, alhpa=0.1), "certify_dataset", "alpha"),
        (lambda: mr.certify_generative(*[nothing] * 4, temprature=1), "certify_generative", "temperature"),
        (lambda: certify_questions([], nothing, nothing, eror_model=None), "certify_questions", "error_model"),
        (lambda: mr.load_dataset("phantom/blood", image_sise=64), "load_dataset", "image_size"),
        (lambda: learning_splits("phantom/blood", shots=1, n_test=1, n_pool=1, sed=1), "learning_splits", "seed"),
        (lambda: fraction_splits("phantom/blood", fraction=1, n_val=1, n_test=1, rot=1), "fraction_splits", "root"),
        (lambda: learn_prompts(nothing, nothing, contex=4), "learn_prompts", "n_context"),
        (lambda: adapt_lora(nothing, [], validation=[], epoch=1), "adapt_lora", "epochs"),
        (lambda: fine_tune(nothing, [], validation=[], epoch=1), "fine_tune", "epochs"),
        (lambda: chat_endpoint("http://localhost", model="m", api_key="K"), "chat_endpoint", "api_key_variable"),
        (lambda: write_benchmark("nowhere", [], severity=[1]), "write_benchmark", "severities"),
    ]


@pytest.mark.parametrize(("call", "function", "meant"), keyword_calls(), ids=lambda value: str(value)[:20])
def test_a_misspelled_keyword_names_the_function_that_was_called_and_the_one_meant(call, function, meant):
    with pytest.raises(TypeError, match=rf"^{function}\(\) takes no '\w+'\. Did you mean .*'{meant}'"):
        call()


def test_a_keyword_like_no_other_is_answered_with_all_of_them():
    with pytest.raises(
        TypeError, match=r"takes no 'zzz'\. Choose one of: .*sigmas, perturbation, seed.*, n0, n, alpha, "
    ):
        mr.certify_dataset(None, None, zzz=1)
