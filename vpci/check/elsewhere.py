"""Cases that are not run here: those of whole systems and special builds are tests, others wait for a model.

`runner` shows each as SKIP with its reason, so that every case of the paper is in every report.
"""

from __future__ import annotations

from vpci.check.cases import Elsewhere

WHOLE = "a test of vpci's repository"
NET = "no net model yet"
CONSOLE = "no console model yet"
CONSTANT = "a disk of this version never changes its configuration by itself; a test shows it with a model that does"
ASKED = "a disk changes its size when its control socket is asked, which is no part of the paper"

_ROWS = (
    ("K07", "a configuration change fires config_vector", "S091", CONSTANT, "tests/check/test_config_change.py::test_a_config_change_fires_the_config_vector"),
    ("L04", "a configuration change sets ISR bit 1 and asserts INTx", "S091", CONSTANT, "tests/order/test_hot_table.py::test_a_config_change_shows_its_bytes_before_its_interrupt"),
    ("L05", "ISR is 3 for a completion and a configuration change; one read clears both", 'S091 "single interrupt can indicate both"', CONSTANT, "tests/faults/test_cases.py::test_isr_keeps_both_bits"),
    ("M04", "a disk that grows: the bytes change, then the configuration interrupt", "S091; D9", ASKED, "tests/disk/test_resize.py::test_the_new_capacity_can_be_read_when_the_interrupt_comes"),
    ("M06", "configured MAC; LINK_UP while the backend is up", "S091", NET, ""),
    ("M07", "a MAC written byte by byte takes effect after byte 5", "V1L net", NET, ""),
    ("M08", "link down: status 0, then the configuration interrupt", "S091", NET, ""),
    ("M09", "without STATUS offered the status word reads 0", "REC", NET, ""),
    ("M10", "the configured MTU is at 10", "UAPI", NET, ""),
    ("M11", "cols, rows and max_nr_ports as configured", "S091", CONSOLE, ""),
    ("M12", "emerg_wr prints before any ack", "V1L emerg_wr", CONSOLE, ""),
    ("M13", "emerg_wr in four single bytes prints one character", "V1L; REC", CONSOLE, ""),
    ("M14", "a resize changes cols and rows, then interrupts; with MULTIPORT there is a message too", "V1L", CONSOLE, ""),
    ("O01", "tx without MRG: 10 bytes of header are taken off", "S091", NET, ""),
    ("O02", "tx with MRG: 12 bytes of header are taken off", "S091", NET, ""),
    ("O03", "rx with MRG: a frame over n chains is published at once, num_buffers n", "S091", NET, ""),
    ("O05", "rx takes header and data in one descriptor or in two", "S091; bit 27", NET, ""),
    ("O06", "an empty rx queue holds or drops frames, and goes on with a doorbell", "S091", NET, ""),
    ("O07", "tx frames of 0 to 13 bytes, and chains shorter than the header, are dropped", "REC", NET, ""),
    ("O08", "NEEDS_CSUM: the checksum is completed; out of the frame it is dropped", "S091", NET, ""),
    ("O10", "PROMISC and ALLMULTI on and off: the filter obeys", "S091", NET, ""),
    ("O11", "TABLE_SET: 2+1 entries are taken, lying lengths are refused", "S091", NET, ""),
    ("O12", "VLAN 5 is added and removed, 4096 is refused", "S091", NET, ""),
    ("O13", "an unknown class is refused; a command without an ack byte has length 0", "S091", NET, ""),
    ("O14", "without CTRL_VQ queue 2 has size 0", "S091 footnote", NET, ""),
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
    ("S01", "Linux 6.1 on QEMU uses disk, network and console; it takes neither 30 nor 31", "TRACE", WHOLE, "tests/guest/test_several.py::test_linux_takes_from_each_what_it_knows"),
    ("S02", "the same without MSI: INTx and ISR", "S091", WHOLE, "tests/guest/test_linux_disk.py::test_linux_with_nomsi_uses_intx_of_an_msix_function"),
    ("S04", "patchv2-literal hangs Linux, and that is seen", "section 3", WHOLE, "tests/guest/test_literal.py::test_linux_hangs_on_the_literal_dialect"),
    ("S05", "SeaBIOS boots from the disk", "TRACE", WHOLE, "tests/guest/test_linux_disk.py::test_seabios_boots_from_the_disk"),
    ("S06", "the register trace of a guest is that with QEMU's own device, bits 24, 30 and 31 apart", "TRACE", WHOLE, "tests/guest/test_trace.py::test_linux_and_seabios_use_our_registers_as_qemus_own"),
    ("S08", "the driver is unbound and bound, the guest reboots, again and again", "LNX", WHOLE, "tests/guest/test_linux_disk.py::test_fifty_rounds_of_unbind_and_bind_then_three_reboots_work_each_time"),
)  # fmt: skip
ELSEWHERE = {row[0]: Elsewhere(*row) for row in _ROWS}
