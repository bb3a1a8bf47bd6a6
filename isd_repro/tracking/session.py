"""Starts W&B runs: mode, key and time limits. Everything here can fail."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from isd_repro.config.params import Tracking
from isd_repro.tracking.names import StageRun

INIT_TIMEOUT = 30.0  # seconds that W&B may take to reach its server before the view falls back to offline
FINISH_TIMEOUT = 60.0  # seconds that W&B may take to send what is left when a run ends

Mode = Literal["auto", "online", "offline", "off"]
Attempt = Literal["online", "offline"]

_QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

_NEEDED = ("API_KEY", "BASE_URL", "ENTITY", "MODE", "DIR", "CONFIG_DIR", "IDENTITY_TOKEN_FILE", "CREDENTIALS_FILE")

_log = logging.getLogger("isd_repro.tracking")
_ENVIRONMENT: dict[str, Mode] = {
    "online": "online",
    "offline": "offline",
    "disabled": "off",
    "run": "online",
    "dryrun": "offline",
}


def wanted_mode(parameter: Mode) -> Mode:
    """The mode by `WANDB_MODE` and the parameter together; an unknown `WANDB_MODE` is reported once and means off."""
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in {"1", "true", "yes"}:
        return "off"  # older than WANDB_MODE; W&B does not heed it where a mode is given
    environment = os.environ.get("WANDB_MODE", "").strip().lower()
    if parameter == "off" or not environment:
        return parameter
    if environment not in _ENVIRONMENT:
        _say_unknown(environment)
        return "off"
    return _ENVIRONMENT[environment]


@cache
def _say_unknown(value: str) -> None:
    _log.warning("WANDB_MODE=%s is unknown (known: online, offline, disabled): W&B is off", value)


@contextmanager
def hide_identity(wanted: bool = True) -> Iterator[None]:
    """Within the block, remove W&B's environment variables except those that it needs, because the others may identify a user.

    W&B reads them once per process and sends some with each request, so its service is restarted before and after the block.
    """
    hidden = {name: value for name, value in os.environ.items() if wanted and name[:6] == "WANDB_" and name[6:] not in _NEEDED}
    if hidden:
        release()
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        if hidden:
            release()
        os.environ.update(hidden)


def installed() -> bool:
    """Whether W&B can be imported; it is not imported to find out."""
    return importlib.util.find_spec("wandb") is not None


def folder_of(root: Path) -> Path:
    """The folder in which W&B writes: `WANDB_DIR`, otherwise the repository."""
    return Path(os.environ.get("WANDB_DIR") or root)


def server() -> str:
    """The URL of the server that W&B would use, from the environment or its settings."""
    try:
        import wandb

        return str(wandb.setup().settings.base_url)
    except Exception:  # noqa: BLE001 - what is wrong with it, the attempt to reach it will say
        return os.environ.get("WANDB_BASE_URL", "")


def has_key() -> bool:
    """Whether W&B will find credentials: in the environment, in its settings, or in `.netrc`, where `wandb login` puts them."""
    try:
        import wandb

        settings = wandb.setup().settings
        if os.environ.get("WANDB_API_KEY") or settings.api_key or settings.identity_token_file:
            return True
        places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
        found = [path for path in (Path(place).expanduser() for place in places) if path.is_file()]
        host = urlsplit(settings.base_url).netloc
        return any(netrc.netrc(path).authenticators(host) is not None for path in found)
    except Exception as error:  # noqa: BLE001 - of a lookup that fails W&B says more when it is needed
        _log.debug("the W&B API key cannot be read: %s", brief(error))
        return False


def prepare(folder: Path, staging: Path | None = None) -> None:
    """Set the variables that W&B reads when it is first used. Its default folders are in the home, which may be read-only.

    Args:
        folder: W&B writes below `<folder>/wandb`.
        staging: folder for copies of artifacts, W&B's cache and its logs; None means a folder below `<folder>/wandb`.
    """
    os.environ.update(_QUIET)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ.setdefault(name, str(staging or folder / "wandb" / "artifacts"))


def start(mode: Attempt, run: StageRun, tracking: Tracking, folder: Path, **settings: Any) -> Any:
    """Call `wandb.init` with bounded waits and without console capture; exceptions of W&B are passed on.

    Args:
        mode: online or offline.
        run: the W&B run; a run that W&B already has is continued.
        tracking: project and entity.
        folder: W&B writes below `<folder>/wandb`.
        settings: further settings of W&B.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    limits = {"init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT}
    return wandb.init(
        mode=mode,
        settings=wandb.Settings(**limits, console="off", silent=True, x_save_requirements=False, **settings),
        project=tracking.project,
        entity=tracking.entity,
        id=run.id,
        name=run.title,
        group=run.group,
        job_type=run.job_type,
        tags=list(run.tags),
        config=dict(run.config),
        allow_val_change=True,
        resume="allow",
        dir=str(folder),
    )


def release() -> None:
    """End W&B's service, in which an init that timed out would continue and block the run id for the next attempt.

    W&B itself waits without limit for the service, which may wait for a dead server; after `FINISH_TIMEOUT` the service is
    killed.
    """
    ender = threading.Thread(target=_teardown, name="end of W&B", daemon=True)
    ender.start()
    ender.join(FINISH_TIMEOUT)
    if ender.is_alive():
        for process in service():
            os.kill(process, signal.SIGKILL)
        ender.join(FINISH_TIMEOUT)


def service() -> list[int]:
    """Process ids of W&B's services that this process started."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text().strip() == "wandb-core"]


def _teardown() -> None:
    try:
        import wandb

        wandb.teardown()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is only tidied up after; it exits with the service's code
        _log.debug("W&B's service did not end: %s", brief(error))


def brief(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
