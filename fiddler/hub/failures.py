"""What can go wrong at the hub, as one sentence and one hint each."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fiddler.errors import FiddlerError, HubError
from fiddler.hub.names import HubName, suggestion
from fiddler.hub.options import HubOptions

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def explained(name: HubName, hub: HubOptions) -> Iterator[None]:
    """Turn the library's exceptions into :class:`HubError`; other errors pass through."""
    try:
        yield
    except FiddlerError:
        raise
    except Exception as error:
        said = _http_failure(error, name, hub) or _local_failure(error, name, hub)
        if said is None:
            raise
        raise said from error


def is_unreachable(error: Exception) -> bool:
    """Whether the hub did not answer, or answered that it cannot."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, httpx2.TransportError)


def not_cached(name: HubName, hub: HubOptions) -> HubError:
    """The error for a model that must come from the cache and is not there."""
    return HubError(
        f"{name} is not in the cache {hub.cache}, and nothing may be downloaded offline",
        hint=f"run once without --offline and HF_HUB_OFFLINE: fiddler pull {name}",
    )


def _http_failure(error: Exception, name: HubName, hub: HubOptions) -> HubError | None:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():  # a RepositoryNotFoundError too, so it comes first
            return HubError(
                f"{name.repo} is gated: its owner must let you in",
                hint=f"ask at {hub.site}/{name.repo}, then pass --token or set HF_TOKEN",
            )
        case errors.RepositoryNotFoundError():
            return _no_such_model(name, hub)
        case errors.RevisionNotFoundError():
            return HubError(
                f"{name.repo} has no revision {name.revision or 'main'}",
                hint=f"its branches and tags are listed at {hub.site}/{name.repo}/tree/main",
            )
        case errors.DisabledRepoError():
            return HubError(f"{name.repo} was disabled on the hub")
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            if "Invalid credentials" not in str(error):  # mirrors say no more than 401
                return _no_such_model(name, hub)
            return HubError(
                "the hub does not accept the access token",
                hint="check --token, HF_TOKEN, or the stored login (hf auth login)",
            )
        case errors.HfHubHTTPError() if error.response.status_code == 429:
            return HubError("the hub asks for a pause: too many requests", hint="try again later")
        case errors.HfHubHTTPError():
            return HubError(
                f"the hub refuses {name} with HTTP status {error.response.status_code}"
                f"{_server_message(error)}",
                hint="run the same command again; it continues where it stopped",
            )
    return None


def _no_such_model(name: HubName, hub: HubOptions) -> HubError:
    return HubError(
        f"the hub has no model {name.repo}, or it is private{suggestion(name.repo, hub.cache)}",
        hint="check the spelling; a private model needs --token or HF_TOKEN",
    )


def _server_message(error: Exception) -> str:
    message = getattr(error, "server_message", None)
    return f": {message.splitlines()[0]}" if message else ""


def _local_failure(error: Exception, name: HubName, hub: HubOptions) -> HubError | None:
    import httpx2
    from huggingface_hub import errors

    match error:
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return not_cached(name, hub)
        case errors.HFValidationError():
            return HubError(f"{name.repo} cannot be a model's name: {error}")
        case httpx2.HTTPError():
            return HubError(
                f"{hub.site} cannot be reached: {str(error) or type(error).__name__}",
                hint="run the same command again when the connection is back; it continues where"
                " it stopped",
            )
        case OSError() if error.errno in _UNWRITABLE:
            return HubError(
                f"the cache {hub.cache} cannot be written: {error.strerror}",
                hint="set HF_HOME to a folder of yours",
            )
    return None
