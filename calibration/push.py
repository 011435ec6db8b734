"""Uploading a checkpoint to the hub, as often as it takes.

push("mixtral-2.5bit", "me/Mixtral-8x7B-mcmoe-2.5bit")
"""

from pathlib import Path

from vllm_mcmoe.calibration.checkpoint.writer import MODEL_CARD
from vllm_mcmoe.calibration.common.progress import Log
from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint
from vllm_mcmoe.calibration.evaluate.model_card import HERE
from vllm_mcmoe.calibration.model.folder import hub_api, hub_error, is_hub_name
from vllm_mcmoe.errors import FormatError, HubError

# Rules of online pruning that another one has replaced here: the hub's copies go, too.
RULES = "pruning-*.safetensors"


def push(
    checkpoint: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    log: Log = lambda message: None,
) -> str:
    """Upload a complete checkpoint, its model card last. Returns its address on the hub.

    What is there already is not uploaded again, so that the same call goes on after an upload that broke off, and
    brings a repository up to date after `mcmoe prune`. Other files in the repository stay.

    name      ORG/NAME; made if there is no such repository
    private   of a repository that is made: whether it is
    revision  a branch, made if there is none; None is the main branch

    Raises FormatError for a directory that is no complete checkpoint, before anything is sent; HubError: no such
    organisation, no permission, no connection.
    """
    checkpoint = Path(checkpoint)
    if not is_hub_name(name):
        raise HubError(f"{name} is no name on the hub: those are ORG/NAME, of letters, digits, '-', '_' and '.'.")
    card = _checked_card(checkpoint)
    files = [path for path in checkpoint.iterdir() if path.is_file() and not path.name.startswith(".")]
    api = hub_api()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        gigabytes = sum(path.stat().st_size for path in files) / 1e9
        log(f"Uploading {len(files)} files, {gigabytes:.2f} GB, to {api.endpoint}/{name}.")
        commit = {"repo_id": name, "revision": revision, "commit_message": "Upload an mcmoe checkpoint"}
        api.upload_folder(
            folder_path=checkpoint,
            allow_patterns=[path.name for path in files if path.name != MODEL_CARD],
            delete_patterns=RULES,
            **commit,
        )
        api.upload_file(path_or_fileobj=card.replace(HERE, name).encode(), path_in_repo=MODEL_CARD, **commit)
    except Exception as error:  # those of connections are classes of the HTTP library underneath
        doing = "it was not uploaded whole; the same command goes on with what is missing"
        raise hub_error(name, doing, error) from error
    return f"{api.endpoint}/{name}" + (f"/tree/{revision}" if revision else "")


def _checked_card(checkpoint: Path) -> str:
    """Of a checkpoint that is complete."""
    summary = inspect_checkpoint(checkpoint)
    if summary.warnings:
        raise FormatError(f"{checkpoint}: {summary.warnings[0]}; `mcmoe inspect {checkpoint}` lists all faults.")
    rule = summary.config.pruning
    if rule is not None and not (checkpoint / rule.file_name).is_file():
        raise FormatError(f"{checkpoint}: {rule.file_name} is missing, which config.json names as the pruning rule's.")
    card = checkpoint / MODEL_CARD
    if not card.is_file():
        raise FormatError(
            f"{card} is missing, the model card that `mcmoe quantize` writes: the hub shows it to people."
        )
    return card.read_text(encoding="utf-8")
