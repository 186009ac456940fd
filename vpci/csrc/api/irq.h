/* Interrupt numbers that both sides of the border name. */

enum vpci_isr_bit { VPCI_ISR_QUEUE = 1, VPCI_ISR_CONFIG = 2 };

enum vpci_vector_value { VPCI_NO_VECTOR = 0xffff };
