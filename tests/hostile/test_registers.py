"""registers.toml: every place, width and value of BAR0, compared with an oracle that was typed from the paper."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.doubles import BAR0, BAR1, CONFIG, Raw
from tests.hostile.bench import Bench
from tests.hostile.cases import Case, evaluate, ids, load
from tests.hostile.header import BAR_BYTES, Header
from vpci._core import lib
from vpci.driver import Memory
from vpci.vfu import wire
from vpci.vfu.client import Client, ServerError

KEYS = {"do", "m", "h", "width", "values", "seed", "steps", "region", "span"}
_, CASES = load("registers.toml", KEYS)
WINDOW = 128  # requests under way before their replies are read


class Registers:
    """A client's BAR0 beside the oracle's."""

    def __init__(self, client: Client) -> None:
        self.client, self.raw = client, Raw(client)
        self.oracle = Header(
            offered=self.raw.read(0, 4) | 1 << 32, queue_sizes=[16, 16], n_vectors=3, config=self.raw.bytes(20, 72)
        )

    def put_state(self, m: int, h: int) -> None:
        """One of the four maps; both sides of it."""
        self.raw.set_msix(0x8000 * m)
        self.oracle.set_msix(bool(m))
        self.write(4, 4, h << 31)

    def write(self, off: int, width: int, value: int) -> None:
        data = (value % (1 << 8 * width)).to_bytes(width, "little")
        self.client.region_write(BAR0, off, data)
        self.oracle.write(off, data)

    def compare(self) -> None:
        found, wanted = self.raw.bytes(0, BAR_BYTES), self.oracle.read(0, BAR_BYTES)
        assert found == wanted, f"BAR0 is\n{found.hex(' ', -4)}, the paper says\n{wanted.hex(' ', -4)}"


@pytest.fixture
def registers(target: Bench) -> Iterator[Registers]:
    with target.client() as client:
        yield Registers(client)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_registers(case: Case, registers: Registers) -> None:
    _DOERS[case.fields["do"]](registers, case)


def every_write(on: Registers, case: Case) -> None:
    """Each offset, also those where the access ends beyond the BAR, with each value; after each the whole BAR."""
    m, h, width = (evaluate(case.fields[key], case.names) for key in ("m", "h", "width"))
    for off in range(BAR_BYTES + 2):
        for text in case.fields["values"]:
            on.put_state(m, h)
            value = evaluate(text, case.names)
            if off + width > BAR_BYTES:
                refused(on, lib.VFU_REGION_WRITE, off, width, bytes(width))
            else:
                on.write(off, width, value)
            on.compare()


def every_read(on: Registers, case: Case) -> None:
    m, h, width = (evaluate(case.fields[key], case.names) for key in ("m", "h", "width"))
    on.put_state(m, h)
    for value in (3, 0x1234, 1):
        on.write(18, 1, value)
    on.write(14, 2, 1)
    on.write(8, 4, 0x8765_4321)
    for off in range(BAR_BYTES + 2):
        if off + width > BAR_BYTES:
            refused(on, lib.VFU_REGION_READ, off, width, b"")
        else:
            assert on.raw.bytes(off, width) == on.oracle.read(off, width), f"{width} bytes at {off}"
    on.compare()


def refused(on: Registers, command: int, off: int, width: int, data: bytes) -> None:
    payload = wire.pack("vfu_region_access", offset=off, region=BAR0, count=width) + data
    with pytest.raises(ServerError):
        on.client.request(command, payload)


def pairs(on: Registers, _: Case) -> None:
    """A walk that writes each of the 256 values after each other one (and after itself); what is read is what was
    written."""
    walk = list(every_pair(256))
    assert len({*itertools.pairwise(walk)}) == 65536
    write = wire.pack("vfu_region_access", offset=18, region=BAR0, count=1)
    for start in range(0, len(walk), WINDOW):
        part = walk[start : start + WINDOW]
        on.client.send_bytes(
            b"".join(
                wire.message(lib.VFU_REGION_WRITE, write + bytes([value])) + wire.message(lib.VFU_REGION_READ, write)
                for value in part
            )
        )
        answers = [on.client.recv() for _ in range(2 * len(part))]
        assert not any(answer.flags & lib.VFU_F_ERROR for answer in answers)
        assert [answer.payload[-1] for answer in answers[1::2]] == part
    on.oracle.write(18, bytes([walk[-1]]))
    on.compare()


def every_pair(n: int) -> Iterator[int]:
    """A closed walk over 0..n-1 that takes every step (a, b) exactly once."""
    for a in range(n):
        yield a
        for b in range(a + 1, n):
            yield from (a, b)
    yield 0


def selects(on: Registers, case: Case) -> None:
    """PFN, vector and size of queues past every end."""
    on.put_state(1, 0)
    for text in case.fields["values"]:
        value = evaluate(text, case.names)
        on.write(14, 2, value)
        on.compare()
        on.write(8, 4, 0xDEAD)
        on.write(22, 2, 2)
        on.compare()


def every_select(on: Registers, _: Case) -> None:
    """All 65536; what the queue shows is right for each."""
    select = wire.pack("vfu_region_access", offset=14, region=BAR0, count=2)
    size = wire.pack("vfu_region_access", offset=8, region=BAR0, count=8)
    for start in range(0, 1 << 16, WINDOW):
        part = range(start, start + WINDOW)
        on.client.send_bytes(
            b"".join(
                wire.message(lib.VFU_REGION_WRITE, select + n.to_bytes(2, "little"))
                + wire.message(lib.VFU_REGION_READ, size)
                for n in part
            )
        )
        answers = [on.client.recv() for _ in range(2 * WINDOW)]
        for n, answer in zip(part, answers[1::2], strict=True):
            assert struct.unpack("<IHH", answer.payload[-8:]) == (0, 16 if n < 2 else 0, n)


def every_kick(on: Registers, _: Case) -> None:
    """All 65536 kicks, with queue 0 running: none is a word, the last is read back."""
    on.write(8, 4, 0x100)
    before = on.raw.bytes(0, 16)
    kick = wire.pack("vfu_region_access", offset=16, region=BAR0, count=2)
    for start in range(0, 1 << 16, WINDOW):
        part = range(start, start + WINDOW)
        on.client.send_bytes(b"".join(wire.message(lib.VFU_REGION_WRITE, kick + n.to_bytes(2, "little")) for n in part))
        assert not any(on.client.recv().flags & lib.VFU_F_ERROR for _ in part)
    assert on.raw.bytes(0, 16) == before
    assert on.raw.read(16, 2) == 0xFFFF


def vectors(on: Registers, case: Case) -> None:
    """What is stored for a vector of any number, and that it survives MSI-X going and coming."""
    on.put_state(1, 0)
    for text in case.fields["values"]:
        value = evaluate(text, case.names)
        on.write(20, 2, value)
        on.write(22, 2, value)
        on.compare()
        on.put_state(0, 0)
        on.compare()
        on.put_state(1, 0)
        on.compare()


def pfns(on: Registers, case: Case) -> None:
    """Accepted as written, wherever it points; also while the queue runs, and kicked."""
    with_memory = Memory(1 << 20)
    with_memory.attach(on.client)
    for text in case.fields["values"]:
        for queue in (0, 1):
            on.write(14, 2, queue)
            on.write(8, 4, evaluate(text, case.names))
            on.write(16, 2, queue)
            on.compare()
    with_memory.close()


def random_walk(on: Registers, case: Case) -> None:
    """`steps` writes of any kind in any order, from a seed; the whole BAR is compared after each."""
    dice = random.Random(evaluate(case.fields["seed"], case.names))
    interesting = [0, 1, 2, 3, 0x80, 0xFFFF, 1 << 30, 1 << 31, 3 << 30, 0xFFFFFFFF, (1 << 64) - 1]
    for _ in range(case.fields["steps"]):
        if dice.random() < 0.1:
            enabled = dice.randrange(2)
            on.raw.set_msix(0x8000 * enabled)
            on.oracle.set_msix(bool(enabled))
        width = dice.choice([1, 2, 2, 4, 4, 8, dice.randint(1, 40)])
        off = dice.choice([0, 4, 8, 12, 14, 16, 18, 19, 20, 22, 24, 28, dice.randrange(BAR_BYTES)])
        if off + width <= BAR_BYTES:
            on.write(off, width, dice.choice([*interesting, dice.getrandbits(8 * width)]))
            on.compare()


def region_sweep(on: Registers, case: Case) -> None:
    """Each offset of another region with each value; what identifies the function stays, and it works afterwards."""
    region, width = (evaluate(case.fields[key], case.names) for key in ("region", "width"))
    identity = on.client.region_read(CONFIG, 0, 4) + on.client.region_read(CONFIG, 8, 4)
    size = on.client.region_info(region).size
    for off in range(min(size, evaluate(case.get("span", size), case.names))):
        for text in case.fields["values"]:
            data = (evaluate(text, case.names) % (1 << 8 * width)).to_bytes(width, "little")
            if off + width > size:
                payload = wire.pack("vfu_region_access", offset=off, region=region, count=width) + data
                with pytest.raises(ServerError):
                    on.client.request(lib.VFU_REGION_WRITE, payload)
            else:
                on.client.region_write(region, off, data)
                assert len(on.client.region_read(region, off, width)) == width
    assert on.client.region_read(CONFIG, 0, 4) + on.client.region_read(CONFIG, 8, 4) == identity
    if region == BAR1:
        assert on.client.region_read(BAR1, 0x800, 8) == bytes(8), "pending bits cannot be written"
    on.client.reset()
    on.oracle.reset()
    on.oracle.set_msix(False)
    on.compare()


_DOERS: dict[str, Callable[[Registers, Case], None]] = {
    "every_write": every_write,
    "every_read": every_read,
    "pairs": pairs,
    "selects": selects,
    "every_select": every_select,
    "every_kick": every_kick,
    "vectors": vectors,
    "pfns": pfns,
    "random_walk": random_walk,
    "region_sweep": region_sweep,
}
