"""Stable Diffusion's U-Net beside PyTorch's, with the same random weights: errors and seconds.

    python -m benchmarks.stable_diffusion           # a mid-size U-Net, timed in turns
    python -m benchmarks.stable_diffusion --full    # all of Stable Diffusion 1.5, 860M parameters

It needs `pip install -e '.[dev,parity]'`. Each library runs in its own process. The measures of a
guided run are 20 steps of DDIM with a guidance scale of 7.5 in float32.
"""

import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import tyro

from experiments.results import write_record

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Settings:
    full: bool = False
    """the sizes of Stable Diffusion 1.5, instead of a mid-size U-Net"""
    repeats: int = 7
    """rounds of the timings"""
    folder: pathlib.Path = pathlib.Path("runs/stable_diffusion_benchmark")
    """for the weights (3.4 GB if full) and the arrays that the processes exchange"""
    worker: str = ""
    """internal: the library that this process runs"""


@dataclasses.dataclass(frozen=True)
class Size:
    widths: tuple[int, ...]
    latent: int
    """of the forward pass"""
    guided: int
    """latent of the guided run"""


MIDDLE = Size((128, 256, 512, 512), 32, 32)
FULL = Size((320, 640, 1280, 1280), 64, 32)
STEPS, SCALE, INDEX = 20, 7.5, 801
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def inputs(size: Size) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "x": (1, size.latent, size.latent, 4),
        "x1": (1, size.guided, size.guided, 4),
        "texts": (2, 77, 768),
    }
    return {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}


def in_torch(settings: Settings, size: Size):
    """Builds the U-Net, writes its weights, and yields what can be run."""
    import torch

    sys.modules["torchvision"] = None  # that of PyPI need not fit the torch of the CPU
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        block_out_channels=size.widths, cross_attention_dim=768, attention_head_dim=8
    ).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape)
            norm = "norm" in name and name.endswith("weight")
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1 * noise + norm)
    net.save_pretrained(settings.folder / "unet", safe_serialization=True)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.save_pretrained(settings.folder / "scheduler")
    arrays = inputs(size)
    x, x1 = (torch.from_numpy(np.moveaxis(arrays[k], -1, 1).copy()) for k in ("x", "x1"))
    texts = torch.from_numpy(arrays["texts"])

    @torch.no_grad()
    def forward():
        out = net(x, torch.tensor(INDEX), texts[:1]).sample
        return np.moveaxis(out.numpy(), 1, -1)

    @torch.no_grad()
    def guided():
        scheduler.set_timesteps(STEPS)
        z = x1
        for t in scheduler.timesteps:
            u, c = net(torch.cat([z, z]), t, texts).sample.chunk(2)
            z = scheduler.step(u + SCALE * (c - u), t, z).prev_sample
        return np.moveaxis(z.numpy(), 1, -1)

    return {"forward": forward, "guided": guided}


def in_jax(settings: Settings, size: Size):
    """Reads the U-Net that torch wrote, and yields what can be run."""
    import jax
    import jax.numpy as jnp

    import diffjax as dj
    from diffjax.networks.stable_diffusion import read_scheduler
    from diffjax.networks.stable_diffusion.folder import read_unet

    before = memory()
    net = jax.block_until_ready(read_unet(settings.folder / "unet"))
    file = (settings.folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    print(json.dumps({"loading": (memory() - before) / file, "file": file}), flush=True)
    scheduler = read_scheduler(settings.folder)
    arrays = {name: jnp.asarray(value) for name, value in inputs(size).items()}
    uncond, cond = arrays["texts"]
    ts = scheduler.ddim_times(STEPS)

    @jax.jit
    def run(net, x1, cond, uncond):
        def denoiser(text):
            network = dj.bind(net, cond=text)
            return dj.as_denoiser(network, scheduler.schedule, scheduler.parametrization)

        sampler = dj.ddim(dj.cfg(denoiser(cond), denoiser(uncond), SCALE), scheduler.schedule)
        return dj.sample(jax.random.key(0), sampler, x1, ts)

    forward = jax.jit(lambda net, x, text: net(x, float(INDEX), text))
    return {
        "forward": lambda: np.asarray(forward(net, arrays["x"], uncond)),
        "guided": lambda: np.asarray(run(net, arrays["x1"], cond, uncond)),
    }


def memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(settings: Settings) -> None:
    """A worker: it runs what it reads from its standard input, and prints the seconds."""
    size = FULL if settings.full else MIDDLE
    programs = (in_torch if settings.worker == "torch" else in_jax)(settings, size)
    print(json.dumps({"ready": memory()}), flush=True)
    for line in sys.stdin:
        name = line.strip()
        begin = time.perf_counter()
        out = programs[name]()
        seconds = time.perf_counter() - begin
        np.save(settings.folder / f"{settings.worker}_{name}.npy", out)
        print(json.dumps({"seconds": seconds, "peak": memory()}), flush=True)


class Worker:
    """A process of one library."""

    def __init__(self, name: str, settings: Settings):
        command = [sys.executable, "-m", "benchmarks.stable_diffusion", "--worker", name]
        command += ["--folder", str(settings.folder)] + ["--full"] * settings.full
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.facts = {}
        while "ready" not in self.facts:
            self.facts |= self.read()

    def read(self) -> dict:
        """The next line that the process prints."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; its error is above")
        return json.loads(line)

    def run(self, name: str) -> dict:
        """Runs a program of the process; returns its seconds and memory."""
        print(name, file=self.process.stdin, flush=True)
        return self.read()

    def end(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def main(settings: Settings) -> None:
    if settings.worker:
        work(settings)
        return
    begin = time.perf_counter()
    settings.folder.mkdir(parents=True, exist_ok=True)
    scores: dict = {}
    torch = Worker("torch", settings)
    if settings.full:  # one after the other: both would fill the memory
        theirs = {name: torch.run(name) for name in ("forward", "guided")}
        torch.end()
        jax = Worker("jax", settings)
        first = {name: jax.run(name) for name in ("forward", "guided")}
        again = {"forward": jax.run("forward"), "guided": jax.run("guided")}
        for name in ("forward", "guided"):
            scores[name] = {
                "torch": theirs[name]["seconds"],
                "jax": again[name]["seconds"],
                "ratio": again[name]["seconds"] / theirs[name]["seconds"],
                "first call": first[name]["seconds"],
            }
    else:
        jax = Worker("jax", settings)
        for name in ("forward", "guided"):
            first = jax.run(name)["seconds"]
            torch.run(name)
            rounds = [(jax.run(name), torch.run(name)) for _ in range(settings.repeats)]
            ours, theirs = ([r[i]["seconds"] for r in rounds] for i in (0, 1))
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            scores[name] = {
                "torch": statistics.median(theirs),
                "jax": statistics.median(ours),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "first call": first,
            }
        torch.end()
    jax.end()
    for name, row in scores.items():
        ours, theirs = (np.load(settings.folder / f"{lib}_{name}.npy") for lib in ("jax", "torch"))
        row["relative error"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    scores["memory of loading over the file's size"] = jax.facts["loading"]
    scores["size of the file"] = jax.facts["file"]
    path = HERE / "results" / f"stable_diffusion{'_full' if settings.full else ''}.json"
    seconds = time.perf_counter() - begin
    write_record(path, settings, scores, seconds, ["torch", "diffusers", "transformers"])
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings))
