"""Running a state machine: so many examples from a seed, which finds the same again."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.faults.ground import Ground

STEPS = 50  # of one example


def asked() -> tuple[int, int]:
    """Seed and number of examples of a long run, as `make faults` asks for them."""
    return int(os.environ.get("KIMIA_FAULT_SEED", "1")), int(os.environ.get("KIMIA_FAULT_EXAMPLES", "2000"))


def explore(
    machine: type[RuleBasedStateMachine], ground: Ground, number: int, examples: int, shrink: bool = True
) -> None:
    """Run examples from seed `number` on a ground; raises what a bad one raised, with the way to it."""
    seeded = seed(number)(type(machine.__name__, (machine,), {"ground": ground}))
    run_state_machine_as_test(
        seeded,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            report_multiple_bugs=False,
        ),
    )
