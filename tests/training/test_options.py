import math

import pytest

from training.options import plan_of, trainer_parser

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
