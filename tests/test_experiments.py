"""The experiments' own code: reading data, the errors on the way, and the arithmetic behind the
scores.
"""

import dataclasses
import datetime
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
import tyro
from flax import nnx
from jax.tree_util import Partial
from PIL import Image

import diffjax as dj
from diffjax import divergence, exact, likelihood, training
from diffjax.networks import MLP
from diffjax.parametrizations import as_denoiser, target
from experiments import couplings, small_models, toy2d, train_images
from experiments import objectives as objectives_study
from experiments.controlnet import controls as image_controls
from experiments.controlnet.__main__ import others_of_the_class, sudden
from experiments.controlnet.models import fold, unfold
from experiments.image_models import Images, digits, fashion_mnist, models, pixels, scores
from experiments.objectives import PATHS
from experiments.objectives import objectives as losses
from experiments.objectives.__main__ import begin_or_continue
from experiments.objectives.scores import log_density, settles
from experiments.objectives.tables import table as objectives_table
from experiments.results import Score, table, write_record, write_report


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + values.astype(np.uint8).tobytes()


@dataclasses.dataclass(frozen=True)
class Settings:
    out: pathlib.Path = pathlib.Path("runs/a")
    steps: int = 3


def test_a_record_is_strict_json_and_says_what_was_run_where_and_when(tmp_path):
    """JSON has no NaN and no infinity: RFC 8259, section 6."""
    scores = {"a": [1, np.float64("nan")], 2: (float("inf"), True, "NaN", None, 0.5)}
    write_record(tmp_path / "new" / "result.json", Settings(), scores, 1.5, ["numpy"])
    record = json.loads((tmp_path / "new" / "result.json").read_text(), parse_constant=pytest.fail)
    assert record["scores"] == {"a": [1, None], "2": [None, True, "NaN", None, 0.5]}
    assert record["settings"] == {"out": "runs/a", "steps": 3} and record["seconds"] == 1.5
    assert (
        record["versions"]["numpy"] == np.__version__
        and record["versions"]["jax"] == jax.__version__
    )
    assert (
        record["machine"]["device"] == jax.devices()[0].device_kind
        and record["machine"]["cores"] >= 1
    )
    assert datetime.date.fromisoformat(record["date"]) >= datetime.date(2026, 11, 27)


def test_a_report_explains_its_scores_and_shows_tables_and_figures(tmp_path):
    record = write_record(tmp_path / "result.json", Settings(), {}, 1.5)
    explained = {
        "NLL": Score("Minus the log density.", "nats", "lower"),
        "of data": Score("To compare with."),
    }
    tables = {"Scores": table(["score", "value"], [["NLL", 1.25]])}
    write_report(tmp_path, "Title", record, explained, tables, {"a.png": "A figure."})
    text = (tmp_path / "report.md").read_text()
    assert (
        "- **NLL** (nats): Minus the log density. Lower is better.\n- **of data**: To compare "
        "with.\n" in text
    )
    assert (
        "| score | value |\n| --- | --- |\n| NLL | 1.25 |" in text and "![A figure.](a.png)" in text
    )


VALUES = np.random.default_rng(0).integers(0, 256, (3, 4, 5))


def test_an_idx_file_is_read(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(VALUES), mtime=0))
    np.testing.assert_array_equal(fashion_mnist.read_idx(path, (3, 4, 5)), VALUES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(VALUES), mtime=0)[:-20], "truncated or damaged"),
        (b"not gzip at all", "truncated or damaged"),
        (
            gzip.compress(idx(VALUES)[:-1], mtime=0),
            r"does not hold unsigned bytes of shape \(3, 4, 5\)",
        ),
        (
            gzip.compress(idx(VALUES[:2]), mtime=0),
            r"does not hold unsigned bytes of shape \(3, 4, 5\)",
        ),
    ],
)
def test_a_damaged_idx_file_is_named_with_how_to_get_it(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"data-dir: .*images.gz.*{message}(.|\n)*apt-get install dataset-fashion-mnist",
    ):
        fashion_mnist.read_idx(path, (3, 4, 5))


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError,
        match=r"train-images-idx3-ubyte.gz is missing\. On Debian `apt-get install",
    ):
        fashion_mnist.load(tmp_path)
    monkeypatch.setenv("DIFFJAX_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        fashion_mnist.load(None)
    monkeypatch.delenv("DIFFJAX_DATA")
    with pytest.raises(ValueError, match=r"data-dir: expected .*, got none; set --data-dir or"):
        fashion_mnist.load(None)


@pytest.mark.parametrize(
    "settings",
    [
        couplings.Settings,
        digits.Settings,
        fashion_mnist.Settings,
        objectives_study.Settings,
        toy2d.Settings,
    ],
)
def test_an_unknown_flag_is_named(settings, capsys):
    with pytest.raises(SystemExit) as error:
        tyro.cli(settings, args=["--stepz", "10"])
    assert error.value.code == 2
    assert "--stepz" in capsys.readouterr().err


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="expected rings, moons or mixture, got 'ring'"):
        small_models.points("ring", 10, 0)


def test_the_digits_are_split_by_class_without_overlap():
    data = digits.load(0)
    assert (
        len(data.train) + len(data.held_out) == 1797 and data.train.max() == 16 == data.levels - 1
    )
    shares = [
        np.bincount(labels) / len(labels) for labels in (data.train_labels, data.held_out_labels)
    ]
    np.testing.assert_allclose(*shares, atol=2 / 360)  # stratified: off by rounding to whole images


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 17, (20, 2, 3))
    return Images(values[:15], np.zeros(15, int), values[15:], np.zeros(5, int), 17, ("a",), (2, 3))


def test_samples_become_the_images_that_they_were_dequantized_from(data):
    xs = likelihood.dequantize(jax.random.key(0), data.train, data.levels)
    np.testing.assert_array_equal(models.to_images(xs, data), data.train)


def test_the_nearest_training_image(data):
    a, b = pixels(data.held_out, data), pixels(data.train, data)
    brute = np.linalg.norm(a[:, None] - b[None], axis=-1).min(1)
    np.testing.assert_allclose(scores.nearest(data.held_out, data), brute, rtol=1e-12)
    # sqrt of a cancelled 1e-13
    np.testing.assert_allclose(scores.nearest(data.train[:3], data), 0, atol=1e-6)


def test_samples_do_not_depend_on_the_blocks_and_end_where_the_flow_of_the_model_does(data):
    """Guidance from N(0, I) to N(m, I) by scale w is the flow of N(w m, I): on the linear path x0 =
    x1 + w m.
    """

    def velocity(x, t, cond=None):  # of N(m, I) on x_t = (1 - t) x0 + t eps
        m = 0.0 if cond is None else cond
        return ((2 * t - 1) * (x - (1 - t) * m)) / ((1 - t) ** 2 + t**2) - m

    model = train_images.Model(Partial(velocity), dj.linear())
    labels, x1, ts = jnp.arange(5.0), models.noise(0, 5, data), dj.uniform(64)
    for scale, w in ((None, 1.0), (3.0, 3.0)):
        whole, blocks = (models.generate(model, labels, x1, ts, scale, block=n) for n in (5, 2))
        np.testing.assert_allclose(blocks, whole, rtol=1e-12, atol=1e-12)
        # Heun's error, O(n^-2)
        np.testing.assert_allclose(whole, x1 + w * labels[:, None, None], atol=2e-2)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("path", small_models.PATHS)
def test_a_normalized_target_has_unit_variance(path):
    """Over x0 and eps of (+-1, +-1), independent and of unit variance: the mean square of any
    linear target is exact.
    """
    schedule, t = small_models.PATHS[path], 0.37
    x0, eps = (np.array(a, float) for a in ([1, 1, -1, -1], [1, -1, 1, -1]))
    for kind in (losses.X0, losses.EPS, losses.V, losses.VELOCITY):
        out = target(schedule, kind, x0, eps, t)
        np.testing.assert_allclose(np.mean(np.asarray(out) ** 2), 1, rtol=1e-12)
        seen = []

        def network(x, t, out=out, seen=seen):
            seen.append(x)
            return out

        alpha, sigma = (float(c) for c in schedule(t))
        estimate = as_denoiser(network, schedule, kind)(alpha * x0 + sigma * eps, t)
        np.testing.assert_allclose(estimate, (x0, eps), rtol=1e-9)
        np.testing.assert_allclose(np.mean(np.asarray(seen[0]) ** 2), 1, rtol=1e-12)


def test_evaluations_until_the_distance_stays_settled():
    curve = {2: 1.001, 4: 1.5, 8: 1.009, 16: 0.995}  # at 2 by chance
    assert settles(curve, 1.0) == 8
    assert settles(curve, 2.0) is None


def test_seeds_are_summed_up_a_model():
    distances = ({"d": 1.0}, {"d": 2.0})
    rows = [
        {
            "objective": "a",
            "path": "linear",
            "nll": nll,
            "bound": None,
            "distances": d,
            "nfe_to_1%": n,
            "seconds": 3.0,
        }
        for nll, d, n in zip((1.0, 3.0), distances, (None, 8), strict=True)
    ]
    last = objectives_table(rows).splitlines()[-1]
    assert last == "| a | linear | 2 | 2.000 ± 1.414 |  | 1.500 ± 0.707 | 8, more than 64 | 3 |"
    rows[1]["nll"] = None
    assert "| solver gave up on some |" in objectives_table(rows)


def test_a_report_is_continued_only_with_its_own_settings(tmp_path):
    settings = objectives_study.Settings(out=tmp_path)
    assert begin_or_continue(settings) == ({}, 0.0)
    scores = {"moons": {"rows": [1]}}
    write_record(tmp_path / "result.json", settings, scores, 3.0)
    assert begin_or_continue(dataclasses.replace(settings, seeds=(7,), data=("digits",))) == (
        scores,
        3.0,
    )
    with pytest.raises(
        ValueError,
        match=(
            r"result.json: it was begun with another value of steps, efficientnet; choose "
            r"another --out"
        ),
    ):
        begin_or_continue(dataclasses.replace(settings, steps=7, efficientnet=tmp_path))


def test_every_objective_trains_every_parameter():
    apply, params = training.functional(MLP(2, width=8, depth=1, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    # not as initialized: zeros block gradients
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = structure.unflatten(
        [0.3 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    )
    x0s = jnp.asarray(small_models.points("moons", 8, 0))

    @jax.jit
    def gradients(params):
        def of(objective):
            def loss(params):
                network = dj.bind(apply, params)
                return losses.batch_loss(
                    objective, network, PATHS["linear"], jax.random.key(0), x0s, None
                )

            return jax.grad(loss)(params)

        # the regularized likelihood is the plain one, and more
        names = losses.OBJECTIVES.keys() - {"maximum likelihood"}
        return {name: of(losses.OBJECTIVES[name]) for name in sorted(names)}

    for name, gradient in gradients(params).items():
        assert all(
            np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient)
        ), name


@pytest.mark.parametrize("path", ["linear", "VE"])
def test_the_log_density_is_that_of_the_data_not_of_what_is_scaled(path):
    """Of N(0.7, 0.3) x N(-0.4, 2), all in closed form; 1e-3 a step of the solver."""
    mean, variances, x0 = np.array([0.7, -0.4]), np.array([0.3, 2.0]), np.array([0.9, -1.3])
    used = PATHS[path]
    denoise = exact.gaussian(jnp.asarray(mean), jnp.diag(jnp.asarray(variances)), used.schedule)
    value = log_density(None, denoise, used, jnp.asarray(x0), divergence.exact_probes)
    low, high = (tuple(map(float, used.schedule(t))) for t in (used.low, used.high))
    x1 = oracles.gaussian_flow(mean, variances, low, high, low[0] * x0)
    (m, v), (m1, v1) = (oracles.gaussian_marginal(mean, variances, *at) for at in (low, high))
    normal = scipy.stats.norm
    density = normal.logpdf(low[0] * x0, m, np.sqrt(v)) + np.log(low[0])
    bias = normal.logpdf(x1, 0, high[1]) - normal.logpdf(x1, m1, np.sqrt(v1))
    np.testing.assert_allclose(value, np.sum(density + bias), atol=0.01)


def test_images_of_a_folder_are_trained_on_sampled_and_scored_and_the_run_goes_on(tmp_path):
    random = np.random.default_rng(0)
    for name, low in (("bright", 200), ("dark", 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(15):
            Image.fromarray(random.integers(low, low + 50, (6, 8, 3), np.uint8)).save(
                tmp_path / f"data/{name}/{i}.png"
            )
    loaded, labels, names = train_images.load(tmp_path / "data")
    assert loaded.shape == (30, 6, 8, 3) and names == ["bright", "dark"]
    assert (loaded[labels == 0].mean(), loaded[labels == 1].mean()) == pytest.approx(
        (224.5, 24.5), abs=2
    )

    settings = train_images.Settings(
        tmp_path / "data",
        tmp_path / "run",
        **{
            "network": "dit",
            "width": 16,
            "levels": 1,
            "batch": 8,
            "sampling_steps": 3,
            "samples": 10,
            "every": 2,
        },
    )
    for steps in (2, 4):
        scores = train_images.main(dataclasses.replace(settings, steps=steps))
        assert all(np.isfinite(score) for score in scores.values())
    assert {"000002.png", "000004.png", "samples.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    drawn = np.load(tmp_path / "run" / "samples.npz")
    assert drawn["images"].shape == (10, 6, 8, 3) and drawn["images"].dtype == np.uint8
    np.testing.assert_array_equal(drawn["labels"], [0, 1] * 5)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"] == scores
    assert "samples.png" in (tmp_path / "run" / "report.md").read_text()


def test_images_that_cannot_be_a_data_set_are_named(tmp_path):
    np.savez(tmp_path / "floats.npz", images=np.zeros((4, 8, 8)), labels=np.zeros(4, int))
    with pytest.raises(
        ValueError, match=r"data: expected uint8 images of one shape in .*floats.npz.*float64"
    ):
        train_images.load(tmp_path / "floats.npz")
    for i, size in enumerate([(8, 8), (8, 6)]):
        (tmp_path / "folder" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "folder" / "a" / f"{i}.png")
    with pytest.raises(ValueError, match=r"data: expected uint8 images of one shape in .*\(8, 6\)"):
        train_images.load(tmp_path / "folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data: expected uint8 images .* got none"):
        train_images.load(tmp_path / "empty")


def squares(left, n=28):
    """A white square of 12x12 pixels, whose left side is at `left`."""
    image = np.zeros((1, n, n))
    image[0, 8:20, left : left + 12] = 255
    return image


def test_edges_are_thin_and_agree_within_a_pixel():
    edges, agree = image_controls.edges, image_controls.within_a_pixel
    base = edges(squares(8))
    # the outline of a square of side 12, without its round corners
    assert 36 <= base.sum() <= 48 and not base[0, 10:18, 10:18].any()
    assert base[0, 14].sum() == 2 and base[0, :, 14].sum() == 2
    assert agree(base, base) == 1.0 and agree(base, edges(squares(9))) == 1.0
    far = agree(base, edges(squares(20)))
    # the upper and lower sides do not meet, the left one lies on the old right one
    assert 0 < far < 0.25
    empty = np.zeros((1, 28, 28), bool)
    assert agree(empty, empty) == 1.0 and agree(empty, base) == 0.0


def test_the_coarse_mask_and_its_overlap():
    mask = image_controls.mask(squares(8))
    np.testing.assert_array_equal(mask, squares(8) > 0)
    assert image_controls.overlap(mask, image_controls.mask(squares(12))) == 1 / 2


def test_folding_keeps_each_block_of_four_pixels():
    images = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    folded = fold(images)
    assert folded.shape == (2, 2, 3, 4)
    np.testing.assert_array_equal(folded[1, 1, 2], images[1, 2:, 4:].ravel())
    np.testing.assert_array_equal(unfold(folded), images)


def test_sudden_convergence_and_the_images_to_compare_with():
    assert sudden({50: 0.2, 100: 0.31, 150: 0.5, 200: 0.4}, 0.2) == 100
    labels = np.array([0, 1, 1, 0, 1, 0])
    others = others_of_the_class(labels[:2], labels, 0)
    assert (others >= 2).all() and (labels[others] == labels[:2]).all()
