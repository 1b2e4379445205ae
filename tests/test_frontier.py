"""Equal learning, area and differences on points written by hand."""

from dataclasses import replace

import pytest

from forgetless.compare.frontier import (
    area,
    at_learning,
    at_share,
    choice_key,
    difference,
    on_frontier,
)
from forgetless.files.compare_json import EqualLearning
from forgetless.sequence.transfer import of_accuracy, transfer

CURVE = [(0.4, 0.01), (0.8, 0.05), (1.0, 0.25)]  # a run at scales 0.5, 0.75 and 1


def test_forgetting_at_a_learning_lies_on_the_line_between_scales():
    assert at_learning(CURVE, 0.2) == pytest.approx(0.005)  # half of the way from the base
    assert at_learning(CURVE, 0.6) == pytest.approx(0.03)
    assert at_learning(CURVE, 1.0) == pytest.approx(0.25)
    assert at_learning(CURVE, 1.01) is None


def test_a_run_past_its_best_is_read_where_it_first_gets_there():
    assert at_learning([(0.5, 0.01), (0.9, 0.1), (0.6, 0.5)], 0.6) == pytest.approx(0.01 + 0.09 / 4)


def test_over_seeds_a_number_needs_every_seed():
    other = [(0.4, 0.03), (0.8, 0.07), (1.0, 0.35)]
    found = at_share([CURVE, other], 0.8)
    assert (
        found.forgetting == pytest.approx(0.06)
        and found.standard_error == pytest.approx(0.01)
        and found.status == "reached"
    )
    lost = at_share([CURVE, [(0.3, 0.0)]], 0.8)
    assert lost.forgetting is None and lost.status == "reached by 1 of 2"
    assert at_share([[(0.3, 0.0)]], 0.8).status == "not reached"


def test_settings_that_reach_the_learning_come_before_those_that_learn_more_nearly():
    assert (
        choice_key([CURVE], 0.8)
        < choice_key([[(0.79, 0.0)]], 0.8)
        < choice_key([[(0.5, 0.0)]], 0.8)
    )


def test_the_area_is_the_mean_of_the_lower_envelope():
    straight, better = [(1.0, 0.2)], [(0.5, 0.02)]
    assert area([straight], 1.0) == pytest.approx(0.2 * 0.95 / 2, rel=0.01)
    assert area([better], 1.0) is None  # ends at half
    both = area([straight, better], 1.0)
    assert both is not None and both < area([straight], 1.0)


def test_points_that_are_beaten_are_not_on_the_frontier():
    assert on_frontier([(1.0, 0.1), (0.5, 0.1), (0.5, 0.01), (1.0, 0.1)]) == [
        True,
        False,
        True,
        True,
    ]


def test_a_difference_is_beyond_the_noise_outside_of_welchs_interval():
    a, b = (
        EqualLearning(method="any", level=0.95, forgetting=f, standard_error=e, seeds=3)
        for f, e in ((0.10, 0.003), (0.20, 0.004))
    )
    gap = difference(a, b, noise=None)
    assert (
        gap.ratio == pytest.approx(0.5)
        and gap.standard_error == pytest.approx(0.005)
        and gap.beyond_noise
    )
    # 3.7 degrees of freedom (Welch 1947: 25^2 / (9^2 / 2 + 16^2 / 2), in units of 1e-6): t = 2.87,
    # half a width of 0.01436.
    assert (
        not difference(a, replace(b, forgetting=0.1143), noise=None).beyond_noise
        and difference(a, replace(b, forgetting=0.1145), noise=None).beyond_noise
    )
    one = EqualLearning(method="any", level=0.95, forgetting=0.1, standard_error=None, seeds=1)
    assert (
        difference(one, replace(one, forgetting=0.2), noise=None).beyond_noise is None
    )  # one seed and nothing known of the noise
    assert (
        difference(one, replace(one, forgetting=0.2), noise=0.04).beyond_noise
        and not difference(one, replace(one, forgetting=0.2), noise=0.06).beyond_noise
    )
    assert difference(replace(one, forgetting=None), one, noise=None) is None


def test_transfer_on_a_matrix_written_by_hand():
    """Three domains: a is forgotten by 0.3 (first 0.1 by b, then 0.2 by c), b by 0.2; b starts 0.5
    better after a, c is 0.1 worse after a and b.
    """
    losses = [[4.0, 5.0, 6.0], [3.0, 4.5, 6.2], [3.1, 4.0, 6.1], [3.3, 4.2, 5.0]]
    found = transfer(losses)
    assert found["average"] == pytest.approx((3.3 + 4.2 + 5.0) / 3)
    assert found["backward_transfer"] == pytest.approx(-(0.3 + 0.2) / 2)
    assert found["forward_transfer"] == pytest.approx((0.5 - 0.1) / 2)
    assert transfer([[4.0], [3.0]]) == {
        "average": 3.0,
        "backward_transfer": None,
        "forward_transfer": None,
    }
    assert set(transfer(losses[:3]).values()) == {None}  # not at its end yet


def test_transfer_of_accuracies_has_their_sign():
    """Two of three domains have questions: the first loses a tenth by the third's step, the second
    starts a fifth better after the first.
    """
    found = of_accuracy([[0.2, 0.3], [0.6, 0.5], [0.7, 0.9], [0.5, 0.8]], [1, 2], steps=3)
    assert found == {
        "average": pytest.approx(0.65),
        "backward_transfer": pytest.approx(-0.1),
        "forward_transfer": pytest.approx(0.2),
    }
    assert set(of_accuracy([[0.2, 0.3], [0.6, 0.5], [0.7, 0.9]], [1, 2], steps=3).values()) == {
        None
    }  # the third domain's turn is still to come
