"""Loading and saving models and tokenizers, with errors that say what to do.

For example:

    model, tokenizer = load_model(options), load_tokenizer(options)
    save_whole(model, tokenizer, Path("final"))
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.errors import OptionError
from forgetless.files.atomic import discard, room_for, temporary_beside
from forgetless.model.quantised import keep_differentiable
from forgetless.options.model import ModelOptions


def device_of(options: ModelOptions) -> torch.device:
    """The device that `options` ask for; auto takes CUDA, then MPS, then the CPU."""
    if options.device != "auto":
        try:
            device = torch.device(options.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise OptionError(
                f"--device {options.device} is not to be had here "
                f"({str(error).splitlines()[0]}); expected auto, cpu, cuda, cuda:1 or mps"
            ) from None
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def seed_and_threads(options: ModelOptions) -> None:
    """Seed torch's random choices, and use as many CPU threads as the options say."""
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)


def load_model(options: ModelOptions, name: str | None = None) -> nn.Module:
    """The causal LM `name` (default `options.model`), bare and whole, in eval mode.

    Raises ValueError when it is not there, when tensors are missing in its files, when they are
    pickles, and when an adapter lies beside them.
    """
    from transformers import AutoModelForCausalLM

    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    settings: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,  # a pickle can run code, however it is read
        "output_loading_info": True,
    }
    if options.quantize != "none":
        settings["quantization_config"] = _quantization(options)
        settings["device_map"] = {"": device_of(options)}
    name = name or options.model
    model: nn.Module
    model, loaded = _from_pretrained(AutoModelForCausalLM, name, options, settings)
    _check_bare_and_whole(name, model, loaded)
    if options.quantize == "none":
        model = model.to(device_of(options))
    keep_differentiable(model)
    return model.eval()


def _check_bare_and_whole(name: str, model: nn.Module, loaded: Mapping[str, Any]) -> None:
    """Raise ValueError where `model` is not what its files hold: an adapter was put on, or what the
    files lack was drawn at random. `loaded` is what transformers says of the loading.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"'{name}' holds both a model (config.json) and an adapter (adapter_config.json), and "
            "transformers loads them as one; expected the bare base: move the adapter to a folder "
            "of its own, or remove its two files"
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(
            f"'{name}' lacks {len(missing)} of the model's tensors, first '{missing[0]}', which "
            "would be random numbers; is the model whole, and a causal language model? Download it "
            "again, or give another"
        )


def load_empty(options: ModelOptions) -> nn.Module:
    """The causal LM on torch's meta device: shapes and names, but no weights.

    Only its configuration is read. Raises ValueError when it is not there.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(options)
    if options.dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    else:
        dtype = getattr(torch, options.dtype)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=options.trust_remote_code
        )
    return model


def load_config(options: ModelOptions) -> Any:
    """The configuration of `options.model`. Raises ValueError when it is not there."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, options.model, options, {})


def load_tokenizer(options: ModelOptions, name: str | None = None) -> Any:
    """The tokenizer `name` (default `options.model`).

    Without a padding token the end-of-text token pads, and nothing is resized. Raises ValueError
    when it is not there.
    """
    from transformers import AutoTokenizer

    return _padding(_from_pretrained(AutoTokenizer, name or options.model, options, {}))


def _padding(tokenizer: Any) -> Any:
    """`tokenizer` with a token that pads."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer


def load_tokenizer_in(folder: Path, options: ModelOptions) -> Any:
    """The tokenizer that lies in a folder of an adapter. None of its code is run.

    Raises ValueError when it is not whole.
    """
    from transformers import AutoTokenizer

    trusted = replace(options, trust_remote_code=False, revision=None)
    return _padding(_loaded_from(AutoTokenizer, str(folder), str(folder), trusted, {}))


def save_whole(
    model: Any, tokenizer: Any, folder: Path, save: Callable[[Any, Path], object] | None = None
) -> None:
    """Save model and tokenizer to `folder`, by `save` where given.

    They are saved under a temporary name beside it, which is then renamed: a partial result is
    never taken for a complete one.
    """
    temporary = temporary_beside(folder)
    try:
        with room_for(folder):
            if save is not None:
                save(model, temporary)
            else:
                model.save_pretrained(str(temporary))
            tokenizer.save_pretrained(str(temporary))
            discard(folder)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def context_length(model: nn.Module) -> int:
    """The longest sequence in tokens that the model's configuration allows.

    It is 2048 where the configuration does not say.
    """
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        length = getattr(model.config, key, None)
        if isinstance(length, int):
            return length
    return 2048


def _from_pretrained(kind: Any, name: str, options: ModelOptions, settings: dict[str, Any]) -> Any:
    """What `kind`, an Auto class of transformers, loads. Raises ValueError where it cannot."""
    folder = model_folder(name)
    return _loaded_from(kind, name if folder is None else str(folder), name, options, settings)


def _loaded_from(
    kind: Any, place: str, name: str, options: ModelOptions, settings: dict[str, Any]
) -> Any:
    """What `kind` loads from `place`, which errors call `name`."""
    try:
        return kind.from_pretrained(
            place,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            **settings,
        )
    except OSError as error:
        offline = ""
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            offline = " (offline mode is on: HF_HUB_OFFLINE)"
        first = str(error).strip().splitlines()[0]
        if settings.get("use_safetensors") and "safetensors" in first:
            raise ValueError(
                f"cannot load '{name}'{offline}: {first}; expected weights as safetensors. Pickles "
                "(pytorch_model.bin) are not opened; convert them where you trust them: "
                "AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)"
            ) from error
        raise ValueError(
            f"cannot load '{name}'{offline}: {first}; check the name, the connection or your "
            "access, or give a local folder"
        ) from error
    # A truncated weight file or a foreign configuration: each library has its own exceptions.
    except Exception as error:
        raise ValueError(
            f"cannot load '{name}': {str(error).strip().splitlines()[0]}; is the model whole, "
            "and one that this transformers knows?"
        ) from error


def model_folder(name: str) -> Path | None:
    """The local folder that `name` is; None for a name on the Hub.

    Raises ValueError for a folder that is not there, or holds no model.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.exists():
        raise ValueError(
            f"model '{name}' does not exist; expected a Hub name or a folder with config.json "
            "and weights"
        )
    if not path.is_dir():
        return None
    if not (path / "config.json").is_file():
        hint = ""
        if (path / "adapter_config.json").is_file():
            hint = (
                "; it holds an adapter: give its base model here (eval and chat take the adapter "
                "by --adapter, tune goes on from a finished run by --after)"
            )
        raise ValueError(f"'{name}' is not a model folder: expected config.json in it{hint}")
    return path


def _quantization(options: ModelOptions) -> Any:
    """transformers' settings for --quantize. Raises ValueError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"--quantize {options.quantize} needs bitsandbytes, which is not installed; pip "
            "install 'forgetless[bnb]'"
        )
    from transformers import BitsAndBytesConfig

    if options.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
