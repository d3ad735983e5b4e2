"""The study of an image model, from training to the report."""

import time

from flax import nnx

from experiments.image_models import Images, Settings, figures, models, scores
from experiments.results import table, write_record, write_report


def run(title: str, network: nnx.Module, data: Images, settings: Settings) -> dict[str, float]:
    """Trains and scores a model, and writes its figures and report; returns the scores."""
    start = time.perf_counter()
    model, seconds = models.train(network, data, settings)
    result = scores.evaluate(model, data, settings)
    figures.figures(model, data, settings, result)
    result["scores"]["training seconds"] = seconds
    measured = {name: result[name] for name in ("scores", "curve")}
    total = time.perf_counter() - start
    record = write_record(settings.out / "result.json", settings, measured, total)
    values = [(name, f"{value:.4g}") for name, value in result["scores"].items()]
    heading = f"Scores of {settings.samples} samples, against {len(data.held_out)} held-out images"
    tables = {heading: table(["score", "value"], values)}
    write_report(settings.out, title, record, scores.SCORES, tables, figures.CAPTIONS)
    return result["scores"]
