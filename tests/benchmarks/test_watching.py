"""Memory and processor time of processes, and the keys that are left in a store."""

import os

import pytest
import redis

from benchmarks.service import Use, use
from benchmarks.watching import MIB, Sample, Watch, kind_of, leftovers, slope

pytestmark = pytest.mark.unit


def test_slopes_leave_the_warm_up_out_and_are_not_moved_by_a_single_peak():
    times = [float(at) for at in range(0, 3600, 36)]
    memory = [50.0 if at < 900 else 100.0 + 2 * at / 3600 for at in times]
    memory[60] = 900.0
    assert slope(times, memory) == pytest.approx(2.0)
    assert slope([0.0, 1.0], [1.0, 1.0]) is None


def test_the_data_of_a_store_has_slopes_of_its_own():
    watch = Watch(dict, store=[(36.0 * at, (10 + at) * MIB, 5) for at in range(101)])
    assert watch.data() == {
        "greatest_mib": 110,
        "slope_mib_per_hour": pytest.approx(100.0),
        "slope_keys_per_hour": 0.0,
    }
    assert Watch(dict).data() == {"greatest_mib": None, "slope_mib_per_hour": None, "slope_keys_per_hour": None}


def test_a_process_that_started_again_is_counted_in_both_lives():
    def sample(at, pid, cpu, mib):
        return Sample(at, pid, Use(cpu, mib * MIB))

    watch = Watch(dict)
    watch.samples["llm"] = [
        sample(0, 7, 1.0, 80),
        sample(10, 7, 3.0, 90),
        sample(20, 8, 0.5, 70),
        sample(30, 8, 1.5, 75),
    ]
    report = watch.report()["llm"]
    assert report["cores"] == pytest.approx(3.0 / 30)
    assert report["lives"] == 2
    assert report["rss_mib"] == {"first": 80, "last": 75, "greatest": 90}


def test_samples_are_of_living_processes_and_of_the_store(valkey_url):
    with redis.Redis.from_url(valkey_url, protocol=2) as client:
        client.set("key", b"x" * MIB)
    watch = Watch(lambda: {"this": os.getpid(), "ended": 2**22 + 1}, valkey_url)
    watch.sample()
    ((_, used, keys),) = watch.store
    assert list(watch.samples) == ["this"]
    assert watch.samples["this"][0].used.rss > 10 * MIB
    assert used > MIB
    assert keys == 1
    assert use(2**22 + 1) is None


def test_what_is_left_is_told_from_what_is_permanent(valkey_url):
    with redis.Redis.from_url(valkey_url, protocol=2) as client:
        client.xadd("{0}:jobs:llm:interactive", {"t": "s.1"})
        client.set("{0}:token:llm", 1)
        client.hset("{ledger}:workers:llm", "w", "4 0 1")
        assert leftovers(valkey_url)["left"] == 0
        client.hset("{0}:turn:s.1", "state", "done")
        client.set("{0}:gone:s", 1, ex=50)
        found = leftovers(valkey_url)
    assert found["left"] == 2
    assert found["kinds"]["turn"] == {
        "keys": 1,
        "for_ever": 1,
        "longest_ttl_seconds": 0,
        "examples": ["{0}:turn:s.1"],
    }
    assert 40 < found["kinds"]["gone"]["longest_ttl_seconds"] <= 50


def test_kinds_are_the_word_after_the_tag():
    assert kind_of("{0}:turn:s.1:audio") == "turn"
    assert kind_of("{ledger}:reserved:@") == "reserved"
