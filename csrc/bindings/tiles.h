// Linux gives a process the tile registers of AMX when it asks for them. The tests, which emulate
// them, define this as true.
#pragma once

#ifndef MAY_USE_TILES
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
// ARCH_REQ_XCOMP_PERM, for XFEATURE_XTILEDATA
#define MAY_USE_TILES (syscall(SYS_arch_prctl, 0x1023, 18) == 0)
#else
#define MAY_USE_TILES false
#endif
#endif
