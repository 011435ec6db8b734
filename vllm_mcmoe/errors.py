"""Everything this project raises on purpose. A message says what was found, where, what was expected and what to do."""


class McmoeError(Exception):
    """Base of all errors a user can cause and mend; the command line prints it without a traceback."""


class FormatError(McmoeError, ValueError):
    """A checkpoint, factors file or plan is not what its format says."""


class UnsupportedModelError(McmoeError, ValueError):
    """A model, layer shape, bit-width or activation this version cannot handle."""


class DataError(McmoeError, ValueError):
    """Calibration or evaluation text is missing, empty or malformed."""


class DeviceError(McmoeError, ValueError):
    """A device that calibration cannot compute on."""


class WorkDirectoryError(McmoeError, ValueError):
    """Unfinished work that does not belong to this run, or that another process is busy with."""


class PlanError(McmoeError, ValueError):
    """A bit allocation cannot be computed, or does not fit the model it is applied to."""


class PruningError(McmoeError, ValueError):
    """A pruning rule cannot be calibrated, or a target cannot be reached."""


class HubError(McmoeError, ValueError):
    """A model that the hub does not have, does not give or does not take, or a hub that cannot be asked."""


class EndpointError(McmoeError, ValueError):
    """A server that cannot be reached, refuses a request, or does not tell what is asked of it."""


class InstallationError(McmoeError, RuntimeError):
    """What is installed cannot serve, or cannot be mended."""
