"""Tuning norms, which stay in 16 bits, so that a quantised model predicts again what its original does.

    report = tune(model, checkpoint, out, tokens, options, work, store)

Every matrix was quantised for itself. What is tuned (tunables.py) follows the gradient of the KL divergence to the
16-bit model, errors of all layers together, in a few steps of Adam, each on some of the calibration sequences. The
steps change float32 copies; the model is run with these rounded as they will be written.

Some of these sequences are left out of that. By their KL, before and after, it is decided whether what was tuned is
written at all.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_mcmoe.calibration.checkpoint.report import TuningReport
from vllm_mcmoe.calibration.checkpoint.workdir import WorkDirectory
from vllm_mcmoe.calibration.checkpoint.writer import Shard
from vllm_mcmoe.calibration.common.files import write_atomically
from vllm_mcmoe.calibration.common.progress import Log, progress
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights
from vllm_mcmoe.calibration.measure.expert_tokens import evenly_spaced
from vllm_mcmoe.calibration.model.activations import Activations, ActivationStore
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.recipes import TuningOptions
from vllm_mcmoe.calibration.tune.streaming import final_states, kl_gradients, mean_kl
from vllm_mcmoe.calibration.tune.tunables import TunedWeights, find_tunables

# One sequence in so many decides whether what the others have tuned is better.
HELD_OUT = 8

# Of Adam: the mean of squared gradients over the last hundred steps, of which there are fewer.
BETAS = (0.9, 0.99)

ORIGINAL = "original-states"  # of the 16-bit model's last layer

_STEP, _BEFORE, _FINISHED = "tuning", "tuning-before", "tuned"  # units of work


def tune(
    model: LayerwiseModel,
    checkpoint: Path,
    out: Path,
    tokens: torch.Tensor,
    options: TuningOptions,
    work: WorkDirectory,
    store: ActivationStore,
    *,
    log: Log,
    show_progress: bool,
) -> TuningReport | None:
    """Write the shards of `out`: the checkpoint's, with what was tuned where that lowers KL, else as they are.

    model        the original
    checkpoint   a complete one, of model
    out          a directory
    tokens       int64 [sequences, length], of calibration
    work         where finished steps and shards are kept

    None for a single sequence, with which nothing can be held out.
    """
    weights = CheckpointWeights(describe_model(checkpoint))
    chosen = evenly_spaced(len(tokens), min(len(tokens), max(2, options.tokens // tokens.shape[1])))
    tokens = tokens[chosen]
    report, values = None, {}
    if len(tokens) > 1:
        job = _Tuning(model, weights, tokens, options, work, store, log, show_progress)
        report = job.run()
        values = job.values if report.kept else {}
    else:
        log("Nothing is tuned: of one calibration sequence none can be held out.")
    out.mkdir(exist_ok=True)
    for path in weights.files.files:
        write_shard(path, out / path.name, TunedWeights(weights, values), work)
    store.drop_all()
    return report


class _Tuning:
    """State of one tune: values and Adam's moments, which are on the disk after every step."""

    def __init__(
        self,
        model: LayerwiseModel,
        weights: CheckpointWeights,
        tokens: torch.Tensor,
        options: TuningOptions,
        work: WorkDirectory,
        store: ActivationStore,
        log: Log,
        show_progress: bool,
    ):
        self.model, self.tokens, self.options = model, tokens, options
        self.work, self.store, self.log, self.show_progress = work, store, log, show_progress
        self.values: dict[str, torch.nn.Parameter] = {}
        self.quantized = LayerwiseModel(TunedWeights(weights, self.values), model.device)
        self.tunables = find_tunables(self.quantized, options)
        self.values |= {name: torch.nn.Parameter(tunable.value) for name, tunable in self.tunables.items()}
        groups = [{"params": [self.values[name]], "lr": tunable.step} for name, tunable in self.tunables.items()]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS)
        every = min(HELD_OUT, len(tokens))
        self.held_out = torch.arange(every - 1, len(tokens), every)
        tuned = torch.ones(len(tokens), dtype=torch.bool)
        tuned[self.held_out] = False
        self.tuned = tuned.nonzero().squeeze(1)

    def run(self) -> TuningReport:
        done = self._resume()
        schedule = self._schedule()
        report = self.work.load(_FINISHED)
        if report is not None and done == len(schedule):
            return TuningReport(**report)
        if done:
            self.log(f"{done} of {len(schedule)} steps of tuning are done already.")
        original = self._original_states()
        before = self.work.load(_BEFORE)
        if before is None:
            before = self._held_out_kl(original)
            self.work.save(_BEFORE, before)
        for step in progress(range(done, len(schedule)), "Tuning norms", show=self.show_progress):
            size = math.sqrt(before) * (1 + math.cos(math.pi * step / len(schedule))) / 2
            self._step(schedule[step], size, original)
            self._save(step + 1)
        after = self._held_out_kl(original)
        report = TuningReport(self.tuned.numel() * self.tokens.shape[1], len(schedule), before, after, after < before)
        self.work.save(_FINISHED, vars(report))
        done = "Tuned" if report.kept else "Tuned, but not for the better, so that nothing of it is written"
        self.log(f"{done}: {report.describe()}.")
        return report

    def _schedule(self) -> list[torch.Tensor]:
        """The sequences of every step, all once in each pass."""
        generator = torch.Generator().manual_seed(0)
        steps = min(self.options.steps, len(self.tuned))
        return [
            chosen.sort().values
            for _ in range(self.options.passes)
            for chosen in self.tuned[torch.randperm(len(self.tuned), generator=generator)].tensor_split(steps)
        ]

    def _original_states(self) -> Activations:
        found = self.store.find(ORIGINAL)
        if found is None:
            found = final_states(self.model, self.tokens, self.store, ORIGINAL)
        return found

    def _held_out_kl(self, original: Activations) -> float:
        expected = self._of(original, self.held_out)
        return mean_kl(self.quantized, self.model, self.tokens[self.held_out], expected, self.store)

    def _of(self, original: Activations, chosen: torch.Tensor) -> Iterator[torch.Tensor]:
        """The sequences' states one by one."""
        length = self.tokens.shape[1]
        return (original.rows[number * length : (number + 1) * length] for number in chosen.tolist())

    def _step(self, chosen: torch.Tensor, size: float, original: Activations) -> None:
        """One of Adam, on these sequences; its size is relative to the tunables' own."""
        expected = self._of(original, chosen)
        tokens = self.tokens[chosen]
        _, gradients = kl_gradients(self.quantized, self.model, tokens, expected, self.tunables, self.store)
        for name, value in self.values.items():
            value.grad = gradients.get(name)
        for group, tunable in zip(self.optimizer.param_groups, self.tunables.values(), strict=True):
            group["lr"] = tunable.step * size
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _file(self, step: int) -> Path:
        """Two take turns: the last step's is whole while the next is written."""
        return self.work.path / f"tuning-{step % 2}.safetensors"

    def _save(self, step: int) -> None:
        tensors = {}
        for name, value in self.values.items():
            tensors[name] = value.detach()
            for key, moment in self.optimizer.state.get(value, {}).items():
                tensors[f"{name}/{key}"] = moment
        path = self._file(step)
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
        self.work.save(_STEP, {"step": step}, [path])

    def _resume(self) -> int:
        """Steps done; what the last of them has left is taken up."""
        document = self.work.load(_STEP)
        if document is None:
            return 0
        tensors = load_file(self._file(document["step"]))
        for name, value in self.values.items():
            value.data.copy_(tensors[name])
            prefix = f"{name}/"
            state = {key.removeprefix(prefix): found for key, found in tensors.items() if key.startswith(prefix)}
            if state:
                self.optimizer.state[value] = state
        return document["step"]


def write_shard(source: Path, target: Path, tuned: TunedWeights, work: WorkDirectory) -> None:
    """A unit of work. The file as it is where nothing of it has other values."""
    unit = f"tuned-{source.stem}"
    if work.load(unit) is not None:
        return
    names = [name for name, info in tuned.files.info.items() if info.file == source]
    if tuned.values:
        shard = Shard()
        for name in names:
            shard.add(name, tuned.stored(name))
        shard.write(target)
    else:
        write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))
    work.save(unit, {}, [target])
