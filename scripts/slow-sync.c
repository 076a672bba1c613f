/*
 * A disk whose syncs take as long as SLOW_SYNC_MS says: loaded before a program (LD_PRELOAD), it waits
 * that long before every fsync and fdatasync, and then does it. For benchmarks: the machines that
 * tests run on often have disks that forget, or that are faster than those in production.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <time.h>

typedef int (*sync_function)(int);

static void wait_as_told(void) {
    const char *told = getenv("SLOW_SYNC_MS");
    long ms = told ? strtol(told, NULL, 10) : 3;
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&left, &left) == -1 && errno == EINTR) {
    }
}

int fsync(int fd) {
    sync_function real = (sync_function)dlsym(RTLD_NEXT, "fsync");
    wait_as_told();
    return real(fd);
}

int fdatasync(int fd) {
    sync_function real = (sync_function)dlsym(RTLD_NEXT, "fdatasync");
    wait_as_told();
    return real(fd);
}
