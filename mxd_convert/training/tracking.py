"""TensorBoard, wandb and trackio through accelerate: the figures of each layer, at the steps of its own training."""

from typing import Any

from accelerate import Accelerator

from mxd_convert.recipe.schema import Recipe


def start_tracker(accelerator: Accelerator, recipe: Recipe, name: str) -> None:
    """Start the tracker that the recipe names, if any.

    In wandb and trackio, `name` is a run of the project `mxd-convert`. In TensorBoard it is a folder under `logs`.
    """
    tracker = recipe.train.tracker
    if tracker == "none":
        return
    project = name if tracker == "tensorboard" else "mxd-convert"
    run = {} if tracker == "tensorboard" else {tracker: {"name": name}}
    accelerator.init_trackers(project, config={"recipe": recipe.to_yaml()}, init_kwargs=run)
    if tracker == "wandb" and accelerator.is_main_process:  # its own steps must increase: it would drop those of a second pass
        accelerator.get_tracker("wandb").run.define_metric("*", step_metric="step")


def track(accelerator: Accelerator, line: dict[str, Any], name: str = "") -> None:
    """Send a line of the training log to the tracker. name: which layers the pass trains; empty if it trains all of them."""
    layers = line["layers"]
    values = {f"layer_{index}/{key}": value for index, figures in layers.items() for key, value in figures.items()}
    mean = sum(figures["fvu"] for figures in layers.values()) / len(layers)
    whole = {key: line[key] for key in ("lr", "tokens_per_second", "kl") if key in line} | {"mean_fvu": mean}
    name = name.replace(" ", "_")
    values |= {f"{name}/{key}" if name else key: value for key, value in whole.items()}
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log({**values, "step": line["step"]})
        else:
            tracker.log(values, step=line["step"])


def finish_tracker(accelerator: Accelerator) -> None:
    """Finish the tracker's run. accelerate's `end_training` would also destroy the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
