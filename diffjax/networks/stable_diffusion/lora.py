"""LoRA files: low-rank changes of a network's layers, merged into its weights."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from safetensors import safe_open

from ...torch_files import read_tensors, tensor_name

__all__ = ["merge_lora"]

# How files end the names of the two factors.
_ENDS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
)
_PREFIXES = {
    "unet": ("lora_unet_", "unet.", ""),
    "text": ("lora_te_", "text_encoder."),
}


def merge_lora(model: Any, path: str | pathlib.Path, scale: ArrayLike = 1.0) -> Any:
    """A model with a LoRA file merged into the weights of its U-Net and text encoder.

    `W' = W + scale (alpha / rank) up down` for each layer of the file. Without an alpha in the
    file, alpha is the rank. The layouts of kohya's scripts, of peft and of diffusers are read, for
    linear and convolutional layers. Names without a prefix are those of the U-Net.

    Args:
        model: a `StableDiffusion`.
        path: the file.
        scale: the strength; it may be traced.

    Returns:
        The new model. Its parameters keep their dtypes.

    Raises:
        ValueError: listing every tensor of the file that has no place in the model, no partner, or
            another shape; if the file's metadata say that alpha is not the rank.

    Reference: Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1.

    >>> import tempfile
    >>> from flax import nnx
    >>> from diffjax.networks.stable_diffusion import CLIPText, StableDiffusion, UNet, UNetConfig
    >>> from safetensors.numpy import save_file
    >>> config = UNetConfig(widths=(8,), attention=(False,), heads=(2,), context=6, groups=4)
    >>> sizes = {"vocabulary": 9, "width": 8, "layers": 1, "heads": 2, "hidden": 16}
    >>> text, unet = CLIPText(**sizes, rngs=nnx.Rngs(0)), UNet(config, rngs=nnx.Rngs(1))
    >>> model = StableDiffusion(text, unet, None, None, None)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "lora.safetensors"
    >>> down, up = np.ones((1, 4, 3, 3), "f4"), np.ones((8, 1, 1, 1), "f4")
    >>> factors = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
    >>> save_file(factors, path)
    >>> new = merge_lora(model, path, scale=0.5)
    >>> float((new.unet.conv_in.kernel[...] - unet.conv_in.kernel[...]).mean().round(3))
    0.5
    """
    tensors = read_tensors(path)
    _check_metadata(pathlib.Path(path))
    changes, used = _changes(tensors)
    networks, wrong, found = {}, [], set()
    for field, prefixes in _PREFIXES.items():
        network = getattr(model, field)
        leaves, structure = jax.tree.flatten_with_path(network)
        places = {}
        for i, (path_of_leaf, _) in enumerate(leaves):
            name, kernel = tensor_name(path_of_leaf)
            if kernel:
                places[_flat(name.removesuffix(".weight"))] = i
        values = [leaf for _, leaf in leaves]
        for layer, (down, up, factor) in changes.items():
            place = next((_place(layer, p, places) for p in prefixes if layer.startswith(p)), None)
            if place is None:
                continue
            found.add(layer)
            change = _product(down, up)
            old = values[place]
            if change is None or change.shape != old.shape:
                wrong.append(
                    f"  {layer}: expected a change of shape {old.shape}, got that of "
                    f"{up.shape} and {down.shape}"
                )
                continue
            new = jnp.asarray(old, jnp.float32) + scale * factor * change
            values[place] = new.astype(old.dtype)
        networks[field] = structure.unflatten(values)
    wrong += [f"  {layer}: no such layer" for layer in changes.keys() - found]
    wrong += [f"  {name}: not understood" for name in tensors.keys() - used]
    if wrong:
        raise ValueError("\n".join([f"{path}: it does not fit the model:", *sorted(wrong)]))
    return model._replace(**networks)


def _check_metadata(path: pathlib.Path) -> None:
    """Newer files of diffusers keep alpha and rank beside the tensors."""
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    for name, text in metadata.items():
        facts = json.loads(text) if name.endswith("lora_adapter_metadata") else {}
        for key, alpha in facts.items():
            rank = facts.get(key.removesuffix("lora_alpha") + "r")
            patterns = key.endswith(("alpha_pattern", "rank_pattern")) and alpha
            if patterns or (key.endswith("lora_alpha") and alpha != rank):
                raise ValueError(
                    f"{path}: expected an alpha that is the rank, or alphas as tensors, got "
                    f"{key} = {alpha} in the metadata; multiply the up factors by alpha / rank"
                )


def _changes(tensors: Mapping[str, np.ndarray]) -> tuple[dict, set[str]]:
    """Layer -> (down, up, alpha / rank), and the names of the tensors that were used."""
    changes, used = {}, set()
    for name in tensors:
        ends = next((ends for ends in _ENDS if name.endswith(ends[0])), None)
        if ends is None:
            continue
        layer = name.removesuffix(ends[0])
        other, alpha = layer + ends[1], f"{layer}.alpha"
        if other not in tensors:
            continue
        down, up = (np.asarray(tensors[key], np.float32) for key in (name, other))
        used |= {name, other}
        factor = 1.0
        if alpha in tensors:
            used.add(alpha)
            factor = float(tensors[alpha]) / len(down)
        changes[layer] = (down, up, factor)
    return changes, used


def _flat(name: str) -> str:
    """Kohya's files join the names of modules by underscores."""
    return name.replace(".", "_")


def _place(layer: str, prefix: str, places: Mapping[str, int]) -> int | None:
    name = layer.removeprefix(prefix).removeprefix("base_model.model.").replace(".processor", "")
    flat = _flat(name).removeprefix("text_model_")
    return places.get(flat + "_0" if flat.endswith("_to_out") else flat)


def _product(down: np.ndarray, up: np.ndarray) -> np.ndarray | None:
    """The change of a kernel (..., in, out): of a linear layer, or of a convolution (up is 1x1)."""
    if up.ndim != down.ndim or up.shape[1] != down.shape[0] or any(n != 1 for n in up.shape[2:]):
        return None
    up = up.reshape(up.shape[:2])
    return np.einsum("or,ri...->...io", up, down)
