/*
 * What a restored machine is given together with its identity: addresses, and lines of files.
 *
 * Here and now, like the identity (machine.c). Whatever is not as it mostly is (a card without its
 * driver, a file that can't be written to, or is none) is left to the host, which then asks for each
 * thing by itself, and is told what is wrong.
 */
#include "agent.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_MAX = 65536 };

struct text {
    char *at;
    size_t length;
};

static struct text first_line(struct text block)
{
    char *newline = memchr(block.at, '\n', block.length);
    return (struct text){block.at, newline ? (size_t)(newline - block.at) + 1 : block.length};
}

static struct text last_line(struct text block)
{
    char *newline = block.length ? memrchr(block.at, '\n', block.length - 1) : NULL;
    size_t start = newline ? (size_t)(newline - block.at) + 1 : 0;
    return (struct text){block.at + start, block.length - start};
}

/* Where `part` begins in `whole`, or where `whole` ends. */
static size_t find(struct text whole, struct text part)
{
    char *found = memmem(whole.at, whole.length, part.at, part.length);
    return found ? (size_t)(found - whole.at) : whole.length;
}

/* Where what stands behind the former block begins; the end, where that block has none. */
static size_t end_of_former(struct text there, size_t start, struct text block)
{
    struct text end = last_line(block), rest = {there.at + start, there.length - start};
    size_t at = start + find(rest, end);
    return at < there.length ? at + end.length : at;
}

static bool write_from(int fd, size_t start, struct text text, struct stat *before)
{
    size_t length = start + text.length;
    return pwrite(fd, text.at, text.length, (off_t)start) == (ssize_t)text.length &&
           ((size_t)before->st_size <= length || ftruncate(fd, (off_t)length) == 0) &&
           ((before->st_mode & 07777) == 0644 || fchmod(fd, 0644) == 0);
}

/* In one write, from the first byte that changes: no reader ever finds it empty. */
static bool put_block(int fd, struct text block, struct stat *before)
{
    static char old[FILE_MAX], new[2 * FILE_MAX];
    struct text there = {old, (size_t)before->st_size};
    if (pread(fd, old, there.length, 0) != (ssize_t)there.length)
        return false;
    size_t start = find(there, first_line(block)), length = 0;
    size_t rest = end_of_former(there, start, block);
    if (start == there.length && start > 0 && old[start - 1] != '\n')
        new[length++] = '\n';
    memcpy(new + length, block.at, block.length);
    length += block.length;
    memcpy(new + length, old + rest, there.length - rest);
    return write_from(fd, start, (struct text){new, length + there.length - rest}, before);
}

static bool put_lines(const char *path, struct text lines, bool are_all)
{
    struct stat before;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0644);
    bool usual = fd >= 0 && fstat(fd, &before) == 0 && S_ISREG(before.st_mode) && before.st_size <= FILE_MAX &&
                 lines.length > 0 && lines.length < FILE_MAX;
    bool done = usual && (are_all ? write_from(fd, 0, lines, &before) : put_block(fd, lines, &before));
    if (fd >= 0)
        close(fd);
    return done;
}

/*
 * u8 count, then as often a text, which names a card, and what machine_set_addresses() reads; u8 count,
 * then as often u8 whether they are all, texts path and lines. False where it can't have all of it.
 */
bool machine_furnish(struct reader *r)
{
    for (uint8_t left = read_u8(r); left > 0 && !r->bad; left--) {
        const char *card = read_string(r);
        if (r->bad || machine_set_addresses(card, r, false).error)
            return false;
    }
    for (uint8_t left = read_u8(r); left > 0 && !r->bad; left--) {
        bool are_all = read_u8(r);
        const char *path = read_string(r);
        struct text lines = {.at = read_string(r)};
        lines.length = r->bad ? 0 : strlen(lines.at);
        if (r->bad || !put_lines(path, lines, are_all))
            return false;
    }
    return !r->bad && r->at == r->end;
}
