"""Which weights are trained, what they are called in the base model, and their effective update U = W - W(base), always (out, in).

With LoRA U = scale * B @ A; with full fine-tuning U is the difference to the base, read from its checkpoint (checkpoint.py) or from a copy. This is the
only file that knows PEFT's names.
Everything else works with two kinds of target weight: `LowRankWeight` and `FullWeight`.

    for weight in target_weights(peft_model):
        weight.name            # 'model.layers.0.self_attn.q_proj.weight', whatever wraps the model
        weight.update()        # (out, in), accumulated in at least f32

A quantised base needs nothing special: only the factors are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.checkpoint import Base, KeptWeight, StoredWeight, stored_weights
from holdfast.options import OptionError, nearest
from holdfast.reading import FileError

logger = logging.getLogger("holdfast")
FUSED_EXPERTS = (
    "fused expert tensors of mixture models hold many weights in one (experts, ...) tensor; holdfast has no importance for them: leave them out of the targets"
)
BASE_ROWS = 1 << 22  # elements of the base in memory at a time
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights that change the base weight


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype that holdfast accumulates in: f32, or f64 for f64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Place:
    """Where a target weight will be, before there is an adapter: what layer coefficients need to know."""

    name: str
    layer: int | None
    kind: str


@dataclass(frozen=True, eq=False)
class LowRankWeight:
    """A base weight with one active LoRA adapter: U = scale * (B @ A - B0 @ A0); no initial product unless the adapter starts away from the base."""

    name: str
    shape: tuple[int, int]  # (out, in)
    layer: int | None
    kind: str
    module: nn.Module
    A: nn.Parameter  # (r, in)
    B: nn.Parameter  # (out, r)
    scale: float
    initial: tuple[Tensor, Tensor] | None = None  # (r, in), (out, r)
    adapter: str = "default"

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.A, self.B)

    def live(self) -> LowRankWeight:
        """The same with the parameters that the module has now: FSDP2 puts others in their place."""
        A, B = self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight
        return self if A is self.A and B is self.B else replace(self, A=A, B=B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """L (out, q), R (q, in) with L @ R = U, in f32 or wider."""
        dtype = wider(self.A.dtype)
        A, B = self.A.detach().to(dtype), self.B.detach().to(dtype) * self.scale
        if self.initial is None:
            return B, A
        A0, B0 = self.initial[0].to(A), self.initial[1].to(A) * self.scale
        return torch.cat([B - B0, B0], 1), torch.cat([A, A - A0], 0)

    def update(self) -> Tensor:
        """U, (out, in), in f32 or wider."""
        dtype = wider(self.A.dtype)
        product = self.B.detach().to(dtype) @ self.A.detach().to(dtype)
        if self.initial is not None:
            product -= self.initial[1].to(product) @ self.initial[0].to(product)
        return product.mul_(self.scale)


@dataclass(frozen=True, eq=False)
class FullWeight:
    """A base weight that is trained itself: U = W - base. `base` is what W was when the target was made: in the checkpoint's file, or a copy in memory."""

    name: str
    shape: tuple[int, int]  # (out, in)
    layer: int | None
    kind: str
    module: nn.Module
    W: nn.Parameter  # (out, in), or (in, out) where transposed
    base: Base  # as W
    transposed: bool

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.W,)

    def live(self) -> FullWeight:
        """The same with the parameter that the module has now: FSDP2 puts another in its place."""
        return self if self.module.weight is self.W else replace(self, W=self.module.weight)

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the parameter, seen as (out, in)."""
        return tensor.T if self.transposed else tensor

    def base_rows(self, rows: slice) -> Tensor:
        """Rows of W(base), (rows, in), in f32 or wider, where W is; rounded to W's dtype as loading did."""
        part = (slice(None), rows) if self.transposed else (rows, slice(None))
        return self.oriented(self.base.read(part).to(self.W.dtype).to(self.W.device)).to(wider(self.W.dtype))

    def update(self) -> Tensor:
        """U, (out, in), in f32 or wider."""
        return self.moved(slice(None))

    def moved(self, rows: slice) -> Tensor:
        """Rows of U, (rows, in), in f32 or wider. However many are asked for, the base is in memory a few at a time."""
        U = self.oriented(self.W.detach())[rows].to(wider(self.W.dtype), copy=True)
        first, last, _ = rows.indices(self.shape[0])
        some = max(1, BASE_ROWS // max(self.shape[1], 1))
        for start in range(first, last, some):
            end = min(start + some, last)
            U[start - first : end - first] -= self.base_rows(slice(start, end))
        return U


TargetWeight = LowRankWeight | FullWeight


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, torch.compile and PEFT wrappers; LoRA layers stay in place, so module names are those of the base model."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


def target_weights(model: nn.Module, *, names: str | None = None, subtract_initial: bool = False) -> list[TargetWeight]:
    """The target weights of `model`, in the model's order.

    With LoRA layers these are the weights under the active adapter. Without, they are trained themselves, and the base is what they are now: those
    matched by `names` (see `matching`), by default all linear ones that require a gradient. `subtract_initial` accepts adapters that start away from the
    base (PiSSA, OLoRA, CorDA) and takes their product as it is now for the start; otherwise they are refused.

    Raises ValueError for what cannot be held: several active adapters, DoRA and other variants, merged adapters, fused experts, embeddings.
    """
    base = unwrapped(model)
    found = [weight for path, module in base.named_modules() if (weight := _low_rank(path, module, model, subtract_initial)) is not None]
    if found:
        _check_own(base, [(weight.name.removesuffix(".weight"), weight.module.get_base_layer()) for weight in found])
        return list(found)
    if hasattr(model, "peft_config"):
        raise ValueError(f"the model has no LoRA layer that holdfast can hold (found {_adapter_types(model)}); use LoRA, or full fine-tuning without PEFT")
    if names is not None:
        return _full(base, matching(base, names))
    trained = [(path, module) for path, module in matching(base, "all-linear") if module.weight.requires_grad]
    if not trained:
        raise ValueError("the model has neither a LoRA layer nor a linear layer that requires a gradient; add an adapter, or unfreeze what you train")
    loose = [path for path in fused_experts(base) if base.get_parameter(path).requires_grad]
    if loose:
        raise ValueError(f"'{loose[0]}': {FUSED_EXPERTS}: freeze them, or name the targets")
    return _full(base, trained)


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the (experts, ...) tensors of a bare mixture model."""
    return [path for path, parameter in model.named_parameters() if parameter.ndim == 3 and "experts" in path]


def warn_of_experts(model: nn.Module, names: str) -> None:
    """Say that 'all-linear' leaves fused experts out, as PEFT's does, so that nobody takes them for trained."""
    experts = fused_experts(model)
    if experts and names == "all-linear":
        logger.warning("all-linear leaves out %d fused expert tensors (first '%s'): they are neither trained nor held", len(experts), experts[0])


def _adapter_types(model: nn.Module) -> str:
    return ", ".join(sorted({str(getattr(c, "peft_type", c)) for c in model.peft_config.values()}))


def _low_rank(path: str, module: nn.Module, model: nn.Module, subtract_initial: bool) -> LowRankWeight | None:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return None
    active = [a for a in module.active_adapters if a in module.lora_A or a in module.lora_embedding_A or a in module.lora_B]
    if not active:
        return None
    where = f"'{path}'"
    if type(module).__name__ == "ParamWrapper":
        raise ValueError(f"{where}: {FUSED_EXPERTS}")
    if len(active) > 1:
        raise ValueError(f"{where} has {len(active)} active adapters ({', '.join(active)}); holdfast holds one: call model.set_adapter(name)")
    adapter = active[0]
    if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
        raise ValueError(f"{where} is a LoRA layer on {type(module.get_base_layer()).__name__}; expected a linear layer: leave it out of target_modules")
    if module.merged:
        raise ValueError(f"{where} has its adapter merged into the base weight; call model.unmerge_adapter() first")
    if module.use_dora.get(adapter) or getattr(module, "lora_variant", {}).get(adapter) is not None:
        raise ValueError(f"{where} uses DoRA or another LoRA variant, whose update is not scale * B @ A; use plain LoRA or rsLoRA")
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    initial = None
    if _moves_the_base(model, adapter):
        if not subtract_initial:
            raise ValueError(f"{where}: the adapter starts away from the base model (init_lora_weights moves the base weight); importance "
                             "belongs to the bare base. Use the default initialisation, or pass subtract_initial=True before training")  # fmt: skip
        initial = (A.detach().clone(), B.detach().clone())
    return LowRankWeight(path + ".weight", (B.shape[0], A.shape[1]), *_place(path), module, A, B, float(module.scaling[adapter]), initial, adapter)


def _check_own(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError where a layer's weight is another module's too (tied, or shared by two layers): neither its gradient nor its update is the layer's."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for path, module in layers:
        other = next((name for name in owners.get(id(module.weight), []) if name != f"{path}.weight"), None)
        if other is not None:
            raise ValueError(f"'{path}.weight' and '{other}' are one parameter, whose gradient and update belong to both; leave it out of the targets")


def _moves_the_base(model: nn.Module, adapter: str) -> bool:
    configs = getattr(model, "peft_config", {})
    how = getattr(configs.get(adapter), "init_lora_weights", True) if isinstance(configs, dict) else True
    return isinstance(how, str) and how.lower().startswith(MOVES_THE_BASE)


def _place(path: str) -> tuple[int | None, str]:
    """(index of the transformer block, kind): 'model.layers.3.self_attn.q_proj' -> (3, 'q_proj')."""
    index = re.search(r"\.(\d+)\.", path)
    return (int(index.group(1)) if index else None), path.rsplit(".", 1)[-1]


def _full(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[TargetWeight]:
    """Weights that are trained themselves, each with its base: in the checkpoint's file where it stands there as it is now, else copied."""
    _check_own(model, layers)
    for path, module in layers:
        if not module.weight.is_floating_point():
            raise ValueError(f"'{path}' is quantised ({module.weight.dtype}) and cannot be trained itself; use LoRA")
    # Of weights that FSDP2 has sharded a process copies its own rows.
    stored = stored_weights(model, {path + ".weight": module.weight for path, module in layers if not distributed.is_sharded(module.weight)})
    copied = [path + ".weight" for path, _ in layers if path + ".weight" not in stored]
    if copied:
        size = sum(module.weight.numel() * module.weight.element_size() for path, module in layers if path + ".weight" not in stored)
        logger.info("base of %d of %d weights is kept as a copy, %.0f MiB (first '%s'): no safetensors file that the model was loaded from holds them "
                    "as they are now", len(copied), len(layers), size / 2**20, copied[0])  # fmt: skip
    else:
        logger.info("base of %d weights is read from the checkpoint, a few rows at a time: no second copy in memory", len(layers))
    return [_full_weight(path, module, stored.get(path + ".weight")) for path, module in layers]


def _full_weight(path: str, module: nn.Module, stored: StoredWeight | None) -> FullWeight:
    W, transposed = module.weight, _is_conv1d(module)
    shape = (W.shape[1], W.shape[0]) if transposed else (W.shape[0], W.shape[1])
    return FullWeight(path + ".weight", shape, *_place(path), module, W, stored or KeptWeight(distributed.local(W).detach().clone()), transposed)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every linear layer that can be a target, in the model's order; the output head is left out, as PEFT's all-linear does.

    Under an adapter this is the base layer inside it, with the path that it has in the bare model.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside: list[str] = []  # paths of adapter layers: what lies below them belongs to the adapter
    for path, module in model.named_modules():
        if inside and path.startswith(inside[-1]):
            continue
        inner = module
        if hasattr(module, "get_base_layer"):
            inside.append(path + ".")
            inner = module.get_base_layer()
        is_linear = isinstance(inner, nn.Linear) or _is_conv1d(inner) or type(inner).__name__ in ("Linear4bit", "Linear8bitLt")
        if is_linear and module is not head and inner is not head:
            yield path, inner


def matching(model: nn.Module, names: str) -> list[tuple[str, nn.Module]]:
    """Linear layers of a bare model chosen by `names`: 'all-linear', comma-separated last parts of module paths ('q_proj,v_proj'), or a regular
    expression that matches the whole path. Raises OptionError naming the nearest kind when nothing matches, ValueError for fused experts."""
    layers = list(linear_layers(model))
    kinds = {path.rsplit(".", 1)[-1] for path, _ in layers}
    if names == "all-linear":
        chosen = layers
    elif re.fullmatch(r"[\w, ]+", names):
        wanted = {name.strip() for name in names.split(",") if name.strip()}
        for name in sorted(wanted - kinds):
            if any(name in path for path in fused_experts(model)):
                raise ValueError(f"'{name}': {FUSED_EXPERTS}")
            raise OptionError(f"no linear layer of the model is called '{name}'; {nearest(name, kinds)}")
        chosen = [(path, module) for path, module in layers if path.rsplit(".", 1)[-1] in wanted]
    else:
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise OptionError(f"--targets '{names}' is not a regular expression: {error}") from None
        chosen = [(path, module) for path, module in layers if pattern.fullmatch(path)]
    if not chosen:
        raise OptionError(f"--targets '{names}' matches no linear layer of the model; kinds: {', '.join(sorted(kinds))}")
    return chosen


@dataclass(frozen=True, eq=False)
class BaseLayer:
    """A linear layer of the bare base model, below any adapter."""

    name: str  # of its weight
    shape: tuple[int, int]  # (out, in)
    module: nn.Module


def base_layers(model: nn.Module, names: str) -> list[BaseLayer]:
    """The base layers chosen by `names` (see `matching`), with or without adapters around them.

    Raises ValueError where switching the adapters off would not give the bare base: merged adapters, or ones that moved the base weight.
    """
    base = unwrapped(model)
    for path, module in base.named_modules():
        if getattr(module, "merged", False):
            raise ValueError(f"'{path}' has its adapter merged into the base weight; call model.unmerge_adapter() first")
    for adapter in getattr(_wrapper(model), "peft_config", None) or {}:
        if _moves_the_base(_wrapper(model), adapter):
            raise ValueError(f"adapter '{adapter}' moved the base weight when it was made (init_lora_weights); importance belongs to the bare base: "
                             "record on the model without the adapter")  # fmt: skip
    shapes, layers = base_shapes(model), matching(base, names)
    _check_own(base, layers)
    return [BaseLayer(path + ".weight", shapes[path + ".weight"], module) for path, module in layers]


def _wrapper(model: nn.Module) -> nn.Module:
    """The PEFT wrapper inside DDP and torch.compile, where there is one."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers model with its adapters switched off, in eval mode, with every parameter frozen; all of it as before on leaving."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = unwrapped(model)
    training = {module: module.training for module in base.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    adapters = [module for module in base.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not module.disable_adapters]
    try:
        for module in adapters:
            module.enable_adapters(False)
        base.requires_grad_(False)
        yield base.eval()
    finally:
        for module in adapters:
            module.enable_adapters(True)  # also unfreezes the adapter, so flags are put back after it
        for module, was in training.items():
            module.training = was
        for parameter, was in trainable.items():
            parameter.requires_grad_(was)


def without_adapter(model: nn.Module) -> nn.Module:
    """What `add_adapter` was given, with the adapter taken out of it again."""
    return model.unload()  # type: ignore[operator,no-any-return]


def placed(model: nn.Module, names: str) -> list[Place]:
    """The places that `names` choose in a bare model (see `matching`)."""
    return [Place(path + ".weight", *_place(path)) for path, _ in matching(model, names)]


def base_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Base weight name -> (out, in) for every linear layer, below any adapter; quantised layers say their shape by in_features and out_features."""
    shapes = {}
    for path, module in unwrapped(model).named_modules():
        inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if _is_conv1d(inner):
            shapes[path + ".weight"] = (inner.weight.shape[1], inner.weight.shape[0])
        elif isinstance(inner, nn.Linear) or (hasattr(inner, "in_features") and hasattr(inner, "weight")):
            shapes[path + ".weight"] = (inner.out_features, inner.in_features)
    return {name: shape for name, shape in shapes.items() if ".lora_" not in name and ".base_layer." not in name}


def fingerprint(model: nn.Module, *, samples: int = 65_536) -> str:
    """sha256 over the shapes of the linear weights and the sign bits of evenly spaced elements of the input embedding.

    Signs survive f32, bf16, f16 and loading in 4 or 8 bit (which leaves embeddings alone), so the fingerprint does not depend on how the model was loaded.
    It tells base models apart, not a base from a fine-tune of it that left the embedding alone.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(base_shapes(model).items()):
        digest.update(f"{name} {shape}\n".encode())
    embedding = unwrapped(model).get_input_embeddings()
    table = getattr(embedding, "base_layer", embedding).weight.detach()
    digest.update(_signs(table, max(1, table.numel() // samples)))
    return digest.hexdigest()


def _signs(table: Tensor, step: int) -> bytes:
    """The sign bits of every `step`th element; of a table sharded by rows, together, each process's own in order."""
    first, here = distributed.rows_here(table)[0] * table.shape[1], distributed.local(table).flatten()
    signs: bytes = torch.signbit(here[-first % step :: step]).cpu().numpy().tobytes()
    return b"".join(distributed.collect(signs)) if distributed.is_sharded(table) else signs


def peft_targets(model: nn.Module, names: str) -> tuple[list[str], bool]:
    """(target_modules for a PEFT configuration, whether some of them store their weight transposed) for the layers of a bare model chosen by `names`."""
    paths = [path for path, _ in matching(model, names)]
    warn_of_experts(model, names)
    kinds = {path.rsplit(".", 1)[-1] for path in paths}
    by_kind = {path for path, _ in linear_layers(model) if path.rsplit(".", 1)[-1] in kinds}
    return sorted(kinds) if by_kind == set(paths) else paths, any(_is_conv1d(module) for _, module in matching(model, names))


def add_adapter(model: nn.Module, *, names: str, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> nn.Module:
    """`model` wrapped by PEFT with a fresh LoRA adapter (U = 0) on the layers chosen by `names`."""
    from peft import LoraConfig, get_peft_model

    modules, conv1d = peft_targets(model, names)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, target_modules=modules,
                        task_type="CAUSAL_LM", fan_in_fan_out=conv1d)  # fmt: skip
    return get_peft_model(model, config)


def adapter_inputs(folder: str | Path) -> dict[str, Tensor]:
    """Base weight name -> A (r, in) of a LoRA adapter's folder, read from its file without a model. Raises ValueError where there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = {}
    try:
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise FileError(f"'{folder}' has no whole adapter_model.safetensors ({error}); give the folder of an adapter that PEFT saved") from None
    for key, value in tensors.items():
        path, mark, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        if mark:
            found[path + ".weight"] = value
    if not found:
        raise ValueError(f"'{folder}' holds no LoRA adapter: expected lora_A weights in it; give an adapter trained by LoRA")
    return found


def has_lora(model: nn.Module) -> bool:
    """Whether an adapter's update is plain LoRA's, of any kind of layer."""
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in unwrapped(model).modules())


def scale_update(model: nn.Module, factor: float) -> None:
    """Multiply the active adapter's update by `factor`, in place, by its scaling: plain LoRA layers of any kind."""
    from peft.tuners.lora import LoraLayer

    if factor == 1.0:
        return
    layers = [module for module in unwrapped(model).modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(f"only LoRA updates can be scaled, found {_adapter_types(model)}")
    for module in layers:
        for adapter in module.active_adapters:
            if adapter in module.scaling:
                module.scaling[adapter] *= factor
