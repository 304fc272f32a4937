"""Every deliberate fault of the scripts is noticed by a scene, those of the design by random examples too."""

import pytest

from tests.faults.breaks import DESIGNED, FORGOTTEN, broken
from tests.faults.explore import asked, explore
from tests.faults.ground import ground_at
from tests.faults.protocol import Protocol
from tests.faults.scenes import SCENES, perform
from tests.faults.truth import Violation

EXAMPLES = 2000  # after which the state machine must have noticed


def notices(scene, ground) -> bool:
    try:
        perform(scene, ground)
    except (ValueError, AssertionError):  # a promise is broken, or the story goes otherwise
        return True
    return False


@pytest.mark.unit
@pytest.mark.parametrize("fault", [*DESIGNED, *FORGOTTEN], ids=str)
def test_a_scene_notices(valkey_url, fault):
    with ground_at(valkey_url) as ground, broken(fault):
        assert any(notices(scene, ground) for scene in SCENES)


@pytest.mark.faults
@pytest.mark.timeout(0)
@pytest.mark.parametrize("fault", DESIGNED, ids=str)
def test_the_state_machine_notices(valkey_url, fault):
    with ground_at(valkey_url) as ground, broken(fault), pytest.raises(Violation):
        explore(Protocol, ground, asked()[0], EXAMPLES, shrink=False)
