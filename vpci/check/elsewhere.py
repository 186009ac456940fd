"""Cases that are not run here: those of whole systems and special builds are tests, others wait for a model.

`runner` shows each as SKIP with its reason, so that every case of the paper is in every report.
"""

from __future__ import annotations

from vpci.check.cases import Elsewhere

WHOLE = "a test of vpci's repository"
CONSOLE = "no console model yet"

_ROWS = (
    ("M11", "cols, rows and max_nr_ports as configured", "S091", CONSOLE, ""),
    ("M12", "emerg_wr prints before any ack", "V1L emerg_wr", CONSOLE, ""),
    ("M13", "emerg_wr in four single bytes prints one character", "V1L; REC", CONSOLE, ""),
    ("M14", "a resize changes cols and rows, then interrupts; with MULTIPORT there is a message too", "V1L", CONSOLE, ""),
    ("P01", "tx in one chain and in three arrives whole, used.len 0", "S091", CONSOLE, ""),
    ("P02", "rx of 5000 bytes fills 4096 and 904", "S091", CONSOLE, ""),
    ("P03", "without MULTIPORT acked queues from 2 on are never used, port 0 works", "S091", CONSOLE, ""),
    ("P04", "DEVICE_READY 1 is answered by PORT_ADD for each port", "S091/V1L", CONSOLE, ""),
    ("P05", "DEVICE_READY 0 is answered by none", "V1L", CONSOLE, ""),
    ("P06", "messages wait for buffers of the control queue, in order", "REC", CONSOLE, ""),
    ("P08", "what the backend sends is held while the guest's port is closed", "REC", CONSOLE, ""),
    ("P09", "a port that goes is told by PORT_REMOVE, and its queues idle", "S091", CONSOLE, ""),
    ("P10", "malformed control messages are ignored and completed", "REC", CONSOLE, ""),
    ("P11", "a buffer too small for a message is never overrun", "REC", CONSOLE, ""),
    ("P12", "with 31 ports the queues are 2n+2 and 2n+3, up to 63", "V1L", CONSOLE, ""),
    ("Q20", "a million random ring images under sanitizers: no crash, leak, or write outside writable buffers and the used ring", "REC", WHOLE, "tests/stress/test_images.py::test_a_million_random_ring_images"),
    ("R03", "without their fences R01 and R02 can fail", "REC", WHOLE, "tests/stress/test_stress.py::test_without_its_fence_a_wake_up_is_lost_and_seen"),
    ("S01", "Linux 6.1 on QEMU uses the disk; it takes neither 30 nor 31", "TRACE", WHOLE, "tests/guest/test_linux_disk.py::test_linux_negotiates_what_the_draft_and_linux_share"),
    ("S02", "the same without MSI: INTx and ISR", "S091", WHOLE, "tests/guest/test_linux_disk.py::test_linux_with_nomsi_uses_intx_of_an_msix_function"),
    ("S04", "patchv2-literal hangs Linux, and that is seen", "section 3", WHOLE, "tests/guest/test_literal.py::test_linux_hangs_on_the_literal_dialect"),
    ("S05", "SeaBIOS boots from the disk", "TRACE", WHOLE, "tests/guest/test_linux_disk.py::test_seabios_boots_from_the_disk"),
    ("S06", "the register trace of a guest is that with QEMU's own device, bits 24, 30 and 31 apart", "TRACE", WHOLE, "tests/guest/test_trace.py::test_linux_and_seabios_use_our_registers_as_qemus_own"),
    ("S08", "the driver is unbound and bound, the guest reboots, again and again", "LNX", WHOLE, "tests/guest/test_linux_disk.py::test_fifty_rounds_of_unbind_and_bind_then_three_reboots_work_each_time"),
)  # fmt: skip
ELSEWHERE = {row[0]: Elsewhere(*row) for row in _ROWS}
