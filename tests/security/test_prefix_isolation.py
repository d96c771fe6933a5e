"""Computed prefixes: shared within a tenant or a group, found by nobody else, and kept."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.engine import pages
from jaxserve.engine.pages import PageIntegrityError, PagePool, page_key, root_key
from jaxserve.engine.request import GenerationRequest
from jaxserve.server.access.claims import Claims
from jaxserve.server.access.tenant import ANYONE, Tenant
from tests.security.keys import bearer, client_of, keyed_service, write_keys
from tests.server.http.raw_http import post

PROMPT = "The same long prompt of two tenants, which fills several pages of the cache."


@pytest.fixture
def make_keyed(tmp_path):
    services = []

    def make(limits=None, **settings):
        service = keyed_service(write_keys(tmp_path / "keys.toml", **settings), limits=limits)
        services.append(service)
        return service

    yield make
    for service in services:
        service.close()


def _cached(client, prompt=PROMPT, **settings):
    outputs = list(client.generate(prompt, max_tokens=2, **settings))
    return outputs[-1].usage.num_cached_tokens


def test_a_salt_is_a_secret_of_the_server():
    alpha, beta = Tenant(name="alpha"), Tenant(name="beta")
    claims, request = Claims(), GenerationRequest("r", (1,), cache_salt="own")
    salts = {
        claims.claim(alpha, request).cache_salt,
        claims.claim(beta, request).cache_salt,
        claims.claim(alpha, GenerationRequest("r", (1,))).cache_salt,
        Claims().claim(alpha, request).cache_salt,
        # Nor can the tenant's own salt lead into another's.
        claims.claim(
            Tenant(name="alphao"), GenerationRequest("r", (1,), cache_salt="wn")
        ).cache_salt,
        claims.claim(alpha, GenerationRequest("r", (1,), cache_salt="\0own")).cache_salt,
    }
    assert len(salts) == 6
    assert claims.claim(alpha, request).cache_salt == claims.claim(alpha, request).cache_salt
    assert claims.claim(ANYONE, request) is request


def test_a_group_named_like_a_tenant_is_not_that_tenant():
    claims, request = Claims(), GenerationRequest("r", (1,))
    joined = Tenant(name="x", cache_group="alpha")
    assert claims.claim(joined, request).cache_salt != (
        claims.claim(Tenant(name="alpha"), request).cache_salt
    )


def test_tenants_do_not_find_each_others_prefixes(make_keyed):
    service = make_keyed()
    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        assert _cached(alpha) == 0
        assert _cached(alpha) == 64  # The control: it is there to be found.
        assert _cached(beta) == 0
        assert _cached(beta) == 64
        assert _cached(beta, cache_salt="other") == 0
    body = {"prompt": PROMPT, "max_tokens": 2}
    for tenant, count in (("alpha", 64), ("watcher", None)):
        status, _, reply = post(service, "/v1/completions", body, bearer(tenant))
        if count is None:
            assert status == 403
        else:
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == count


def test_what_a_neighbour_asked_does_not_show_in_the_steps(make_keyed):
    """How long a first token takes is how many tokens are computed before it: the same for a
    prompt that nobody sent and for one that a neighbour sent."""
    service = make_keyed()

    def computed(client, prompt):
        first = len(service.executor.plans)
        list(client.generate(prompt, max_tokens=1))
        service.assert_idle()
        return [plan.num_tokens for plan in service.executor.plans[first:]]

    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        cold = computed(beta, PROMPT[::-1])
        computed(alpha, PROMPT)
        assert computed(beta, PROMPT) == cold
        assert sum(computed(alpha, PROMPT)) < sum(cold)  # The control.


def test_a_group_shares(make_keyed):
    group = {"cache_group": "team"}
    service = make_keyed(alpha=group, beta=group)
    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        assert _cached(alpha) == 0
        assert _cached(beta) == 64


def test_colliding_keys_join_neither_prompts_nor_tenants(monkeypatch):
    class Weak:
        def __init__(self, *_args, **_kwargs):
            pass

        def digest(self):
            return b"the same for all"

    monkeypatch.setattr(pages.hashlib, "blake2b", Weak)
    pool = PagePool(4, 2)
    assert root_key("a") == root_key("b") == page_key(root_key("a"), (1, 2))
    table = pool.allocate(1)
    key = page_key(root_key("a"), (1, 2))
    pool.register(table[0], key, (1, 2), salt="a")
    assert pool.find_prefix([key], [1, 2], salt="a") == table
    assert pool.find_prefix([key], [1, 3], salt="a") == []
    assert pool.find_prefix([key], [1, 2], salt="b") == []


def _fill(pool, owner, first_token, count):
    """Registers `count` pages of one token each and lets go of them."""
    table = pool.allocate(count)
    keys, parent = [], root_key(owner)
    for index, page in enumerate(table):
        parent = page_key(parent, (first_token + index,))
        keys.append(parent)
        pool.register(page, parent, (first_token + index,), salt=owner, owner=owner)
    pool.release(table)
    return keys


def _found(pool, owner, keys, first_token):
    return len(pool.find_prefix(keys, range(first_token, first_token + len(keys)), salt=owner))


def test_a_flood_cannot_evict_a_reserved_share():
    pool = PagePool(20, 1)
    pool.reserve({"a": 0.25})
    mine = _fill(pool, "a", 100, 5)
    beyond = _fill(pool, "a", 200, 3)
    for flood in range(10):
        _fill(pool, "b", 1000 + 100 * flood, 12)
    assert _found(pool, "b", _fill(pool, "b", 9000, 5), 9000) == 5
    # Five of a's eight are left: the most recently used ones.
    assert _found(pool, "a", beyond, 200) == 3
    assert _found(pool, "a", mine, 100) == 2
    assert pool.num_available == 15
    pool.check_integrity([])


def test_what_is_reserved_is_not_available_but_can_be_used_by_its_owner():
    pool = PagePool(10, 1)
    pool.reserve({"a": 0.4})
    keys = _fill(pool, "a", 1, 6)
    assert (pool.num_cached, pool.num_available) == (6, 6)
    found = pool.find_prefix(keys, range(1, 7), salt="a")
    assert pool.num_unheld(found) == 2
    assert pool.num_unheld(found[:1]) == 1
    before = pool.num_available
    pool.share(found)
    assert pool.num_available == before - 2
    table = pool.allocate(4)
    with pytest.raises(PageIntegrityError):
        pool.allocate(1)
    pool.release(found)
    pool.release(table)
    pool.check_integrity([])


def test_reserves_that_change_in_between_break_nothing():
    pool = PagePool(6, 1)
    _fill(pool, "a", 1, 3)
    _fill(pool, "b", 10, 3)
    assert pool.num_available == 6
    pool.reserve({"a": 0.5})  # After somebody has looked, before it takes what it saw.
    assert len(pool.allocate(6)) == 6
    pool.check_integrity([[page] for page in range(6)])


@pytest.mark.parametrize("seed", range(3))
def test_random_use_keeps_the_books_and_the_reserves(seed):
    rng = np.random.default_rng(seed)
    pool = PagePool(24, 1)
    pool.reserve({"a": 0.25, "b": 0.125})
    tables, token = [], 0
    for _ in range(400):
        want = int(rng.integers(1, 5))
        if rng.random() < 0.5 and pool.num_available >= want:
            owner = str(rng.choice(["a", "b", "c"]))
            table = pool.allocate(want)
            parent = root_key(owner)
            for page in table:
                token += 1
                parent = page_key(parent, (token,))
                pool.register(page, parent, (token,), salt=owner, owner=owner)
            tables.append(table)
        elif tables:
            pool.release(tables.pop(int(rng.integers(len(tables)))))
        pool.check_integrity(tables)
        assert 0 <= pool.num_available <= pool.num_free + pool.num_cached


def test_a_flood_of_requests_leaves_the_share_of_a_peer(make_keyed):
    service = make_keyed(alpha={"cache_share": 0.1})
    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        assert _cached(alpha) == 0
        for index in range(12):
            list(beta.generate(f"{index:02} " + "flood " * 40, max_tokens=1))
        assert _cached(alpha) == 64
        # Without a share it would be gone: beta's own first prompt is.
        assert _cached(beta, "00 " + "flood " * 40) == 0
    service.assert_idle()
