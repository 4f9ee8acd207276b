/* Preloaded below the program: the n-th call of one function fails with one errno, on our temporary files and on
 * directories. What is to fail stands in the file that HORNBEAM_FAULT names: "<function> <n> <errno>"; n counts from
 * when the file was written; 0 fails every call. Read again at each call, so that a test can change it. The numbers of
 * the inodes that reached stable storage go to the file that HORNBEAM_SYNCED names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char current[128];
static long calls;

static int fails(const char *function) {
    const char *name = getenv("HORNBEAM_FAULT");
    char text[128] = "", wanted[64];
    long n, number;
    int result = 0;
    if (!name) return 0;
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0 || sscanf(text, "%63s %ld %ld", wanted, &n, &number) < 3) return 0;
    pthread_mutex_lock(&mutex);
    if (strcmp(text, current)) {
        strcpy(current, text);
        calls = 0;
    }
    if (!strcmp(wanted, function) && (++calls == n || n == 0)) {
        result = (int)number;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

/* Whether a descriptor is one of our temporary files, or a directory. */
static int ours(int fd) {
    char link[64], path[4096];
    struct stat found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, ".hornbeam-tmp") != NULL || (!fstat(fd, &found) && S_ISDIR(found.st_mode));
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(name, condition) do { int e; if ((condition) && (e = fails(name))) { errno = e; return -1; } } while (0)

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t at) {
    FAIL("write", ours(fd));
    return REAL(pwrite64)(fd, bytes, n, at);
}
ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at) {
    FAIL("write", ours(fd));
    return REAL(pwrite)(fd, bytes, n, at);
}
ssize_t write(int fd, const void *bytes, size_t n) {
    FAIL("write", ours(fd));
    return REAL(write)(fd, bytes, n);
}
int fsync(int fd) {
    FAIL("fsync", ours(fd));
    int result = REAL(fsync)(fd);
    const char *name = getenv("HORNBEAM_SYNCED");
    struct stat found;
    int log = name && !result && !fstat(fd, &found) ? open(name, O_WRONLY | O_CREAT | O_APPEND, 0666) : -1;
    if (log >= 0) {
        dprintf(log, "%lu\n", (unsigned long)found.st_ino);
        close(log);
    }
    return result;
}
int ftruncate64(int fd, off64_t n) {
    FAIL("truncate", ours(fd));
    return REAL(ftruncate64)(fd, n);
}
int rename(const char *from, const char *to) {
    FAIL("rename", strstr(from, ".hornbeam-tmp"));
    return REAL(rename)(from, to);
}
int fchmod(int fd, mode_t mode) {
    FAIL("fchmod", ours(fd));
    return REAL(fchmod)(fd, mode);
}
int fchown(int fd, uid_t user, gid_t group) {
    FAIL("fchown", ours(fd));
    return REAL(fchown)(fd, user, group);
}
/* The first half is copied before it fails. A negative number is that of a signal, which the process sends itself then. */
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t n, unsigned flags) {
    struct stat found;
    if (ours(from) && !fstat(to, &found)) {
        off_t half = lseek(from, 0, SEEK_CUR) ? 0 : lseek(from, 0, SEEK_END) / 2;
        lseek(from, 0, half ? SEEK_SET : SEEK_CUR);
        int e = fails("copy");
        if (e < 0) {
            if (half) REAL(copy_file_range)(from, at, to, there, (size_t)half, flags);
            raise(-e);
        }
        if (e && half) return REAL(copy_file_range)(from, at, to, there, (size_t)half, flags);
        if (e) {
            errno = e;
            return -1;
        }
    }
    return REAL(copy_file_range)(from, at, to, there, n, flags);
}
int open64(const char *path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    FAIL("open", strstr(path, ".hornbeam-tmp") && (flags & O_CREAT));
    return REAL(open64)(path, flags, mode);
}
