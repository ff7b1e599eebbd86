/* A disk that fails: the K-th call that changes files below a folder gets an error.

Preloaded into a process (LD_PRELOAD), so that Python's writes and those of libraries (TensorStore,
Arrow) are the same to it. faulty_disk.py builds it and sets it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long calls, first, last;
static int number;

/* Calls [from, to] from now on, counted from 1, fail with an errno. */
void faulty_disk_set(const char *folder, long from, long to, int error) {
  strncpy(root, folder, sizeof root - 1);
  first = from, last = to, number = error;
  __atomic_store_n(&calls, 0, __ATOMIC_SEQ_CST);
}

long faulty_disk_calls(void) { return __atomic_load_n(&calls, __ATOMIC_SEQ_CST); }

static int fails(const char *path) {
  if (!root[0] || strncmp(path, root, strlen(root)) != 0) return 0;
  long call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
  if (call < first || call > last) return 0;
  errno = number;
  return 1;
}

static int fails_at(int folder, const char *path) {
  char link[64], whole[2 * PATH_MAX];
  if (!root[0] || !path) return 0;
  if (path[0] == '/') return fails(path);
  snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
  ssize_t size = readlink(link, whole, PATH_MAX - 1);
  if (size < 0) return 0;
  snprintf(whole + size, PATH_MAX, "/%s", path);
  return fails(whole);
}

static int fails_file(int file) {
  char link[64], path[PATH_MAX];
  if (!root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  int before = errno;
  ssize_t size = readlink(link, path, sizeof path - 1);
  errno = before;
  if (size < 0) return 0;
  path[size] = 0;
  return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)
#define OPENED(name, folder, path, ...)                                                         \
  int mode = 0;                                                                                 \
  if (flags & (O_CREAT | O_TMPFILE)) {                                                          \
    va_list more;                                                                               \
    va_start(more, flags);                                                                      \
    mode = va_arg(more, int);                                                                   \
    va_end(more);                                                                               \
  }                                                                                             \
  return (flags & WRITES) && fails_at(folder, path) ? -1 : REAL(name)(__VA_ARGS__, flags, mode);

int open(const char *path, int flags, ...) { OPENED(open, AT_FDCWD, path, path) }
int open64(const char *path, int flags, ...) { OPENED(open64, AT_FDCWD, path, path) }
int openat(int folder, const char *path, int flags, ...) { OPENED(openat, folder, path, folder, path) }
int openat64(int folder, const char *path, int flags, ...) {
  OPENED(openat64, folder, path, folder, path)
}

#define FILE_CALL(type, name, parameters, arguments) \
  type name parameters { return fails_file(file) ? -1 : REAL(name) arguments; }

FILE_CALL(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
FILE_CALL(ssize_t, writev, (int file, const struct iovec *data, int count), (file, data, count))
FILE_CALL(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at),
          (file, data, size, at))
FILE_CALL(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at),
          (file, data, size, at))
FILE_CALL(int, fsync, (int file), (file))
FILE_CALL(int, fdatasync, (int file), (file))
FILE_CALL(int, ftruncate, (int file, off_t size), (file, size))
FILE_CALL(int, ftruncate64, (int file, off64_t size), (file, size))

#define PATH_CALL(name, folder, path, parameters, arguments) \
  int name parameters { return fails_at(folder, path) ? -1 : REAL(name) arguments; }

PATH_CALL(mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
PATH_CALL(mkdirat, folder, path, (int folder, const char *path, mode_t mode), (folder, path, mode))
PATH_CALL(unlink, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(unlinkat, folder, path, (int folder, const char *path, int flags), (folder, path, flags))
PATH_CALL(rmdir, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PATH_CALL(renameat, folder, to, (int other, const char *from, int folder, const char *to),
          (other, from, folder, to))
PATH_CALL(link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PATH_CALL(linkat, folder, to, (int other, const char *from, int folder, const char *to, int flags),
          (other, from, folder, to, flags))
