"""Cases that are not run here: those of whole systems and special builds are tests, others wait for a model.

`runner` shows each as SKIP with its reason, so that every case of the paper is in every report.
"""

from __future__ import annotations

from vpci.check.cases import Elsewhere

WHOLE = "a test of vpci's repository"

_ROWS = (
    ("Q20", "a million random ring images under sanitizers: no crash, leak, or write outside writable buffers and the used ring", "REC", WHOLE, "tests/stress/test_images.py::test_a_million_random_ring_images"),
    ("R03", "without their fences R01 and R02 can fail", "REC", WHOLE, "tests/stress/test_stress.py::test_without_its_fence_a_wake_up_is_lost_and_seen"),
    ("S01", "Linux 6.1 on QEMU uses disk, network and console; it takes neither 30 nor 31", "TRACE", WHOLE, "tests/guest/test_several.py::test_linux_takes_from_each_what_it_knows"),
    ("S02", "the same without MSI: INTx and ISR", "S091", WHOLE, "tests/guest/test_linux_disk.py::test_linux_with_nomsi_uses_intx_of_an_msix_function"),
    ("S04", "patchv2-literal hangs Linux, and that is seen", "section 3", WHOLE, "tests/guest/test_literal.py::test_linux_hangs_on_the_literal_dialect"),
    ("S05", "SeaBIOS boots from the disk", "TRACE", WHOLE, "tests/guest/test_linux_disk.py::test_seabios_boots_from_the_disk"),
    ("S06", "the register trace of a guest is that with QEMU's own device, bits 24, 30 and 31 apart", "TRACE", WHOLE, "tests/guest/test_trace.py::test_linux_and_seabios_use_our_registers_as_qemus_own"),
    ("S08", "the driver is unbound and bound, the guest reboots, again and again", "LNX", WHOLE, "tests/guest/test_linux_disk.py::test_fifty_rounds_of_unbind_and_bind_then_three_reboots_work_each_time"),
)  # fmt: skip
ELSEWHERE = {row[0]: Elsewhere(*row) for row in _ROWS}
