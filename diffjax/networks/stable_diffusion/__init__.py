"""Stable Diffusion 1.x and 2.x: networks in the layout of the published weights, and their files.

`read_model` reads a model folder from disk, and returns text encoder, U-Net, autoencoder, schedule
and parametrization as one pytree. The networks are those of this library: all samplers, guidance
and transforms take them. The guide is `docs/stable_diffusion.md`.
"""

from .clip import CLIPText
from .folder import StableDiffusion, read_controlnet, read_model
from .lora import merge_lora
from .scheduler import Scheduler, read_scheduler
from .tokenizer import read_tokenizer
from .unet import ControlNet, UNet, UNetConfig
from .vae import AutoencoderKL

__all__ = [
    "AutoencoderKL",
    "CLIPText",
    "ControlNet",
    "Scheduler",
    "StableDiffusion",
    "UNet",
    "UNetConfig",
    "merge_lora",
    "read_controlnet",
    "read_model",
    "read_scheduler",
    "read_tokenizer",
]
