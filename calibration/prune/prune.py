"""Adding a pruning rule to a checkpoint, and measuring what it drops and costs.

report = prune("mixtral-2.5bit", ["c4.jsonl"], method="otp", target=0.25)
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_mcmoe.calibration.checkpoint.identity import (
    identity_of_device,
    identity_of_model,
    identity_of_program,
    identity_of_tokens,
)
from vllm_mcmoe.calibration.checkpoint.workdir import working_on
from vllm_mcmoe.calibration.common.device import choose_device
from vllm_mcmoe.calibration.common.files import write_atomically
from vllm_mcmoe.calibration.common.progress import Log
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights
from vllm_mcmoe.calibration.evaluate.scores import Evaluation, evaluate_pruning
from vllm_mcmoe.calibration.measure.sensitivity import choose_store
from vllm_mcmoe.calibration.model.activations import Storage
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.folder import hub_name_of_snapshot, is_hub_name
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import DEFAULT_LENGTH, DEFAULT_SEQUENCES, find_data_files, load_calibration_data
from vllm_mcmoe.calibration.prune.points import PrunedPoint, forget_points, save_points
from vllm_mcmoe.calibration.prune.rules import calibrate_rules, check_request
from vllm_mcmoe.errors import FormatError, PruningError
from vllm_mcmoe.pruning import PruningRules

# Fractions of the table; those beyond a model's (top_k - 1) / top_k are left out.
TABLE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def prune(
    checkpoint: str | Path,
    data: Sequence[str | Path] | None = None,
    *,
    method: str = "otp",
    target: float = 0.25,
    evaluation_data: Sequence[str | Path] | None = None,
    table: bool = False,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    activations: Storage = "auto",
    device: str | torch.device = "auto",
    restart: bool = False,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> list[PrunedPoint]:
    """Calibrate a rule on text, write it into the checkpoint, measure it. A rule that was there is replaced.

    Finished layers are kept in CHECKPOINT.pruning.partial: the same call goes on from there after having been killed.

    data             calibration text, as load_sequences takes it; None takes the built-in text
    method           "odp" (routing-weight ratios) or "otp" (learned mask router)
    target           fraction of expert activations to drop by default when the checkpoint is served
    evaluation_data  text to measure on; None measures nothing. What is measured is kept in the checkpoint, too
    table            measure 0, 10, ... 50% besides the target; each takes a pass over the model
    activations      "memory", "disk" or "auto", as calibrate takes it
    device           what computes, as choose_device takes it; a mask router is trained on the CPU
    restart          forget what an earlier run has left

    Raises DeviceError, UnsupportedModelError, FormatError, DataError or PruningError before any long work.
    """
    device = choose_device(device, log)
    _check_writable(Path(checkpoint))
    description = describe_model(checkpoint)
    check_request(method, target, description)
    if evaluation_data is not None:
        find_data_files(evaluation_data)
    source = CheckpointWeights(description)
    text = load_calibration_data(description, data, sequences, length, log)
    identity = {
        **identity_of_program(),
        **identity_of_device(device),
        **identity_of_model(description, source.files),
        **identity_of_tokens(text),
        "method": method,
        "target": target,
        "seed": seed,
    }
    out = description.path.with_name(f"{description.path.name}.pruning")
    with working_on(out, identity, restart=restart, log=log) as work:
        model = LayerwiseModel(source, device)
        store = choose_store(activations, model, text.tokens.numel(), True, work.activations, log)
        options = {"seed": seed, "store": store, "work": work, "show_progress": show_progress}
        rules = calibrate_rules(model, text.tokens, method, target, **options)
        write_rules(description.path, rules)
        forget_points(description.path)
        work.remove()
    log(f"Wrote the {method} rule for {target:.0%} of the expert activations into {description.path}.")
    if evaluation_data is None:
        return []
    largest = (description.top_k - 1) / description.top_k
    targets = sorted({0.0, target, *(t for t in TABLE if table and t <= largest)})
    options = {"sequences": sequences, "length": length, "device": device}
    options |= {"log": log, "show_progress": show_progress}
    found = evaluate_pruning(checkpoint, evaluation_data, targets, **options)
    points = [_point(target, evaluation) for target, evaluation in zip(targets, found, strict=True)]
    save_points(description.path, rules.config.sha256, points)
    return points


def _check_writable(checkpoint: Path) -> None:
    """Raises PruningError for what is on the hub, or in its cache, which other programs read as the hub's."""
    cached = hub_name_of_snapshot(checkpoint)
    name = cached or (str(checkpoint) if is_hub_name(str(checkpoint)) and not checkpoint.exists() else None)
    if name is not None:
        where = "lies in the hub's cache" if cached else "is no directory; it may be a name on the hub"
        raise PruningError(
            f"{checkpoint} {where}. A pruning rule is written into the checkpoint: fetch one of your own with "
            f"`hf download {name} --local-dir DIR`, then `mcmoe prune DIR`; `mcmoe push DIR ORG/NAME` uploads it."
        )


def _point(target: float, result: Evaluation) -> PrunedPoint:
    return PrunedPoint(target, result.pruned, result.geometric_mean_perplexity, result.mean_kl)


def write_rules(checkpoint: Path, rules: PruningRules) -> None:
    """Put rules into a checkpoint: their tensors in a new file, then config.json, replaced in one step, which names it.

    Raises FormatError for a directory whose config.json is no checkpoint's.
    """
    path = checkpoint / "config.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" not in document:
        raise FormatError(f"{path}: no quantization_config: this model is not quantised; run `mcmoe quantize` first.")
    write_atomically(checkpoint / rules.config.file_name, lambda file: file.write_bytes(rules.serialize()))
    document["quantization_config"]["pruning"] = rules.config.to_dict()
    text = json.dumps(document, indent=2) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    for old in checkpoint.glob("pruning-*.safetensors"):
        if old.name != rules.config.file_name:
            os.unlink(old)
