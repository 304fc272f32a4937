"""Directed examples of the state machine: short stories in which one thing goes wrong, each to its end.

A scene calls the rules of `Protocol` itself, so that every answer is judged as in a random example.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.ground import Ground
from tests.faults.play import Attempt
from tests.faults.protocol import Protocol

SPEECH = ("tokenizer", "llm", "detokenizer")
SPOKEN = ("llm", "detokenizer")
TEXT = ("llm",)


class Stage(Protocol):
    """The state machine, led by hand: `compare` after every act."""

    def take(self, number: int = 1, pick: int = 0) -> Attempt:
        """The one turn that waits, by a worker of its stage; `pick`: of which of the stages that are not done."""
        [attempt] = self.sweep(pick=pick, number=number, count=3).values
        self.compare()
        return attempt

    def taken_over(self, attempt: Attempt, number: int) -> Attempt:
        """The turn of a worker that fell silent, by another."""
        [new] = self.take_over(attempt=attempt, number=number).values
        self.compare()
        return new

    def say(self, attempt: Attempt, move: int = 0, answers_lost: int = 0) -> None:
        """Publish one chunk."""
        self.publish(attempt=attempt, move=move, answers_lost=answers_lost)
        self.compare()

    def say_all(self, attempt: Attempt) -> None:
        """Publish all that is left."""
        self.publish_rest(attempt=attempt)
        self.compare()

    def back(self, steps: int) -> None:
        """A fail-over takes back so many comparisons."""
        self.fail_over(steps=steps)
        self.compare()

    def all_of(self, attempt: Attempt) -> None:
        """Whatever a worker may still do with a turn that is another's."""
        for act in (self.heartbeat, self.publish_rest):
            act(attempt=attempt)
            self.compare()
        for act in (self.release, self.give_up):
            act(attempt=attempt, answers_lost=1)
            self.compare()


def nothing_goes_wrong(stage: Stage) -> None:
    stage.ask(route=SPEECH)
    for _ in SPEECH:
        stage.say_all(stage.take())


def a_worker_wakes_up_late(stage: Stage) -> None:
    stage.ask(route=SPEECH)
    for _ in SPEECH:
        old = stage.take()
        stage.say(old)
        new = stage.taken_over(old, 2)
        stage.all_of(old)
        stage.say_all(new)


def a_worker_takes_its_own_turn_over(stage: Stage) -> None:
    stage.ask(route=SPOKEN)
    old = stage.take()
    stage.start_again(stage="llm", number=1, politely=False)
    new = stage.taken_over(old, 1)
    stage.all_of(old)
    stage.say_all(new)


def a_worker_stops_between_delivery_and_claim(stage: Stage) -> None:
    stage.ask(route=TEXT)
    slow = stage.deliver(pick=0, number=2, silent=False)
    stage.all_silent()
    quick = stage.deliver(pick=0, number=1, silent=True)
    stage.compare()
    assert not stage.claim_late(delivery=slow).values
    [new] = stage.claim_late(delivery=quick).values
    stage.say_all(new)


def a_copy_comes_late(stage: Stage) -> None:
    """The worker that was wanted finds its copy of a turn that another has begun, and done."""
    words = {"session": "s1", "route": SPOKEN, "key": "", "deadline": None, "batch": False, "whole": False}
    turn = stage.open(**words)
    stage.submit(turn=turn, worker="llm-1", old=False, answers_lost=0)
    stage.compare()
    worker = stage.take(2)
    stage.say_all(worker)
    stage.all_silent()
    jobs = stage.workers["llm", 1]
    assert not stage.taken("llm", jobs, stage.ground.run(jobs.sweep(3))).values


def a_living_worker_s_entry_looks_abandoned(stage: Stage) -> None:
    stage.ask(route=TEXT)
    owner = stage.take()
    stage.silence(attempt=owner, how="entry")
    assert not stage.recover(pick=0, number=2, count=1, lost=False).values
    stage.compare()
    stage.heartbeat(attempt=owner)
    stage.say_all(owner)


def chunks_come_twice_and_out_of_order(stage: Stage) -> None:
    stage.ask(route=TEXT)
    worker = stage.take()
    stage.say(worker, move=1)  # a gap
    stage.say(worker, answers_lost=1)
    stage.say(worker, move=-1)
    stage.say_all(worker)
    stage.say(worker, move=-1, answers_lost=1)


def the_session_is_deleted_under_a_worker(stage: Stage) -> None:
    turn = stage.ask(route=SPEECH)
    worker = stage.take()
    stage.say_all(worker)
    llm = stage.take()
    stage.say(llm)
    stage.lose(turn=turn, how="deleted")
    stage.compare()
    stage.take_over_reading(turn=turn, reader="o2")
    stage.open_again(turn=turn, reader="o1")
    stage.say(llm)
    stage.release(attempt=llm, answers_lost=1)
    stage.all_of(llm)


def a_turn_is_handed_over(stage: Stage) -> None:
    stage.ask(route=TEXT)
    worker = stage.take()
    for number in (2, 1, 2):  # more often than a turn may be claimed without progress
        stage.release(attempt=worker, answers_lost=1)
        stage.compare()
        worker = stage.take(number)
    stage.say(worker)
    stage.release(attempt=worker, answers_lost=0)
    stage.say_all(stage.take())


def every_worker_dies_after_a_chunk(stage: Stage) -> None:
    stage.ask(route=TEXT)
    worker = stage.take()
    for number in (2, 1):
        stage.say(worker)
        worker = stage.taken_over(worker, number)
    stage.say_all(worker)


def every_worker_dies_without_a_chunk(stage: Stage) -> None:
    stage.ask(route=TEXT)
    worker = stage.taken_over(stage.take(), 2)
    assert not stage.take_over(attempt=worker, number=1).values
    assert stage.truth.letters == 1


def a_caller_cancels_and_everybody_else_ends_it_too(stage: Stage) -> None:
    turn = stage.ask(route=TEXT)
    worker = stage.take()
    for failed in (False, True, False):
        stage.end(turn=turn, failed=failed)
        stage.compare()
    stage.all_of(worker)


def a_cancelled_turn_waits(stage: Stage) -> None:
    turn = stage.ask(route=TEXT)
    stage.end(turn=turn, failed=False)
    assert not stage.sweep(pick=0, number=1, count=1).values


def features_are_gone(stage: Stage) -> None:
    stage.ask(route=SPEECH)
    stage.say_all(stage.take())
    llm = stage.take()
    stage.say(llm)
    stage.give_up(attempt=llm, answers_lost=1)
    stage.compare()
    stage.all_of(llm)
    stage.say_all(stage.taken_over(stage.take(), 2))
    assert not stage.truth.turns["s1.t0"].over


def the_deadline_passes(stage: Stage) -> None:
    words = {"session": "s1", "route": TEXT, "key": "", "batch": False, "whole": True}
    turn = stage.open(deadline="far", **words)
    worker = stage.take()
    stage.say(worker)
    stage.clock_jumps(hours=2)
    stage.look(turn=turn)
    stage.say_all(stage.taken_over(worker, 2))  # it has begun to speak
    stage.open(deadline="past", **words)
    assert not stage.sweep(pick=0, number=1, count=1).values


def the_deadline_passes_and_no_worker_is_there(stage: Stage) -> None:
    words = {"session": "s1", "route": SPOKEN, "key": "", "batch": False, "whole": True}
    runs = stage.open(deadline="far", **words)
    worker = stage.take()
    waits = stage.open(deadline="far", **words)
    for turn in (waits, runs):
        stage.look(turn=turn)
    stage.compare()
    stage.clock_jumps(hours=2)
    stage.look(turn=waits)
    assert stage.truth.turns[waits].reason == "DEADLINE_EXCEEDED"
    stage.compare()
    stage.heartbeat(attempt=worker)
    stage.look(turn=runs)  # its worker lives
    assert not stage.truth.turns[runs].over
    stage.say(worker)
    stage.look(turn=runs)  # the detokenizer has not begun, and nobody is there to begin
    assert stage.truth.turns[runs].over
    stage.compare()
    stage.say(worker)


def orchestrators_disagree(stage: Stage) -> None:
    words = {"session": "s1", "route": TEXT, "deadline": None, "batch": False, "whole": False}
    turn = stage.open(key="again", **words)
    stage.open(key="again", **words)
    stage.compare()
    stage.append_input(turn=turn, start=1, count=1, old=False)  # a gap
    stage.append_input(turn=turn, start=0, count=2, old=False)
    stage.append_input(turn=turn, start=1, count=2, old=False)
    stage.compare()
    token = stage.truth.turns[turn].token
    stage.take_over_reading(turn=turn, reader="o2")
    stage.append(turn, token, 2, 1)
    stage.submit_turn(turn, token, None)
    stage.compare()
    for _ in range(2):
        stage.submit(turn=turn, worker="llm-1", old=False, answers_lost=1)
        stage.compare()
    stage.save(session="s1", behind=False)
    stage.save(session="s1", behind=True)  # the same again: its answer was lost
    stage.ask(route=TEXT)
    stage.save(session="s1", behind=True)  # another
    stage.compare()


def input_outlives_its_turn(stage: Stage) -> None:
    turn = stage.ask(route=TEXT)
    worker = stage.take()
    stage.lose(turn=turn, how="expired but for its input")
    stage.compare()
    stage.take_over_reading(turn=turn, reader="o2")
    stage.all_of(worker)
    stage.open_again(turn=turn, reader="o1")
    stage.compare()
    stage.all_of(worker)


def a_session_forgets_what_is_gone_and_nothing_else(stage: Stage) -> None:
    """Another turn of the session is opened when one is gone altogether, and one but for its input."""
    for how in ("expired", "expired but for its input"):
        turn = stage.ask(route=TEXT)
        stage.say_all(stage.take())
        stage.lose(turn=turn, how=how)
        stage.compare()
    turn = stage.ask(route=TEXT)
    stage.compare()
    stage.lose(turn=turn, how="deleted")
    stage.compare()


def a_fail_over_loses_a_claim(stage: Stage) -> None:
    """The same worker gets the turn again, while its old attempt still runs."""
    stage.ask(route=TEXT)
    stage.compare()
    old = stage.take()
    stage.back(steps=1)
    new = stage.take()
    stage.all_of(old)
    stage.say_all(new)


def a_fail_over_loses_chunks(stage: Stage) -> None:
    stage.ask(route=TEXT)
    worker = stage.take()
    stage.say(worker)
    stage.say(worker)
    stage.back(steps=2)
    stage.say(worker)  # a gap: it sends again from there
    assert worker.at == 0
    stage.say_all(worker)


def a_fail_over_loses_what_a_later_stage_has_read(stage: Stage) -> None:
    """The detokenizer has heard the whole answer; the log of ids has not got its end any more."""
    turn = stage.ask(route=SPOKEN)
    llm = stage.take()
    stage.say(llm)
    detokenizer = stage.take(pick=1)
    stage.say_all(llm)
    stage.say(detokenizer)
    stage.say(detokenizer, move=-1)
    stage.back(steps=3)
    stage.say_all(detokenizer)
    stage.say_all(detokenizer)
    assert stage.truth.turns[turn].state == "running"
    stage.say(llm)
    stage.say_all(llm)
    assert stage.truth.turns[turn].state == "done"


def a_fail_over_loses_turns(stage: Stage) -> None:
    stage.compare()
    turn = stage.ask(route=SPEECH)
    stage.compare()
    worker = stage.take()
    stage.back(steps=2)
    assert turn not in stage.truth.turns
    stage.all_of(worker)
    stage.see_to_it(turn=turn)
    stage.compare()
    stage.all_of(worker)


def a_caller_hears(stage: Stage) -> None:
    """Positions come late, twice, and behind the end; whoever takes the turn over knows the furthest."""
    turn = stage.open(session="s1", route=SPOKEN, key="", deadline=None, batch=False, whole=False)
    stage.hear(turn=turn, seconds=1)
    stage.compare()
    stage.see_to_it(turn=turn)
    worker = stage.take()
    for seconds in (2, 1, 2):
        stage.hear(turn=turn, seconds=seconds)
        stage.compare()
    stage.say(worker)
    new = stage.taken_over(worker, 2)
    stage.stop(turn=turn, how="cancelled")
    stage.hear(turn=turn, seconds=3)
    stage.compare()
    stage.stop(turn=turn, how="expired")
    stage.hear(turn=turn, seconds=3)
    stage.compare()
    stage.all_of(new)


SCENES: tuple[Callable[[Stage], None], ...] = (
    nothing_goes_wrong,
    a_worker_wakes_up_late,
    a_worker_takes_its_own_turn_over,
    a_worker_stops_between_delivery_and_claim,
    a_copy_comes_late,
    a_living_worker_s_entry_looks_abandoned,
    chunks_come_twice_and_out_of_order,
    the_session_is_deleted_under_a_worker,
    a_turn_is_handed_over,
    every_worker_dies_after_a_chunk,
    every_worker_dies_without_a_chunk,
    a_caller_cancels_and_everybody_else_ends_it_too,
    a_cancelled_turn_waits,
    features_are_gone,
    the_deadline_passes,
    the_deadline_passes_and_no_worker_is_there,
    orchestrators_disagree,
    a_caller_hears,
    input_outlives_its_turn,
    a_session_forgets_what_is_gone_and_nothing_else,
    a_fail_over_loses_a_claim,
    a_fail_over_loses_chunks,
    a_fail_over_loses_what_a_later_stage_has_read,
    a_fail_over_loses_turns,
)


def perform(scene: Callable[[Stage], None], ground: Ground) -> None:
    """Play a scene to its end, and on until everything has converged. Raises Violation."""
    stage = type("Stage", (Stage,), {"ground": ground})()
    scene(stage)
    stage.compare()
    stage.converge()
