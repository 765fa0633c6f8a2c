"""Which layers are anchors, and how many layers follow each."""

import pytest

from vllm_tokenselect.method.anchors import Role, choose_anchors, give_roles
from vllm_tokenselect.method.settings import SettingsError

# Of a model with two dense layers, and a sliding window in layer 5.
SELECTING = [2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("setting", "anchors"),
    [("all", SELECTING), (1, SELECTING), (3, [2, 6, 9]), (100, [2]), ((4, 9), [2, 4, 9])],
)
def test_every_nth_layer_that_selects_is_an_anchor_or_those_named_and_the_first(setting, anchors):
    assert choose_anchors(setting, SELECTING) == anchors


def test_the_first_layer_that_selects_in_a_pipeline_stage_is_an_anchor():
    assert choose_anchors((2,), SELECTING, first_of_stages=[2, 7]) == [2, 7]


def test_a_layer_that_does_not_select_cannot_be_an_anchor():
    with pytest.raises(SettingsError, match=r"names the layers \[0, 5\].* that do are \[2, 3, 4"):
        choose_anchors((0, 4, 5), SELECTING)


def test_an_anchor_knows_how_many_layers_follow_it():
    follows = Role(follows=True)
    assert give_roles([2, 4, 9], SELECTING) == [
        *(Role(followers=1), follows),
        *(Role(followers=3), follows, follows, follows),
        Role(followers=0),
    ]
    assert give_roles(SELECTING, SELECTING) == [Role()] * len(SELECTING)
