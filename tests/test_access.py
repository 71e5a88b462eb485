"""The section Access: who may come in, and what for."""

from __future__ import annotations

import hashlib
from functools import partial

import pytest
from support import at_once

import moltis
from moltis import (
    SCOPES,
    Access,
    AuthenticationError,
    Caller,
    RateLimit,
    RpcError,
    Scope,
    ScramClient,
    Store,
    StoreError,
    device_caller,
    redact,
    scram_handle,
)

HERE = "127.0.0.1"
THERE = "192.0.2.7"
NODE = moltis.ConnectParams("node", client_id="n1")
MINUTE = 60.0  # s


class Clock:
    """Time that passes when the test says so, in both units that moltis uses."""

    def __init__(self):
        self.seconds = 1_700_000_000.0

    def sleep(self, seconds):
        self.seconds += seconds

    def ms(self):
        return round(self.seconds * 1000)

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "moltis.db")
    yield store
    store.close()


@pytest.fixture
def access(store, clock):
    return Access(store, clock=clock.ms, monotonic=clock.monotonic)


def code_of(caught):
    return caught.value.code


def scram(access, token, server_binding=None, client_binding=None):
    """Authenticate as a node does; return the device that the gateway then knows."""
    client = ScramClient(scram_handle(token), token, client_binding)
    server = access.scram_server(server_binding)
    client.verify(server.final(client.final(server.first(client.first()))))
    return access.devices.device_by_handle(server.username)


# --- devices --------------------------------------------------------------------------


def test_a_token_proves_its_device_in_both_forms(access):
    device, token = access.devices.create_device("Pi", "linux")
    other, _ = access.devices.create_device("Mac", "macos")
    assert token.startswith("mdt_")
    assert len(token) == 4 + 43
    assert access.devices.device_by_token(token) == device
    assert scram(access, token) == device
    assert scram(access, token, b"cert", b"cert") == device
    assert device != other


def test_no_other_token_is_accepted(access):
    access.devices.create_device("Pi")
    for token in ("", "mdt_", moltis.new_secret("mdt_"), "\0", "\ud800"):
        assert access.devices.device_by_token(token) is None
    with pytest.raises(AuthenticationError):
        scram(access, moltis.new_secret("mdt_"))


def test_the_store_holds_no_token_key_cookie_or_code(access, store, tmp_path):
    secrets = [
        access.devices.create_device("Pi")[1],
        access.join_codes.create_join_code(access.devices.create_device("Pi")[0]),
    ]
    key = access.operators.ensure_operator_key(None)
    secrets += [
        key,
        access.sign_ins.sign_in(key, HERE, "Firefox"),
        access.operators.create_key("ci", SCOPES)[1],
    ]
    store.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("moltis.db*"))
    for secret in secrets:
        assert secret.encode() not in kept
        assert secret.partition("_")[2].encode() not in kept


def test_secrets_are_cut_out_of_logs(access):
    key = access.operators.ensure_operator_key(None)
    secrets = [
        access.devices.create_device("Pi")[1],
        access.join_codes.create_join_code(access.devices.create_device("Pi")[0]),
        key,
    ]
    secrets.append(access.sign_ins.sign_in(key, HERE, "Firefox"))
    for secret in secrets:
        assert (
            redact(f"got {secret}, sorry") == f"got {secret[:3].rstrip('_')}_…, sorry"
        )


def test_a_rotated_token_opens_nothing_any_more(access):
    device, old = access.devices.create_device("Pi")
    new = access.devices.rotate_device(device)
    assert access.devices.device_by_token(old) is None
    assert access.devices.device_by_token(new).id == device.id
    assert scram(access, new).id == device.id
    with pytest.raises(AuthenticationError):
        scram(access, old)


def test_a_revoked_token_opens_nothing_any_more(access):
    device, token = access.devices.create_device("Pi")
    access.devices.revoke_device(device)
    assert access.devices.device_by_token(token) is None
    with pytest.raises(AuthenticationError):
        scram(access, token)


def test_revoking_or_rotating_nothing_is_an_error(access):
    device, _ = access.devices.create_device("Pi")
    access.devices.revoke_device(device)
    for gone in (device, device.replace(id="nobody")):
        for act in (access.devices.revoke_device, access.devices.rotate_device):
            with pytest.raises(RpcError) as caught:
                act(gone)
            assert code_of(caught) == "NOT_FOUND"


def test_a_device_is_revoked_while_it_authenticates(access):
    device, token = access.devices.create_device("Pi")
    client = ScramClient(scram_handle(token), token)
    server = access.scram_server()
    proof = client.final(server.first(client.first()))
    access.devices.revoke_device(device)
    server.final(proof)
    assert access.devices.device_by_handle(server.username) is None


def test_an_unknown_handle_gets_the_same_salt_after_a_restart(store):
    def salt():
        server = Access(store).scram_server()
        return server.first("n,,n=nobody,r=abc").split(",")[1]

    assert salt() == salt()


def test_a_device_whose_token_expires_must_connect_before_that(access, store, clock):
    device, _ = access.devices.create_device("Pi")
    token = access.devices.rotate_device(device, clock.ms() + 600_000)
    clock.sleep(599)
    assert scram(access, token).id == device.id
    clock.sleep(2)
    assert access.devices.device_by_token(token) is None
    with pytest.raises(AuthenticationError):
        scram(access, token)
    access.purge()
    assert store.devices.all(0) == []


def test_a_device_is_no_operator(access):
    device, _ = access.devices.create_device("Pi")
    caller = device_caller(device)
    assert (caller.kind, caller.id, caller.name) == ("device", device.id, "Pi")
    for scope in SCOPES:
        with pytest.raises(RpcError) as caught:
            caller.require(scope)
        assert code_of(caught) == "FORBIDDEN"
    forged = Caller("device", "d", "d", scopes=SCOPES)
    assert not any(forged.may(scope) for scope in SCOPES)


# --- join codes -----------------------------------------------------------------------


def join_code(access, name="Pi"):
    return access.join_codes.create_join_code(access.devices.create_device(name)[0])


def test_a_join_code_gives_one_machine_a_token(access):
    made, shown = access.devices.create_device("Pi", "linux")
    code = access.join_codes.create_join_code(made)
    device, token = access.join_codes.redeem_join_code(code, THERE)
    assert (device.id, device.display_name) == (made.id, "Pi")
    assert scram(access, token).id == made.id
    assert access.devices.device_by_token(shown) is None
    with pytest.raises(RpcError) as caught:
        access.join_codes.redeem_join_code(code, THERE)
    assert code_of(caught) == "NOT_FOUND"


def test_a_join_code_dies_when_the_token_beside_it_is_used(access, store, clock):
    device, token = access.devices.create_device("Pi")
    code = access.join_codes.create_join_code(device)
    store.devices.connect(device.id, NODE, THERE, clock.ms())
    with pytest.raises(RpcError) as caught:
        access.join_codes.redeem_join_code(code, THERE)
    assert code_of(caught) == "NOT_FOUND"
    assert access.devices.device_by_token(token).id == device.id


def test_of_several_machines_with_one_join_code_one_gets_a_token(access):
    for name in ("a", "b", "c"):
        redeem = access.join_codes.redeem_join_code
        ended = at_once(partial(redeem, join_code(access, name), f"192.0.2.{name}"), 4)
        tokens = [e[1] for e in ended if isinstance(e, tuple)]
        assert len(tokens) == 1
        assert access.devices.device_by_token(tokens[0]).display_name == name


def test_a_link_does_not_take_the_token_that_a_machine_has_just_come_with(
    access, store, clock, monkeypatch
):
    """Its device would be deleted ten minutes later, as one that never came."""
    made, shown = access.devices.create_device("Pi")
    code, rotate = (
        access.join_codes.create_join_code(made),
        access.devices.rotate_device,
    )

    def connect_first(*args, **options):
        assert store.devices.connect(made.id, NODE, THERE, clock.ms())
        return rotate(*args, **options)

    monkeypatch.setattr(access.devices, "rotate_device", connect_first)
    with pytest.raises(RpcError) as caught:
        access.join_codes.redeem_join_code(code, THERE)
    assert code_of(caught) == "NOT_FOUND"
    clock.sleep(700)
    access.purge()
    assert access.devices.device_by_token(shown).id == made.id


def test_of_several_browsers_with_one_link_one_is_signed_in(access):
    code = access.sign_ins.one_time_key(access.operators.ensure_operator_key(None))
    ended = at_once(partial(access.sign_ins.sign_in, code, HERE, ""))
    assert [isinstance(e, str) for e in ended].count(True) == 1


def test_of_several_keys_with_one_name_one_is_made(access):
    create = partial(access.operators.create_key, "ci", ["operator.read"])
    ended = at_once(create)
    assert [isinstance(e, tuple) for e in ended].count(True) == 1
    assert len(access.operators.keys()) == 1


def test_a_join_code_has_128_random_bits(access):
    codes = {join_code(access) for _ in range(20)}
    assert len(codes) == 20
    assert all(len(code) == len("mc_") + 22 for code in codes)


def test_a_join_code_lasts_ten_minutes(access, clock):
    early, late = (join_code(access) for _ in range(2))
    clock.sleep(599)
    access.join_codes.redeem_join_code(early, THERE)
    clock.sleep(1)
    with pytest.raises(RpcError) as caught:
        access.join_codes.redeem_join_code(late, THERE)
    assert code_of(caught) == "NOT_FOUND"


def test_a_token_that_was_fetched_and_never_used_dies(access, store, clock):
    """What a link preview fetches is worth nothing later."""
    _, token = access.join_codes.redeem_join_code(join_code(access), THERE)
    used, kept = access.join_codes.redeem_join_code(join_code(access, "Mac"), THERE)
    store.devices.connect(used.id, NODE, THERE, clock.ms())
    clock.sleep(601)
    assert access.devices.device_by_token(token) is None
    assert access.devices.device_by_token(kept).id == used.id


def test_guessing_join_codes_is_slowed_down(access):
    code = join_code(access)
    for _ in range(5):
        with pytest.raises(RpcError):
            access.join_codes.redeem_join_code("mc_guess", THERE)
    with pytest.raises(RpcError) as caught:
        access.join_codes.redeem_join_code(code, THERE)
    assert code_of(caught) == "RATE_LIMITED"
    access.join_codes.redeem_join_code(code, "192.0.2.8")


def test_guessing_join_codes_locks_nobody_out_who_has_a_key(access):
    key = access.operators.ensure_operator_key(None)
    for _ in range(6):
        with pytest.raises(RpcError):
            access.join_codes.redeem_join_code("mc_guess", THERE)
    assert access.operators.admit_operator(key, THERE)
    fail(access, THERE, 6)
    access.join_codes.redeem_join_code(join_code(access), "192.0.2.8")


# --- operator keys --------------------------------------------------------------------


def test_the_first_start_makes_a_key_that_may_do_everything(access):
    key = access.operators.ensure_operator_key(None)
    assert key.startswith("mk_")
    caller = access.operators.operator_by_key(key)
    assert caller.kind == "operator"
    assert all(caller.may(scope) for scope in SCOPES)


def test_later_starts_keep_the_key(access):
    key = access.operators.ensure_operator_key(None)
    assert access.operators.ensure_operator_key(key) == key
    assert len(access.operators.keys()) == 1


@pytest.mark.parametrize("current", [None, "", "mk_something", "\ud800"])
def test_a_key_that_opens_nothing_is_made_anew_and_its_predecessor_ends(
    access, current
):
    old = access.operators.ensure_operator_key(None)
    _, other = access.operators.create_key("ci", [Scope.READ])
    new = access.operators.ensure_operator_key(current)
    assert access.operators.operator_by_key(old) is None
    assert access.operators.operator_by_key(new).may(Scope.ADMIN)
    assert access.operators.operator_by_key(other)


def test_a_key_may_do_what_its_scopes_say(access):
    _, text = access.operators.create_key("ci", [Scope.WRITE])
    caller = access.operators.operator_by_key(text)
    allowed = {scope for scope in SCOPES if caller.may(scope)}
    assert allowed == {Scope.READ, Scope.WRITE}
    caller.require(Scope.READ)
    with pytest.raises(RpcError, match=r"ci lacks the scope operator\.admin") as caught:
        caller.require(Scope.ADMIN)
    assert code_of(caught) == "FORBIDDEN"


@pytest.mark.parametrize("scope", [Scope.READ, Scope.APPROVALS, Scope.PAIRING])
def test_a_narrow_scope_includes_no_other(access, scope):
    _, text = access.operators.create_key("ci", [scope])
    caller = access.operators.operator_by_key(text)
    assert [s for s in SCOPES if caller.may(s)] == [scope]


@pytest.mark.parametrize(
    ("name", "scopes"),
    [
        ("ci", []),
        ("ci", ["operator.everything"]),
        ("ci", [Scope.READ, ""]),
        ("  ", [Scope.READ]),
        (moltis.OWNER_NAME, [Scope.READ]),
        ("moltis", [Scope.READ]),
    ],
)
def test_a_key_needs_a_name_and_known_scopes(access, name, scopes):
    with pytest.raises(RpcError) as caught:
        access.operators.create_key(name, scopes)
    assert code_of(caught) == "INVALID_REQUEST"


def test_two_keys_have_no_name_in_common_while_both_are_good(access):
    """The audit names them.  FAULTS D12"""
    key, _ = access.operators.create_key("alice", SCOPES)
    with pytest.raises(RpcError, match="there is a key 'Alice' already") as caught:
        access.operators.create_key("Alice", SCOPES)
    assert code_of(caught) == "CONFLICT"
    access.operators.revoke_key(key.id)
    access.operators.create_key("Alice", SCOPES)


def test_a_revoked_key_opens_nothing_and_ends_its_sign_ins(access):
    key, text = access.operators.create_key("ci", SCOPES)
    cookie = access.sign_ins.sign_in(text, HERE, "Firefox")
    access.operators.revoke_key(key.id)
    assert access.operators.operator_by_key(text) is None
    assert access.sign_ins.caller_by_cookie(cookie) is None
    with pytest.raises(RpcError) as caught:
        access.operators.revoke_key(key.id)
    assert code_of(caught) == "NOT_FOUND"


def test_the_last_use_of_a_key_is_noted_once_a_minute(access, clock):
    _, text = access.operators.create_key("ci", SCOPES)
    first = clock.ms()
    access.operators.operator_by_key(text)
    clock.sleep(59)
    access.operators.operator_by_key(text)
    assert access.operators.keys()[0].last_used_at == first
    clock.sleep(1)
    access.operators.operator_by_key(text)
    assert access.operators.keys()[0].last_used_at == first + 60_000


def test_a_full_disk_locks_no_operator_out(access, store):
    _, text = access.operators.create_key("ci", SCOPES)
    cookie = access.sign_ins.sign_in(
        access.operators.ensure_operator_key(None), HERE, "Firefox"
    )
    store.settings._db.rows("PRAGMA query_only = ON")
    with pytest.raises(StoreError):
        access.devices.create_device("Pi")
    assert access.operators.operator_by_key(text)
    assert access.sign_ins.caller_by_cookie(cookie)


# --- sign-ins -------------------------------------------------------------------------


def test_a_key_is_traded_for_a_cookie(access):
    key = access.operators.ensure_operator_key(None)
    cookie = access.sign_ins.sign_in(key, THERE, "Firefox")
    caller = access.sign_ins.caller_by_cookie(cookie)
    assert caller.may(Scope.ADMIN)
    (login,) = access.sign_ins.logins()
    assert (login.id, login.address) == (caller.login_id, THERE)
    assert login.user_agent == "Firefox"
    for wrong in ("", "ms_", key, cookie + "x", login.id, "\ud800"):
        assert access.sign_ins.caller_by_cookie(wrong) is None
    assert access.operators.operator_by_key(cookie) is None


def test_a_sign_in_may_do_what_its_key_may(access):
    _, text = access.operators.create_key("guest", [Scope.READ])
    caller = access.sign_ins.caller_by_cookie(
        access.sign_ins.sign_in(text, THERE, "Firefox")
    )
    assert caller.scopes == (Scope.READ,)


def test_signing_out_ends_this_sign_in_alone(access):
    key = access.operators.ensure_operator_key(None)
    first, second = (access.sign_ins.sign_in(key, THERE, name) for name in ("a", "b"))
    login_id = access.sign_ins.caller_by_cookie(first).login_id
    assert access.sign_ins.sign_out(login_id)
    assert not access.sign_ins.sign_out(login_id)
    assert access.sign_ins.caller_by_cookie(first) is None
    assert access.sign_ins.caller_by_cookie(second)


def test_a_sign_in_ends_thirty_days_after_its_last_use(access, clock):
    day = 86400
    cookie = access.sign_ins.sign_in(
        access.operators.ensure_operator_key(None), THERE, "Firefox"
    )
    clock.sleep(29 * day)
    assert access.sign_ins.caller_by_cookie(cookie)
    clock.sleep(29 * day)
    assert access.sign_ins.caller_by_cookie(cookie)
    clock.sleep(30 * day)
    assert access.sign_ins.caller_by_cookie(cookie) is None
    assert access.sign_ins.logins() == []
    access.purge()


def test_a_key_keeps_its_newest_sign_ins(access, clock, monkeypatch):
    """A key that may only read would fill the disk, and the list of all sign-ins."""
    monkeypatch.setattr(moltis, "MAX_KEY_LOGINS", 3)
    sign_ins, key = access.sign_ins, access.operators.ensure_operator_key(None)
    other = access.operators.create_key("other", [Scope.READ])[1]
    cookie = sign_ins.sign_in(other, THERE, "of another key")
    first, second = (sign_ins.sign_in(key, THERE, "Firefox") for _ in range(2))
    clock.sleep(2 * MINUTE)
    assert sign_ins.caller_by_cookie(first)  # used later than the second
    newest = [sign_ins.sign_in(key, THERE, "a script") for _ in range(2)]
    assert sign_ins.caller_by_cookie(second) is None
    assert all(map(sign_ins.caller_by_cookie, [first, *newest, cookie]))


def test_an_endless_user_agent_is_cut(access):
    access.sign_ins.sign_in(
        access.operators.ensure_operator_key(None), THERE, "x" * 10_000
    )
    assert len(access.sign_ins.logins()[0].user_agent) < 400


# --- the audit ------------------------------------------------------------------------


def test_the_audit_says_who_did_what_from_where(access, store):
    key = access.operators.ensure_operator_key(None)
    admin = access.operators.operator_by_key(key, THERE)
    made, _ = access.operators.create_key("ci", [Scope.READ], by=admin)
    device, _ = access.devices.create_device("Pi", by=admin)
    access.devices.rotate_device(device, by=admin)
    code = access.join_codes.create_join_code(device)
    access.join_codes.redeem_join_code(code, "192.0.2.9")
    access.devices.revoke_device(device, by=admin)
    access.operators.revoke_key(made.id, by=admin)
    access.record_refused_proof("node", "no such token", "192.0.2.9")
    access.devices.create_device("Demo")
    noted = [(e.event, e.caller, e.address, e.subject) for e in store.audit.page()]
    owner = moltis.OWNER_NAME
    assert sorted(noted) == [
        ("key.created", owner, THERE, "ci (operator.read)"),
        ("key.revoked", owner, THERE, "ci"),
        ("token.created", "moltis", "", "Demo"),
        ("token.created", owner, THERE, "Pi"),
        ("token.joined", "Pi", "192.0.2.9", "Pi"),
        ("token.refused", "", "192.0.2.9", "no such token"),
        ("token.revoked", owner, THERE, "Pi"),
        ("token.rotated", owner, THERE, "Pi"),
    ]


def test_signing_in_all_day_pushes_nothing_of_others_out(access, store, monkeypatch):
    """FAULTS D11"""
    monkeypatch.setattr(moltis, "MAX_CALLER_EVENTS", 10)
    admin = access.operators.operator_by_key(access.operators.ensure_operator_key(None))
    _, text = access.operators.create_key("guest", [Scope.READ], by=admin)
    for number in range(30):
        access.sign_ins.sign_in(text, THERE, f"Firefox {number}")
        fail(access, f"192.0.2.{number}")
    counts = [(entry.event, entry.count) for entry in store.audit.page()]
    assert ("login.created", 30) in counts
    assert counts.count(("login.refused", 1)) == 10
    assert ("key.created", 1) in counts


def test_the_audit_names_the_key_and_not_only_what_it_is_called(access, store):
    """FAULTS D12: a name may be given again after its key was revoked."""
    admin = access.operators.operator_by_key(access.operators.ensure_operator_key(None))
    ids = []
    for _ in range(2):
        made, text = access.operators.create_key("alice", [Scope.PAIRING], by=admin)
        alice = access.operators.operator_by_key(text, THERE)
        access.devices.create_device("Pi", by=alice)
        access.operators.revoke_key(made.id, by=admin)
        ids.append(made.id)
    created = [e for e in store.audit.page() if e.event == "token.created"]
    assert {e.caller for e in created} == {"alice"}
    assert {e.caller_id for e in created} == set(ids)


@pytest.mark.parametrize("name", ["Owner", "MOLTIS", " owner "])
def test_no_key_is_called_as_the_owner_or_as_moltis(access, name):
    """FAULTS D12"""
    with pytest.raises(RpcError) as caught:
        access.operators.create_key(name, [Scope.READ])
    assert code_of(caught) == "INVALID_REQUEST"


# --- patience -------------------------------------------------------------------------


def fail(access, address, times=1):
    codes = []
    for _ in range(times):
        with pytest.raises(RpcError) as caught:
            access.sign_ins.sign_in("mk_wrong", address, "")
        codes.append(code_of(caught))
    return codes


def test_five_failures_a_minute_then_even_the_right_key_has_to_wait(access, clock):
    key = access.operators.ensure_operator_key(None)
    assert fail(access, THERE, 6) == ["UNAUTHORIZED"] * 5 + ["RATE_LIMITED"]
    with pytest.raises(RpcError) as caught:
        access.sign_ins.sign_in(key, THERE, "")
    assert caught.value.retry_after == MINUTE
    access.sign_ins.sign_in(key, "192.0.2.8", "")
    clock.sleep(MINUTE)
    access.sign_ins.sign_in(key, THERE, "")


def test_slow_failures_are_no_guessing(access, clock):
    for _ in range(20):
        assert fail(access, THERE) == ["UNAUTHORIZED"]
        clock.sleep(15.1)


def test_the_right_key_clears_the_record(access):
    key = access.operators.ensure_operator_key(None)
    for _ in range(3):
        assert fail(access, THERE, 4) == ["UNAUTHORIZED"] * 4
        access.sign_ins.sign_in(key, THERE, "")


def test_the_wait_doubles_up_to_an_hour_and_is_forgotten_after_one(clock):
    limit = RateLimit(clock.monotonic)
    waits = []
    for _ in range(9):
        for _ in range(5):
            limit.failed(THERE)
        waits.append(limit.retry_after(THERE) / MINUTE)
        clock.sleep(waits[-1] * MINUTE)
        assert limit.retry_after(THERE) is None
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    clock.sleep(3601)
    for _ in range(5):
        limit.failed(THERE)
    assert limit.retry_after(THERE) == MINUTE


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "127.9.9.9"]
)
def test_loopback_is_never_locked_out_with_the_right_key(access, address):
    key = access.operators.ensure_operator_key(None)
    assert fail(access, address, 7)[5:] == ["RATE_LIMITED"] * 2
    assert access.sign_ins.sign_in(key, address, "")


def test_an_ipv6_customer_is_one_address_and_an_ipv4_one_is_not_many(clock):
    limit = RateLimit(clock.monotonic)
    for number in range(5):
        limit.failed(f"2001:db8:1:2::{number}")
        limit.failed(f"::ffff:192.0.2.{number}")
    assert limit.retry_after("2001:db8:1:2:ffff::1%eth0")
    assert not limit.retry_after("2001:db8:1:3::1")
    assert not limit.retry_after("192.0.2.1")
    for _ in range(4):
        limit.failed("192.0.2.1")
    assert limit.retry_after("::ffff:192.0.2.1")


def test_what_is_no_address_is_limited_all_the_same(clock):
    limit = RateLimit(clock.monotonic)
    for _ in range(5):
        limit.failed("unix\0socket")
    assert limit.retry_after("unix\0socket")


def test_the_memory_of_failures_is_bounded(clock, monkeypatch):
    monkeypatch.setattr(moltis, "MAX_FAILING_ADDRESSES", 100)
    limit = RateLimit(clock.monotonic)
    for _ in range(5):
        limit.failed(THERE)
    for number in range(99):
        limit.failed(f"10.0.0.{number}")
    assert limit.retry_after(THERE)
    limit.failed("10.0.1.0")
    assert not limit.retry_after(THERE)
    assert len(limit._failures) == 100


def test_a_refusal_says_neither_the_key_nor_more_than_needed(access):
    with pytest.raises(RpcError) as caught:
        access.operators.admit_operator("mk_wrong_key_of_somebody", THERE)
    assert "wrong_key" not in caught.value.message
    assert "try again" not in caught.value.message


def test_hashes_are_plain_sha256_so_that_a_shell_can_check_them(access, store):
    _, token = access.devices.create_device("Pi")
    (row,) = store.settings._db.rows("SELECT token_hash FROM devices")
    assert row["token_hash"] == hashlib.sha256(token.encode()).hexdigest()
