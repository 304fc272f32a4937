"""Schedules of faults: a slice in every run of the tests, two hundred in `make faults`."""

from unittest.mock import patch

import pytest

from kimia.client import requests
from kimia.client.progress import TurnProgress
from kimia.streams.wire import script_names
from kimia.v1 import kimi_audio_pb2 as pb
from tests.faults.explore import asked
from tests.faults.injection import ASIDE, SCRIPTS
from tests.faults.schedule import CALLS, LIVES, draw
from tests.faults.schedules import check, run_many, undisturbed

TASKS, PROCESSES = 180, 20
SLICE = (2, 10)  # between them: lost, doubled and refused calls, a worker that dies and one that stands still


@pytest.mark.unit
def test_a_schedule_is_a_function_of_its_seed():
    assert draw("tasks", 7) == draw("tasks", 7) != draw("tasks", 8)
    assert draw("tasks", 7) != draw("processes", 7)


@pytest.mark.unit
def test_schedules_reach_every_boundary_with_every_action():
    drawn = [fault for seed in range(TASKS) for fault in draw("tasks", seed)]
    assert {fault.action for fault in drawn} == {*CALLS, *LIVES}
    wanted = {"publish", "claim", "heartbeat", "ack", "read", "grpc_read", "grpc_write"}
    for action in CALLS:
        assert {fault.boundary for fault in drawn if fault.action == action} == wanted
    assert all(any(fault.action in LIVES for fault in draw("processes", seed)) for seed in range(PROCESSES))


@pytest.mark.unit
def test_every_script_of_a_turn_passes_a_boundary():
    assert {name for name in script_names() if not name.startswith("ledger_")} == {*SCRIPTS, *ASIDE}


@pytest.mark.unit
def test_callers_hear_nothing_of_it(valkey_url):
    expected = undisturbed(valkey_url)
    for seed in SLICE:
        assert check("tasks", seed, valkey_url, expected).fired


@pytest.mark.faults
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("kind", "count"), [("tasks", TASKS), ("processes", PROCESSES)])
def test_many_schedules(valkey_url, capsys, kind, count):
    first = asked()[0]
    with capsys.disabled():
        tally = run_many(kind, range(first, first + count), valkey_url)
        print(tally)
    assert not tally.failed


def gone_on_too_far(progress, caller):
    last = {"last_audio_index": progress.next_audio, "last_text_index": progress.next_text}
    return pb.ResumeRequest(caller=caller, turn_id=progress.turn_id, **last)


CARELESS = {
    "what comes twice is taken twice": (TurnProgress, "_is_next", lambda *_: True),
    "a client goes on behind what it has not got": (TurnProgress, "resume_request", gone_on_too_far),
    "a request that is sent again has no key": (requests, "new_key", lambda: ""),
}


@pytest.mark.faults
@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # connections of a run that broke off
@pytest.mark.parametrize("fault", CARELESS)
def test_a_careless_client_is_noticed(valkey_url, fault):
    with patch.object(*CARELESS[fault]):
        assert run_many("tasks", range(20), valkey_url, enough=1).failed
