"""Trackers receive the figures of every layer at the steps of its training."""

import json

from small_runs import small_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mxd_convert
from mxd_convert import convert
from mxd_convert.plan.memory import estimate
from mxd_convert.training.tracking import track

LINE = {"step": 8, "lr": 0.1, "tokens_per_second": 5.0, "layers": {"3": {"fvu": 0.5}, "4": {"fvu": 0.25}}}


def test_tensorboard_has_the_log_of_a_run_in_several_passes(models, text, tmp_path):
    settings = {"layers": "all", "train": {"tracker": "tensorboard"}}
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", **settings)
    plan = mxd_convert.make_plan(mxd_convert.load_recipe(recipe))
    result = convert(recipe, overrides={"train.memory_gib": estimate(plan, plan.layers[:2]).training / 2**30}, quiet=True)
    scalars = {}
    for folder in {path.parent for path in (tmp_path / "logs").rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        scalars |= {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    lines = [json.loads(line) for line in (result.output / "training_log.jsonl").read_text().splitlines()]
    for index in ("0", "1", "2"):
        logged = [(line["step"], line["layers"][index]["fvu"]) for line in lines]
        assert [step for step, _ in logged] == [step for step, _ in scalars[f"layer_{index}/fvu"]]
        assert all(
            abs(ours - theirs) < 1e-5 for (_, ours), (_, theirs) in zip(logged, scalars[f"layer_{index}/fvu"], strict=True)
        )
    assert {"layers_0-1/mean_fvu", "layer_2/mean_fvu", "layer_2/lr"} <= set(scalars)


class Tracker:
    def __init__(self, name):
        self.name, self.logged = name, []

    def log(self, values, step=None):
        self.logged.append((step, values))


class Accelerator:
    def __init__(self, *trackers):
        self.trackers = trackers


def test_wandb_receives_steps_as_a_metric():
    others = [Tracker("trackio"), Tracker("wandb")]
    track(Accelerator(*others), LINE)
    track(Accelerator(*others), {**LINE, "step": 4}, "layers 3-4")
    values = {"layer_3/fvu": 0.5, "layer_4/fvu": 0.25}
    whole = {"lr": 0.1, "tokens_per_second": 5.0, "mean_fvu": 0.375}
    of_a_pass = {f"layers_3-4/{key}": value for key, value in whole.items()}
    assert others[0].logged == [(8, values | whole), (4, values | of_a_pass)]
    assert others[1].logged == [(None, values | whole | {"step": 8}), (None, values | of_a_pass | {"step": 4})]
