"""Who a node is, and who belongs to its mesh: token, certificate authority, node key, TLS contexts.

A token's trip: 128 random bits, written `mesh1-...` -> HKDF -> the mesh's Ed25519 certificate
authority -> a certificate for this node's own Ed25519 key -> TLS 1.3, mutual, on every connection.
Node id = base32(SHA-256(public key)). Rules: 1. A node forgets the token after joining, unless it is
the machine that made it: a stolen device is one id and enrols nobody. 2. No check of times: a
Raspberry Pi boots in 1970, and whoever holds the token can sign any time. 3. Chains are checked
strictly, then the id is compared with the key that signed the handshake. 4. All files are 0600.
"""

import base64
import datetime
import hashlib
import hmac
import json
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.core.messages import NodeId
from mesh.disk import write_whole
from mesh.errors import IdentityError, MeshError, UsageError
from mesh.settings import check_name, default_name
from mesh.storage import alone_in

TOKEN_PREFIX = "mesh1-"
SECRET_BYTES = 16
CHECKSUM_BYTES = 4
"""20 bytes are exactly 32 base32 characters; one typing error in 4 billion passes."""

ALPN = "gossipmesh"
"""Makes a connection to any other TLS service fail in the handshake, with a reason."""

NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; the ssl module has no name for it."""

VALID_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
VALID_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
"""Fixed and long: expiry is by leaving or by a new mesh, never by a clock that may be wrong."""

UNREADABLE = (ValueError, TypeError, RecursionError, UnsupportedAlgorithm, x509.InvalidVersion)
"""What json and cryptography raise for a file that is damaged, or of a kind that is unknown here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A member's papers, as load() read them."""

    node: NodeId
    name: str
    mesh: str
    """first 8 characters of the hash of the authority's key: which mesh, for people"""
    beacon_key: bytes
    state: Path

    def beacon(self, instance: str) -> str:
        """What mDNS carries so that members recognise their mesh and others learn nothing."""
        return hmac.new(self.beacon_key, instance.encode(), hashlib.sha256).hexdigest()[:16]

    def context(self, *, server: bool) -> ssl.SSLContext:
        """TLS for one side: this node's certificate, the mesh's authority, nothing else.

        Raises IdentityError if one of them is damaged.
        """
        side = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # there are no host names: node_of() compares the key
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.verify_flags |= NO_CHECK_TIME
        try:
            context.load_verify_locations(str(self.state / "ca.pem"))
            context.load_cert_chain(str(self.state / "node.pem"))
        except OSError as error:
            raise _damaged(self.state, error) from None
        context.set_alpn_protocols([ALPN])
        if server:
            context.num_tickets = 0  # no resumption: every connection proves its key again
        return context


def node_of(certificate: bytes) -> NodeId:
    """The node id of a DER certificate whose chain TLS has checked. Raises IdentityError."""
    try:
        return _node_id(x509.load_der_x509_certificate(certificate).public_key())
    except UNREADABLE as error:
        raise IdentityError(f"a certificate that cannot be read: {error}") from None


def create_mesh(state: Path, name: str | None = None) -> str:
    """Makes a new mesh with this machine as its first member; returns the token.

    Raises UsageError if this machine is in a mesh already.
    """
    called = check_name(name or default_name())
    secret = secrets.token_bytes(SECRET_BYTES)
    token = format_token(secret)
    with alone_in(state):
        if is_member(state):
            raise UsageError(
                f"this machine is in mesh {load(state).mesh} already; "
                "`mesh token` prints its token, `mesh leave` leaves it"
            )
        _enrol(state, secret, called, token)
    return token


def join_mesh(state: Path, token: str, name: str | None = None) -> Identity:
    """Becomes a member of the token's mesh and forgets the token. Needs no connection.

    Raises UsageError for a token that cannot be one, or a machine that is in another mesh.
    """
    secret = parse_token(token)
    called = check_name(name or default_name())
    with alone_in(state):
        if not is_member(state):
            _enrol(state, secret, called, None)
        current = load(state)
        if current.mesh != _mesh_id(_authority_key(secret)):
            raise UsageError(
                f"this machine is in mesh {current.mesh}; `mesh leave` leaves it first"
            )
        return rename(state, name) if name else current


def read_token(state: Path) -> str:
    """The token, on the machine that made the mesh. Raises IdentityError elsewhere."""
    load(state)
    try:
        token = (state / "token").read_text(errors="replace")
    except OSError:
        raise IdentityError(
            "this machine joined with a token and forgot it, as it should: "
            "run `mesh token` on the machine that made the mesh"
        ) from None
    try:
        parse_token(token)
    except UsageError:
        raise IdentityError(
            f"the token in {state} is damaged: its mesh goes on, but nobody can join it any more"
        ) from None
    return token


def leave_mesh(state: Path) -> str | None:
    """Forgets the mesh; the node's key stays. Returns the token if this machine made the mesh."""
    if not is_member(state):
        raise IdentityError(f"{state} is in no mesh")
    kept = state / "token"
    with alone_in(state):
        token = kept.read_text(errors="replace") if kept.exists() else None
        try:
            for name in ("mesh.json", "ca.pem", "token", "peers.json"):
                (state / name).unlink(missing_ok=True)
        except OSError as error:
            raise MeshError(f"cannot change {state}: {error.strerror}") from None
    return token


def rename(state: Path, name: str) -> Identity:
    """Changes what this node is called from its next start on."""
    about = json.loads((state / "mesh.json").read_text())
    about["name"] = check_name(name)
    write_whole(state / "mesh.json", json.dumps(about).encode())
    return load(state)


def is_member(state: Path) -> bool:
    """Whether this state directory belongs to a mesh."""
    return (state / "mesh.json").exists()


def load(state: Path) -> Identity:
    """This machine's papers. Raises IdentityError if there are none, or they are damaged."""
    if not is_member(state):
        raise IdentityError(
            f"{state} is in no mesh yet: `mesh init` makes one, `mesh join TOKEN` joins one"
        )
    try:
        about = json.loads((state / "mesh.json").read_text())
        pem = (state / "node.pem").read_bytes()
        return Identity(
            node=_node_id(x509.load_pem_x509_certificate(pem).public_key()),
            name=check_name(about["name"]),
            mesh=str(about["mesh"]),
            beacon_key=bytes.fromhex(about["beacon_key"]),
            state=state,
        )
    except (OSError, KeyError, MeshError, *UNREADABLE) as error:
        raise _damaged(state, error) from None


def check_identity(state: Path) -> Identity:
    """load(), and whether the papers belong together. Raises IdentityError with what does not."""
    identity = load(state)
    try:
        authority = x509.load_pem_x509_certificate((state / "ca.pem").read_bytes())
        own = x509.load_pem_x509_certificate((state / "node.pem").read_bytes())
    except (OSError, *UNREADABLE) as error:
        raise _damaged(state, error) from None
    found = _node_id(authority.public_key())[:8]
    if found != identity.mesh:
        raise IdentityError(
            f"the authority in {state} is that of mesh {found}, not of {identity.mesh}: "
            "`mesh leave`, then `mesh join TOKEN`"
        )
    try:
        own.verify_directly_issued_by(authority)
    except (InvalidSignature, *UNREADABLE):
        raise IdentityError(
            f"this node's certificate is one of another mesh than {identity.mesh}: "
            "`mesh leave`, then `mesh join TOKEN`"
        ) from None
    identity.context(server=True)  # the key belongs to the certificate
    return identity


def _damaged(state: Path, error: Exception) -> IdentityError:
    return IdentityError(
        f"the identity in {state} is damaged ({error}): `mesh leave`, then `mesh join TOKEN`"
    )


def format_token(secret: bytes) -> str:
    checksum = hashlib.sha256(secret).digest()[:CHECKSUM_BYTES]
    return TOKEN_PREFIX + base64.b32encode(secret + checksum).decode().lower()


def parse_token(token: str) -> bytes:
    """The secret of a token as a person pasted it. Raises UsageError."""
    text = "".join(token.split()).lower()
    if not text.startswith(TOKEN_PREFIX):
        raise UsageError(f"a token begins with {TOKEN_PREFIX}: copy the whole line of `mesh token`")
    try:
        raw = base64.b32decode(text.removeprefix(TOKEN_PREFIX).upper())
    except ValueError:
        raw = b""
    secret, checksum = raw[:SECRET_BYTES], raw[SECRET_BYTES:]
    if len(raw) != SECRET_BYTES + CHECKSUM_BYTES or not hmac.compare_digest(
        hashlib.sha256(secret).digest()[:CHECKSUM_BYTES], checksum
    ):
        raise UsageError("the token is incomplete or mistyped: copy the whole line of `mesh token`")
    return secret


def _enrol(state: Path, secret: bytes, name: str, token: str | None) -> None:
    """Writes this node's papers, and the token where it is to be kept."""
    authority = _authority_key(secret)
    certificate = _authority_certificate(authority)
    key = _node_key(state)
    leaf = _node_certificate(key, authority, certificate)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_whole(state / "node.pem", private + leaf.public_bytes(pem))
    write_whole(state / "ca.pem", certificate.public_bytes(pem))
    about = {
        "mesh": _mesh_id(authority),
        "name": name,
        "beacon_key": _derive(secret, b"mdns beacon").hex(),
    }
    if token is not None:
        write_whole(state / "token", token.encode())
    else:
        (state / "token").unlink(missing_ok=True)  # that of a mesh made and half left before
    # Last: is_member() is true only once everything else is there.
    write_whole(state / "mesh.json", json.dumps(about).encode())


def _node_key(state: Path) -> Ed25519PrivateKey:
    """This machine's key: kept when it changes its mesh, made once."""
    try:
        key = serialization.load_pem_private_key((state / "node.pem").read_bytes(), None)
    except (OSError, *UNREADABLE):
        return Ed25519PrivateKey.generate()
    return key if isinstance(key, Ed25519PrivateKey) else Ed25519PrivateKey.generate()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=b"gossipmesh/1", info=purpose).derive(secret)


def _authority_key(secret: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_derive(secret, b"certificate authority"))


def _mesh_id(authority: Ed25519PrivateKey) -> str:
    return _node_id(authority.public_key())[:8]


def _node_id(key: object) -> NodeId:
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError("a member's key is Ed25519")
    spki = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashlib.sha256(spki).digest()
    return NodeId(base64.b32encode(digest).decode().rstrip("=").lower())


def _name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    """The same bytes on every machine: Ed25519 signatures are deterministic."""
    name = _name_of(f"gossipmesh {_mesh_id(key)}")
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, None)
    )


def _node_certificate(
    key: Ed25519PrivateKey, authority: Ed25519PrivateKey, issuer: x509.Certificate
) -> x509.Certificate:
    public = key.public_key()
    both = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    return (
        x509.CertificateBuilder()
        .subject_name(_name_of(_node_id(public)))
        .issuer_name(issuer.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("mesh.internal")]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .sign(authority, None)
    )
