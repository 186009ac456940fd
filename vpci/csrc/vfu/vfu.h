/* What the C files of vpci._vfu share: libvfio-user's own header, and the border that cffi reads too. */
#ifndef VPCI_VFU_H
#define VPCI_VFU_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include <vfio-user/libvfio-user.h>

#include "pyvfio_user.h"
#include "transport.h"

#endif
