"""Where a model's files are: in a directory, or on the hub, from where each is fetched when it is first needed.

    folder = find_model("Qwen/Qwen3-30B-A3B", revision="main")    # asks the hub for the commit, fetches config.json
    folder.fetch("model-00003-of-00016.safetensors")              # into the hub's cache, unless it is there

A model of the hub stays at the commit that it was found at: a branch that moves meanwhile changes nothing.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import SafetensorsFileMetadata, validate_repo_id

from vllm_mcmoe import __version__
from vllm_mcmoe.calibration.common.progress import Log, download_bar, progress
from vllm_mcmoe.errors import FormatError, HubError

CONFIG_FILE = "config.json"
# Weights in any format, and what other tools derive from them.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
HEADERS_AT_ONCE = 8


class ModelFolder:
    """A directory with a model.

    path       where its files are, or will be
    given      what a user calls it
    on_hub     its name on the hub, ORG/NAME, if it is known to be from there
    revision   the commit there, if files are to be fetched from it
    can_fetch  whether more files can be had than there are
    """

    revision: str | None = None
    can_fetch: bool = False

    def __init__(self, path: Path):
        self.path = path
        self.given: str | Path = path
        self.on_hub = hub_name_of_snapshot(path)

    @property
    def name(self) -> str:
        """For titles."""
        return self.on_hub or self.path.resolve().name

    def __str__(self) -> str:
        return str(self.given)

    def has(self, name: str) -> bool:
        """Whether the model has a file of that name, at its top level."""
        return (self.path / name).is_file()

    def fetch(self, name: str) -> Path:
        """The path of one of its files, which is there afterwards. Raises HubError."""
        return self.path / name

    def fetch_side_files(self) -> None:
        """Everything at the top level but weights and git's files: tokenizer, chat template, settings, licence. Raises
        HubError."""

    def read_headers(self, names: Sequence[str]) -> list[SafetensorsFileMetadata]:
        """Of safetensors files that are not there, by range requests: nothing else of them is read. Raises HubError,
        FormatError."""
        if names:
            raise FormatError(f"{self.path / names[0]}: named in the index but missing. Is the download complete?")
        return []


class HubFolder(ModelFolder):
    """One commit of a model on the hub, and the folder of huggingface_hub's cache that its files come to."""

    def __init__(self, name: str, revision: str | None, log: Log):
        """Raises HubError: no such model or revision, no permission, no config.json, or no way to ask and nothing in
        the cache."""
        self.given = self.on_hub = name
        self._api, self._log, self._listed = hub_api(), log, None
        with _found_by_name(name, revision):
            self.revision = self._api.resolve_revision(name, revision=revision, cache_dir=_cache()).resolved
            self.path = self._download(CONFIG_FILE).parent
        log(f"{name}: commit {self.revision}; files are kept in {self.path}.")

    def _download(self, name: str) -> Path:
        return Path(
            self._api.hf_hub_download(
                self.name, name, revision=self.revision, cache_dir=_cache(), tqdm_class=download_bar()
            )
        )

    @property
    def can_fetch(self) -> bool:
        self._list()
        return self._answers

    def _list(self) -> set[str]:
        """Names of the files at the commit's top level; where the hub cannot be asked, of those in the cache."""
        if self._listed is None:
            try:
                siblings = self._api.model_info(self.name, revision=self.revision).siblings
                self._listed = {sibling.rfilename for sibling in siblings if "/" not in sibling.rfilename}
                self._answers = True
            except Exception as error:
                reason = _explain(self.name, error)
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise HubError(f"{self.name}: {reason}.") from error
                self._listed = {path.name for path in self.path.iterdir()}
                self._answers = False
                self._log(f"{self.name}: {reason}; its files are taken to be those in {self.path}.")
        return self._listed

    def has(self, name: str) -> bool:
        return super().has(name) or name in self._list()

    def fetch(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            if name.endswith(WEIGHT_SUFFIXES) and download_bar() is None:  # the bar says the same
                self._log(f"Fetching {name} of {self.name}.")
            with _fetching(self.name, name):
                self._download(name)
        return path

    def fetch_side_files(self) -> None:
        for name in sorted(self._list()):
            if not name.startswith(".") and not name.endswith(WEIGHT_SUFFIXES):
                self.fetch(name)

    def read_headers(self, names: Sequence[str]) -> list[SafetensorsFileMetadata]:
        if not names:
            return []
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            return list(progress(pool.map(self._read_header, names), "Reading headers", total=len(names)))

    def _read_header(self, name: str) -> SafetensorsFileMetadata:
        with _fetching(self.name, f"the header of {name}"):
            try:
                return self._api.parse_safetensors_file_metadata(self.name, name, revision=self.revision)
            except SafetensorsParsingError as error:
                raise FormatError(f"{self.name}: {name} cannot be read as safetensors: {error}") from error


def find_model(model: str | Path | ModelFolder, revision: str | None = None, log: Log = lambda _: None) -> ModelFolder:
    """The model of that name: a directory, where there is one, else ORG/NAME on the hub.

    revision  branch, tag or commit on the hub; None is the main branch
    log       told what is fetched

    Raises HubError as HubFolder does, and for the revision of a directory. A directory that is missing is not noticed
    here unless its name could be one on the hub.
    """
    if isinstance(model, ModelFolder):
        return model
    path = Path(model)
    if not path.exists() and is_hub_name(str(model)):
        return HubFolder(str(model), revision, log)
    if revision is not None:
        raise HubError(f"{model}: a revision was given, {revision}, which only ORG/NAME on the hub has, no directory.")
    return ModelFolder(path)


def is_hub_name(name: str) -> bool:
    """Whether it has the form of a model's name on the hub, ORG/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def hub_name_of_snapshot(path: Path) -> str | None:
    """ORG/NAME where the directory is a snapshot in the hub's cache, which other programs read, too."""
    parts = path.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/", 1)


def hub_api() -> HfApi:
    """Of HF_ENDPOINT, with the token of `hf auth login` or HF_TOKEN."""
    return HfApi(library_name="vllm-mcmoe", library_version=__version__)


def hub_error(name: str, doing: str, error: Exception) -> HubError:
    """What ends in that exception, for a user."""
    return HubError(f"{name}: {doing}: {_explain(name, error)}.")


def _cache() -> str:
    """Of HF_HUB_CACHE or HF_HOME."""
    return constants.HF_HUB_CACHE


@contextmanager
def _found_by_name(name: str, revision: str | None) -> Iterator[None]:
    """In the block a name is looked up that may as well be that of a directory, mistyped: errors say both."""
    try:
        yield
    except Exception as error:  # those of connections are classes of the HTTP library underneath
        cause, reason = _cause(error), _explain(name, error)
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            reason = f"no such directory, and {reason}"
        elif isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            reason = f"no {CONFIG_FILE} in that repository, so it is no model that transformers or vLLM reads"
        elif not isinstance(cause, HfHubHTTPError):
            asked = revision or constants.DEFAULT_REVISION
            reason = (
                f"no such directory, and revision {asked} of a model of that name is not in the cache folder "
                f"{_cache()}; {reason}"
            )
        raise HubError(f"{name}: {reason}.") from error


def _cause(error: BaseException) -> BaseException:
    """Of an error which only says that the cache has no such file, why the hub did not give it either."""
    of_cache = isinstance(error, LocalEntryNotFoundError | RevisionResolutionError)
    return _cause(error.__cause__) if of_cache and error.__cause__ is not None else error


@contextmanager
def _fetching(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (FormatError, HubError):
        raise
    except Exception as error:  # as above, and of the disk
        kept = f"Files that are complete are kept in {_cache()}: the same command goes on from there."
        raise HubError(f"{name}: {what} could not be fetched: {_explain(name, error)}. {kept}") from error


def _explain(name: str, error: BaseException) -> str:
    """For a user, without a full stop at the end. name: of the model."""
    hub, error = hub_api().endpoint, _cause(error)
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    if isinstance(error, GatedRepoError):
        return (
            f"access is granted on request only: ask for it at {hub}/{name}, then log in with `hf auth login` or set "
            f"HF_TOKEN ({_reason(error)})"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the hub ({hub}) has no such revision of it; give --revision a branch, a tag or a commit of 40 digits"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no model of that name on the hub ({hub}) that you may see. If it is private, log in with `hf auth login` "
            "or set HF_TOKEN"
        )
    if isinstance(error, EntryNotFoundError):
        return f"the hub ({hub}) has no such file"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        logged_in = " `hf auth login` or HF_TOKEN says who you are" if status in (401, 403) else ""
        return f"the hub ({hub}) answers HTTP {status}: {_reason(error)}{logged_in and ';'}{logged_in}"
    return f"the hub ({hub}) cannot be reached, or broke off: {_reason(error) or type(error).__name__}"


def _reason(error: BaseException) -> str:
    told = getattr(error, "server_message", None) or str(error)
    return " ".join(told.split())[:300].rstrip(".")
