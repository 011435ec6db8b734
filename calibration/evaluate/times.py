"""How long quantising a model takes: predicted for this machine, and what its phases are of all of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from vllm_mcmoe.calibration.common.device import multiplies_in_bfloat16
from vllm_mcmoe.calibration.common.progress import Log, Phase
from vllm_mcmoe.calibration.evaluate.model_counts import count_model, largest_layer
from vllm_mcmoe.calibration.evaluate.speed import ModelSizes, Speed, measure_speed, predict, typical_speed
from vllm_mcmoe.calibration.evaluate.work import count_work
from vllm_mcmoe.calibration.measure.sensitivity import FLOAT_BYTES
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.folder import ModelFolder
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel, skeleton
from vllm_mcmoe.calibration.recipes import Effort, Recipe, find_recipe, needs_gradients
from vllm_mcmoe.kernels.packing import Kind


def predict_times(
    model_dir: str | Path | ModelFolder,
    *,
    linear_bits: int | None = None,
    sequences: int = 128,
    length: int = 2048,
    recipe: str | Recipe = "mcmoe",
    codes: Kind | None = None,
    tuned: bool = True,
    log: Log = lambda message: None,
) -> dict[Effort, dict[str, float]]:
    """Effort -> step -> seconds that quantising takes on this machine's CPU, with torch's threads. Options as
    plan_resources takes them; a recipe that is not a name has the same times at every effort.

    The machine is tested for that, seconds in which nothing else should run on it. The steps are work.Work's.

    Raises UnsupportedModelError and HubError as describe_model does.
    """
    description = describe_model(model_dir)
    model = skeleton(description)
    counts = count_model(description, model, length)
    sizes = ModelSizes.of(description, length, FLOAT_BYTES * largest_layer(model))
    log("Testing how fast this machine is, some seconds.")
    speeds: dict[bool, Speed] = {}  # by whether products are rounded; nothing else differs between efforts
    times: dict[Effort, dict[str, float]] = {}
    for effort in get_args(Effort):
        chosen = find_recipe(recipe, effort, tune=tuned, codes=codes)
        rounds = chosen.bfloat16_products and sizes.may_round
        if rounds not in speeds:
            speeds[rounds] = measure_speed(sizes, chosen, next(iter(speeds.values()), None))
        bits = chosen.linear_bits if linear_bits is None else linear_bits
        times[effort] = predict(count_work(description, chosen, sequences, length, counts, bits), speeds[rounds])
    return times


def phases_of(
    model: LayerwiseModel,
    recipe: Recipe,
    sequences: int,
    length: int,
    linear_bits: int,
    *,
    measures: bool,
    quantizes: bool = True,
    evaluated: Sequence[str] = (),
) -> list[Phase]:
    """What a run of the pipeline will draw bars of, in their order, each as long in proportion as counts and a usual
    machine's speed make it. sequences x length calibration tokens.

    measures    whether factors or loss gradients are measured
    quantizes   whether what is measured is quantised, too
    evaluated   names of models that are then run on as much text
    """
    description = model.description
    counts = count_model(description, model.module, length)
    speed = typical_speed(recipe.bfloat16_products and multiplies_in_bfloat16(model.device, description.hidden))

    def seconds(recipe: Recipe, measures: bool) -> dict[str, float]:
        return predict(count_work(description, recipe, sequences, length, counts, linear_bits, measures), speed)

    layers, whole = model.num_layers, seconds(recipe, measures)
    checking = counts.weights * speed.read
    # Without gradients there are no sweeps under Hessians of outputs, which take no other time to measure.
    rest = seconds(replace(recipe, tuning=None), False)
    quantising = sum(rest.values()) - checking + whole["output_sweeps"] + whole["output_hessians"]
    measuring = sum(whole.values()) - whole["tuning"] - quantising - checking
    running = whole["forward"] - rest["forward"] if needs_gradients(recipe) else 0.0
    names = len(model.source.names())
    found = [Phase("Checking weights", names, checking / names)]
    if measures and running:
        found.append(Phase("Running the model", layers + 1, running / (layers + 1)))
    if measures:
        found.append(Phase("Measuring layers", layers, (measuring - running) / layers))
    if not quantizes:
        return found
    found.append(Phase("Quantising layers", layers, quantising / layers))
    if recipe.tuning is not None:
        steps = recipe.tuning.passes * min(recipe.tuning.steps, sequences)
        found.append(Phase("Tuning norms", steps, whole["tuning"] / steps))
    of_pass = sequences * length * ((counts.active - counts.head) * speed.expert + counts.scores * speed.score)
    return found + [Phase(f"Running {name}", layers, of_pass / layers) for name in evaluated]
