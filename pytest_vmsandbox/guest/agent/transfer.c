/*
 * Files and trees, in a child that may block: stdin and stdout are streams of the host, and the reason
 * of a failure goes to stderr as a record (u32 errno, then the path).
 *
 * A tree is a sequence of records, depth first: D opens a directory, U leaves it, F is a file with its
 * content in chunks, L a symbolic link, E the end. A name is one component, so that no record can
 * reach outside; the root's name is empty. See docs/protocol.md.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 65532, DEPTH_MAX = 256, RECORD_SIZE = 20, NAME_MAX_BYTES = 255, IN_PLACE_MAX = 1024 * 1024 };

static unsigned char buffer[4 + CHUNK];

/* What is to be removed if we fail: one name in one directory. */
static struct {
    int dir_fd;
    char name[NAME_MAX + 1];
    bool pending;
} half_made;

static void remove_tree(int dir_fd, const char *name, int depth)
{
    if (unlinkat(dir_fd, name, 0) == 0 || depth > DEPTH_MAX)
        return;
    int fd = openat(dir_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir)
        return;
    fchmod(fd, 0700);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            remove_tree(fd, entry->d_name, depth + 1);
    closedir(dir);
    unlinkat(dir_fd, name, AT_REMOVEDIR);
}

_Noreturn void transfer_fail(int error, const char *path)
{
    unsigned char report[4 + PATH_MAX];
    size_t length = strnlen(path, PATH_MAX);
    if (half_made.pending)
        remove_tree(half_made.dir_fd, half_made.name, 0);
    put_u32(report, (uint32_t)error);
    memcpy(report + 4, path, length);
    (void)!write(2, report, 4 + length);
    _exit(1);
}

void write_all(int fd, const void *data, size_t length, const char *path)
{
    for (const unsigned char *at = data; length > 0;) {
        ssize_t count = write(fd, at, length);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            transfer_fail(count < 0 ? errno : EIO, path);
        at += count;
        length -= (size_t)count;
    }
}

static size_t read_most(int fd, void *data, size_t length, const char *path)
{
    size_t done = 0;
    while (done < length) {
        ssize_t count = read(fd, (unsigned char *)data + done, length - done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            transfer_fail(errno, path);
        if (count == 0)
            break;
        done += (size_t)count;
    }
    return done;
}

/* The host's stream must go on: if it ends here, the host has given up. */
static void need(void *data, size_t length, const char *path)
{
    if (read_most(0, data, length, path) < length)
        transfer_fail(ECANCELED, path);
}

/* ---- get ---- */

static void get(const char *path, uint64_t offset, uint64_t limit)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    struct stat seen;
    if (fd < 0 || fstat(fd, &seen) < 0)
        transfer_fail(errno, path);
    if (S_ISDIR(seen.st_mode))
        transfer_fail(EISDIR, path);
    if (offset > 0 && lseek(fd, (off_t)offset, SEEK_SET) < 0)
        transfer_fail(errno, path);
    while (limit > 0) {
        size_t wanted = limit < CHUNK ? (size_t)limit : CHUNK;
        ssize_t count = read(fd, buffer, wanted);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            transfer_fail(errno, path);
        if (count == 0)
            return;
        write_all(1, buffer, (size_t)count, "the host's stream");
        limit -= (uint64_t)count;
    }
}

/* ---- put ---- */

static int open_parent(const char *path, char *name)
{
    const char *slash = strrchr(path, '/');
    const char *last = slash ? slash + 1 : path;
    char parent[PATH_MAX];
    if (!*last || strcmp(last, ".") == 0 || strcmp(last, "..") == 0)
        transfer_fail(EISDIR, path);
    if (strlen(path) >= sizeof parent || strlen(last) > NAME_MAX)
        transfer_fail(ENAMETOOLONG, path);
    snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - path) + 1 : 2, slash ? path : "./");
    strcpy(name, last);
    int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        transfer_fail(errno, path);
    return fd;
}

/* A name beside the final one that nobody else uses; it is removed if we fail. */
static void plan_half_made(int dir_fd, const char *name)
{
    half_made.dir_fd = dir_fd;
    snprintf(half_made.name, sizeof half_made.name, ".%.200s.vmsandbox-%d", name, (int)getpid());
}

static bool put_into_place(const char *name)
{
    half_made.pending = renameat(half_made.dir_fd, half_made.name, half_made.dir_fd, name) < 0;
    return !half_made.pending;
}

static void give_owner(int fd, const char *owner, const char *path)
{
    uid_t uid;
    gid_t gid, named_gid;
    char user[256], home[PATH_MAX], name[256];
    const char *colon = strchrnul(owner, ':');
    snprintf(user, sizeof user, "%.*s", (int)(colon - owner), owner);
    int error = find_user(user, &uid, &gid, home, sizeof home, name, sizeof name);
    if (!error && *colon)
        error = find_group(colon + 1, &named_gid);
    if (error)
        transfer_fail(error, owner);
    if (fchown(fd, uid, *colon ? named_gid : gid) < 0)
        transfer_fail(errno, path);
}

/* Files that are doors to something else (devices, /proc, /sys, a directory that we may not write to)
 * can't be replaced, only written to; small contents in one write(2), as sysfs wants it. */
static void put_in_place(const char *path, uint64_t size)
{
    unsigned char *whole = size <= IN_PLACE_MAX ? malloc((size_t)size + 1) : NULL;
    if (whole)
        need(whole, (size_t)size, path);
    int fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        transfer_fail(errno, path);
    if (whole) {
        write_all(fd, whole, (size_t)size, path);
        size = 0;
    }
    for (size_t part; size > 0; size -= part) {
        part = size < CHUNK ? (size_t)size : CHUNK;
        need(buffer, part, path);
        write_all(fd, buffer, part, path);
    }
    if (close(fd) < 0)
        transfer_fail(errno, path);
}

/* Nor can a file that something is mounted on: what was made beside it is copied there. */
static void copy_in_place(const char *owner, mode_t mode, const char *path)
{
    int from = openat(half_made.dir_fd, half_made.name, O_RDONLY | O_CLOEXEC);
    int to = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
    if (from < 0 || to < 0)
        transfer_fail(errno, path);
    for (size_t count; (count = read_most(from, buffer, CHUNK, path)) > 0;)
        write_all(to, buffer, count, path);
    if (*owner)
        give_owner(to, owner, path);
    if (fchmod(to, mode) < 0 || close(to) < 0)
        transfer_fail(errno, path);
    close(from);
    unlinkat(half_made.dir_fd, half_made.name, 0);
    half_made.pending = false;
}

enum { MODE_KEEP = 0xFFFFFFFF };

static void put(const char *asked, uint64_t size, uint32_t mode, const char *owner)
{
    static char resolved[PATH_MAX];
    char name[NAME_MAX + 1];
    struct stat seen;
    const char *path = realpath(asked, resolved) ? resolved : asked; /* a link's target is what is written */
    bool exists = stat(path, &seen) == 0;
    if (exists && S_ISDIR(seen.st_mode))
        transfer_fail(EISDIR, asked);
    if (exists && !S_ISREG(seen.st_mode)) {
        put_in_place(path, size);
        return;
    }
    plan_half_made(open_parent(path, name), name);
    int fd = openat(half_made.dir_fd, half_made.name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 && exists && errno != ENOSPC && errno != EDQUOT && errno != EROFS) {
        put_in_place(path, size);
        return;
    }
    if (fd < 0)
        transfer_fail(errno, asked);
    half_made.pending = true;
    for (size_t part; size > 0; size -= part) {
        part = size < CHUNK ? (size_t)size : CHUNK;
        need(buffer, part, asked);
        write_all(fd, buffer, part, asked);
    }
    if (exists)
        (void)!fchown(fd, seen.st_uid, seen.st_gid); /* as far as we may */
    if (*owner)
        give_owner(fd, owner, asked);
    mode_t final = (mode != MODE_KEEP ? (mode_t)mode : exists ? seen.st_mode : 0644) & 07777;
    if (fchmod(fd, final) < 0 || close(fd) < 0)
        transfer_fail(errno, asked);
    if (!put_into_place(name) && errno == EBUSY && exists)
        copy_in_place(owner, final, path);
    else if (half_made.pending)
        transfer_fail(errno, asked);
}

/* ---- tree get ---- */

static void send_record(char kind, const char *name, const struct stat *seen, const char *link)
{
    size_t name_length = strlen(name), link_length = strlen(link);
    unsigned char record[RECORD_SIZE + NAME_MAX_BYTES + PATH_MAX];
    int64_t mtime_ns = (int64_t)seen->st_mtim.tv_sec * 1000000000 + seen->st_mtim.tv_nsec;
    record[0] = (unsigned char)kind;
    record[1] = (unsigned char)name_length;
    record[2] = (unsigned char)link_length;
    record[3] = (unsigned char)(link_length >> 8);
    put_u32(record + 4, seen->st_mode & 07777);
    put_u32(record + 8, (uint32_t)mtime_ns);
    put_u32(record + 12, (uint32_t)(mtime_ns >> 32));
    put_u32(record + 16, 0);
    memcpy(record + RECORD_SIZE, name, name_length);
    memcpy(record + RECORD_SIZE + name_length, link, link_length);
    write_all(1, record, RECORD_SIZE + name_length + link_length, "the host's stream");
}

static void send_content(int fd, const char *name)
{
    for (;;) {
        size_t count = read_most(fd, buffer + 4, CHUNK, name);
        put_u32(buffer, (uint32_t)count);
        write_all(1, buffer, 4 + count, "the host's stream");
        if (count == 0)
            return;
    }
}

static void send_entry(int dir_fd, const char *path, const char *name, int depth);

static void send_directory(int fd, int depth)
{
    DIR *dir = fdopendir(fd);
    if (!dir)
        transfer_fail(errno, "fdopendir");
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            send_entry(fd, entry->d_name, entry->d_name, depth + 1);
    closedir(dir);
}

static void send_entry(int dir_fd, const char *path, const char *name, int depth)
{
    static const struct stat nothing;
    struct stat seen;
    char link[PATH_MAX] = "";
    if (depth > DEPTH_MAX)
        transfer_fail(ELOOP, path);
    if (fstatat(dir_fd, path, &seen, AT_SYMLINK_NOFOLLOW) < 0)
        transfer_fail(errno, path);
    if (S_ISLNK(seen.st_mode)) {
        ssize_t length = readlinkat(dir_fd, path, link, sizeof link - 1);
        if (length < 0)
            transfer_fail(errno, path);
        link[length] = 0;
        send_record('L', name, &seen, link);
        return;
    }
    if (!S_ISDIR(seen.st_mode) && !S_ISREG(seen.st_mode))
        transfer_fail(EOPNOTSUPP, path); /* a device, a socket: no copy of it would be one */
    int fd = openat(dir_fd, path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        transfer_fail(errno, path);
    if (S_ISREG(seen.st_mode)) {
        send_record('F', name, &seen, "");
        send_content(fd, path);
        close(fd);
        return;
    }
    send_record('D', name, &seen, "");
    send_directory(fd, depth);
    send_record('U', "", &nothing, "");
}

static void tree_get(const char *path)
{
    static const struct stat nothing;
    send_entry(AT_FDCWD, path, "", 0);
    send_record('E', "", &nothing, "");
}

/* ---- tree put ---- */

struct record {
    char kind;
    uint32_t mode;
    struct timespec times[2];
    char name[NAME_MAX_BYTES + 1];
    char link[PATH_MAX];
};

static void receive_record(struct record *record)
{
    unsigned char head[RECORD_SIZE];
    need(head, sizeof head, "tree");
    size_t name_length = head[1], link_length = (size_t)(head[2] | head[3] << 8);
    int64_t mtime_ns = (int64_t)((uint64_t)get_u32(head + 8) | (uint64_t)get_u32(head + 12) << 32);
    if (link_length >= PATH_MAX)
        transfer_fail(ENAMETOOLONG, "tree");
    record->kind = (char)head[0];
    record->mode = get_u32(head + 4) & 07777;
    record->times[0] = (struct timespec){.tv_nsec = UTIME_OMIT};
    record->times[1].tv_sec = (time_t)(mtime_ns / 1000000000);
    record->times[1].tv_nsec = (long)(mtime_ns % 1000000000);
    if (record->times[1].tv_nsec < 0) {
        record->times[1].tv_nsec += 1000000000;
        record->times[1].tv_sec--;
    }
    need(record->name, name_length, "tree");
    record->name[name_length] = 0;
    need(record->link, link_length, "tree");
    record->link[link_length] = 0;
    if (strchr(record->name, '/') || strcmp(record->name, ".") == 0 || strcmp(record->name, "..") == 0)
        transfer_fail(EINVAL, record->name);
}

static void receive_content(int fd, const char *name)
{
    unsigned char head[4];
    for (;;) {
        need(head, sizeof head, name);
        uint32_t length = get_u32(head);
        if (length > CHUNK)
            transfer_fail(EINVAL, name);
        if (length == 0)
            return;
        need(buffer, length, name);
        write_all(fd, buffer, length, name);
    }
}

static void receive_file(int dir_fd, const struct record *record, const char *name)
{
    int fd = openat(dir_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 && errno == EEXIST && unlinkat(dir_fd, name, 0) == 0)
        fd = openat(dir_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        transfer_fail(errno, name);
    receive_content(fd, name);
    if (fchmod(fd, record->mode) < 0 || futimens(fd, record->times) < 0 || close(fd) < 0)
        transfer_fail(errno, name);
}

static void receive_link(int dir_fd, const struct record *record, const char *name)
{
    int failed = symlinkat(record->link, dir_fd, name);
    if (failed && errno == EEXIST && unlinkat(dir_fd, name, 0) == 0)
        failed = symlinkat(record->link, dir_fd, name);
    if (failed || utimensat(dir_fd, name, record->times, AT_SYMLINK_NOFOLLOW) < 0)
        transfer_fail(errno, name);
}

static int enter_directory(int dir_fd, const char *name)
{
    if (mkdirat(dir_fd, name, 0700) < 0 && errno != EEXIST)
        transfer_fail(errno, name);
    int fd = openat(dir_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        transfer_fail(errno, name);
    return fd;
}

static void receive_entry(int dir_fd, const struct record *record, const char *name, int depth)
{
    if (record->kind == 'F') {
        receive_file(dir_fd, record, name);
        return;
    }
    if (record->kind == 'L') {
        receive_link(dir_fd, record, name);
        return;
    }
    if (record->kind != 'D' || depth > DEPTH_MAX)
        transfer_fail(record->kind == 'D' ? ELOOP : EINVAL, name);
    int fd = enter_directory(dir_fd, name);
    struct record *inner = malloc(sizeof *inner); /* not on the stack: it holds a path, and depth is 256 */
    if (!inner)
        transfer_fail(ENOMEM, name);
    for (receive_record(inner); inner->kind != 'U'; receive_record(inner)) {
        if (!*inner->name)
            transfer_fail(EINVAL, name);
        receive_entry(fd, inner, inner->name, depth + 1);
    }
    free(inner);
    if (fchmod(fd, record->mode) < 0 || futimens(fd, record->times) < 0)
        transfer_fail(errno, name);
    close(fd);
}

/* A new name appears whole or not at all; into a directory that is there, the tree is merged. */
static void tree_put(const char *path)
{
    static struct record root, end;
    char name[NAME_MAX + 1];
    struct stat seen;
    int parent = open_parent(path, name);
    receive_record(&root);
    bool exists = fstatat(parent, name, &seen, AT_SYMLINK_NOFOLLOW) == 0;
    if (exists && S_ISDIR(seen.st_mode) != (root.kind == 'D'))
        transfer_fail(root.kind == 'D' ? ENOTDIR : EISDIR, path);
    bool merging = exists && root.kind == 'D';
    if (!merging) {
        plan_half_made(parent, name);
        half_made.pending = true;
    }
    receive_entry(parent, &root, merging ? name : half_made.name, 0);
    receive_record(&end);
    if (end.kind != 'E')
        transfer_fail(EINVAL, path);
    if (!merging && !put_into_place(name))
        transfer_fail(errno, path);
}

static void set_addresses(const char *interface, struct reader *r)
{
    struct refusal refused = machine_set_addresses(interface, r, true);
    if (refused.error)
        transfer_fail(refused.error, refused.what);
}

/* ---- */

_Noreturn void transfer_run(unsigned char *request, size_t length)
{
    struct reader r = reader_of(request, length);
    uint8_t kind = read_u8(&r);
    char *path = read_string(&r);
    uint64_t offset_or_size = read_u64(&r), limit = read_u64(&r);
    uint32_t mode = read_u32(&r);
    char *owner = read_string(&r);
    if (r.bad)
        transfer_fail(EINVAL, "transfer");
    umask(022);
    switch (kind) {
    case TRANSFER_GET:
        get(path, offset_or_size, limit);
        break;
    case TRANSFER_PUT:
        put(path, offset_or_size, mode, owner);
        break;
    case TRANSFER_TREE_GET:
        tree_get(path);
        break;
    case TRANSFER_TREE_PUT:
        tree_put(path);
        break;
    case TRANSFER_SYNC:
        sync();
        break;
    case TRANSFER_ADDRESSES:
        set_addresses(path, &r);
        break;
    default:
        transfer_fail(ENOSYS, "transfer");
    }
    _exit(0);
}
