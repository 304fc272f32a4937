"""Deliberate faults: one promise each is taken out of a script, as a careless change would. Each must be noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1
from unittest.mock import patch

from kimia.streams import wire

Edit = tuple[str, str, str]  # script, what stands there, what stands there instead


@dataclass(frozen=True)
class Break:
    """A fault, and how it is made."""

    name: str
    edits: tuple[Edit, ...]

    def __str__(self) -> str:
        return self.name


def fault(name: str, script: str, old: str, new: str = "") -> Break:
    """A fault of one edit."""
    return Break(name, ((script, old, new),))


PUBLISH_FENCE = "if h[2] ~= consumer or h[3] ~= token then return {'fenced', next} end"
NO_HEAD = "if not h[1] then\n  ack(KEYS[7], entry)\n  return {'gone', 0}\nend\n"

# The faults that the protocol was designed against.
DESIGNED = (
    fault("no owner check at claim", "claim", "if not mine or mine[2] ~= consumer then return {'lost'} end"),
    fault("no lease check at claim", "claim", "if owner and ends > now then", "if false then"),
    fault("no fence", "publish", PUBLISH_FENCE),
    fault("unconditional heartbeat", "heartbeat", "if h[1] and (h[2] ~= consumer or h[3] ~= token) then return 0 end"),
    fault(
        "XADD without index check",
        "publish",
        "if index > next then return {'gap', next} end\n\nlocal new = index == next",
        "local new = true",
    ),
    Break(
        "no head-key check",
        (
            ("publish", NO_HEAD, ""),
            ("publish", "if h[2] ~= consumer or", "if h[1] and (h[2] ~= consumer) or h[1] and"),
            ("publish", "if over(h[1]) then", "if h[1] and over(h[1]) then"),
            (
                "publish",
                "local next, ttl = tonumber(h[4] or 0), h[5]",
                "local next, ttl = tonumber(h[4] or 0), h[5] or 9e5",
            ),
        ),
    ),
    fault("no head-key check by a new reader", "reader", "if not ttl then return 0 end", "ttl = ttl or 9e5"),
    fault("no head-key check at a heartbeat", "heartbeat", "if not h[1] or over(h[1])", "if h[1] and over(h[1])"),
    fault(
        "submission lost between publish and submit",
        "publish",
        "if after ~= '' and (final or early == '1') and not h[7] then queue(head, KEYS[9], after, turn) end",
    ),
    fault("poison counted without progress reset", "publish", ", next, stage .. ':tries', 0)", ", next)"),
)

# And others, each a line that could be forgotten.
FORGOTTEN = (
    fault("a fence without the token", "publish", "h[2] ~= consumer or h[3] ~= token", "h[2] ~= consumer"),
    fault(
        "a claim of what is done or replaced",
        "claim",
        "if h[5] or not h[7] or not (copy or",
        "if false and not (copy or",
    ),
    fault("a claim of what has ended", "claim", "if not h[1] or over(h[1]) then", "if not h[1] then"),
    fault(
        "a deadline that cuts off what has begun", "claim", "now > deadline and next == 0 then", "now > deadline then"
    ),
    fault("a second terminal state", "finish", "if over(h[1]) then return 'over' end"),
    fault("a failure without fence", "finish", "if h[1] and stage and (h[3] ~= consumer or h[4] ~= token)", "if false"),
    fault("a rewind without fence", "rewind", "if h[1] and (h[2] ~= consumer or h[3] ~= token) then return 0 end"),
    fault("a handover without fence", "release", "if h[1] and (h[2] ~= consumer or h[3] ~= token) then return 0 end"),
    fault(
        "a handover that counts", "release", "if redis.call('HINCRBY', KEYS[1], s'tries', -1) < 0 then", "if false then"
    ),
    fault("a handover that nobody hears of", "release", "queue(KEYS[1], KEYS[3], stage, turn)"),
    fault(
        "a job acknowledged too early",
        "publish",
        "local new = index == next",
        "local new = index == next\nack(KEYS[7], entry)",
    ),
    fault("a log that never expires", "publish", "renew_turn(ttl)\nreturn {new", "return {new"),
    fault("an old reader that still writes", "append", "if h[2] ~= token then return {'fenced', next} end"),
    fault("input with gaps", "append", "if index > next then return {'gap', next} end"),
    fault("an old reader that still submits", "submit", "if h[2] ~= token then return 'fenced' end"),
    fault("a request that is not recognised", "open", "idem and redis.call('GET', idem) or turn", "turn"),
    fault("a deletion without tombstone", "delete", "redis.call('SET', KEYS[4], 1, 'PX', ARGV[1])"),
    fault("a deletion that leaves a log", "delete", ", head .. ':tokens'"),
    fault("a session that forgets a turn whose input lives", "open", "head, head .. ':input',", "head,"),
    fault("a drop of what its worker begins", "drop", "not (s[5] and tonumber(s[4] or 0) > now)", "true"),
    fault("a drop before the deadline", "drop", " or now <= deadline then", " then"),
    fault("a drop of what has begun", "drop", " and tonumber(s[3] or 0) == 0"),
    fault(
        "a position that counts before its turn runs, and after", "playback", "if h[1] ~= 'running' then return {} end"
    ),
    fault("a late position that counts", "playback", "or heard > before or", "or heard ~= before or"),
    fault("a claim that forgets the position", "claim", "if h[14] then", "if false then"),
    fault("a session written over", "save", "if found ~= version then return {'conflict', found} end"),
)

# Faults of admission.
LEDGER = (
    fault(
        "admission beyond the capacity",
        "ledger_reserve",
        "if reserved >= rows and not holds(stage) then",
        "if false then",
    ),
    fault(
        "admission beyond a tenant's limit", "ledger_reserve", "if limit >= 0 and count >= limit", "if false and count"
    ),
    fault("rows of the dead", "ledger_reserve", "if tonumber(ends) > now then rows", "if true then rows"),
    fault(
        "a renewal of what has ended",
        "ledger_renew",
        "if life > 0 and not (ends and tonumber(ends) > now) then return 0 end",
    ),
    fault("a release that forgets a stage", "ledger_renew", "pools[#pools + 1] = stage end", "pools[2] = stage end"),
    fault(
        "a release that is not counted",
        "ledger_renew",
        "'ZADD', released, math.min(over, now),",
        "'ZADD', released, 0,",
    ),
    fault(
        "a refusal that keeps a row",
        "ledger_reserve",
        "  seen[stage] = true\n",
        "  seen[stage] = true\n  redis.call('ZADD', prefix .. 'reserved:' .. stage, now + life, session)\n",
    ),
)


@contextmanager
def broken(by: Break) -> Iterator[None]:
    """Every wire runs the scripts with this fault."""
    sound = wire.script_text

    def faulty(script: str) -> tuple[str, str]:
        body = sound(script)[0]
        for name, old, new in by.edits:
            if name == script:
                assert body.count(old) == 1, f"{name}.lua says {old!r} no more, or more than once"
                body = body.replace(old, new)
        return body, sha1(body.encode(), usedforsecurity=False).hexdigest()

    with patch.object(wire, "script_text", faulty):
        yield
