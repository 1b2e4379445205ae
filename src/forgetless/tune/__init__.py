"""Fine-tuning while holding. Called, it is `forgetless tune` from Python:

    run = forgetless.tune("MODEL", data="domain.jsonl", out="run")
    run["forgetting"]["nats"], run["learning"]["nats"]

tune/python.py says what it takes; `help(forgetless.tune.python.tune_from_python)`.
"""

from forgetless.options.callable_room import make_callable

make_callable(__name__, "forgetless.tune.python:tune_from_python")
