"""Keys and ids."""

import pytest

from kimia.errors import RequestError
from kimia.streams import keys

pytestmark = pytest.mark.unit


def test_ids_lead_back_to_their_session():
    session = keys.new_session_id()
    turn = keys.new_turn_id(session)
    assert keys.session_of(turn) == session
    assert keys.new_turn_id(session) != turn


def test_a_new_session_id_is_one():
    assert all(keys.check_session_id(keys.new_session_id()) for _ in range(100))


@pytest.mark.parametrize("bad", ["", "a.b", "x" * 65, "{0}", "a b", "a\n", "ü", "a:b", "a/b"])
def test_other_session_ids_are_refused(bad):
    with pytest.raises(RequestError) as caught:
        keys.check_session_id(bad)
    assert caught.value.field == "session_id"


@pytest.mark.parametrize("bad", ["", "abc", "abc.", ".abc", "a.b.c", "a.b:input", "{0}.a"])
def test_other_turn_ids_are_refused(bad):
    with pytest.raises(RequestError) as caught:
        keys.session_of(bad)
    assert caught.value.field == "turn_id"


def test_partitions_are_stable_and_all_used():
    partitions = {keys.partition_of(f"session-{number}", 4) for number in range(200)}
    assert partitions == set(keys.all_partitions(4)) == {"{0}", "{1}", "{2}", "{3}"}
    assert keys.partition_of("session-1", 16) == "{14}"  # written down: a new hash would lose every stored session


def test_all_keys_of_a_session_carry_its_tag():
    p, s, t = "{5}", "abc", "abc.1"
    made = [
        keys.head(p, t),
        *(keys.log(p, t, name) for name in keys.LOGS),
        keys.idempotency(p, "acme", "k"),
        keys.session(p, s),
        keys.session_turns(p, s),
        keys.session_blobs(p, s),
        keys.gone(p, s),
        keys.jobs(p, "llm", keys.BATCH),
        keys.worker_jobs(p, "llm", "w-1"),
        keys.token(p, "llm"),
        keys.dlq(p, "llm"),
        keys.inbox(p, "w-1"),
        keys.blob(p, "acme", "tiny", "00ff", 3),
        keys.mel(p, "acme", t, 3),
    ]
    assert all(key.startswith("{5}:") for key in made)
    assert len(set(made)) == len(made)


def test_an_idempotency_key_is_one_per_tenant_and_stays_unread():
    assert keys.idempotency("{0}", "a", "secret") != keys.idempotency("{0}", "b", "secret")
    assert "secret" not in keys.idempotency("{0}", "a", "secret")


def test_a_request_without_session_finds_its_session_by_its_key():
    assert keys.session_id_for("a", "k") == keys.session_id_for("a", "k")
    assert keys.session_id_for("a", "k") != keys.session_id_for("b", "k")
    assert keys.check_session_id(keys.session_id_for("a", "ö:{}" * 50))


def test_the_ledger_has_a_tag_of_its_own():
    assert keys.ledger("x") == "{ledger}:x"
