"""Tokens, papers, and what TLS makes of them; the last part asks openssl, which shares no code of ours."""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh import identity, wire
from mesh.core.address import Address
from mesh.core.membership import INCARNATION_BLOCK
from mesh.core.messages import (
    Hello,
)
from mesh.disk import write_whole
from mesh.errors import IdentityError, MeshError, UsageError
from mesh.identity import (
    create_mesh,
    format_token,
    is_member,
    join_mesh,
    leave_mesh,
    load,
    node_of,
    parse_token,
    read_token,
    rename,
)
from mesh.launch import make_mesh_if_none
from mesh.memory import Memory
from mesh.settings import NodeSettings
from mesh.storage import StateDirectory, private_directory
from tests.helpers import DEADLINE_S, Host, until

SEEDED = settings(derandomize=True, deadline=None, max_examples=100)
secrets = st.binary(min_size=16, max_size=16)
OTHER = format_token(b"another mesh....")

# ----------------------------------------------------------------------------------------- tokens


@SEEDED
@given(secrets)
def test_a_token_carries_its_secret(secret):
    token = format_token(secret)
    assert parse_token(token) == secret
    assert token.startswith("mesh1-")
    assert token.isascii()
    assert len(token) == 38


@SEEDED
@given(secrets)
def test_a_token_survives_what_pasting_does_to_it(secret):
    token = format_token(secret)
    pasted = f"  {token[:20].upper()}\n {token[20:]}\n"
    assert parse_token(pasted) == secret


@SEEDED
@given(secrets, st.integers(6, 37), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_one_mistyped_character_is_refused(secret, place, typed):
    token = format_token(secret)
    mistyped = token[:place] + typed + token[place + 1 :]
    if mistyped != token:
        with pytest.raises(UsageError, match="mesh token"):
            parse_token(mistyped)


@SEEDED
@given(secrets, st.integers(0, 37))
def test_a_token_that_was_cut_is_refused(secret, length):
    with pytest.raises(UsageError, match="mesh token"):
        parse_token(format_token(secret)[:length])


@SEEDED
@given(secrets, st.integers(6, 36))
def test_two_swapped_characters_are_refused(secret, place):
    token = format_token(secret)
    swapped = token[:place] + token[place + 1] + token[place] + token[place + 2 :]
    if swapped != token:
        with pytest.raises(UsageError):
            parse_token(swapped)


@SEEDED
@given(st.text(max_size=60))
def test_other_text_is_no_token(text):
    with pytest.raises(UsageError):
        parse_token(text)
    with pytest.raises(UsageError):
        parse_token("mesh1-" + text)


def test_two_meshes_have_two_secrets(tmp_path):
    tokens = {create_mesh(tmp_path / str(n)) for n in range(8)}
    assert len(tokens) == 8


# ------------------------------------------------------------------------------------- membership


def files(state):
    return sorted(path.name for path in state.iterdir())


def test_one_token_gives_the_same_authority_on_every_machine(tmp_path):
    token = create_mesh(tmp_path / "a")
    join_mesh(tmp_path / "b", token)
    join_mesh(tmp_path / "other", OTHER)
    authorities = [(tmp_path / n / "ca.pem").read_bytes() for n in ("a", "b", "other")]
    assert authorities[0] == authorities[1] != authorities[2]
    assert load(tmp_path / "a").mesh == load(tmp_path / "b").mesh != load(tmp_path / "other").mesh


def test_the_authority_of_a_token_never_changes(tmp_path):
    """A new version that derived other keys would split every mesh that exists."""
    join_mesh(tmp_path, format_token(bytes(range(16))))
    digest = hashlib.sha256((tmp_path / "ca.pem").read_bytes()).hexdigest()
    assert (load(tmp_path).mesh, digest[:16]) == ("fnjvkozs", "1067af4a5dab5c42")


def test_a_node_id_is_the_hash_of_the_key_that_its_certificate_carries(tmp_path):
    create_mesh(tmp_path)
    certificate = x509.load_pem_x509_certificate((tmp_path / "node.pem").read_bytes())
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    expected = base64.b32encode(hashlib.sha256(spki).digest()).decode().rstrip("=").lower()
    assert load(tmp_path).node == expected
    assert node_of(certificate.public_bytes(serialization.Encoding.DER)) == expected
    assert len(expected) == 52


def test_every_node_has_an_id_of_its_own(tmp_path):
    nodes = {join_mesh(tmp_path / str(n), OTHER).node for n in range(8)}
    assert len(nodes) == 8


def test_a_mesh_tells_its_members_by_a_tag_that_others_cannot_make(tmp_path):
    token = create_mesh(tmp_path / "a")
    a, b = load(tmp_path / "a"), join_mesh(tmp_path / "b", token)
    other = join_mesh(tmp_path / "other", OTHER)
    assert a.beacon("instance") == b.beacon("instance") != other.beacon("instance")
    assert a.beacon("instance") != a.beacon("instancf")


def test_joining_makes_a_member_with_a_name(tmp_path):
    joined = join_mesh(tmp_path, OTHER, "workbench")
    assert is_member(tmp_path)
    assert (joined.name, joined.node) == ("workbench", load(tmp_path).node)


def test_joining_twice_changes_nothing(tmp_path):
    token = create_mesh(tmp_path / "a")
    first = join_mesh(tmp_path / "b", token, "b")
    papers = (tmp_path / "b" / "node.pem").read_bytes()
    assert join_mesh(tmp_path / "b", token) == first
    assert (tmp_path / "b" / "node.pem").read_bytes() == papers
    assert join_mesh(tmp_path / "a", token) == load(tmp_path / "a")
    assert read_token(tmp_path / "a") == token


def test_joining_again_under_another_name_renames(tmp_path):
    join_mesh(tmp_path, OTHER, "old")
    assert join_mesh(tmp_path, OTHER, "new").name == "new"
    assert rename(tmp_path, "newer").name == "newer"


def test_a_member_of_one_mesh_cannot_join_another(tmp_path):
    create_mesh(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(UsageError, match="mesh leave"):
        join_mesh(tmp_path, OTHER)
    with pytest.raises(UsageError, match="already"):
        create_mesh(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_leaving_forgets_the_mesh_and_keeps_the_key(tmp_path):
    before = join_mesh(tmp_path, OTHER)
    assert leave_mesh(tmp_path) is None
    assert files(tmp_path) == ["node.pem"]
    with pytest.raises(IdentityError, match="mesh join"):
        load(tmp_path)
    create_mesh(tmp_path)
    assert load(tmp_path).node == before.node
    assert load(tmp_path).mesh != before.mesh


def test_leaving_gives_the_token_back_where_the_mesh_was_made(tmp_path):
    token = create_mesh(tmp_path)
    assert leave_mesh(tmp_path) == token
    assert files(tmp_path) == ["node.pem"]


def test_who_is_in_no_mesh_cannot_leave_it(tmp_path):
    with pytest.raises(IdentityError, match="no mesh"):
        leave_mesh(tmp_path)


def test_who_joined_has_forgotten_the_token(tmp_path):
    secret = bytes(range(16))
    join_mesh(tmp_path, format_token(secret))
    assert "token" not in files(tmp_path)
    kept = b"".join((tmp_path / name).read_bytes() for name in files(tmp_path))
    authority = identity._authority_key(secret).private_bytes_raw()
    for spelling in (secret, authority):
        for written in (spelling, spelling.hex().encode(), base64.b64encode(spelling)):
            assert written not in kept
    with pytest.raises(IdentityError, match="machine that made the mesh"):
        read_token(tmp_path)


def test_a_token_left_by_a_half_made_mesh_is_not_taken_for_that_of_the_mesh_joined(tmp_path):
    write_whole(tmp_path / "token", format_token(b"never made......").encode())
    join_mesh(tmp_path, OTHER)
    with pytest.raises(IdentityError, match="machine that made the mesh"):
        read_token(tmp_path)


@pytest.mark.parametrize("name", ["", " a", "a\n", "a" * 33, "\ud800"])
def test_a_name_that_no_table_could_show_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UsageError, match="name"):
        rename_or_join(tmp_path / "state", name)


def rename_or_join(state, name):
    """An empty name means the default when joining; it is none when renaming."""
    if name:
        try:
            join_mesh(state, OTHER, name)
        finally:
            assert not state.exists() or files(state) == []
    else:
        join_mesh(state, OTHER)
        rename(state, name)


# ------------------------------------------------------------------------------------------ files


def test_every_file_is_0600_in_a_0700_directory(tmp_path):
    before = os.umask(0)  # the most careless one
    try:
        create_mesh(tmp_path / "state")
        directory = StateDirectory(tmp_path / "state")
        directory.lock()
        directory.memory.reserve_incarnations()
        directory.memory.store_peers([Address("127.0.0.1", 1)])
        directory.write_running(load(tmp_path / "state").node, "a", "control.sock")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state").iterdir()}
    directory.unlock()
    assert len(modes) == 8
    assert set(modes.values()) == {0o600}, modes
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_a_directory_that_others_can_read_is_closed_to_them(tmp_path):
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    private_directory(state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path):
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(MeshError, match="another user"):
        private_directory(tmp_path)


DAMAGE = {
    "empty": b"",
    "zeros": bytes(300),
    "text": b"no such thing",
    "not UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("file", ["mesh.json", "node.pem", "ca.pem"])
@pytest.mark.parametrize("how", [*DAMAGE, "half", "missing", "another's"])
def test_damaged_papers_are_an_identity_error_that_says_what_to_do(tmp_path, file, how):
    create_mesh(tmp_path / "a")
    join_mesh(tmp_path / "other", OTHER)
    path = tmp_path / "a" / file
    match how:
        case "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "missing":
            path.unlink()
        case "another's":
            path.write_bytes((tmp_path / "other" / file).read_bytes())
        case _:
            path.write_bytes(DAMAGE[how])
    if how == "another's":
        papers_or_refused(tmp_path / "a")
        return
    with pytest.raises(IdentityError, match=r"mesh (leave|join)"):
        papers(tmp_path / "a")
    if file != "mesh.json":
        leave_mesh(tmp_path / "a")
        join_mesh(tmp_path / "a", OTHER)
        papers(tmp_path / "a")


def papers(state):
    load(state).context(server=True)
    return load(state).context(server=False)


def papers_or_refused(state):
    try:
        papers(state)
    except IdentityError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "about",
    [
        "[]",
        "{}",
        "null",
        '{"mesh": "m", "name": "", "beacon_key": "00"}',
        '{"mesh": "m", "name": 7, "beacon_key": "00"}',
        '{"mesh": "m", "name": "a", "beacon_key": "no hex"}',
        '{"mesh": "m", "name": "a", "beacon_key": null}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_a_mesh_file_with_other_contents_is_an_identity_error(tmp_path, about):
    create_mesh(tmp_path)
    (tmp_path / "mesh.json").write_text(about)
    with pytest.raises(IdentityError, match="mesh leave"):
        load(tmp_path)


@settings(SEEDED, max_examples=100)
@given(st.sampled_from(["mesh.json", "node.pem", "ca.pem"]), st.data())
def test_papers_with_a_few_flipped_bits_are_read_or_refused(tmp_path_factory, file, data):
    state = tmp_path_factory.getbasetemp() / "flipped"
    if not state.exists():
        join_mesh(state, OTHER, "flipped")
    whole = (state / file).read_bytes()
    body = bytearray(whole)
    inside = file != "mesh.json" and data.draw(st.booleans())
    if inside:
        # Below the base64, where a parser of certificates would see it.
        blocks = list(re.finditer(rb"-----\n([^-]+)-----END", whole))
        start, end = blocks[data.draw(st.integers(0, len(blocks) - 1))].span(1)
        body = bytearray(base64.b64decode(whole[start:end]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place] ^= 1 << data.draw(st.integers(0, 7))
    if inside:
        body = whole[:start] + base64.encodebytes(bytes(body)) + whole[end:]
    try:
        (state / file).write_bytes(body)
        papers_or_refused(state)
    finally:
        (state / file).write_bytes(whole)


@pytest.mark.parametrize("damage", [b"", b"mesh1-aaaa", b"\xff\xfe"])
def test_a_damaged_token_is_never_handed_out_and_can_be_left_behind(tmp_path, damage):
    create_mesh(tmp_path)
    (tmp_path / "token").write_bytes(damage)
    with pytest.raises(IdentityError, match="damaged"):
        read_token(tmp_path)
    leave_mesh(tmp_path)
    assert not is_member(tmp_path)


def test_an_unreadable_certificate_of_a_peer_is_an_identity_error(tmp_path):
    join_mesh(tmp_path, OTHER)
    with pytest.raises(IdentityError):
        node_of(b"not DER")
    with pytest.raises(IdentityError, match="Ed25519"):
        node_of(certificate_for(ec.generate_private_key(ec.SECP256R1()).public_key()))


def certificate_for(public):
    """A certificate that the authority of OTHER signed for some key, as one who has the token can."""
    name = x509.Name([])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(public)
    builder = builder.serial_number(1).not_valid_before(identity.VALID_FROM)
    builder = builder.not_valid_after(identity.VALID_UNTIL)
    signed = builder.sign(identity._authority_key(parse_token(OTHER)), None)
    return signed.public_bytes(serialization.Encoding.DER)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    """The kernel refuses what is larger than the limit half-way through, as a full disk does."""
    path = tmp_path / "incarnation"
    write_whole(path, b"1025")
    code = (
        "import pathlib, resource, sys\n"
        "from mesh.errors import MeshError\n"
        "from mesh.disk import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_whole(pathlib.Path(sys.argv[1]), b'x' * 100_000)\n"
        "except MeshError as error:\n"
        "    print(error)\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert "cannot write" in completed.stdout
    assert path.read_bytes() == b"1025"
    assert files(tmp_path) == ["incarnation"]


def test_a_write_that_does_not_reach_the_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "peers.json"
    write_whole(path, b"[]")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MeshError, match="No space left"):
        write_whole(path, b"other")
    assert path.read_bytes() == b"[]"
    assert files(tmp_path) == ["peers.json"]


def test_a_mesh_that_could_not_be_written_whole_was_not_made(tmp_path, monkeypatch):
    """At every write that may fail; the next attempt succeeds."""
    for allowed in range(5):
        state = tmp_path / str(allowed)
        left = allowed

        def some(path, data):
            nonlocal left
            if not left:
                raise MeshError("cannot write")
            left -= 1
            write_whole(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(identity, "write_whole", some)
            if allowed == 4:
                create_mesh(state)
            else:
                with pytest.raises(MeshError):
                    create_mesh(state)
                assert not is_member(state)
        if allowed < 4:
            create_mesh(state)
        assert parse_token(read_token(state))
        papers(state)


@pytest.mark.parametrize("second", ["init", "run", "join", "leave"])
def test_two_commands_at_once_on_one_directory_follow_each_other(
    tmp_path, monkeypatch, capsys, second
):
    """The second begins between two files of the first, and goes on until it waits or is through."""
    lock, write = identity.alone_in, write_whole
    told, waits_or_done = [], threading.Event()

    @contextlib.contextmanager
    def seen_waiting(state):
        if threading.current_thread() is other:
            directory = os.open(private_directory(state), os.O_RDONLY)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits_or_done.set()
            os.close(directory)
        with lock(state):
            yield

    def act():
        try:
            match second:
                case "init":
                    told.append(create_mesh(tmp_path))
                case "run":
                    make_mesh_if_none(NodeSettings(state=tmp_path))
                case "join":
                    told.append(join_mesh(tmp_path, OTHER))
                case "leave":
                    leave_mesh(tmp_path)
        except MeshError as error:
            told.append(error)
        waits_or_done.set()

    other = threading.Thread(target=act)

    def interrupted(path, data):
        if path.name == ("mesh.json" if second == "leave" else "ca.pem") and not other.ident:
            if second == "leave":
                write(path, data)
            other.start()
            assert waits_or_done.wait(DEADLINE_S)
        write(path, data)

    monkeypatch.setattr(identity, "alone_in", seen_waiting)
    monkeypatch.setattr(identity, "write_whole", interrupted)
    token = create_mesh(tmp_path)
    other.join(DEADLINE_S)
    if second == "leave":
        assert (told, is_member(tmp_path)) == ([], False)
        create_mesh(tmp_path)
    else:
        assert read_token(tmp_path) == token
    identity.check_identity(tmp_path)
    match second:
        case "run":
            assert f"mesh join {token}\n" in capsys.readouterr().err, "the one that there is"
        case "init" | "join":
            assert [type(error) for error in told] == [UsageError]


def test_a_second_node_cannot_use_a_state_directory(tmp_path):
    first, second = StateDirectory(tmp_path), StateDirectory(tmp_path)
    first.lock()
    with pytest.raises(UsageError, match="--state"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_a_state_directory_is_free_again_when_its_node_is_killed(tmp_path):
    code = (
        "import os, pathlib, signal, sys\n"
        "from mesh.storage import StateDirectory\n"
        "StateDirectory(pathlib.Path(sys.argv[1])).lock()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -9
    directory = StateDirectory(tmp_path)
    directory.lock()
    directory.unlock()


def test_incarnations_only_rise_from_start_to_start(tmp_path):
    directory = Memory(tmp_path)
    starts = [directory.reserve_incarnations() for _ in range(3)]
    assert starts == sorted(set(starts))
    directory.store_incarnation(starts[-1] + 10_000)
    assert directory.reserve_incarnations() == starts[-1] + 10_000


@pytest.mark.parametrize("damage", [b"", b"-5", b"many", b"9" * 5000, b"\xff"])
def test_a_damaged_incarnation_begins_above_what_a_node_can_have_used(tmp_path, damage):
    (tmp_path / "incarnation").write_bytes(damage)
    used_before = 3000 * INCARNATION_BLOCK
    assert Memory(tmp_path).reserve_incarnations() > used_before


def test_with_neither_file_nor_clock_incarnations_begin_at_one(tmp_path):
    memory = Memory(tmp_path, wall_clock=lambda: 86_400.0)  # a Raspberry Pi in 1970
    assert memory.reserve_incarnations() == 1


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1, null, [], 7]", b"\xff", b"[" * 100_000])
def test_a_damaged_cache_of_peers_is_an_empty_one(tmp_path, damage):
    (tmp_path / "peers.json").write_bytes(damage)
    assert Memory(tmp_path).peers() == []


def test_remembered_peers_are_those_that_were_stored(tmp_path):
    addresses = [Address("192.0.2.1", 7710), Address("2001:db8::1", 65535)]
    Memory(tmp_path).store_peers(addresses)
    assert Memory(tmp_path).peers() == addresses
    assert json.loads((tmp_path / "peers.json").read_bytes())[1] == "[2001:db8::1]:65535"


# ---------------------------------------------------------------------------------------- openssl


@pytest.fixture(scope="module")
def host():
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def node(host):
    token = host.member("server")
    host.member("client", token)
    host.member("stranger")
    return host.up("server")


def openssl(*arguments, data=b""):
    return subprocess.run(
        ["openssl", *map(str, arguments)],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )


def client(node, host, *flags, who=None):
    """`openssl s_client` with somebody's papers; it ends when the handshake has."""
    state = host.state(who or "client")
    papers = ["-cert", state / "node.pem", "-key", state / "node.pem"] if who else []
    authority = ["-CAfile", host.state("client") / "ca.pem"]
    where = ["-connect", f"127.0.0.1:{node.port}", "-alpn", "gossipmesh", "-x509_strict"]
    return ["s_client", *where, *authority, *papers, *flags]


def test_a_member_is_served_over_tls_1_3(host, node):
    completed = openssl(*client(node, host, "-brief", "-verify_return_error", who="client"))
    assert completed.returncode == 0, completed.stderr
    assert b"Protocol version: TLSv1.3" in completed.stderr
    assert b"Verification: OK" in completed.stderr


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_1", "-tls1"])
def test_older_versions_of_tls_are_refused(host, node, version):
    completed = openssl(*client(node, host, version, "-cipher", "ALL:@SECLEVEL=0", who="client"))
    assert completed.returncode != 0
    assert b"alert protocol version" in completed.stderr
    assert node.lives()


def test_the_chain_of_a_node_passes_openssl_verify_strictly(host, node):
    completed = openssl(*client(node, host, "-showcerts", who="client"))
    sent = re.findall(
        rb"-----BEGIN CERT.*?-----END CERTIFICATE-----\n", completed.stdout, re.DOTALL
    )
    leaf, authority = host.root / "leaf.pem", host.state("client") / "ca.pem"
    leaf.write_bytes(sent[0])
    assert authority.read_bytes() in sent[1:], "openssl sends the authority along; nobody needs it"
    for purpose in ("sslserver", "sslclient"):
        strict = ("verify", "-x509_strict", "-purpose", purpose, "-CAfile", authority)
        verified = openssl(*strict, leaf)
        assert verified.returncode == 0, verified.stderr
    alone = openssl("verify", "-x509_strict", "-CAfile", host.state("stranger") / "ca.pem", leaf)
    assert alone.returncode != 0
    text = openssl("x509", "-in", leaf, "-noout", "-text").stdout
    assert b"CA:FALSE" in text
    assert b"ED25519" in text
    subject = openssl("x509", "-in", leaf, "-noout", "-subject").stdout.decode()
    assert subject.strip().endswith(node.id)


def test_a_member_of_a_mesh_cannot_sign_for_it(host):
    """A node's own certificate must not pass as an authority."""
    state = host.state("client")
    key = Ed25519PrivateKey.generate()
    issuer_pem = (state / "node.pem").read_bytes()
    issuer = x509.load_pem_x509_certificate(issuer_pem)
    builder = x509.CertificateBuilder().subject_name(issuer.subject).issuer_name(issuer.subject)
    builder = builder.public_key(key.public_key()).serial_number(7)
    builder = builder.not_valid_before(identity.VALID_FROM)
    builder = builder.not_valid_after(identity.VALID_UNTIL)
    signed = builder.sign(serialization.load_pem_private_key(issuer_pem, None), None)
    forged = host.root / "forged.pem"
    forged.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    chain = ("-untrusted", state / "node.pem", "-CAfile", state / "ca.pem", forged)
    assert openssl("verify", "-x509_strict", *chain).returncode != 0
    assert openssl("verify", *chain).returncode != 0


def served(arguments, wanted, more=lambda data: 0):
    """The first bytes of application data that the node sends, at most `wanted`, and then as many as
    `more` says of them; then it ends."""
    with subprocess.Popen(
        ["openssl", *map(str, arguments), "-quiet"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        data = process.stdout.read(wanted)
        data += process.stdout.read(more(data))
        process.kill()
        return data, process.stderr.read()


def test_a_member_is_greeted(host, node):
    member = client(node, host, who="client")
    data, _ = served(member, wire.PREFIX_BYTES, lambda prefix: wire.parse_prefix(prefix)[0])
    hello = wire.decode(data[wire.PREFIX_BYTES :])
    assert isinstance(hello, Hello)
    assert hello.member.node == node.id


def test_without_a_certificate_nobody_gets_a_byte(host, node):
    before = node.refused("tls")
    data, said = served(client(node, host), 1)
    assert data == b""
    assert b"alert certificate required" in said
    until(lambda: node.refused("tls") > before, "it is counted")


def test_a_certificate_of_another_mesh_gets_no_byte(host, node):
    before = node.refused("certificate")
    data, said = served(client(node, host, who="stranger"), 1)
    assert data == b""
    assert b"alert unknown ca" in said
    until(lambda: node.refused("certificate") > before, "it is counted")


def test_a_certificate_that_signed_itself_gets_no_byte(host, node):
    key, certificate = host.root / "self.key", host.root / "self.pem"
    subject = ("-subj", f"/CN={node.id}", "-days", "1", "-nodes")
    made = openssl(
        "req", "-x509", "-newkey", "ed25519", "-keyout", key, "-out", certificate, *subject
    )
    assert made.returncode == 0, made.stderr
    before = node.refused("certificate")
    data, _ = served([*client(node, host), "-cert", certificate, "-key", key], 1)
    assert data == b""
    until(lambda: node.refused("certificate") > before, "it is counted")


def test_another_protocol_over_tls_is_no_peer(host, node):
    """A member's certificate, but the other side speaks HTTP: the node hangs up and lives."""
    before = node.refused("protocol")
    arguments = client(node, host, "-quiet", who="client")
    openssl(*arguments, data=b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    until(lambda: node.refused("protocol") > before, "it is counted")
    assert node.status()["ok"]


def test_a_directory_that_holds_other_things_is_not_closed_to_its_users(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    shared.chmod(0o755)
    (shared / "thesis.txt").touch()
    with pytest.raises(MeshError, match="a directory of its own"):
        private_directory(shared)
    assert shared.stat().st_mode & 0o777 == 0o755
    (shared / "thesis.txt").unlink()
    assert private_directory(shared).stat().st_mode & 0o777 == 0o700
