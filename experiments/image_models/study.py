"""The whole study of an image model, from training to the report."""

import time

from flax import nnx

from experiments.image_models import Images, Settings, figures, models, scores
from experiments.results import table, write_record, write_report


def run(title: str, network: nnx.Module, data: Images, settings: Settings) -> dict[str, float]:
    """Trains, scores and shows a model; returns the scores."""
    start = time.perf_counter()
    model, seconds = models.train(network, data, settings)
    result = scores.evaluate(model, data, settings)
    figures.figures(model, data, settings, result)
    result["scores"]["training seconds"] = seconds
    measured = {name: result[name] for name in ("scores", "curve")}
    record = write_record(
        settings.out / "result.json", settings, measured, time.perf_counter() - start
    )
    rows = table(
        ["score", "value"], [(name, f"{value:.4g}") for name, value in result["scores"].items()]
    )
    heading = f"Scores of {settings.samples} samples, against {len(data.held_out)} held-out images"
    write_report(settings.out, title, record, scores.SCORES, {heading: rows}, figures.CAPTIONS)
    return result["scores"]
