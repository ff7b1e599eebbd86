/* A disk that fails: the K-th call that changes files below a folder gets an error.

Or the process group is killed there, in the middle of what it writes. Preloaded into a process
(LD_PRELOAD), so that Python's writes and those of libraries (TensorStore, Arrow) are the same to it.
faulty_disk.py builds it and sets it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PASSES, FAILS, ENDS };
#define KILL 0 /* as an error: no error, but SIGKILL */

static char root[PATH_MAX];
static long unshared, *calls = &unshared, first, last;
static int number;

/* FAULTY_DISK_SET: lines of folder, first and last call (from 1) that fail, errno, and the file in
   which this process and those that it starts count their calls together. "": nothing fails. */
__attribute__((constructor)) void faulty_disk_read(void) {
  const char *setting = getenv("FAULTY_DISK_SET");
  char folder[PATH_MAX], counter[PATH_MAX];
  root[0] = 0;
  if (!setting) return;
  if (sscanf(setting, "%4095[^\n]\n%ld\n%ld\n%d\n%4095[^\n]", folder, &first, &last, &number,
             counter) != 5)
    return;
  int file = open(counter, O_RDWR);
  if (file < 0) return;
  void *shared = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (shared == MAP_FAILED) return;
  calls = shared;
  strcpy(root, folder);
}

static void end(void) {
  kill(0, SIGKILL);
  for (;;) pause();
}

static int verdict(const char *path) {
  if (!root[0] || strncmp(path, root, strlen(root)) != 0) return PASSES;
  long call = __atomic_add_fetch(calls, 1, __ATOMIC_SEQ_CST);
  if (call < first || call > last) return PASSES;
  errno = number;
  return number == KILL ? ENDS : FAILS;
}

/* What changes a name is killed before it does. */
static int fails(const char *path) {
  int what = verdict(path);
  if (what == ENDS) end();
  return what;
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

static int verdict_file(int file) {
  char link[64], path[PATH_MAX];
  if (!root[0]) return PASSES;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  int before = errno;
  ssize_t size = readlink(link, path, sizeof path - 1);
  errno = before;
  if (size < 0) return PASSES;
  path[size] = 0;
  return verdict(path);
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

/* What writes is killed when half of it is written; `half` are the arguments for that. */
#define FILE_CALL(type, name, parameters, arguments, half) \
  type name parameters {                                   \
    int what = verdict_file(file);                         \
    if (what == ENDS) {                                    \
      (void)!(half);                                       \
      end();                                               \
    }                                                      \
    return what == FAILS ? -1 : REAL(name) arguments;      \
  }

FILE_CALL(ssize_t, write, (int file, const void *data, size_t size), (file, data, size),
          REAL(write)(file, data, size / 2))
FILE_CALL(ssize_t, writev, (int file, const struct iovec *data, int count), (file, data, count),
          REAL(writev)(file, data, count / 2))
FILE_CALL(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at),
          (file, data, size, at), REAL(pwrite)(file, data, size / 2, at))
FILE_CALL(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at),
          (file, data, size, at), REAL(pwrite64)(file, data, size / 2, at))
FILE_CALL(ssize_t, sendfile, (int file, int from, off_t *at, size_t size), (file, from, at, size),
          REAL(sendfile)(file, from, at, size / 2))
FILE_CALL(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t size),
          (file, from, at, size), REAL(sendfile64)(file, from, at, size / 2))
FILE_CALL(int, fsync, (int file), (file), 0)
FILE_CALL(int, fdatasync, (int file), (file), 0)
FILE_CALL(int, ftruncate, (int file, off_t size), (file, size), 0)
FILE_CALL(int, ftruncate64, (int file, off64_t size), (file, size), 0)

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

/* What C libraries write through a FILE is not seen, only that they open it. */
#define FILE_OPENED(name)                                                                    \
  FILE *name(const char *path, const char *mode) {                                           \
    return strpbrk(mode, "wa+") && fails_at(AT_FDCWD, path) ? NULL : REAL(name)(path, mode); \
  }

FILE_OPENED(fopen)
FILE_OPENED(fopen64)
