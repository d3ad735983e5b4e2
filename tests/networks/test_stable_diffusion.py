"""Stable Diffusion's networks and files without PyTorch: what is refused, transforms, LoRA, and the
command. The numbers are compared with torch's in tests/parity.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stable_diffusion_folder as small
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

import diffjax as dj
from diffjax.networks import controlled, guess_weights, stable_diffusion
from diffjax.networks.stable_diffusion import (
    ControlNet,
    UNet,
    UNetConfig,
    merge_lora,
    read_controlnet,
    read_model,
    read_scheduler,
    read_tokenizer,
)
from experiments import stable_diffusion as command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with jax.enable_x64(False):
        return small.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    with jax.enable_x64(False):
        return read_model(folder)


@pytest.fixture(autouse=True)
def _as_a_user_runs():
    with jax.enable_x64(False):
        yield


CALL = jax.jit(UNet.__call__)


def edit(path, change):
    """Changes a JSON file or the tensors of a file, and gives what was there to put it back."""
    before = path.read_bytes()
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(before))))
    else:
        save_file(change(load_file(path)), path)
    return before


@pytest.fixture
def edited(folder):
    """`edited(name, change)` changes a file of the folder until the test ends."""
    old = {}

    def change(name, function):
        before = edit(folder / name, function)
        old.setdefault(folder / name, before)

    yield change
    for path, content in old.items():
        path.write_bytes(content)


SCHEDULER = "scheduler/scheduler_config.json"
UNET = "unet/diffusion_pytorch_model.safetensors"


def test_every_faulty_tensor_is_listed(folder, edited):
    def faulty(tensors):
        tensors.pop("conv_in.bias")
        tensors["conv_out.bias"] = np.zeros(5, "f4")
        return tensors | {"more.weight": np.zeros(2, "f4")}

    edited(UNET, faulty)
    with pytest.raises(ValueError, match=r"model.safetensors: load_tensors: .* UNet:") as error:
        read_model(folder)
    assert str(error.value).splitlines()[1:] == [
        "  conv_in.bias: expected (8,), got none",
        "  conv_out.bias: expected (4,), got (5,)",
        "  more.weight: expected none, got (2,)",
    ]


def test_a_truncated_and_a_missing_file_are_named(folder):
    path = folder / UNET
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-8])
        with pytest.raises(ValueError, match=r"path: expected a file of safetensors .*cannot be"):
            read_model(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"expected the weights, such as .* in .*unet"):
            read_model(folder)
    finally:
        path.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"expected .*config.json"):
        read_model(folder / "unet")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet/config.json", {"sampl_size": 3, "act_fn": "gelu"}, "sampl_size: unknown"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn: expected 'silu', got 'gelu'"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"] * 2}, "up_block_types: expected the"),
        (
            "unet/config.json",
            {"down_block_types": ["AttnDownBlock2D"] * 2},
            "block_types: expected",
        ),
        ("unet/config.json", {"attention_head_dim": 3}, r"widths\[0\]: expected a multiple of 3"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor: expected None, got 0.1"),
        ("vae/config.json", {"up_block_types": ["UpBlock"]}, "up_block_types: expected only"),
        ("text_encoder/config.json", {"model_type": "bert"}, "expected a clip_text_model"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "activation: expected one of"),
        ("controlnet/config.json", {"global_pool_conditions": True}, "global_pool_conditions: exp"),
        (
            "scheduler/scheduler_config.json",
            {"beta_strat": 1},
            "expected known keys, got beta_strat",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "expected a scheduler of a chain of betas, .* got FlowMatchEuler",
        ),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample: .*clip_x0"),
        (
            "scheduler/scheduler_config.json",
            {"use_karras_sigmas": True},
            "use_karras.*grids.karras",
        ),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": "x"},
            "beta_schedule: expected linear",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type: expect"),
    ],
)
def test_what_is_not_supported_is_named(folder, edited, name, change, message):
    edited(name, lambda config: config | change)
    with pytest.raises(ValueError, match=message):
        (read_controlnet if "controlnet" in name else read_model)(
            folder / "controlnet" if "controlnet" in name else folder
        )


def test_the_dtype_of_the_weights(model, folder):
    half = read_model(folder, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.unet)} == {jnp.dtype("bfloat16")}
    x, text = jnp.ones((8, 8, 4)), jnp.ones((3, 8))
    whole, out = (CALL(unet, x, 10.0, text) for unet in (model.unet, half.unet))
    assert out.dtype == x.dtype
    program = str(jax.make_jaxpr(half.unet)(x, 10.0, text))
    convolutions = [line for line in program.splitlines() if "= conv_general_dilated" in line]
    assert convolutions and all(":bf16[" in line for line in convolutions)
    np.testing.assert_allclose(out, whole, atol=0.05 * float(abs(whole).max()))


def test_a_batch_is_the_mapped_sample(model):
    rng = np.random.default_rng(0)
    xs, texts = jnp.asarray(rng.normal(size=(3, 8, 8, 4))), jnp.asarray(rng.normal(size=(3, 5, 8)))
    ts = jnp.arange(3.0)
    for axes, arguments in (
        ((0, None, None), (xs, 7.0, texts[0])),
        ((0, 0, 0), (xs, ts, texts)),
    ):
        mapped = jax.jit(jax.vmap(UNet.__call__, (None, *axes)))(model.unet, *arguments)
        np.testing.assert_allclose(CALL(model.unet, *arguments), mapped, rtol=1e-4, atol=1e-5)


def test_a_guided_call_costs_less_than_two():
    """What comes before the first attention to the text is computed once."""
    with jax.enable_x64(False):
        config = UNetConfig(
            widths=(16, 32), attention=(True, False), heads=(2, 2), context=8, groups=4
        )
        unet = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
        x, text = jnp.ones((16, 16, 4)), jnp.ones((5, 8))

        def network(unet, text):
            return dj.as_denoiser(dj.bind(unet, cond=text), dj.linear(), dj.VELOCITY)

        def guided(unet, x, a, b):
            return dj.cfg(network(unet, a), network(unet, b), 3.0)(x, 0.5)

        def operations(function, *args):
            return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

        once = operations(lambda unet, x, a: network(unet, a)(x, 0.5), unet, x, text)
        assert operations(guided, unet, x, text, 2 * text) < 1.95 * once


def test_gradients_by_the_embedding_are_finite_differences(model):
    with jax.enable_x64():
        model = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model)
        schedule = dj.linear_vp()
        rng = np.random.default_rng(0)
        x, text, direction = (jnp.asarray(rng.normal(size=s)) for s in ((8, 8, 4), (3, 8), (3, 8)))

        @jax.jit
        @jax.value_and_grad
        def brightness(text):
            denoise = model._replace(schedule=schedule).denoiser(text)
            x0 = dj.sample(jax.random.key(0), dj.ddim(denoise, schedule), x, dj.uniform(1, 0.9))
            return model.vae.decode(x0).mean()

        h = 1e-5
        _, gradient = brightness(text)
        values = [brightness(text + step * direction)[0] for step in (h, -h)]
        slope = jnp.vdot(gradient, direction)
        np.testing.assert_allclose(slope, (values[0] - values[1]) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "text", "message"),
    [
        ((9, 8, 4), (3, 8), "x: expected shape .*multiples of 2, got"),
        ((8, 8, 3), (3, 8), r"x: expected shape \(\.\.\., height, width, 4\)"),
        ((8, 8, 4), (3, 7), r"cond: expected the embedding of a text, \(tokens, 8\)"),
        ((2, 8, 8, 4), (3, 3, 8), r"cond: expected .* leading axes \(2,\), got \(3, 3, 8\)"),
    ],
)
def test_inputs_of_another_shape(model, x, text, message):
    with pytest.raises(ValueError, match=message):
        model.unet(jnp.ones(x), 0.5, jnp.ones(text))


def test_a_text_is_needed_and_images_and_tokens_are_checked(model):
    with pytest.raises(ValueError, match=r"cond: expected the embedding of a text.*got None"):
        model.unet(jnp.ones((8, 8, 4)), 0.5)
    with pytest.raises(ValueError, match=r"images: expected shape .*multiples of 8, got"):
        model.vae.encode(jnp.ones((12, 8, 3)))
    with pytest.raises(ValueError, match=r"latents: expected shape \(\.\.\., height, width, 4\)"):
        model.vae.decode(jnp.ones((8, 8, 3)))
    with pytest.raises(ValueError, match="tokens: expected numbers of the vocabulary, got"):
        model.text(np.array([1, len(small.VOCABULARY)]))
    with pytest.raises(ValueError, match="tokens: expected at most 77, got 78"):
        model.text(np.zeros(78, int))
    with pytest.raises(ValueError, match="tokens: expected integers"):
        model.text(np.zeros(7))


def test_a_new_control_is_the_base_and_a_hint_of_another_size_or_range_is_refused(model):
    control = ControlNet.of(model.unet, rngs=nnx.Rngs(1))
    x, text, hint = jnp.ones((8, 8, 4)), jnp.ones((3, 8)), jnp.ones((64, 64, 3))
    network = controlled(model.unet, [(control, hint, 1.0)])
    call = jax.jit(lambda network, x, text: network(x, 5.0, text))
    np.testing.assert_array_equal(call(network, x, text), call(model.unet, x, text))
    assert guess_weights(control).shape == (len(control.stored_out) + 1,)
    kernel = model.unet.conv_in.kernel
    assert control.conv_in.kernel is not kernel
    np.testing.assert_array_equal(control.conv_in.kernel[...], kernel[...])
    with pytest.raises(ValueError, match=r"hint: expected shape \(64, 64, 3\), 8 pixels for each"):
        control(x, 5.0, hint[:32], text)
    with pytest.raises(
        ValueError, match=r"hint: expected values in \[0, 1\], .* -0.5 to -0.5; .*\(hint \+ 1\) / 2"
    ):
        control(x, 5.0, -0.5 * hint, text)


def test_the_grids_of_the_published_scheduler(folder, edited):
    """The published indices, as the torch library computes them."""
    scheduler = read_scheduler(folder)

    def indices(ts):
        return np.round(1000 * np.asarray(ts)).astype(int) - 1

    np.testing.assert_array_equal(indices(scheduler.ddim_times(20)), [*range(951, 0, -50), 0])
    linspace = np.round(999 - np.arange(20) * 999 / 20).astype(int)
    np.testing.assert_array_equal(indices(scheduler.dpm_solver_times(20)), [*linspace, -1])
    edited(SCHEDULER, lambda config: config | {"timestep_spacing": "leading"})
    leading = read_scheduler(folder).dpm_solver_times(20)
    np.testing.assert_array_equal(indices(leading), [*range(941, 47, -47), -1])
    edited(SCHEDULER, lambda config: config | {"timestep_spacing": "linspace"})
    ends = indices(read_scheduler(folder).ddim_times(4))  # at index 0, which is not repeated
    np.testing.assert_array_equal(ends, [999, 666, 333, 0])
    with pytest.raises(ValueError, match=r"steps: expected a number in \[1, 999\], got 0"):
        scheduler.ddim_times(0)
    with pytest.raises(FileNotFoundError, match=r"expected scheduler_config.json in"):
        read_scheduler(folder / "unet")


LAYOUTS = {
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "_"),
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "."),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "."),
    "layers": ("unet.{}.lora_linear_layer.down.weight", "unet.{}.lora_linear_layer.up.weight", "."),
    "alone": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", "."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_file_is_merged(model, tmp_path, layout):
    """W' = W + scale alpha / rank up down, in numpy."""
    down_name, up_name, join = LAYOUTS[layout]
    linear = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0".replace(".", join)
    conv = "down_blocks.0.resnets.0.conv1".replace(".", join)
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(2, 8)).astype("f4"), rng.normal(size=(8, 2)).astype("f4")
    conv_down = rng.normal(size=(3, 8, 3, 3)).astype("f4")
    conv_up = rng.normal(size=(8, 3, 1, 1)).astype("f4")
    tensors = {
        down_name.format(linear): down,
        up_name.format(linear): up,
        down_name.format(conv): conv_down,
        up_name.format(conv): conv_up,
    }
    factor = 1.0
    if layout == "kohya":
        tensors[f"lora_unet_{linear}.alpha"], factor = np.array(1.0, "f4"), 0.5
        name = "encoder.layers.0.mlp.fc1".replace(".", "_")
        tensors[f"lora_te_text_model_{name}.lora_down.weight"] = down
        tensors[f"lora_te_text_model_{name}.lora_up.weight"] = rng.normal(size=(16, 2)).astype("f4")
    save_file(tensors, tmp_path / "lora.safetensors")
    merged = merge_lora(model, tmp_path / "lora.safetensors", 0.7)

    def change(get):
        old, new = (np.asarray(get(m.unet).kernel[...], float) for m in (model, merged))
        return new - old

    def attention(unet):
        return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_out[0]

    np.testing.assert_allclose(change(attention), 0.7 * factor * (up @ down).T, atol=1e-6)
    expected = np.einsum("or,rihw->hwio", conv_up[..., 0, 0], conv_down)
    np.testing.assert_allclose(
        change(lambda unet: unet.down_blocks[0].resnets[0].conv1), 0.7 * expected, atol=1e-6
    )
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(model.unet), jax.tree.leaves(merged.unet), strict=True)
    ]
    assert sum(changed) == 2
    same_text = jax.tree.all(jax.tree.map(np.array_equal, model.text, merged.text))
    assert same_text == (layout != "kohya")


def test_what_does_not_fit_in_a_lora_file_is_listed(model, tmp_path):
    ones = np.ones((2, 8), "f4")
    tensors = {
        "unet.conv_in.lora_A.weight": ones,
        "unet.conv_in.lora_B.weight": ones.T.copy(),
        "unet.nowhere.lora_A.weight": ones,
        "unet.nowhere.lora_B.weight": ones.T.copy(),
        "unet.conv_out.lora_A.weight": ones,
        "other": ones,
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors: it does not fit the model:") as error:
        merge_lora(model, tmp_path / "lora.safetensors")
    text = str(error.value)
    for part in (
        "unet.conv_in: expected a change of shape (3, 3, 4, 8)",
        "unet.nowhere: no such layer",
        "unet.conv_out.lora_A.weight: not understood",
        "other: not understood",
    ):
        assert part in text, part


def test_an_alpha_in_the_metadata_that_is_not_the_rank_is_refused(model, tmp_path):
    tensors = {
        "unet.conv_in.lora_A.weight": np.ones((1, 4, 3, 3), "f4"),
        "unet.conv_in.lora_B.weight": np.ones((8, 1, 1, 1), "f4"),
    }
    for alpha in (1, 8):
        facts = json.dumps({"unet.r": 1, "unet.lora_alpha": alpha, "unet.rank_pattern": {}})
        save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": facts})
        if alpha == 1:
            merge_lora(model, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"alpha that is the rank.*unet.lora_alpha = 8"):
        merge_lora(model, tmp_path / "lora.safetensors")


def test_images_that_are_no_floats_from_minus_one_to_one_are_refused(model):
    with pytest.raises(ValueError, match="images"):
        model.vae.encode(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images: expected values in \[-1, 1\], .*127.5 - 1"):
        model.vae.encode(np.full((8, 8, 3), 255.0, "f4"))


def test_tokens_of_both_kinds_of_files(folder, tmp_path):
    tokens = read_tokenizer(folder)
    ids = {word: i for i, word in enumerate(small.VOCABULARY)}
    start, end = ids["<|startoftext|>"], ids["<|endoftext|>"]
    words = [ids["cat</w>"], ids["a</w>"], ids["t</w>"]]
    expected = [start, *words, *[end] * 73]
    np.testing.assert_array_equal(tokens(" CAT a  t"), expected)
    np.testing.assert_array_equal(tokens([]), np.zeros((0, 77)))
    assert tokens(["a", ""]).shape == (2, 77) and tokens("a").dtype == np.int32
    tokens._words.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(read_tokenizer(tmp_path)(" CAT a  t"), expected)
    with pytest.raises(ValueError, match=r"at most 75 tokens, got 76; .* '[ a]+' would fit"):
        tokens("a " * 76)
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json, or vocab.json and"):
        read_tokenizer(folder / "unet")
    (tmp_path / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "a"}}')
    assert read_tokenizer(tmp_path)("cat")[-1] == ids["a"]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        read_tokenizer(tmp_path)


def test_the_command_draws_an_image(folder, tmp_path):
    """With a control, a LoRA file, an image to begin with, and a mask."""
    rng = np.random.default_rng(0)
    for name, mode in (("control", "RGB"), ("image", "RGB"), ("mask", "L")):
        shape = (64, 64, 3) if mode == "RGB" else (64, 64)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode).save(tmp_path / f"{name}.png")
    lora = {
        "unet.conv_in.lora_A.weight": np.ones((1, 4, 3, 3), "f4"),
        "unet.conv_in.lora_B.weight": np.ones((8, 1, 1, 1), "f4"),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    files = {name: tmp_path / f"{name}.png" for name in ("control", "image", "mask")}
    settings = command.Settings(
        model=folder,
        prompt="a cat",
        out=tmp_path / "out.png",
        height=64,
        width=64,
        steps=2,
        control_net=folder / "controlnet",
        lora=tmp_path / "lora.safetensors",
        **files,
    )
    image = command.main(settings)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), image)
    assert image.shape == (64, 64, 3) and image.std() > 0
    assert json.loads((tmp_path / "out.json").read_text())["settings"]["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height, width: expected multiples of 64, got 100 and 512"),
        ({"mask": "a.png"}, "mask: expected an image, too"),
        ({"control": "a.png"}, "control-net, control: expected both or none"),
        ({"strength": 0.0}, "strength: expected a time in"),
    ],
)
def test_settings_of_the_command_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=re.escape(message) if "(" in message else message):
        command.check(command.Settings(model="m", prompt="p", **options))


def test_an_image_of_another_size_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    settings = command.Settings(model=tmp_path, prompt="p")
    with pytest.raises(
        ValueError, match=r"a.png: expected the size of the output, 512x512, got 8x8"
    ):
        command.read_image(tmp_path / "a.png", settings)


def test_the_tokenizer_needs_its_package(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[stable-diffusion\]'"):
        stable_diffusion.read_tokenizer(folder)
