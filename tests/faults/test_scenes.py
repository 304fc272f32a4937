"""Every scene keeps the promises, on both kinds of server."""

import pytest

from tests.faults.ground import ground_at
from tests.faults.scenes import SCENES, perform

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_promises_are_kept(journal_url, scene):
    with ground_at(journal_url) as ground:
        perform(scene, ground)
