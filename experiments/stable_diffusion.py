"""An image from a text, by a Stable Diffusion model in a folder on disk.

    python -m experiments.stable_diffusion --model DIR --prompt "a photo of a cat"
    # steered by edges, with a LoRA file
    python -m experiments.stable_diffusion --model DIR --prompt "a house" --control-net DIR \
        --control edges.png --lora FILE
    # another version of an image, or of the white part of a mask
    python -m experiments.stable_diffusion --model DIR --prompt "in winter" --image photo.png
    python -m experiments.stable_diffusion --model DIR --prompt "a hat" --image photo.png \
        --mask mask.png --strength 1

The folder is one of the torch library diffusers, with Stable Diffusion 1.x or 2.x. Nothing is
downloaded.
"""

import dataclasses
import pathlib
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

import diffjax as dj
from diffjax import samplers
from diffjax.networks import controlled, stable_diffusion
from experiments.results import write_record


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an image."""

    model: pathlib.Path
    """the model's folder"""
    prompt: str
    """what the image shows, at most 75 tokens"""
    negative_prompt: str = ""
    """what guidance leads away from"""
    out: pathlib.Path = pathlib.Path("runs/stable_diffusion/image.png")
    """the image; its settings go to a JSON file beside it"""
    height: int = 512
    """pixels, a multiple of 64"""
    width: int = 512
    """pixels, a multiple of 64"""
    steps: int = 20
    """steps of DPM-Solver++(2M), with two evaluations each"""
    guidance: float = 7.5
    """guidance scale; 1 is none"""
    control_net: pathlib.Path | None = None
    """the folder of a ControlNet"""
    control: pathlib.Path | None = None
    """its image, of the size of the output"""
    control_weight: float = 1.0
    """its weight"""
    lora: pathlib.Path | None = None
    """a LoRA file, which is merged into the model"""
    lora_scale: float = 1.0
    """its strength"""
    image: pathlib.Path | None = None
    """an image to begin with, of the size of the output"""
    strength: float = 0.8
    """the time, up to 1, at which `image` is noised and the sampling begins"""
    mask: pathlib.Path | None = None
    """what of `image` is drawn anew: the white part"""
    resamples: int = 5
    """how often each step is taken with a mask; more fit the new part better to the old one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the weights and the networks; the sampler computes in float32"""
    seed: int = 0
    """seed of the noise"""


def read_image(path: pathlib.Path, settings: Settings, mode: str = "RGB") -> np.ndarray:
    """An image (height, width, channels) in [0, 1], of the size of the output."""
    image = Image.open(path).convert(mode)
    if image.size != (settings.width, settings.height):
        raise ValueError(
            f"{path}: expected the size of the output, {settings.width}x{settings.height}, got "
            f"{image.width}x{image.height}; resize it, or set --width and --height"
        )
    return np.asarray(image, np.float32).reshape(settings.height, settings.width, -1) / 255


def check(settings: Settings) -> None:
    """Raises ValueError if settings do not fit together."""
    if settings.height % 64 or settings.width % 64:
        raise ValueError(
            f"height, width: expected multiples of 64, got {settings.height} and {settings.width}"
        )
    if (settings.control_net is None) != (settings.control is None):
        raise ValueError("control-net, control: expected both or none")
    if settings.mask is not None and settings.image is None:
        raise ValueError("mask: expected an image, too")
    if not 0 < settings.strength <= 1:
        raise ValueError(f"strength: expected a time in (0, 1], got {settings.strength}")


def main(settings: Settings) -> np.ndarray:
    check(settings)
    begin = time.perf_counter()
    model = stable_diffusion.read_model(settings.model, jnp.dtype(settings.dtype))
    if settings.lora is not None:
        model = stable_diffusion.merge_lora(model, settings.lora, settings.lora_scale)
    if model.unet.config.inputs != model.vae.latents:
        raise ValueError(
            f"model: expected a U-Net of {model.vae.latents} channels, got one of "
            f"{model.unet.config.inputs}, which also takes a mask and an image"
        )
    tokens = stable_diffusion.read_tokenizer(settings.model)
    network = model.unet
    if settings.control_net is not None and settings.control is not None:
        net = stable_diffusion.read_controlnet(settings.control_net, jnp.dtype(settings.dtype))
        hint = read_image(settings.control, settings)
        network = controlled(network, [(net, hint, settings.control_weight)])

    texts = jax.jit(type(model.text).__call__)(
        model.text, tokens([settings.prompt, settings.negative_prompt])
    )
    asked, unwanted = texts.astype(jnp.float32)
    denoise = dj.cfg(
        model.denoiser(asked, network), model.denoiser(unwanted, network), settings.guidance
    )
    start_key, noise_key, key = jax.random.split(jax.random.key(settings.seed), 3)
    encode, decode = jax.jit(type(model.vae).encode), jax.jit(type(model.vae).decode)
    shape = settings.height // 8, settings.width // 8, model.vae.latents

    start, known, noise = 1.0, jnp.zeros(shape), jax.random.normal(noise_key, shape)
    if settings.image is not None:
        mean, std = encode(model.vae, 2 * read_image(settings.image, settings) - 1)
        known = mean + std * jax.random.normal(start_key, mean.shape)
        start = settings.strength
    repeats = 1 if settings.mask is None else settings.resamples
    with tqdm(total=settings.steps * repeats, unit="step") as bar:
        watched = dj.bind(_watched, bar.update, denoise)
        sampler = dj.dpm_solver_2m(watched, model.schedule)
        if settings.mask is not None:
            pixels = read_image(settings.mask, settings, "L")
            kept = pixels[4::8, 4::8] < 0.5  # of the pixels in the middle of each latent
            sampler = samplers.repaint(sampler, model.schedule, known, kept, repeats)
        ts = dj.uniform_log_snr(model.schedule, settings.steps, start)
        x = dj.perturb(model.schedule, known, noise, start)
        x = jax.block_until_ready(dj.sample(key, sampler, x, ts))
    image = np.asarray(decode(model.vae, x))
    image = np.round(255 * np.clip(image / 2 + 0.5, 0, 1)).astype(np.uint8)

    settings.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(settings.out)
    seconds = time.perf_counter() - begin
    write_record(settings.out.with_suffix(".json"), settings, {}, seconds, ["tokenizers"])
    print(settings.out)
    return image


def _watched(tick, denoise, x, t):
    """The denoiser, with a tick at each call."""
    jax.debug.callback(lambda _: tick(), t)
    return denoise(x, t)


if __name__ == "__main__":
    main(tyro.cli(Settings))
