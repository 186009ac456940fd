"""Groups K and L: MSI-X vectors, masks, and the way back to INTx; ISR and the INTx line."""

from __future__ import annotations

from contextlib import closing

from vpci.check.cases import Need, case, claim, expect
from vpci.check.config import CHANGING, changes
from vpci.check.guest import Guest, Mill

MSIX = Need(vectors=2)
TWO = Need(queues=2, vectors=3)
INTX_STATUS = 8  # bit 3 of PCI status
INTX_DISABLE = 0x400  # bit 10 of PCI command


def table_size(g: Guest) -> int:
    at = g.capabilities()[0x11]
    return (g.pci(at + 2, 2) & 0x7FF) + 1


def mask_entry(g: Guest, vector: int, masked: bool) -> None:
    """Bit 0 of the last word of an entry of 16 bytes; the word at capability + 4 has the table's BAR and offset."""
    where = g.pci(g.capabilities()[0x11] + 4, 4)
    at = (where & ~7) + 16 * vector + 12
    g.client.region_write(where & 7, at, int(masked).to_bytes(4, "little"))


def level(g: Guest) -> bool:
    """INTx, as PCI status has it."""
    return bool(g.pci(6, 2) & INTX_STATUS)


# -- K: MSI-X --------------------------------------------------------------------------------------------------------


@case(
    "K01",
    "every vector below the table's size can be mapped and reads back",
    "S091",
    Need(sets={"pci.msix_vectors": 4}),
    MSIX,
)
def k01(g: Guest) -> None:
    size = table_size(g)
    if g.need.sets:
        expect(size, 4, "table size")
    g.msix()
    for vector in (*range(min(size, 64)), size - 1):
        for off, name in ((20, "config_vector"), (22, "queue_vector")):
            g.write(off, 2, vector)
            expect(g.read(off, 2), vector, name)


@case("K02", "a vector outside the table reads back 0xffff", "S091; QEMU", Need(sets={"pci.msix_vectors": 4}), MSIX)
def k02(g: Guest) -> None:
    size = table_size(g)
    g.msix()
    for vector in filter(lambda vector: vector >= size, (size, 0x7FF, 0x800, 0x8000, 0xFFFE, 0xFFFF)):
        for off, name in ((20, "config_vector"), (22, "queue_vector")):
            g.write(off, 2, 0)
            g.write(off, 2, vector)
            expect(g.read(off, 2), 0xFFFF, f"{name} after {vector:#x} of {size}")


@case("K03", "queue_vector is that of the selected queue; of an absent one it is 0xffff", "S091", TWO)
def k03(g: Guest) -> None:
    g.msix()
    for index, vector in ((0, 1), (1, 2)):
        g.select(index)
        g.write(22, 2, vector)
    for index, vector in ((0, 1), (1, 2), (0, 1)):
        g.select(index)
        expect(g.read(22, 2), vector, f"queue_vector of queue {index}")
    g.select(0xFFFF)
    g.write(22, 2, 0)
    expect((g.read(22, 2), g.read(20, 2)), (0xFFFF, 0xFFFF), "queue_vector of an absent queue, config_vector")


@case("K04", "a completion fires its queue's vector only; INTx is silent and ISR reads 0", "S091", MSIX)
def k04(g: Guest) -> None:
    fds, intx = [g.vector(0), g.vector(1)], g.intx()
    ring = g.start(msix=True)
    for n in range(3):
        ring.works()
        g.interrupts(fds[1], 1, f"vector 1, completion {n}")
    expect((g.client.drain(fds[0]), g.client.drain(intx)), (0, 0), "interrupts of (vector 0, INTx)")
    expect((g.read(19, 1), level(g)), (0, False), "(ISR, Interrupt Status)")


@case("K05", "with queue_vector 0xffff a completion fires nothing", "S091", MSIX)
def k05(g: Guest) -> None:
    fds = [g.vector(0), g.vector(1), g.intx()]
    ring = g.start(msix=True)
    g.write(22, 2, 0xFFFF)
    ring.works()
    g.settle()
    expect([g.client.drain(fd) for fd in fds], [0, 0, 0], "interrupts of (vector 0, vector 1, INTx)")
    expect(g.read(19, 1), 0, "ISR")
    g.write(22, 2, 1)
    ring.works()
    g.interrupts(fds[1], 1, "with vector 1 again")


@case("K06", "two queues may share a vector", "S091", TWO)
def k06(g: Guest) -> None:
    fds = [g.vector(n) for n in range(3)]
    g.msix()
    g.ack(*g.traffic.several)
    rings = [g.ring(g.traffic.queue(n)) for n in range(2)]
    for ring in rings:
        g.select(ring.index)
        g.write(22, 2, 1)
    g.driver_ok()
    for ring in rings:
        ring.works()
        g.interrupts(fds[1], 1, f"of queue {ring.index}")
    g.select(rings[1].index)
    g.write(22, 2, 2)
    rings[1].works()
    g.interrupts(fds[2], 1, "of queue 1 with a vector of its own")
    expect([g.client.drain(fds[0]), g.client.drain(fds[1])], [0, 0], "interrupts of the others")


@case("K07", "a configuration change fires config_vector", "S091", *CHANGING)
def k07(g: Guest) -> None:
    fds = [g.vector(0), g.vector(1)]
    g.start(*g.traffic.told, msix=True)
    with closing(changes(g)) as each:
        for change in each:
            g.server.ask(*change.ask)
            g.interrupts(fds[0], 1, f"of {' '.join(change.ask)}")
    expect(g.client.drain(fds[1]), 0, "interrupts of the queue's vector")
    expect(g.read(19, 1), 0, "ISR")
    g.write(20, 2, 0xFFFF)
    with closing(changes(g)) as each:
        for change in each:
            g.server.ask(*change.ask)
    g.interrupts(fds[0], 0, "without a vector")
    expect(g.client.drain(fds[1]), 0, "interrupts of the queue's vector")


@case("K08", "MSI-X Enable moves configuration from 20 to 24; vectors are 0xffff", "S091 offsets 20/24", MSIX)
def k08(g: Guest) -> None:
    config = g.config(20)
    at = g.capabilities()[0x11] + 2
    g.pci_write(at + 1, 1, 0x80)  # the high byte alone
    expect((g.read(20, 2), g.read(22, 2)), (0xFFFF, 0xFFFF), "config_vector and queue_vector")
    expect(g.config(24), config, "configuration at 24")
    g.pci_write(at, 1, 0xFF)
    expect(g.config(24), config, "configuration at 24 after a write of the low byte")
    g.pci_write(at + 1, 1, 0)
    expect(g.config(20), config, "configuration at 20 again")


@case("K10", "vectors keep their values while MSI-X is disabled", "REC", MSIX)
def k10(g: Guest) -> None:
    fd = g.vector(1)
    ring = g.start(msix=True)
    g.msix(False)
    g.msix(True)
    expect((g.read(20, 2), g.read(22, 2)), (0, 1), "config_vector and queue_vector")
    ring.works()
    g.interrupts(fd, 1, "after MSI-X was off and on")


@case("K11", "the function mask moves nothing; a masked vector fires once when it is unmasked", "PCI; REC", MSIX)
def k11(g: Guest) -> None:
    fd, config = g.vector(1), g.config(20)
    ring = g.start(msix=True)
    g.msix(True, mask=True)
    expect(g.config(24), config, "configuration at 24 under the function mask")
    for _ in range(2):
        ring.works()
    g.interrupts(fd, 0, "under the function mask")
    g.msix(True)
    g.interrupts(fd, 1, "after the mask went")
    mask_entry(g, 1, True)
    for _ in range(2):
        ring.works()
    g.interrupts(fd, 0, "under the mask of its entry")
    mask_entry(g, 1, False)
    g.interrupts(fd, 1, "after the entry's mask went")
    g.msix(False, mask=True)
    expect(g.config(20), config, "configuration at 20 with the mask alone")


@case("K12", "vectors that run out read back 0xffff, and fewer, or INTx, work: Linux' three tries", "S091 \"report such failures\"; LNX vp_find_vqs",
      Need(queues=2, vectors=3, sets={"pci.fail_vectors": 2}), Need(queues=2, vectors=3, sets={"pci.fail_vectors": 1}))  # fmt: skip
def k12(g: Guest) -> None:
    limit = int(g.need.sets["pci.fail_vectors"])
    fds = [g.vector(n) for n in range(3)]
    g.msix()
    g.ack(*g.traffic.several)
    rings = [g.ring(g.traffic.queue(n)) for n in range(2)]
    expect(_map(g, 0, (1, 2)), [0, *(vector if vector < limit else 0xFFFF for vector in (1, 2))], "one vector each")
    works = _map(g, 0, (1, 1)) == [0, 1, 1]
    expect(works, limit == 2, "one vector for both queues can be mapped")
    g.driver_ok()
    if not works:
        g.msix(False)
    left = fds[1] if works else g.intx()  # one index at a time has eventfds, as a VMM does it
    rings[0].works()
    g.interrupts(left, 1, "with what was left")


def _map(g: Guest, config: int, queues: tuple[int, ...]) -> list[int]:
    """Write the vectors and read each back."""
    g.write(20, 2, config)
    got = [g.read(20, 2)]
    for n, vector in enumerate(queues):
        g.select(g.traffic.queue(n))
        g.write(22, 2, vector)
        got.append(g.read(22, 2))
    return got


@case("K14", "the vectors read as words at 20 and 22, and both at once", "W2 (QEMU returns only the low half)", MSIX)
def k14(g: Guest) -> None:
    g.msix()
    g.write(20, 2, 0)
    g.write(22, 2, 1)
    expect((g.read(20, 2), g.read(22, 2), g.read(20, 4)), (0, 1, 0x10000), "(at 20, at 22, both)")
    expect(g.span(20, 4), bytes([0, 0, 1, 0]), "their bytes")
    g.write(20, 4, 0)
    expect(g.read(20, 4), 0x10000, "both after a write of 4 bytes, which is dropped")


@case(
    "K15",
    "a table of 0x800 vectors is accepted, 0x801 is refused",
    "S091 0..0x7FF",
    Need(own=True, sets={"pci.msix_vectors": 0x800}),
)
def k15(g: Guest) -> None:
    expect(table_size(g), 0x800, "table size")
    g.msix()
    g.write(20, 2, 0x7FF)
    expect(g.read(20, 2), 0x7FF, "config_vector")
    fd = g.vector(0x7FF)
    ring = g.start(msix=True)
    g.write(22, 2, 0x7FF)
    ring.works()
    g.interrupts(fd, 1, "of the last vector")
    said = g.server.refusal({"pci.msix_vectors": 0x801})
    claim("pci.msix_vectors" in said, f"pci.msix_vectors = 0x801: {said or 'it was accepted'}")


@case("K16", "without m a write at 20 goes to configuration and to no vector", "S091", MSIX)
def k16(g: Guest) -> None:
    config = g.config(20)
    g.write(20, 2, 0)
    g.write(22, 2, 0)
    expect(g.config(20), g.config_after(config, 0, bytes(4)), "configuration, written at 0 and 2")
    g.msix()
    expect((g.read(20, 2), g.read(22, 2)), (0xFFFF, 0xFFFF), "config_vector and queue_vector")


# -- L: INTx ---------------------------------------------------------------------------------------------------------


@case("L01", "a completion sets ISR bit 0 and asserts INTx once", "S091")
def l01(g: Guest) -> None:
    fd = g.intx()
    g.start().works()
    g.interrupts(fd, 1, "INTx")
    expect(level(g), True, "Interrupt Status")
    expect(g.read(19, 1), 1, "ISR")


@case("L02", "a second completion before ISR is read leaves it 1; an unmask while it is 1 fires again", "S091")
def l02(g: Guest) -> None:
    fd = g.intx()
    ring = g.start()
    ring.works()
    g.interrupts(fd, 1, "INTx")
    ring.works()
    g.settle()
    claim(g.client.drain(fd) <= 1, "several edges for one completion")
    g.client.irq_unmask(0)
    g.interrupts(fd, 1, "INTx, unmasked while ISR is 1")
    expect(g.read(19, 1), 1, "ISR")
    g.client.irq_unmask(0)
    g.interrupts(fd, 0, "INTx, unmasked after ISR was read")


@case(
    "L03",
    "a read of ISR returns it, clears it and deasserts INTx; the next completion asserts it again",
    'UAPI "read-and-acknowledge"',
)
def l03(g: Guest) -> None:
    fd = g.intx()
    ring = g.start()
    for n in range(3):
        ring.works()
        g.interrupts(fd, 1, f"INTx, completion {n}")
        expect((level(g), g.read(19, 1)), (True, 1), "(Interrupt Status, ISR)")
        expect((level(g), g.read(19, 1)), (False, 0), "(Interrupt Status, ISR) afterwards")
        g.client.irq_unmask(0)


@case("L04", "a configuration change sets ISR bit 1 and asserts INTx", "S091", *CHANGING)
def l04(g: Guest) -> None:
    fd = g.intx()
    g.start(*g.traffic.told)
    with closing(changes(g)) as each:
        for change in each:
            g.server.ask(*change.ask)
            g.interrupts(fd, 1, f"INTx of {' '.join(change.ask)}")
            expect((level(g), g.read(19, 1)), (True, 2), "(Interrupt Status, ISR)")
            expect((level(g), g.read(19, 1)), (False, 0), "(Interrupt Status, ISR) afterwards")
            g.client.irq_unmask(0)


@case(
    "L05",
    "ISR is 3 for a completion and a configuration change; one read clears both",
    'S091 "single interrupt can indicate both"',
    *CHANGING,
)
def l05(g: Guest) -> None:
    ring = g.start(*g.traffic.told)
    with closing(changes(g)) as each:
        for completion_first, change in enumerate(each):
            if completion_first:
                ring.serve(g.traffic.cheap(g))
            g.server.ask(*change.ask)
            if not completion_first:
                ring.serve(g.traffic.cheap(g))
            g.settle()
            expect((g.read(19, 1), g.read(19, 1)), (3, 0), "ISR, read twice")


@case("L06", "a suppressed completion leaves ISR 0", "S091", Need(bits=(28,)), Need(bits=(28, 29)))
def l06(g: Guest) -> None:
    fd = g.intx()
    event = 29 in g.need.bits
    ring = g.start(*g.need.bits)
    if event:
        ring.set_used_event(100)
    else:
        ring.set_flags(1)
    Mill(ring).run(2)
    g.interrupts(fd, 0, "INTx, suppressed")
    expect((level(g), g.read(19, 1)), (False, 0), "(Interrupt Status, ISR)")


@case("L08", "with PCI's Interrupt Disable there is no assertion, and ISR is 1 all the same", "PCI")
def l08(g: Guest) -> None:
    fd = g.intx()
    ring = g.start()
    g.pci_write(4, 2, INTX_DISABLE)
    ring.works()
    g.interrupts(fd, 0, "INTx, disabled")
    expect(g.read(19, 1), 1, "ISR")
    g.pci_write(4, 2, 0)
    ring.works()
    g.interrupts(fd, 1, "INTx, enabled again")


@case("L10", "enabling MSI-X deasserts INTx and clears ISR; disabling it starts with 0", "REC", MSIX)
def l10(g: Guest) -> None:
    fd = g.intx()
    ring = g.start()
    ring.works()
    g.interrupts(fd, 1, "INTx")
    g.msix()
    expect((level(g), g.read(19, 1)), (False, 0), "(Interrupt Status, ISR) with MSI-X")
    g.msix(False)
    expect((level(g), g.read(19, 1)), (False, 0), "(Interrupt Status, ISR) without it again")
