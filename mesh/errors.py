"""Every error that gossipmesh raises on purpose. Anything else that escapes is a bug.

A message says what happened and what to do about it; it is shown to people without a traceback.
"""


class MeshError(Exception):
    """Base of all errors of this library; catch this one."""


def first_of(error: BaseException) -> BaseException:
    """The first error in a group of groups, as trio's nurseries raise them; or the error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class UsageError(MeshError):
    """The caller asked for something that cannot be: the message says what to change."""


class NodeNotRunning(MeshError):
    """No node answers on this machine (the `mesh` command exits with 3)."""


class IdentityError(MeshError):
    """A token, key or certificate is missing, damaged or of another mesh."""


class PeersMissing(MeshError, TimeoutError):
    """wait_for_peers() ran out of time."""


class StreamLost(MeshError):
    """A connection ended: reset, end of file, or no progress. What was in doubt can be resumed."""


class PeerTimeout(StreamLost):
    """A peer accepted a connection, then did not do its part in time."""


class ScriptFailed(MeshError):
    """A script that was simulated ended with an error: the message is its traceback."""

    def __init__(self, message: str, code: int) -> None:
        """`code`: what its process would have ended with."""
        super().__init__(message)
        self.code = code


class ProtocolError(MeshError):
    """A rule of the protocol was broken; see the two children for by whom."""


class LocalProtocolError(ProtocolError):
    """We broke a rule: a bug in this library."""


class RemoteProtocolError(ProtocolError):
    """A peer broke a rule: its connection is closed and counted, the node lives on."""


class NotFinite(RemoteProtocolError):
    """Numbers that are NaN, infinite or absurdly large were refused before they touched anything."""


class ConnectionRefused(StreamLost):
    """The machine answers, and nobody listens there: the process is gone."""
