"""What callers have written down, as numbers: how long they waited, whether they heard silence, who was refused."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.kills import Death
from benchmarks.player import Dry, Interval, played, unexplained, union

PERCENTILES = (50, 95, 99)
LOW_PERCENTILES = (1, 5, 50)
SHOWN_STALL = 0.02  # seconds of a stall that is kept one by one
GAP_EDGES = np.geomspace(1.0, 20000.0, 60)  # ms
LEAD_SECONDS = 3.5  # a lease of 2 s, up to half of it until somebody looks, and half a second to rebuild
BEFORE, EARLY, BUILT = "before speech", "lead not built", "lead built"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Silence:
    """An underrun and what accounts for it."""

    dry: Dry
    turn_id: str
    machine: float  # seconds that stalls of the machine explain
    callers: float  # of the rest: late ticks of the callers' process
    unexplained: float

    def record(self, begun: float) -> dict[str, Any]:
        seconds = {"seconds": self.dry.seconds, "unexplained": self.unexplained}
        return {"at": self.dry.begin - begun, "turn": self.turn_id, **seconds}


def hear(
    records: Sequence[Record], stalls: Iterable[Sequence[float]], begun: float, deaths: Sequence[Death] = ()
) -> dict[str, Any]:
    """The report of all callers. `stalls`: begin and end of each; `begun`: the time that is 0 in it."""
    by_kind: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_kind[record["what"]].append(record)
    turns = by_kind["turn"]
    machine = union(stalls)
    late = {process: union((r["begin"], r["end"]) for r in rs) for process, rs in _by_process(by_kind["late"]).items()}
    silences = [found for turn in turns for found in silences_of(turn, machine, late.get(turn["process"], []))]
    killed = {"deaths": _after_deaths(turns, deaths, silences)} if deaths else {}
    return {
        **killed,
        "calls": _calls(by_kind),
        "turns": {**Counter(turn["end"] for turn in turns), "interrupted": sum(map(was_interrupted, turns))},
        "failures": [record["reason"] for record in (*turns, *by_kind["failed"]) if record["reason"]],
        **_waits(turns),
        **_silence(turns, silences, begun),
        "barge_in": _barge_in(turns),
        "callers": _callers(turns, by_kind["late"]),
        "timeline": {
            "deaths": [[death.at - begun, death.name] for death in deaths],
            "voice_to_voice": [
                [turn["spoken"] - begun, 1e3 * wait] for turn in turns if (wait := voice_to_voice(turn))
            ],
            "stalls": [[begin - begun, end - begin] for begin, end in machine if end - begin >= SHOWN_STALL],
            "late": [[b - begun, e - b] for found in late.values() for b, e in found if e - b >= SHOWN_STALL],
        },
    }


def _by_process(records: Iterable[Record]) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        found[record["process"]].append(record)
    return found


# ---- single turns -----------------------------------------------------------------------------------------------


def was_interrupted(turn: Record) -> bool:
    return turn["interrupted"] is not None


def voice_to_voice(turn: Record) -> float | None:
    """Seconds from the last frame of the question to the first speech."""
    return turn["arrivals"][0][0] - turn["spoken"] if turn["arrivals"] else None


def silences_of(turn: Record, machine: Sequence[Interval], late: Sequence[Interval]) -> list[Silence]:
    """The underruns of one answer. After a failure there is nothing more to wait for: it counts as that."""
    whole = turn["end"] == "done" and was_interrupted(turn) and turn["ended"] <= turn["interrupted"]
    player = played(turn["arrivals"], None if whole else turn["interrupted"])
    both = union([*machine, *late])
    found = []
    for dry in player.dry:
        rest, fault = unexplained(dry, machine), unexplained(dry, both)
        found.append(Silence(dry, turn["turn_id"], dry.seconds - rest, rest - fault, fault))
    return found


# ---- all turns --------------------------------------------------------------------------------------------------


def _calls(by_kind: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Who came in, who was refused, where, and how long they then waited."""
    refused = by_kind.get("refused", ())
    return {
        "admitted": len(by_kind.get("admitted", ())),
        "refused_at_start": sum(record["admitted"] is None for record in refused),
        "refused_later": sum(record["admitted"] is not None for record in refused),
        "failed": len(by_kind.get("failed", ())),
        "told_to_wait_seconds": quantiles([r["seconds"] or 0.0 for r in by_kind.get("told_to_wait", ())]),
        "set_up_ms": quantiles([1e3 * (r["at"] - r["begun"]) for r in by_kind.get("admitted", ())]),
        "waited_for_a_row_seconds": quantiles(_waited(by_kind)),
    }


def _waited(by_kind: Mapping[str, Sequence[Record]]) -> list[float]:
    """Seconds from the first refusal of a caller to the call that was admitted."""
    first: dict[int, float] = {}
    waits = []
    for record in sorted((*by_kind.get("refused", ()), *by_kind.get("admitted", ())), key=lambda r: r["at"]):
        if record["what"] == "refused":
            first.setdefault(record["caller"], record["begun"])
        elif (since := first.pop(record["caller"], None)) is not None:
            waits.append(record["at"] - since)
    return waits


def _waits(turns: Sequence[Record]) -> dict[str, Any]:
    players = [played(turn["arrivals"]) for turn in turns]
    gaps = [1e3 * gap for player in players for gap in player.gaps]
    reserves = [1e3 * reserve for player in players for reserve in player.reserves]
    counts, _ = np.histogram(gaps, GAP_EDGES)
    return {
        "voice_to_voice_ms": quantiles([1e3 * wait for turn in turns if (wait := voice_to_voice(turn)) is not None]),
        "first_audio_ms": quantiles([1e3 * turn["first_audio"] for turn in turns if turn["first_audio"] is not None]),
        "gap_ms": {**quantiles(gaps), "edges": [round(edge, 3) for edge in GAP_EDGES], "counts": counts.tolist()},
        "reserve_ms": quantiles(reserves, LOW_PERCENTILES),
    }


def _silence(turns: Sequence[Record], silences: Sequence[Silence], begun: float) -> dict[str, Any]:
    heard = {turn["turn_id"] for turn in turns if turn["arrivals"]}
    broken = {silence.turn_id for silence in silences}
    faulty = {silence.turn_id for silence in silences if silence.unexplained > 0}
    return {
        "answers": len(heard),
        "speech_seconds": sum(seconds for turn in turns for _, seconds in turn["arrivals"]),
        "underrun_seconds": {
            "total": sum(silence.dry.seconds for silence in silences),
            "explained_by_machine": sum(silence.machine for silence in silences),
            "explained_by_callers": sum(silence.callers for silence in silences),
            "unexplained": sum(silence.unexplained for silence in silences),
        },
        "continuity": share(len(heard - broken), len(heard)),
        "continuity_but_for_stalls": share(len(heard - faulty), len(heard)),
        "underrun_ms": quantiles([1e3 * silence.dry.seconds for silence in silences]),
        "underruns": [silence.record(begun) for silence in silences],
    }


def _after_deaths(turns: Sequence[Record], deaths: Sequence[Death], silences: Sequence[Silence]) -> dict[str, Any]:
    """What became of the answers that were under way at each death, by the speech that their callers had in hand.

    `before speech`: until the first piece, ms from the death; the others: the gap between two pieces in which the death
    falls, and the underruns from there to the next death. A lead is built when it is at least LEAD_SECONDS.
    """
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in (BEFORE, EARLY, BUILT)}
    ends = [death.at for death in deaths[1:]] + [float("inf")]
    for death, until in zip(deaths, ends, strict=True):
        for turn in turns:
            if not turn["spoken"] < death.at < (turn["ended"] or 0.0):
                continue
            arrivals = [at for at, _ in turn["arrivals"]]
            earlier, later = [at for at in arrivals if at <= death.at], [at for at in arrivals if at > death.at]
            if not earlier:
                found[BEFORE]["wait"].extend(1e3 * (at - death.at) for at in later[:1])
                continue
            lead = max(played(turn["arrivals"][: len(earlier)]).dry_at - death.at, 0.0)
            row = found[BUILT if lead >= LEAD_SECONDS else EARLY]
            row["wait"].extend(1e3 * (at - earlier[-1]) for at in later[:1])  # none: it was interrupted, or all there
            dry = [one for one in silences if one.turn_id == turn["turn_id"] and death.at <= one.dry.end < until]
            row["underrun"].append(sum(one.dry.seconds for one in dry))
            row["unexplained"].append(sum(one.unexplained for one in dry))
    return {
        name: {
            "wait_ms": quantiles(row["wait"]),
            "underrun_seconds": sum(row["underrun"]),
            "unexplained_seconds": sum(row["unexplained"]),
        }
        for name, row in found.items()
    }


def _barge_in(turns: Sequence[Record]) -> dict[str, Any]:
    """From a cancel to the last piece of stale speech, and to the word that the turn is cancelled."""
    running = [turn for turn in turns if was_interrupted(turn) and turn["end"] == "cancelled"]
    last = [max((at for at, _ in turn["arrivals"]), default=turn["interrupted"]) for turn in running]
    stale = [1e3 * max(at - turn["interrupted"], 0.0) for turn, at in zip(running, last, strict=True)]
    answered = [1e3 * (turn["ended"] - turn["interrupted"]) for turn in running]
    return {"running": len(running), "last_stale_ms": quantiles(stale), "acknowledged_ms": quantiles(answered)}


def _callers(turns: Sequence[Record], late: Sequence[Record]) -> dict[str, Any]:
    """Whether the callers kept time themselves."""
    seconds = [record["end"] - record["begin"] for record in late]
    return {
        "late_ticks": len(late),
        "late_seconds": sum(seconds),
        "worst_tick_ms": 1e3 * max(seconds, default=0.0),
        "worst_frame_of_a_question_ms": quantiles([1e3 * turn["worst_frame"] for turn in turns]),
    }


def quantiles(values: Sequence[float], which: Sequence[int] = PERCENTILES) -> dict[str, float | None]:
    """Number, percentiles, least or greatest; None where there are no values."""
    numbers = {f"p{q}": float(np.percentile(values, q)) if values else None for q in which}
    worst = (min if which[0] < 50 else max)(values, default=None)
    return {"n": len(values), **numbers, "worst": worst}


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
