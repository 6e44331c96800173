"""What it means to users that a bucket didn't serve a request."""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator


class Unserved(OSError):
    """A bucket has not served a request, though its object may be there. `code` is the status of HTTP, 0 if
    there was no answer."""

    def __init__(self, text: str, code: int = 0):
        super().__init__(text)
        self.errno, self.code = errno.EIO, code


unanswered = threading.Event()  # set while the last request wasn't answered


@contextlib.contextmanager
def understood(path: os.PathLike[str]) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise where a bucket isn't served into errors that users understand.
    Other errors, and those about a path of a disk, stay as they are."""
    try:
        yield
    except Exception as error:
        refused = isinstance(error, OSError) and "Forbidden" in str(error)
        if os.fspath(path).startswith("gs://") and (
            refused or of_network(error) or _UNSERVED.search(str(error))
        ):
            raise failure(path, error) from error
        raise


# What TensorStore says of a request that wasn't served, and never of an object that is damaged.
_UNSERVED = re.compile(
    r"retry attempts failed|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED"
)


def of_network(error: Exception) -> bool:
    """Whether an error is one of the libraries that ask a bucket."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google", "requests", "fsspec")


def failure(path: os.PathLike[str], error: Exception, seconds: float = 0.0) -> Unserved:
    """What an error of a request means to the user."""
    code = getattr(error, "code", None)
    found = re.search(r"http_response_code='(\d+)'", str(error))  # of TensorStore
    code = int(code) if str(code).isdigit() else int(found[1]) if found else 0
    said = (str(error).strip() or type(error).__name__).splitlines()
    if code in (401, 403) or "Forbidden" in said[0]:
        told = ("permission is denied; give the account roles/storage.objectUser on the bucket, or log in "
                "with another: gcloud auth application-default login")  # fmt: skip
    elif type(error).__module__.startswith("google.auth"):
        told = "no credentials are found; log in: gcloud auth application-default login"
    elif code == 429:
        told = "the storage refuses so many requests (429); write less often, or ask for a higher quota"
    elif code >= 500:
        told = f"the storage can't serve it now ({code}); try again later"
    elif code:
        told = f"the storage refuses it ({said[-1]})"
    elif isinstance(error, TimeoutError) or type(error).__name__ == "FSTimeoutError":
        told = f"there was no answer within {seconds:.0f} s; look at the network and try again"
    else:
        told = f"the storage can't be reached ({said[0]:.120}); look at the network and try again"
    if not code or code >= 500:
        unanswered.set()
    return Unserved(f"{path}: {told}", code)
