/* Guest memory: an address table that turns a guest physical address (gpa) into host pointers.
 * The pump fills it from DMA_MAP and DMA_UNMAP; the ring code is the only reader of pointers. */

typedef struct vpci_mem vpci_mem;

enum vpci_mem_perm { VPCI_MEM_READ = 1, VPCI_MEM_WRITE = 2 };

/* A process may have some 65,000 mappings, and other devices want theirs. */
enum vpci_mem_limit { VPCI_MEM_MAX_RANGES = 16384 };

vpci_mem *vpci_mem_new(void);
void vpci_mem_free(vpci_mem *mem);

/* Map size bytes of fd at offset to gpa. fd < 0 records a range that cannot be mapped.
 * perm: enum vpci_mem_perm bits. The fd stays the caller's. Returns 0 or -errno. */
int vpci_mem_map(vpci_mem *mem, uint64_t gpa, uint64_t size, int fd, uint64_t offset, uint32_t perm);

/* The same for a range that somebody else has mapped at hva and unmaps after vpci_mem_unmap; NULL: only messages reach
 * it. Its file may shrink, for all we know. Returns 0 or -errno. */
int vpci_mem_borrow(vpci_mem *mem, uint64_t gpa, uint64_t size, void *hva, uint32_t perm);

/* Forget exactly one range that was mapped. Returns 0, -ENOENT, or -EBUSY while chains hold it. */
int vpci_mem_unmap(vpci_mem *mem, uint64_t gpa, uint64_t size);

/* Copy between guest memory and buf; the whole span must be mapped with that right.
 * Returns 0 or -EFAULT, and then nothing was written. */
int vpci_mem_read(vpci_mem *mem, uint64_t gpa, void *buf, uint64_t len);
int vpci_mem_write(vpci_mem *mem, uint64_t gpa, const void *buf, uint64_t len);
