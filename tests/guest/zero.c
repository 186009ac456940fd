/* zero DEVICE OFFSET LENGTH keep|free: what `blkdiscard -z` and a hole punched into a block device ask the kernel for;
 * the guest's busybox has neither. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int fd = open(argv[1], O_RDWR | O_DIRECT);
    uint64_t range[] = {strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0)};
    int rc = strcmp(argv[4], "free") ? ioctl(fd, BLKZEROOUT, range)
                                     : fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range[0], range[1]);
    if (rc < 0)
        perror(argv[1]);
    return rc < 0;
}
