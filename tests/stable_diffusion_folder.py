"""A small Stable Diffusion model with random weights, written as a folder of diffusers."""

import json
import pathlib

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from diffjax.networks.stable_diffusion import AutoencoderKL, CLIPText, ControlNet, UNet, UNetConfig
from diffjax.torch_files import tensor_name

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [
    *LETTERS,
    *(letter + "</w>" for letter in LETTERS),
    "ca",
    "cat</w>",
    "<|startoftext|>",
    "<|endoftext|>",
]
CONFIG = UNetConfig(
    widths=(8, 16), attention=(True, False), heads=(2, 2), blocks=1, context=8, groups=4
)
_UNET = {
    "in_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [4, 4, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def _tensors(network, seed: int) -> dict[str, np.ndarray]:
    """Random tensors for the network, in torch's layout."""
    rng, tensors = np.random.default_rng(seed), {}
    for path, leaf in jax.tree.leaves_with_path(network):
        name, kernel = tensor_name(path)
        array = rng.normal(size=leaf.shape).astype("f4") / max(1, np.prod(leaf.shape[:-1])) ** 0.5
        if kernel:
            array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
        tensors[name] = np.ascontiguousarray(array)
    return tensors


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the folder and returns it."""
    sizes = {"vocabulary": len(VOCABULARY), "width": 8, "layers": 1, "heads": 2, "hidden": 16}
    parts = {
        "unet": (
            UNet,
            (CONFIG,),
            {},
            _UNET | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        ),
        "controlnet": (ControlNet, (CONFIG,), {}, _UNET),
        "vae": (AutoencoderKL, (), {"widths": (4, 4, 8, 8), "blocks": 1, "groups": 4}, _VAE),
        "text_encoder": (CLIPText, (), sizes, _TEXT),
    }
    for i, (name, (kind, args, options, config)) in enumerate(parts.items()):
        network = nnx.eval_shape(
            lambda kind=kind, args=args, options=options: kind(*args, **options, rngs=nnx.Rngs(0))
        )
        (folder / name).mkdir(parents=True)
        file = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file(_tensors(network, i), folder / name / f"{file}.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(_SCHEDULER))
    (folder / "tokenizer").mkdir()
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ids))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return folder
