"""What `forgetless shrink` takes: options that say what to do, and adapters whose update is a
product of two factors and nothing more. All of it is checked before a model is loaded.

    config = adapter_config("their-adapter")       # the configuration of a plain LoRA adapter
    check_shrink(options)                          # the same, and the rest of the options
"""

from __future__ import annotations

from pathlib import Path

from forgetless.budget.budget import parse
from forgetless.errors import OptionError
from forgetless.files.outputs import MARK, check_claim, local_inputs, ours_in
from forgetless.files.room import check_output_folder
from forgetless.files.untrusted import JsonObject
from forgetless.model.adapter_files import checked_adapter
from forgetless.model.targets import MOVES_THE_BASE
from forgetless.options.verbs import ShrinkOptions

# What shrink writes in its folder.
SHRINK_WRITES = ("final", "run.json")
# What in an adapter's configuration moves the model by more than scale * B @ A, and so stays when
# that is shrunk.
MORE_THAN_FACTORS = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules trained beside it",
    "trainable_token_indices": "trained token embeddings",
    "lora_bias": "trained biases",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted parameters of fused layers",
}


def check_shrink(options: ShrinkOptions) -> str | None:
    """Everything that can be refused without loading a model; returns the name of the base model
    that the adapter's configuration gives, if it does.

    Raises OptionError or ValueError, and leaves an empty output folder.
    """
    if options.method == "shrink" and not options.importance:
        raise OptionError(
            "--method shrink shrinks along importance: give --importance FILE of `forgetless "
            "record`, or --method scale"
        )
    if (options.budget is None) == (options.mu is None):
        raise OptionError("give --budget (1%, 0.01nats), which chooses mu, or --mu X; one of them")
    if options.budget:
        parse(options.budget)
        if not options.general and options.method != "scale":
            raise OptionError(
                "without --general a budget is kept on a prediction, which holds for scaled "
                "updates alone: give --general TEXT, or --method "
                "scale with --importance FILE of forgetless record --calibrate"
            )
    config = adapter_config(options.adapter, any_kind=scales_any_kind(options))
    adapter = Path(options.adapter).resolve()
    out = Path(options.out).resolve()
    if out == adapter or out in adapter.parents or adapter in out.parents:
        raise OptionError(
            f"--out '{options.out}' would write where the adapter lies; the input is never "
            "changed: give another folder"
        )
    check_output_folder(options.out)
    _check_new(options)
    base: str | None = config.get("base_model_name_or_path")
    return base


def _check_new(options: ShrinkOptions) -> None:
    """Raise ValueError unless the folder to write is empty, or holds no more than what an earlier
    shrink left that did not come to its end.
    """
    out = Path(options.out)
    known = {MARK, ".lock", *ours_in(out)}
    others = [path.name for path in out.iterdir() if path.name not in known]
    if others or (out / "run.json").exists():
        raise ValueError(f"'{out}' is not empty; give a new folder")
    check_claim(out, "shrink", SHRINK_WRITES, local_inputs(options))


def scales_any_kind(options: ShrinkOptions) -> bool:
    """Whether what is asked needs no update that is a product of two factors: scaling, measured."""
    return options.method == "scale" and not (options.budget and not options.general)


def is_of_factors(folder: str) -> bool:
    """Whether an adapter's update is a product of two factors and nothing more."""
    try:
        adapter_config(folder)
    except ValueError:
        return False
    return True


def adapter_config(folder: str, *, any_kind: bool = False) -> JsonObject:
    """The configuration of a PEFT adapter that shrink can work on: of two factors and nothing more,
    or with `any_kind` whatever has a way back to its base (adapter_path.py).

    Raises ValueError with the reason otherwise.
    """
    config = checked_adapter(folder)
    if any_kind and not _starts_elsewhere(config):
        return config
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"'{folder}' is a {kind} adapter; shrinking needs an update that is a product of two "
            "factors: LoRA or rsLoRA; --method scale with --general TEXT takes this one"
        )
    beyond = [what for key, what in MORE_THAN_FACTORS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append("trained biases")
    if _starts_elsewhere(config):
        initial = config["init_lora_weights"]
        raise ValueError(
            f"'{folder}' starts away from the base model (init_lora_weights: {initial}), while "
            "importance belongs to the bare base; convert it to "
            "plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if beyond:
        raise ValueError(
            f"'{folder}' has {', '.join(beyond)}, which would stay as it is when scale * B @ A "
            "is shrunk; only plain LoRA and rsLoRA are taken. --method scale with --general TEXT "
            "scales all of it"
        )
    return config


def _starts_elsewhere(config: JsonObject) -> bool:
    """Whether making the adapter moved the base."""
    initial = config.get("init_lora_weights", True)
    return isinstance(initial, str) and initial.lower().startswith(MOVES_THE_BASE)
