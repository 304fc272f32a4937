"""Every key of the system, and the ids that stand in them.

`{p}` is a partition: a literal hash tag such as `{0}`, derived from the session id, so that all keys of a session lie
on one node of a cluster and one Lua call may touch them together. Names in `<>` stand for values; docs/protocol.md
says what lies under each key.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from zlib import crc32

from kimia.errors import RequestError
from kimia.stage import Log

LOGS: tuple[Log, ...] = ("input", "encoded", "tokens", "audio")

INTERACTIVE = "interactive"
BATCH = "batch"
HANDOVER = "handover"  # turns that a worker gave back unfinished: they come before everything else
CLASSES = (HANDOVER, INTERACTIVE, BATCH)  # in the order of service

GROUP = "workers"  # the one consumer group of every job stream

MOST_PARTITIONS = 1024  # of one journal
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

# ---- ids ----------------------------------------------------------------------------------------------------------


def new_session_id() -> str:
    """A session id that nobody can guess."""
    return secrets.token_urlsafe(16)


def session_id_for(tenant: str, idempotency_key: str) -> str:
    """The session of a request that names no session but an idempotency key: the same request finds the same one."""
    return "i" + hashlib.sha256(f"{tenant}\0{idempotency_key}".encode()).hexdigest()[:40]


def new_turn_id(session_id: str) -> str:
    """`<session id>.<unique>`."""
    return f"{check_session_id(session_id)}.{secrets.token_hex(8)}"


def session_of(turn_id: str) -> str:
    """The session part of a turn id. Raises RequestError."""
    session, dot, unique = turn_id.partition(".")
    if not dot or _ID.fullmatch(unique) is None or _ID.fullmatch(session) is None:
        raise RequestError(f"{turn_id!r} is no turn id; use the id that TurnEvent.turn_id gave", field="turn_id")
    return session


def check_session_id(session_id: str, field: str = "session_id") -> str:
    """The id itself. Raises RequestError."""
    if _ID.fullmatch(session_id) is None:
        raise RequestError(f"{session_id!r} is no session id; use 1 to 64 letters, digits, '-' or '_'", field=field)
    return session_id


def partition_of(session_id: str, partitions: int) -> str:
    """`{p}` of a session."""
    return f"{{{crc32(session_id.encode()) % partitions}}}"


def all_partitions(partitions: int) -> tuple[str, ...]:
    """`{0}`, `{1}`, ..."""
    return tuple(f"{{{number}}}" for number in range(partitions))


# ---- turns --------------------------------------------------------------------------------------------------------


def head(p: str, turn: str) -> str:
    """Hash: what is known of a turn."""
    return f"{p}:turn:{turn}"


def log(p: str, turn: str, name: Log) -> str:
    """Stream: one log of a turn."""
    return f"{p}:turn:{turn}:{name}"


def idempotency(p: str, tenant: str, key: str) -> str:
    """String: the turn that a request with this idempotency key has started."""
    return f"{p}:idem:{tenant}:{hashlib.sha256(key.encode()).hexdigest()[:32]}"


# ---- sessions -----------------------------------------------------------------------------------------------------


def session(p: str, session_id: str) -> str:
    """Hash: record and version."""
    return f"{p}:session:{session_id}"


def session_turns(p: str, session_id: str) -> str:
    """Set: ids of its turns."""
    return f"{p}:session:{session_id}:turns"


def session_blobs(p: str, session_id: str) -> str:
    """Set: blob keys that its turns used."""
    return f"{p}:session:{session_id}:blobs"


def gone(p: str, session_id: str) -> str:
    """String: the tombstone that a deleted session leaves for a while."""
    return f"{p}:gone:{session_id}"


# ---- jobs ---------------------------------------------------------------------------------------------------------


def jobs(p: str, stage: str, job_class: str) -> str:
    """Stream with the group GROUP: turns that wait for a worker of this stage."""
    return f"{p}:jobs:{stage}:{job_class}"


def worker_jobs(p: str, stage: str, worker: str) -> str:
    """Stream with the group GROUP: copies of jobs that one worker would do best."""
    return f"{p}:jobs:{stage}:@{worker}"


def early(p: str, stage: str) -> str:
    """List: sound that a stage may read before its turn is submitted."""
    return f"{p}:early:{stage}"


def token(p: str, stage: str) -> str:
    """Counter: tokens of claims of this stage; `reader` for reader tokens."""
    return f"{p}:token:{stage}"


def dlq(p: str, stage: str) -> str:
    """Stream: turns that were given up."""
    return f"{p}:dlq:{stage}"


def inbox(p: str, owner: str) -> str:
    """Stream: pointers to what is new for one process."""
    return f"{p}:inbox:{owner}"


# ---- blobs, ledger ------------------------------------------------------------------------------------------------


def blob(p: str, tenant: str, checkpoint: str, content: str, piece: int) -> str:
    """String: one piece of the features of a clip; `content` is the clip's hash in hexadecimal."""
    return f"{p}:blob:{tenant}:{checkpoint}:{content}:{piece}"


def mel(p: str, tenant: str, turn: str, index: int) -> str:
    """String: the mel that chunk `index` of a turn's log `audio` has committed."""
    return f"{p}:blob:{tenant}:{turn}:mel:{index}"


def ledger(name: str) -> str:
    """A key of the capacity ledger, which has a tag of its own."""
    return f"{{ledger}}:{name}"
