"""Every trainer for a step, and the folder that comes of it."""

import pytest

from kimia.model.checkpoint import open_checkpoint
from kimia.model.consistency import read_configs
from training.config import LIMIT_BYTES
from training.smoke import Smoke, load_all

pytestmark = pytest.mark.unit


def test_every_trainer_runs_and_the_folder_loads_strictly(configs, tmp_path):
    smoke = Smoke(tmp_path, configs, steps=2)
    checkpoint = smoke.run()
    opened = open_checkpoint(checkpoint.root)
    assert 0.5 * LIMIT_BYTES < load_all(opened, read_configs(opened)) < LIMIT_BYTES
