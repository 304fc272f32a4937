"""What the stream protocol promises, against everything that may go wrong with it.

truth.py        the promises as a model: what every call must answer, and what must lie in the journal after it
ground.py       a real server to play on: looked at as a whole, rolled back, its time moved
protocol.py     the state machine: orchestrators, workers and zombies in any order, compared with the model
ledger.py       the same for admission
schedule.py     what goes wrong where and when, from a seed; injection.py does it at the boundaries of a part
schedules.py    such schedules against a whole service: fleet.py (tasks), processes.py and process.py (processes)
campaign.py     processes of a service with real stages are killed by seed while callers talk to it
breaks.py       deliberate faults of the scripts, each of which the state machines must notice
"""
