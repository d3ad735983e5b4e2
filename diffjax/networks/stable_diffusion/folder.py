"""A model folder on disk: configurations and weights."""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from ..._bind import bind
from ...parametrizations import Parametrization, as_denoiser
from ...torch_files import load_tensors, read_tensors
from ...typing import Denoiser, Network, Schedule
from .clip import CLIPText
from .scheduler import read_scheduler
from .unet import ControlNet, UNet, UNetConfig
from .vae import AutoencoderKL

__all__ = ["StableDiffusion", "read_controlnet", "read_model"]

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# The keys of each configuration: those that are read, and those with one admitted value.
_ENCODER_ONLY = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "upcast_attention": ...,  # the softmax is always that of float32 logits
    "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "num_attention_heads": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
_ENCODER_READ = {
    "in_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "use_linear_projection": False,
}
_UNET_ONLY = _ENCODER_ONLY | {
    "center_input_sample": False,
    "dropout": 0.0,
    "reverse_transformer_layers_per_block": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
_UNET_READ = _ENCODER_READ | {
    "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "sample_size": None,
}
_CONTROL_ONLY = _ENCODER_ONLY | {
    "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
_CONTROL_READ = _ENCODER_READ | {"conditioning_embedding_out_channels": [16, 32, 96, 256]}
_VAE_ONLY = {
    "act_fn": "silu",
    "force_upcast": ...,
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_VAE_READ = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": None,
    "scaling_factor": 0.18215,
}
_TEXT_READ = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class StableDiffusion(NamedTuple):
    """A text-to-image model; `read_model` makes one. It is a pytree."""

    text: CLIPText
    """tokens to embeddings"""
    unet: UNet
    """the network"""
    vae: AutoencoderKL
    """images to latents, and back"""
    schedule: Schedule
    """the path of the latents"""
    parametrization: Parametrization
    """what the network predicts"""

    def denoiser(self, embedding: ArrayLike, network: Network | None = None) -> Denoiser:
        """The denoiser of latents given a text's embedding.

        Args:
            embedding: what `text` returned.
            network: another one than `unet`, such as `controlled(unet, controls)`.

        Returns:
            The denoiser. `cfg` of those of a text and of the empty text guides.
        """
        network = bind(self.unet if network is None else network, cond=embedding)
        return as_denoiser(network, self.schedule, self.parametrization)


def read_model(folder: str | pathlib.Path, dtype=None) -> StableDiffusion:
    """Reads a Stable Diffusion 1.x or 2.x model from a folder of the torch library `diffusers`.

    The folder has the subfolders `unet`, `vae`, `text_encoder` and `scheduler`. Both the published
    files and those that today's versions save are read. Tensors of safetensors are mapped to memory
    and read one by one; without such a file that of torch is read, of which only tensors are
    admitted. Nothing is downloaded.

    Args:
        folder: the model's folder.
        dtype: of the parameters and of the computations, such as `jnp.bfloat16`. None for
            parameters as in the files, and computations in at least float32.

    Returns:
        The model.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming a configuration key that is unknown or whose value is not supported; or
            listing every tensor that is missing, unexpected or of another shape.

    Reference: Rombach et al. 2022 (arXiv 2112.10752).

    >>> model = read_model("stable-diffusion-v1-5")  # doctest: +SKIP
    >>> read_model("no-such-folder")
    Traceback (most recent call last):
    FileNotFoundError: folder: expected scheduler_config.json in no-such-folder
    """
    folder = pathlib.Path(folder)
    scheduler = read_scheduler(folder)
    unet = read_unet(folder / "unet", dtype)
    return StableDiffusion(
        read_text(folder / "text_encoder", dtype),
        unet,
        read_vae(folder / "vae", dtype),
        scheduler.schedule,
        scheduler.parametrization,
    )


def read_controlnet(folder: str | pathlib.Path, dtype=None) -> ControlNet:
    """Reads a ControlNet from its folder.

    Args:
        folder: the folder, with `config.json` and the weights.
        dtype: as for `read_model`.

    Returns:
        The control.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: as `read_model`.

    Reference: Zhang et al. 2023 (ControlNet, arXiv 2302.05543).

    >>> control = read_controlnet("control_v11p_sd15_canny")  # doctest: +SKIP
    >>> read_controlnet("no-such-folder")
    Traceback (most recent call last):
    FileNotFoundError: folder: expected no-such-folder/config.json, which is missing
    """
    folder = pathlib.Path(folder)
    config = _config(folder, _CONTROL_READ, _CONTROL_ONLY)
    widths = tuple(config["conditioning_embedding_out_channels"])
    sizes = _unet_config(config)
    return _load(folder, lambda rngs: ControlNet(sizes, widths, dtype=dtype, rngs=rngs), dtype)


def read_unet(folder: pathlib.Path, dtype=None) -> UNet:
    """The U-Net of its folder."""
    config = _config(folder, _UNET_READ, _UNET_ONLY)
    if [_UP.get(kind) for kind in config["up_block_types"]][::-1] != _attention(config):
        raise ValueError(
            f"{folder / 'config.json'}: up_block_types: expected the mirror image of "
            f"down_block_types, of {', '.join(_UP)}, got {config['up_block_types']}"
        )
    sizes = _unet_config(config)
    return _load(folder, lambda rngs: UNet(sizes, dtype=dtype, rngs=rngs), dtype)


def read_vae(folder: pathlib.Path, dtype=None) -> AutoencoderKL:
    """The autoencoder of its folder."""
    config = _config(folder, _VAE_READ, _VAE_ONLY)
    for key in ("down_block_types", "up_block_types"):
        if set(config[key]) != set(_VAE_READ[key]):
            raise ValueError(
                f"{folder / 'config.json'}: {key}: expected only {_VAE_READ[key][0]}, "
                f"got {config[key]}"
            )
    sizes = {
        "channels": config["in_channels"],
        "latents": config["latent_channels"],
        "widths": tuple(config["block_out_channels"]),
        "blocks": config["layers_per_block"],
        "groups": config["norm_num_groups"],
        "scaling": config["scaling_factor"],
        "dtype": dtype,
    }
    return _load(folder, lambda rngs: AutoencoderKL(**sizes, rngs=rngs), dtype, _new_vae_name)


def read_text(folder: pathlib.Path, dtype=None) -> CLIPText:
    """The text encoder of its folder."""
    # The file of `transformers` holds much besides; what matters is named, the rest is ignored.
    given = _json(folder / "config.json")
    config = _TEXT_READ | {key: given[key] for key in _TEXT_READ if key in given}
    kind = given.get("model_type", "clip_text_model")
    if kind != "clip_text_model" or config["layer_norm_eps"] != 1e-5:
        raise ValueError(
            f"{folder / 'config.json'}: expected a clip_text_model with layer_norm_eps 1e-5, got "
            f"{kind} with {config['layer_norm_eps']}"
        )
    sizes = {
        "vocabulary": config["vocab_size"],
        "tokens": config["max_position_embeddings"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "activation": config["hidden_act"],
        "dtype": dtype,
    }
    return _load(folder, lambda rngs: CLIPText(**sizes, rngs=rngs), dtype, _new_text_name)


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected {path}, which is missing")
    return json.loads(path.read_text())


def _config(folder: pathlib.Path, read: dict, only: dict) -> dict[str, Any]:
    """The configuration, with the torch library's defaults for what it leaves out."""
    path = folder / "config.json"
    given = {k: v for k, v in _json(path).items() if not k.startswith("_")}
    wrong = [
        f"  {key}: expected {only[key]!r}, got {value!r}"
        for key, value in given.items()
        if key in only and only[key] is not ... and value not in (only[key], None)
    ]
    wrong += [f"  {key}: unknown" for key in given if key not in read and key not in only]
    if wrong:
        raise ValueError("\n".join([f"{path}: it has keys that are not supported:", *wrong]))
    return read | {key: value for key, value in given.items() if key in read}


def _attention(config: dict[str, Any]) -> list[bool | None]:
    return [_DOWN.get(kind) for kind in config["down_block_types"]]


def _unet_config(config: dict[str, Any]) -> UNetConfig:
    widths, heads = tuple(config["block_out_channels"]), config["attention_head_dim"]
    attention = _attention(config)
    if None in attention:
        raise ValueError(
            f"down_block_types: expected {' or '.join(_DOWN)}, got {config['down_block_types']}"
        )
    return UNetConfig(
        inputs=config["in_channels"],
        outputs=config.get("out_channels", config["in_channels"]),
        widths=widths,
        attention=tuple(map(bool, attention)),
        # In these files `attention_head_dim` is the number of heads.
        heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(widths),
        blocks=config["layers_per_block"],
        context=config["cross_attention_dim"],
        groups=config["norm_num_groups"],
        epsilon=config["norm_eps"],
        linear_projection=config["use_linear_projection"],
    )


def _load(
    folder: pathlib.Path, make: Callable, dtype, rename: Callable[[str], str | None] = str
) -> Any:
    """The network of the folder. Tensors whose new name is None are left out."""
    path = _weights(folder)
    tensors = read_tensors(path)
    names = {new: name for name in tensors if (new := rename(name)) is not None}
    network = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    try:
        return load_tensors(network, _Renamed(tensors, names), dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _weights(folder: pathlib.Path) -> pathlib.Path:
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    ends = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    paths = [folder / (stem + end) for end in ends for stem in stems]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"folder: expected the weights, such as diffusion_pytorch_model.safetensors or "
        f"model.safetensors, in {folder}"
    )


class _Renamed(Mapping):
    """Tensors under other names, still read one by one."""

    def __init__(self, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _new_vae_name(name: str) -> str:
    """Published files have other names for the layers of the attention."""
    module, _, last = name.rpartition(".")
    parent, _, layer = module.rpartition(".")
    return f"{parent}.{_OLD_VAE[layer]}.{last}" if layer in _OLD_VAE else name


def _new_text_name(name: str) -> str | None:
    """Published files have a prefix, and the numbers of the positions as a tensor."""
    return None if name.endswith("position_ids") else name.removeprefix("text_model.")
