"""Recording what matters in a base model. Called, it is `forgetless record` from Python:

    importance = forgetless.record("MODEL", text="general.jsonl", out="i.safetensors")
    importance = forgetless.record(model, tokenizer)      # loaded already; on what it says itself

record/python.py says what it takes; `help(forgetless.record.python.record_from_python)`.
"""

from forgetless.options.callable_room import make_callable

make_callable(__name__, "forgetless.record.python:record_from_python")
