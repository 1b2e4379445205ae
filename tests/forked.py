"""What the server of forked processes imports, so that they need not (`conftest.forking`)."""

import atexit
import gc
import importlib

MODULES = (
    "conftest",
    "peft",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "forgetless.budget.shrink",
    "forgetless.compare.compare",
    "forgetless.record.record",
    "forgetless.tune.tune",
)

# There is nothing to collect in what is imported, and looking for it takes a seventh of the time.
gc.disable()
for module in MODULES:
    importlib.import_module(module)
# The processes do not walk through what is frozen, and so do not copy it. The server puts it back:
# Triton's bindings complain at exit where it is not collected.
gc.freeze()
atexit.register(gc.unfreeze)
gc.enable()
