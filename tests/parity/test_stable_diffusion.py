"""Parity of Stable Diffusion with diffusers and transformers: a small model with random weights, in
the layout that today's versions save and in the published one.
"""

import gzip
import importlib.util
import json
import pathlib
import random
import shutil
import string
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffjax as dj
from diffjax.networks import controlled, guess_weights, stable_diffusion
from diffjax.networks.stable_diffusion.folder import read_text, read_vae

# These import torchvision where they find it, which need not fit the torch of the CPU.
sys.modules["torchvision"] = None
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

del sys.modules["torchvision"]

# One thread each: two libraries' threads on two cores wait for each other.
torch.set_num_threads(1)
# diffusers on numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a photo of a cat", ""]
SIZE = 16  # of a latent


@pytest.fixture(autouse=True)
def _as_a_user_runs():
    with jax.enable_x64(False):
        yield


def randomized(model, seed):
    """Weights and biases that no mistake of epsilon, order or sign would leave unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def vocabulary(folder):
    """CLIP's own vocabulary, from the wheel of open_clip_torch, as two files."""
    package = pathlib.Path(importlib.util.find_spec("open_clip").origin).parent
    lines = gzip.decompress((package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = lines.split("\n")[1:48895]
    # the printable bytes, and then letters from 256 on for the 68 others
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 324))]
    words = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder that today's versions save, and the same in the published layout."""
    base = tmp_path_factory.mktemp("models")
    saved, published = base / "saved", base / "published"
    vocabulary(base / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", model_max_length=77)
    widths = (16, 32, 32, 32)
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        cross_attention_dim=32,
        attention_head_dim=4,
        block_out_channels=widths,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=8 * SIZE,
    )
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=randomized(vae, 1),
        text_encoder=randomized(CLIPTextModel(config), 2),
        tokenizer=tokenizer,
        unet=randomized(unet, 0),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(saved)
    randomized(ControlNetModel.from_unet(unet), 3).save_pretrained(saved / "controlnet")
    path = saved / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))

    shutil.copytree(saved, published)
    shutil.rmtree(published / "tokenizer")
    shutil.copytree(base / "tokenizer", published / "tokenizer")
    path = published / "text_encoder" / "model.safetensors"
    tensors = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in load_file(path).items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    path = published / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    save_file(tensors, path)
    path = published / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config.pop("timestep_spacing")  # a key that came later
    path.write_text(json.dumps(config))
    path = published / "vae" / "config.json"
    kept = ("_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels",
            "latent_channels", "layers_per_block", "norm_num_groups", "out_channels",
            "sample_size", "up_block_types")  # fmt: skip
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k in kept})
    )
    return {"saved": saved, "published": published}


@pytest.fixture(scope="module")
def folder(folders):
    return folders["saved"]


@pytest.fixture(scope="module")
def models(folder):
    """The torch pipeline and ours."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with jax.enable_x64(False):
        return pipe, stable_diffusion.read_model(folder)


def test_the_published_layout_holds_the_same_model(models, folders):
    """All the other tests read the folder that today's versions save."""
    _, model = models
    saved, published = folders["saved"], folders["published"]
    weights = "unet/diffusion_pytorch_model.safetensors"  # both layouts have one of the U-Net
    assert (saved / weights).read_bytes() == (published / weights).read_bytes()
    for ours, theirs in (
        (model.text, read_text(published / "text_encoder")),
        (model.vae, read_vae(published / "vae")),
    ):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_array_equal(a, b)
    names = [
        {path.name for path in (folder / "tokenizer").iterdir()} for folder in folders.values()
    ]
    assert "tokenizer.json" in names[0] and "merges.txt" not in names[0]
    assert "tokenizer.json" not in names[1] and "merges.txt" in names[1]


def relative(ours, theirs):
    theirs = np.asarray(theirs.detach() if isinstance(theirs, torch.Tensor) else theirs)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def channels_last(tensor):
    return (
        np.moveaxis(tensor.detach().numpy(), 1, -1) if tensor.ndim == 4 else tensor.detach().numpy()
    )


def as_torch(x):
    return torch.from_numpy(np.moveaxis(np.array(x), -1, -3).copy())


def draws(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def at(network, name):
    for part in name.split("."):
        network = network[int(part)] if part.isdigit() else getattr(network, part)
    return network


BLOCKS = {"ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D", "Attention"}


def compared_blocks(theirs, ours, run):
    """Runs the torch model, and each of our blocks on the inputs that its counterpart got."""
    seen, hooks = {}, []
    for name, module in theirs.named_modules():
        if type(module).__name__ in BLOCKS:

            def hook(module, args, kwargs, out, name=name):
                seen[name] = (module, args, kwargs, out)

            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    errors = {}
    for name, (module, args, kwargs, out) in seen.items():
        kind, block = type(module).__name__, at(ours, name)
        x = args[0] if args else kwargs["hidden_states"]
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        inputs = [jnp.asarray(channels_last(x))]
        if kind == "ResnetBlock2D" and len(args) > 1 and args[1] is not None:
            inputs.append(jnp.asarray(args[1].numpy()))
        context = kwargs.get("encoder_hidden_states")
        if context is not None:
            inputs.append(jnp.asarray(context.numpy()))
        value = jax.jit(type(block).__call__)(block, *inputs)
        errors[name] = relative(value, channels_last(out))
    return errors


def test_every_block_of_the_unet(models):
    pipe, model = models
    x, text = draws(0, 2, SIZE, SIZE, 4), draws(1, 2, 77, 32)

    def run():
        return pipe.unet(as_torch(x), torch.tensor(801), torch.from_numpy(np.array(text))).sample

    errors = compared_blocks(pipe.unet, model.unet, run)
    assert len(errors) > 60 and max(errors.values()) < 1e-4, errors
    with torch.no_grad():
        expected = channels_last(run())
    assert relative(jax.jit(type(model.unet).__call__)(model.unet, x, 801.0, text), expected) < 1e-4


def test_every_block_of_the_autoencoder(models):
    pipe, model = models
    images, latents = draws(0, 1, 8 * SIZE, 8 * SIZE, 3), draws(1, 1, SIZE, SIZE, 4)

    def run():
        posterior = pipe.vae.encode(as_torch(images)).latent_dist
        return posterior.mean, posterior.std, pipe.vae.decode(as_torch(latents)).sample

    errors = compared_blocks(pipe.vae, model.vae, run)
    assert len(errors) > 20 and max(errors.values()) < 1e-4, errors
    with torch.no_grad():
        mean, std, decoded = map(channels_last, run())
    ours = jax.jit(type(model.vae).encode)(model.vae, images)
    assert relative(ours[0], 0.18215 * mean) < 1e-4 and relative(ours[1], 0.18215 * std) < 1e-4
    ours = jax.jit(type(model.vae).decode)(model.vae, 0.18215 * latents)
    assert relative(ours, decoded) < 1e-4


def test_the_text_encoder(models):
    pipe, model = models
    tokens = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(tokens).last_hidden_state
    assert relative(model.text(tokens.numpy()), expected) < 1e-4


def test_the_control(folder):
    theirs = ControlNetModel.from_pretrained(folder / "controlnet")
    ours = stable_diffusion.read_controlnet(folder / "controlnet")
    x, text, hint = (
        draws(0, 2, SIZE, SIZE, 4),
        draws(1, 2, 77, 32),
        jnp.abs(draws(2, 8 * SIZE, 8 * SIZE, 3)) % 1,
    )
    args = (
        as_torch(x),
        torch.tensor(801),
        torch.from_numpy(np.array(text)),
        as_torch(hint[None].repeat(2, 0)),
    )
    for guess in (False, True):
        with torch.no_grad():
            down, middle = theirs(*args, guess_mode=guess, return_dict=False)
        residuals = ours(x, 801.0, hint, text)
        weights = guess_weights(ours) if guess else np.ones(13)
        for a, b, w in zip(
            (*residuals.stored, residuals.middle), (*down, middle), weights, strict=True
        ):
            assert relative(w * a, channels_last(b)) < 1e-4


def latents_of(pipe, x1, **options):
    call = dict(
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1],
        latents=as_torch(x1[None]),
        num_inference_steps=20,
        guidance_scale=7.5,
        height=8 * SIZE,
        width=8 * SIZE,
        output_type="latent",
    )
    pipe.set_progress_bar_config(disable=True)
    return channels_last(pipe(**call | options).images)[0]


SOLVERS = {
    "ddim": (DDIMScheduler, dj.ddim, "ddim_times"),
    "dpm_solver_2m": (DPMSolverMultistepScheduler, dj.dpm_solver_2m, "dpm_solver_times"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_twenty_guided_steps(models, folder, name):
    pipe, model = models
    kind, sampler, times = SOLVERS[name]
    pipe.scheduler = kind.from_config(PNDMScheduler.from_pretrained(folder / "scheduler").config)
    scheduler = stable_diffusion.read_scheduler(folder)
    tokenizer = stable_diffusion.read_tokenizer(folder)
    asked, unwanted = model.text(tokenizer(PROMPTS))
    denoise = dj.cfg(model.denoiser(asked), model.denoiser(unwanted), 7.5)
    x1 = draws(3, SIZE, SIZE, 4)
    ts = getattr(scheduler, times)(20)
    x0 = dj.sample(jax.random.key(0), sampler(denoise, model.schedule), x1, ts)
    assert relative(x0, latents_of(pipe, x1)) < 1e-3
    image = channels_last(pipe.vae.decode(as_torch(x0[None]) / 0.18215).sample)[0]
    assert relative(jax.jit(type(model.vae).decode)(model.vae, x0), image) < 1e-3


def test_twenty_guided_steps_with_a_control(models, folder):
    pipe, model = models
    net = ControlNetModel.from_pretrained(folder / "controlnet")
    parts = {name: part for name, part in pipe.components.items()}
    parts |= {"scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"), "controlnet": net}
    steered = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    x1, hint = draws(3, SIZE, SIZE, 4), jnp.abs(draws(2, 8 * SIZE, 8 * SIZE, 3)) % 1
    expected = latents_of(
        steered, x1, image=as_torch(hint[None]), controlnet_conditioning_scale=0.7
    )
    scheduler = stable_diffusion.read_scheduler(folder)
    control = stable_diffusion.read_controlnet(folder / "controlnet")
    network = controlled(model.unet, [(control, hint, 0.7)])
    tokenizer = stable_diffusion.read_tokenizer(folder)
    denoisers = [model.denoiser(text, network) for text in model.text(tokenizer(PROMPTS))]
    sampler = dj.ddim(dj.cfg(*denoisers, 7.5), model.schedule)
    assert (
        relative(dj.sample(jax.random.key(0), sampler, x1, scheduler.ddim_times(20)), expected)
        < 1e-3
    )


@pytest.mark.parametrize("layout", ["saved", "published"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_grids_of_the_folders(folders, layout, name):
    """The published file does not name a spacing: each scheduler has its own default."""
    kind, _, times = SOLVERS[name]
    theirs = kind.from_config(PNDMScheduler.from_pretrained(folders[layout] / "scheduler").config)
    theirs.set_timesteps(20)
    ours = getattr(stable_diffusion.read_scheduler(folders[layout]), times)(20)
    indices = np.round(1000 * np.asarray(ours)) - 1
    np.testing.assert_array_equal(indices[:-1], theirs.timesteps.numpy())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_the_grids(tmp_path, spacing, steps):
    common = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for kind, times, options in (
        (DDIMScheduler, "ddim_times", {"clip_sample": False, "steps_offset": 1}),
        (DPMSolverMultistepScheduler, "dpm_solver_times", {"steps_offset": 1}),
    ):
        scheduler = kind(**common, **options, timestep_spacing=spacing)
        if kind is DDIMScheduler and spacing == "linspace":
            scheduler.register_to_config(steps_offset=0)
        scheduler.set_timesteps(steps)
        scheduler.save_pretrained(tmp_path)
        ours = stable_diffusion.read_scheduler(tmp_path)
        indices = np.round(1000 * np.asarray(getattr(ours, times)(steps))) - 1
        np.testing.assert_array_equal(indices, [*scheduler.timesteps.numpy(), -1])
        alphas = jax.vmap(ours.schedule)(jnp.arange(1, 1001) / 1000)[0]
        np.testing.assert_allclose(alphas**2, scheduler.alphas_cumprod, rtol=2e-5)


def test_a_chain_that_predicts_v_and_ends_at_zero(models, tmp_path):
    pipe, model = models
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.save_pretrained(tmp_path)
    pipe.scheduler = scheduler
    ours = stable_diffusion.read_scheduler(tmp_path)
    alphas = jax.vmap(ours.schedule)(jnp.arange(1, 1001) / 1000)[0]
    np.testing.assert_allclose(alphas**2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    model = model._replace(schedule=ours.schedule, parametrization=ours.parametrization)
    with torch.no_grad():
        texts = [
            pipe.text_encoder(
                pipe.tokenizer(p, padding="max_length", return_tensors="pt").input_ids
            )
            for p in PROMPTS
        ]
    denoisers = [model.denoiser(text.last_hidden_state[0].numpy()) for text in texts]
    sampler = dj.ddim(dj.cfg(*denoisers, 7.5), model.schedule)
    x1 = draws(3, SIZE, SIZE, 4)
    x0 = dj.sample(jax.random.key(0), sampler, x1, ours.ddim_times(20))
    assert relative(x0, latents_of(pipe, x1)) < 1e-3


def prompts(n):
    """Words, and strings of every kind of character."""
    rng = random.Random(0)
    words = "a photo of the cat in Paris, 1990's café naïve don't we'll 42 über 東京 🙂 <b>".split()
    alphabet = (
        string.printable
        + "äöüßéèñçøåÆŒ日本語中文한국어русскийالعربيةहिन्दी🙂🚀🎨\u00a0\u200b\u2028ǅﬁ²½"
    )
    for i in range(n):
        if i % 2:
            yield " ".join(rng.choice(words) for _ in range(rng.randint(0, 15)))
        else:
            yield "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 25)))


@pytest.mark.parametrize("layout", ["saved", "published"])
def test_the_tokenizer_on_5000_prompts(folders, layout):
    folder = folders[layout]
    theirs = CLIPTokenizer.from_pretrained(folders["saved"] / "tokenizer", model_max_length=77)
    ours = stable_diffusion.read_tokenizer(folder)
    for prompt in prompts(5000):
        expected = theirs(prompt, padding="max_length").input_ids
        if len(expected) == 77:
            np.testing.assert_array_equal(ours(prompt), expected, err_msg=repr(prompt))
    words = ours("a photo of a cat")
    np.testing.assert_array_equal(words[:7], [49406, 320, 1125, 539, 320, 2368, 49407])
    with pytest.raises(ValueError, match="texts: expected at most 75 tokens, got 80"):
        ours("cat " * 80)
