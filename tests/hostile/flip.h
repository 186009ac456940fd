/* Another CPU of a hostile guest: a thread that rewrites words of guest memory as fast as it can. */

struct flip_target {
    uint64_t off;        /* in the memory */
    uint32_t width;      /* bytes: 1, 2, 4 or 8 */
    uint32_t n;
    uint64_t values[16];
};

struct flipper;

/* Rewrites the targets in turn, each with one of its values, until flip_stop. */
struct flipper *flip_start(uint8_t *memory, const struct flip_target *targets, uint32_t n_targets);
/* Keeps `ahead` requests available for ever: avail.idx := used.idx + ahead. */
struct flipper *flip_feed(uint8_t *memory, uint64_t avail_idx_off, uint64_t used_idx_off, uint16_t ahead);
/* Returns how many words were written. */
uint64_t flip_stop(struct flipper *f);
