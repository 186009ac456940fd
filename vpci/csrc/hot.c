/* The hot table: BAR0 as bytes, with what a read or a write of each byte does. Python compiles it from the resolved
 * layout; messages.c asks it. No offset of any register is known here. */
#include "pump.h"

int hot_init(struct hot *hot, uint32_t size)
{
    *hot = (struct hot){.size = size};
    uint8_t *bytes = calloc(3, size ? size : 1);
    if (!bytes)
        return -ENOMEM;
    hot->image = bytes;
    hot->read_kind = bytes + size;
    hot->kick_width = bytes + 2 * (size_t)size;
    return 0;
}

void hot_fini(struct hot *hot)
{
    free(hot->image);
}

static void show_notify(struct hot *hot, uint32_t off)
{
    for (uint32_t i = 0; i < sizeof(hot->notify) && off + i < hot->size && hot->read_kind[off + i] == VPCI_READ_NOTIFY; i++)
        hot->image[off + i] = (uint8_t)(hot->notify >> 8 * i);
}

static void install_row(struct hot *hot, const vpci_hot_row *row)
{
    for (uint32_t i = 0; i < row->width && i < sizeof(row->value) && row->offset + i < hot->size; i++) {
        uint32_t at = row->offset + i;
        hot->image[at] = (uint8_t)(row->value >> 8 * i);
        hot->read_kind[at] = (uint8_t)row->read;
        hot->kick_width[at] = row->write == VPCI_WRITE_KICK && !i ? (uint8_t)row->width : 0;
    }
    if (row->read == VPCI_READ_NOTIFY)
        show_notify(hot, row->offset);
}

void hot_install(struct hot *hot, const vpci_hot_row *rows, uint32_t n_rows)
{
    for (uint32_t i = 0; i < n_rows; i++)
        install_row(hot, &rows[i]);
}

bool hot_covers_isr(const struct hot *hot, uint32_t off, uint32_t len)
{
    return memchr(hot->read_kind + off, VPCI_READ_ISR, len);
}

void hot_read(const struct hot *hot, uint32_t off, uint32_t len, uint32_t isr, uint8_t *out)
{
    memcpy(out, hot->image + off, len);
    for (uint32_t i = 0; i < len; i++)
        if (hot->read_kind[off + i] == VPCI_READ_ISR)
            out[i] = (uint8_t)isr;
}

bool hot_is_kick(const struct hot *hot, uint32_t off, uint32_t len)
{
    return len && hot->kick_width[off] == len;   /* an empty access may lie just behind the BAR */
}

bool hot_kick_place(const struct hot *hot, uint32_t *off, uint32_t *width)
{
    for (*off = 0; *off < hot->size; ++*off)
        if ((*width = hot->kick_width[*off]))
            return true;
    return false;
}

void hot_set_notify(struct hot *hot, uint16_t value)
{
    hot->notify = value;
    for (uint32_t i = 0; i < hot->size; i++)
        if (hot->read_kind[i] == VPCI_READ_NOTIFY && (!i || hot->read_kind[i - 1] != VPCI_READ_NOTIFY))
            show_notify(hot, i);
}
