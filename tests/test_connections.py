"""Which connection a request gets: kept, new, and to which address."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from objectcache.stores import connections
from objectcache.stores.connections import Connections, Unresolved
from objectcache.stores.receiver import Peer

PEERS: list[Peer] = [(socket.AF_INET, (f"127.0.0.{i}", 80)) for i in (1, 2, 3)]


class Names:
    """A resolver: what it says now, and how often it was asked."""

    def __init__(self, peers: list[Peer]) -> None:
        self.peers = peers
        self.asked = 0

    def __call__(self, host: str, port: int, flags: int) -> list[Peer]:
        if flags & socket.AI_NUMERICHOST:
            raise OSError("a name")
        self.asked += 1
        if not self.peers:
            raise socket.gaierror("no such name")
        return list(self.peers)


def run(
    scenario: Callable[[Connections, Names], Awaitable[None]], most: int = 8, idle_s: float = 9
) -> None:
    async def main() -> None:
        names = Names(list(PEERS))
        pool = Connections("store", 80, most, 0.5, names, idle_s)
        try:
            await scenario(pool, names)
        finally:
            pool.close()

    asyncio.run(asyncio.wait_for(main(), 10))


def kept(pool: Connections, peer: Peer) -> socket.socket:
    """The server's end of a connection that now waits in the pool."""
    ours, theirs = socket.socketpair()
    pool.give_back(peer, ours)
    return theirs


def test_new_connections_go_where_the_fewest_are() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        chosen = [await pool.choose() for _ in range(6)]
        assert sorted(chosen) == sorted(PEERS * 2)
        pool.give_back(PEERS[1], None)
        assert await pool.choose() == PEERS[1]
        assert names.asked == 1

    run(scenario)


def test_a_dead_address_is_left_alone_but_not_if_all_are() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        pool.reached(PEERS[0], False)
        assert PEERS[0] not in [await pool.choose() for _ in range(6)]
        assert await pool.choose([PEERS[1]]) == PEERS[2]
        pool.reached(PEERS[1], False)
        pool.reached(PEERS[2], False)
        assert await pool.choose() == PEERS[0]  # dead for longest
        pool.reached(PEERS[2], True)
        assert await pool.choose() == PEERS[2]
        with pytest.raises(Unresolved):
            await pool.choose(PEERS)

    run(scenario)


def test_another_address_is_taken_where_there_is_one() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        for _ in PEERS:
            await pool.choose()
        servers = [kept(pool, peer) for peer in PEERS]
        peer, sock = await pool.get(elsewhere=[PEERS[2]])  # kept, though not the latest
        assert peer == PEERS[1] and sock is not None
        sock.close()
        pool.reached(PEERS[0], False)
        peer, sock = await pool.get(elsewhere=[PEERS[2]])  # a new one: the kept one is dead
        assert (peer, sock) == (PEERS[1], None)
        # Where there is no other, another connection to the same.
        peer, sock = await pool.get(elsewhere=[PEERS[1], PEERS[2]])
        assert peer == PEERS[2] and sock is not None
        sock.close()
        for server in servers:
            server.close()

    run(scenario)


def test_the_last_one_used_is_used_again() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        peers = [await pool.choose() for _ in range(2)]
        servers = [kept(pool, peer) for peer in peers]
        assert pool.open == pool.idle == 2
        first, second = pool.take(), pool.take()
        assert first is not None and second is not None and pool.take() is None
        assert [first[0], second[0]] == [peers[1], peers[0]]
        assert pool.open == 2 and pool.idle == 0
        for _, sock in (first, second):
            sock.close()
        for server in servers:
            server.close()

    run(scenario)


@pytest.mark.parametrize("how", ["closed", "spoke"])
def test_one_that_stirred_is_not_used(how: str) -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        server = kept(pool, await pool.choose())
        if how == "closed":
            server.close()
        else:
            server.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert pool.take() is None
        assert pool.open == 0
        server.close()

    run(scenario)


def test_that_one_did_not_stir_is_believed_for_one_turn_of_the_loop() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        servers = [kept(pool, await pool.choose()) for _ in range(3)]
        first = pool.take()
        assert first is not None
        await asyncio.sleep(0)
        servers[0].close()
        second = pool.take()
        assert second is not None and pool.take() is None
        pool.give_back(*first)  # in the same turn
        servers[2].close()
        assert pool.take() is None
        pool.give_back(second[0], None)
        assert pool.open == 0
        second[1].close()
        servers[1].close()

    run(scenario)


def test_there_are_never_more_than_the_bound() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        servers = [kept(pool, await pool.choose()) for _ in range(3)]
        assert pool.open == 3
        await pool.choose()
        assert pool.open == 3 and pool.idle == 2
        servers[0].setblocking(False)
        assert servers[0].recv(1) == b""  # the oldest went
        for server in servers:
            server.close()

    run(scenario, most=3)


def test_close_closes_those_that_come_back_too() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        servers = [kept(pool, await pool.choose())]
        peer = await pool.choose()
        pool.close()
        servers.append(kept(pool, peer))
        assert pool.open == 0
        assert [server.recv(1) for server in servers] == [b"", b""]
        for server in servers:
            server.close()

    run(scenario)


def test_a_name_is_looked_up_once_for_all_and_old_answers_last() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        names.peers = []
        outcomes = await asyncio.gather(*(pool.choose() for _ in range(5)), return_exceptions=True)
        assert all(isinstance(outcome, Unresolved) for outcome in outcomes)
        assert names.asked == 1
        names.peers = list(PEERS)
        assert await pool.choose() in PEERS
        assert names.asked == 2

    run(scenario)


def test_addresses_need_no_resolver() -> None:
    async def scenario() -> None:
        for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
            found, address = await Connections(host, 81, 1, 0.5).choose()
            assert (found, *address[:2]) == (family, host, 81)

    asyncio.run(scenario())


def test_idle_connections_are_closed_after_a_while() -> None:
    async def scenario(pool: Connections, names: Names) -> None:
        servers = [kept(pool, await pool.choose())]
        await asyncio.sleep(0.1)
        servers.append(kept(pool, await pool.choose()))
        await asyncio.sleep(0.15)
        assert pool.open == pool.idle == 1
        await asyncio.sleep(0.1)
        assert pool.open == pool.idle == 0
        for server in servers:
            assert server.recv(1) == b""
            server.close()

    run(scenario, idle_s=0.2)


def test_idle_connections_do_not_outlive_servers_patience() -> None:
    assert connections.IDLE_S < 15  # what many servers and balancers have
