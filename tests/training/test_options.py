import math

import pytest

from kimia.errors import ParameterError
from training.loop import Progress
from training.options import UNFINISHED, leave, plan_of, trainer_parser

pytestmark = pytest.mark.unit

PLACES = ["--corpus", "corpus", "--run", "run", "--checkpoint", "micro"]


def test_a_stage_has_its_own_defaults():
    parser = trainer_parser("A stage.", steps=7, batch=3, rate=0.5)
    options = parser.parse_args(PLACES)
    assert (options.steps, options.batch, options.rate, options.seconds, options.start) == (7, 3, 0.5, math.inf, None)


def test_the_plan_is_what_was_told():
    options = trainer_parser(None, steps=7, batch=3, rate=0.5).parse_args([*PLACES, "--steps", "9", "--seconds", "60"])
    plan = plan_of(options, clip=2.0)
    assert (plan.steps, plan.learning_rate, plan.clip, plan.seconds) == (9, 0.5, 2.0, 60.0)


def test_a_trainer_needs_its_places(capsys):
    with pytest.raises(SystemExit):
        trainer_parser(None, steps=1, batch=1, rate=1.0).parse_args(PLACES[:4])
    assert "--checkpoint" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused():
    parser = trainer_parser(None, steps=1, batch=1, rate=1.0)
    assert plan_of(parser.parse_args([*PLACES, "--device", "cpu"])).device.type == "cpu"
    with pytest.raises(ParameterError, match="CUDA devices"):
        parser.parse_args([*PLACES, "--device", "cuda:99"])


def test_a_slice_that_is_over_says_so_by_its_exit_code(capsys):
    leave("vq", Progress(step=3), 3)
    with pytest.raises(SystemExit) as left:
        leave("vq", Progress(step=2), 3)
    assert left.value.code == UNFINISHED
    assert capsys.readouterr().out == "vq: 2 of 3 steps are done; the same command goes on\n"
