/* SPDX-License-Identifier: MIT
 *
 * Preloaded into a process: kills it instead of its n-th system call that changes a file below a folder.
 *
 * It wraps functions of the C library, so calls count whoever makes them: Python's files, torch's writers, the threads
 * of a sharded checkpoint. Nothing on the disk changes between two such calls, so these are all the moments that
 * differ. fsync counts too, as the order of what comes before and after it matters.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long fatal_call, half_writes;
static int log_to = -1;
static atomic_long calls;

/* Kill at the n-th call below a folder (0: never); with `half`, a write is half done before. Calls are logged to a
 * descriptor.
 */
void arm(const char *folder, long n, long half, int descriptor) {
  strncpy(root, folder, sizeof root - 1);
  fatal_call = n;
  half_writes = half;
  log_to = descriptor;
  atomic_store(&calls, 0);
}

static int below(const char *path) {
  size_t length = strlen(root);
  return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* Count a call; returns whether it is the one to kill at. */
static int count(const char *name, const char *path) {
  if (!below(path)) return 0;
  char line[PATH_MAX + 64];
  long n = atomic_fetch_add(&calls, 1) + 1;
  if (log_to >= 0) syscall(SYS_write, log_to, line, snprintf(line, sizeof line, "%s %s\n", name, path + strlen(root)));
  return n == fatal_call;
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static const char *of_descriptor(int file, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
  return path;
}

static const char *at(int folder, const char *name, char *path) {
  if (name[0] == '/') return name;
  char start[PATH_MAX];
  if (folder == AT_FDCWD) {
    if (!getcwd(start, sizeof start)) return "";
  } else {
    of_descriptor(folder, start);
  }
  snprintf(path, PATH_MAX, "%.*s/%.*s", 2000, start, 2000, name);
  return path;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define AT(what, folder, name)                                    \
  do {                                                            \
    char path_[PATH_MAX];                                         \
    if (root[0] && count(what, at(folder, name, path_))) die();   \
  } while (0)
#define FD(what, file)                                            \
  do {                                                            \
    char path_[PATH_MAX];                                         \
    if (root[0] && count(what, of_descriptor(file, path_))) die(); \
  } while (0)

#define OPEN(name)                                                \
  int name(const char *path, int flags, ...) {                    \
    mode_t mode = 0;                                              \
    if (flags & (O_CREAT | __O_TMPFILE)) {                        \
      va_list more;                                               \
      va_start(more, flags);                                      \
      mode = va_arg(more, mode_t);                                \
      va_end(more);                                               \
    }                                                             \
    if (flags & (O_CREAT | O_TRUNC)) AT("open", AT_FDCWD, path);  \
    return NEXT(name)(path, flags, mode);                         \
  }
#define OPENAT(name)                                              \
  int name(int folder, const char *path, int flags, ...) {        \
    mode_t mode = 0;                                              \
    if (flags & (O_CREAT | __O_TMPFILE)) {                        \
      va_list more;                                               \
      va_start(more, flags);                                      \
      mode = va_arg(more, mode_t);                                \
      va_end(more);                                               \
    }                                                             \
    if (flags & (O_CREAT | O_TRUNC)) AT("open", folder, path);    \
    return NEXT(name)(folder, path, flags, mode);                 \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *mode) {
  if (mode[0] != 'r') AT("open", AT_FDCWD, path);
  return NEXT(fopen)(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
  if (mode[0] != 'r') AT("open", AT_FDCWD, path);
  return NEXT(fopen64)(path, mode);
}

ssize_t write(int file, const void *data, size_t size) {
  char path[PATH_MAX];
  if (root[0] && count("write", of_descriptor(file, path))) {
    if (half_writes) NEXT(write)(file, data, size / 2);
    die();
  }
  return NEXT(write)(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int number) {
  FD("write", file);
  return NEXT(writev)(file, parts, number);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
  FD("write", file);
  return NEXT(pwrite)(file, data, size, place);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
  FD("write", file);
  return NEXT(pwrite64)(file, data, size, place);
}

ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
  FD("write", to);
  return NEXT(copy_file_range)(from, a, to, b, size, flags);
}

ssize_t sendfile64(int to, int from, off64_t *place, size_t size) {
  ssize_t (*next)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
  FD("write", to);
  return next(to, from, place, size);
}

ssize_t sendfile(int to, int from, off_t *place, size_t size) {
  ssize_t (*next)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
  FD("write", to);
  return next(to, from, place, size);
}

#define ONE_FILE(name, ...)                                       \
  int name(int file) {                                            \
    FD(#name, file);                                              \
    return NEXT(name)(file);                                      \
  }
ONE_FILE(fsync)
ONE_FILE(fdatasync)

int ftruncate(int file, off_t size) {
  FD("truncate", file);
  return NEXT(ftruncate)(file, size);
}

int ftruncate64(int file, off64_t size) {
  FD("truncate", file);
  return NEXT(ftruncate64)(file, size);
}

int truncate(const char *path, off_t size) {
  AT("truncate", AT_FDCWD, path);
  return NEXT(truncate)(path, size);
}

int truncate64(const char *path, off64_t size) {
  AT("truncate", AT_FDCWD, path);
  return NEXT(truncate64)(path, size);
}

int rename(const char *from, const char *to) {
  AT("rename", AT_FDCWD, to);
  return NEXT(rename)(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
  AT("rename", b, to);
  return NEXT(renameat)(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  AT("rename", b, to);
  return NEXT(renameat2)(a, from, b, to, flags);
}

#define ONE_PATH(name)                                            \
  int name(const char *path) {                                    \
    AT(#name, AT_FDCWD, path);                                    \
    return NEXT(name)(path);                                      \
  }
ONE_PATH(unlink)
ONE_PATH(rmdir)
ONE_PATH(remove)

int unlinkat(int folder, const char *path, int flags) {
  AT("unlink", folder, path);
  return NEXT(unlinkat)(folder, path, flags);
}

int mkdir(const char *path, mode_t mode) {
  AT("mkdir", AT_FDCWD, path);
  return NEXT(mkdir)(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
  AT("mkdir", folder, path);
  return NEXT(mkdirat)(folder, path, mode);
}

int chmod(const char *path, mode_t mode) {
  AT("chmod", AT_FDCWD, path);
  return NEXT(chmod)(path, mode);
}

int fchmod(int file, mode_t mode) {
  FD("chmod", file);
  return NEXT(fchmod)(file, mode);
}

int fchmodat(int folder, const char *path, mode_t mode, int flags) {
  AT("chmod", folder, path);
  return NEXT(fchmodat)(folder, path, mode, flags);
}

int link(const char *from, const char *to) {
  AT("link", AT_FDCWD, to);
  return NEXT(link)(from, to);
}

int symlink(const char *target, const char *path) {
  AT("link", AT_FDCWD, path);
  return NEXT(symlink)(target, path);
}
