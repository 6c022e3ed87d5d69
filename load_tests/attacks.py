"""The attacks on a server's HTTP interface, and the process that carries them out.

Every attack is an attempt of `load_tests/misbehaving.py` that several clients make again and again.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection

import httpx

from load_tests.misbehaving import CLOSED, LEFT, MIB, Client
from tests.hostile import huge_animation, padded

LOWEST_PRIORITY = 19  # as `nice` counts
OPEN = "open at the end"


@dataclass(frozen=True, slots=True)
class Attack:
    """Clients that do the same again and again.

    entry: by which `--only` chooses it. clients: at once. every_s: seconds from one attempt of
    a client to its next, or more if the attempt takes longer. together: all at the same time, else
    one after the other.
    """

    entry: str
    name: str
    clients: int
    every_s: float
    attempt: Callable[[Client], Awaitable[object]]
    together: bool = False


@cache
def _huge() -> bytes:
    return huge_animation(4096)


@cache
def _long() -> bytes:
    return padded(15 * MIB)


def _leave(client: Client) -> Awaitable[None]:
    return client.leave_after(random.Random(client.number).uniform(0, 0.3))


ATTACKS = (
    Attack("T1", "endless trailers", 4, 2, Client.send_endless_trailers),
    Attack("T2", "upgrades that say nothing", 50, 40, Client.upgrade_and_say_nothing),
    Attack("T3", "h2c offered with a request", 1, 2, Client.ask_for_http2),
    Attack("T4", "8 images of 4096x4096", 1, 5, lambda c: c.send_files([_huge()] * 8, 1.0)),
    Attack(
        "T4",
        "4 images of 4096x4096, client leaves",
        1,
        6,
        lambda c: c.send_files([_huge()] * 4, 0.3),
    ),
    Attack("T5", "answers that nobody reads", 8, 40, lambda c: c.read_nothing(45)),
    Attack(
        "T6",
        "bodies of 31 MiB, a byte every 5 s",
        24,
        60,
        lambda c: c.send_body_slowly(31 * MIB, 12 * MIB, 5),
    ),
    Attack("T6", "files of 15 MiB", 4, 20, lambda c: c.send_files([_long()], 5.0)),
    Attack("T7", "forms of 64 deep texts", 1, 4, Client.send_deep_form),
    Attack("T7", "lists of 131,072 entries", 1, 2, Client.send_long_list),
    Attack("T9", "foreign pages and hosts", 2, 1, Client.call_as_foreign_page),
    Attack(
        "T33",
        "8 clients at once, refused and leaving",
        8,
        30,
        lambda c: c.send_files([_huge()] * 4, 1.0),
        together=True,
    ),
    Attack("", "heads of a byte a second", 50, 40, lambda c: c.send_head_slowly(1)),
    Attack("", "half-open connections", 20, 40, lambda c: c.stay_half_open(40)),
    Attack("", "resets after a request", 2, 2, _leave),
)


def chosen(only: Sequence[str]) -> list[Attack]:
    """Return the attacks of these entries, or all of them if there are none."""
    return [attack for attack in ATTACKS if not only or attack.entry in only]


@dataclass(frozen=True, slots=True)
class Attackers:
    """The process that attacks.

    seconds: how long. scale: of the rates. nice: its priority. only: entries; empty for all.
    """

    host: str
    port: int
    seconds: float
    scale: float
    nice: int
    only: tuple[str, ...]

    def run(self, report: Connection) -> None:
        """Attack, and then stop with every connection open; the process must be killed.

        report: gets None at the start, and in the end a Counter of outcomes for each attack.
        """
        _huge(), _long()
        os.nice(self.nice)
        asyncio.run(self._run(report))

    @contextmanager
    def running(self) -> Iterator[Connection]:
        """Attack in a process for this context; yield where it reports when it falls silent."""
        spawn = multiprocessing.get_context("spawn")
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=self.run, args=(sender,))
        process.start()
        sender.close()
        try:
            receiver.recv()
            yield receiver
        finally:
            process.kill()
            process.join()

    async def _run(self, report: Connection) -> None:
        report.send(None)
        attacks = chosen(self.only)
        counts: list[Counter[str]] = [Counter() for _ in attacks]
        tasks = [
            asyncio.create_task(self._repeat(attack, number, outcomes))
            for attack, outcomes in zip(attacks, counts, strict=True)
            for number in range(attack.clients)
        ]
        await asyncio.sleep(self.seconds)
        report.send([+outcomes for outcomes in counts])
        os.kill(os.getpid(), signal.SIGSTOP)
        await asyncio.gather(*tasks)

    async def _repeat(self, attack: Attack, number: int, outcomes: Counter[str]) -> None:
        client, every_s = Client(self.host, self.port, number), attack.every_s / self.scale
        # Clients that shall be refused come together.
        spread_s = 0 if attack.together else min(every_s, self.seconds / 2)
        await asyncio.sleep(spread_s * number / attack.clients)
        while True:
            began = time.monotonic()
            outcomes[OPEN] += 1
            try:
                outcome = await attack.attempt(client)
            except OSError:
                outcome = CLOSED
            outcomes[OPEN] -= 1
            outcomes[outcome if isinstance(outcome, str) else LEFT] += 1
            await asyncio.sleep(max(0.0, began + every_s - time.monotonic()))


def attackers_of(
    url: str,
    seconds: float,
    scale: float = 1.0,
    nice: int = LOWEST_PRIORITY,
    only: Sequence[str] = (),
) -> Attackers:
    """Return the attackers of the server at this URL."""
    address = httpx.URL(url)
    return Attackers(address.host, address.port or 80, seconds, scale, nice, tuple(only))
