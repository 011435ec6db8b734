"""Every weight is read once before hours are spent on the model."""

from vllm_mcmoe.calibration.checkpoint.workdir import WorkDirectory
from vllm_mcmoe.calibration.common.progress import progress
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel

WEIGHTS = "weights"  # the unit of work that says they have been checked


def check_weights(model: LayerwiseModel, work: WorkDirectory, show_progress: bool) -> None:
    """Read every weight once: minutes, against the hours after which a damaged one might be met.

    Raises UnsupportedModelError for NaN or infinite weights, FormatError for a file that cannot be read.
    """
    if work.load(WEIGHTS) is None:
        for name in progress(model.source.names(), "Checking weights", show=show_progress):
            model.check_weight(name)
        work.save(WEIGHTS, {})
