"""Every error that gossipmesh raises on purpose. Anything else that escapes is a bug.

A message says what happened and what to do about it; it is shown to people without a traceback.
"""


class MeshError(Exception):
    """Base of all errors of this library; catch this one."""

    code = "error"
    """how programs know it: of the local socket's answers and of `mesh.error/1`"""
    hint = "`mesh status` shows how this machine's node is"
    """what to try where the message alone does not say it"""


def first_of(error: BaseException) -> BaseException:
    """The first error in a group of groups, as trio's nurseries raise them; or the error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class UsageError(MeshError):
    """The caller asked for something that cannot be: the message says what to change."""

    code = "usage"
    hint = "`mesh COMMAND --help` lists what there is"


class NodeNotRunning(MeshError):
    """No node answers on this machine (the `mesh` command exits with 3)."""

    code = "no_node"
    hint = "start one with `mesh up` or `mesh run SCRIPT`"


class NodeTimeout(MeshError, TimeoutError):
    """A node did not answer in time: stopped, stuck or cut off (the `mesh` command exits with 5)."""

    code = "timeout"
    hint = "is it stopped, or its machine overloaded? try again"


class NodeRefused(MeshError):
    """A node does not do that for another (the `mesh` command exits with 6)."""

    code = "refused"
    hint = "start that node with `mesh up --allow-control`"


class IdentityError(MeshError):
    """A token, key or certificate is missing, damaged or of another mesh."""


class PeersMissing(MeshError, TimeoutError):
    """wait_for_peers() ran out of time."""


class StreamLost(MeshError):
    """A connection ended: reset, end of file, or no progress. What was in doubt can be resumed."""

    errno: int = 0
    """the operating system's number of what kept a connection from opening; 0: it opened"""


class PeerTimeout(StreamLost):
    """A peer accepted a connection, then did not do its part in time."""


class ScriptFailed(MeshError):
    """A script that was simulated ended with an error: the message is its traceback."""

    code = "script"
    hint = "the traceback is the script's own"

    def __init__(self, message: str, exit_code: int) -> None:
        """`exit_code`: what its process would have ended with."""
        super().__init__(message)
        self.exit_code = exit_code


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
